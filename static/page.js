// The page works without this file. With it, the answer follows what is typed, and the address follows the answer.
"use strict";
(() => {
  const form = document.getElementById("job");
  const result = document.getElementById("result");
  const announce = document.getElementById("announce");
  const WAIT = 350;
  let timer, controller;

  const filled = () => [...new FormData(form)].filter(([, value]) => value.trim());

  async function plan() {
    clearTimeout(timer);
    controller?.abort();
    const mine = (controller = new AbortController());
    const pairs = filled();
    const posted = pairs.some(([name]) => name === "config");
    const query = new URLSearchParams(pairs).toString();
    result.setAttribute("aria-busy", "true");
    try {
      const response = posted
        ? await fetch("/result", { method: "POST", body: new URLSearchParams(pairs), signal: mine.signal })
        : await fetch(`/result?${query}`, { signal: mine.signal });
      const text = await response.text();
      if (mine !== controller) return;
      result.innerHTML = text;
      if (!posted) history.replaceState(null, "", `/?${query}`);
      told();
    } catch (error) {
      if (error.name !== "AbortError") announce.textContent = "The server does not answer.";
    } finally {
      if (mine === controller) result.removeAttribute("aria-busy");
    }
  }

  // What a new answer means for the rest of the page: the title, the fields, the timeline.
  function told() {
    const verdict = result.querySelector("h1")?.textContent ?? "";
    announce.textContent = verdict;
    document.title = `${verdict} · vramplan`;
    for (const field of form.querySelectorAll(".wrong")) {
      field.classList.remove("wrong");
      field.querySelector(".error").textContent = "";
      field.querySelector("[aria-invalid]")?.removeAttribute("aria-invalid");
    }
    const problem = result.querySelector("[data-field]");
    const input = problem?.dataset.field && form.elements[problem.dataset.field];
    if (input) {
      input.setAttribute("aria-invalid", "true");
      input.closest(".field").classList.add("wrong");
      document.getElementById(`e-${input.name}`).textContent = problem.dataset.message;
      input.closest("details")?.setAttribute("open", "");
    }
    timeline();
  }

  // Under the cursor, or under the slider, what is alive.
  function timeline() {
    const plot = result.querySelector(".time");
    if (!plot) return;
    const scrub = result.querySelector(".scrub");
    const readout = result.querySelector(".readout");
    const cursor = plot.querySelector(".cursor");
    const peak = [cursor.getAttribute("x1"), readout.textContent];
    const names = [...result.querySelectorAll(".moments thead th")].slice(4).map((cell) => cell.textContent);
    const rows = [...result.querySelectorAll(".moments tbody tr")];
    const xs = rows.map((row) => Number(row.dataset.x));

    function move(x, text) {
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      readout.textContent = text;
    }

    function show(index) {
      const [step, phase, module, allocated, ...parts] = [...rows[index].cells].map((cell) => cell.textContent);
      const alive = parts.map((size, i) => [names[i], size]).filter(([, size]) => size !== "0");
      const text = `${allocated} in the ${step === "1" ? "first" : "steady"} step, ${phase}${module && `, ${module}`}: ` +
        alive.map(([name, size]) => `${name.toLowerCase()} ${size}`).join(", ");
      move(`${xs[index]}%`, text);
      scrub.setAttribute("aria-valuetext", text);
    }

    const nearest = (x) => xs.reduce((best, at, i) => (Math.abs(at - x) < Math.abs(xs[best] - x) ? i : best), 0);
    scrub.hidden = false;
    scrub.value = nearest(parseFloat(peak[0]));
    scrub.addEventListener("input", () => show(Number(scrub.value)));
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      scrub.value = nearest((100 * (event.clientX - box.left)) / box.width);
      show(Number(scrub.value));
    });
    plot.addEventListener("pointerleave", () => move(...peak));
  }

  // Advice is asked for in place.
  result.addEventListener("click", async (event) => {
    const link = event.target.closest("a.ask");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const section = link.closest("section");
    section.setAttribute("aria-busy", "true");
    link.parentElement.textContent = "Planning every change …";
    try {
      const page = new DOMParser().parseFromString(await (await fetch(link.href)).text(), "text/html");
      section.replaceWith(page.getElementById("advice"));
      announce.textContent = "The changes that make it fit are listed.";
    } catch {
      location.assign(link.href);
    }
  });

  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(plan, WAIT);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    plan();
  });
  timeline();
})();
