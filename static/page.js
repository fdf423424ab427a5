// The page works without this file. With it the answer follows what is typed (htmx merges it into the page), names are
// completed, and the timeline says what is alive under the cursor.
"use strict";
(() => {
  const form = document.getElementById("job");
  if (!form) return;
  const byId = (id) => document.getElementById(id);
  const announce = (text) => (byId("announce").textContent = text);
  const ask = (how) => form.dispatchEvent(new Event(how));

  // The form asks: at once when something is chosen, after a breath while something is typed. A name is asked for when
  // it is whole. Every field that is changed is a step of the browser's history.
  let field, last;
  const changed = (event) => {
    field = event.target.name;
    if (event.target.type === "file") return read(event.target);
    const chosen = event.target.matches("select, [type=radio]");
    if (event.target.role === "combobox" ? event.type === "change" : chosen === (event.type === "change")) {
      ask(chosen ? "chosen" : "typed");
    }
  };
  form.addEventListener("input", changed);
  form.addEventListener("change", changed);

  async function read(input) {
    const [file] = input.files;
    if (!file) return;
    byId("f-config").value = await file.text();
    input.value = "";
    ask("chosen");
  }

  for (const how of ["typed", "chosen", "submit"]) {
    form.addEventListener(how, () => form.setAttribute("hx-method", byId("f-config").value.trim() ? "post" : "get"), true);
  }

  form.addEventListener("htmx:config:request", (event) => {
    const { ctx } = event.detail;
    if (ctx.sourceElement !== form) return;
    for (const [name, value] of [...ctx.request.body]) {
      if (typeof value !== "string" || !value.trim()) ctx.request.body.delete(name);
    }
    ctx[field === last ? "replace" : "push"] = "true";
    last = field;
  });

  // While a step runs: what is being done, for how long, and a way out. What was typed stays. A request has a ticket by
  // which the server is asked about it; a new one ends the one before, be it of the form or for advice.
  let asking, clock, again;
  document.addEventListener("htmx:before:request", ({ detail: { ctx } }) => {
    if (asking && asking.ctx.sourceElement !== ctx.sourceElement) cancel();
    clearInterval(clock);
    clearTimeout(again);
    const ticket = Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("");
    ctx.request.headers["X-Ticket"] = ticket;
    asking = { ctx, ticket, start: performance.now() };
    byId("doing").textContent = "Running the step";
    byId("elapsed").textContent = "";
    byId("result").setAttribute("aria-busy", "true");
    clock = setInterval(follow, 250, asking);
  });
  document.addEventListener("htmx:finally:request", ({ detail: { ctx } }) => {
    if (asking?.ctx !== ctx) return;
    clearInterval(clock);
    asking = null;
    byId("result").removeAttribute("aria-busy");
  });

  async function follow(mine) {
    byId("elapsed").textContent = `${((performance.now() - mine.start) / 1000).toFixed(1)} s`;
    const said = await fetch(`/progress/${mine.ticket}`).then((answer) => answer.json()).catch(() => ({}));
    if (mine !== asking || said.state === "done") return;
    const doing = said.doing && said.doing[0].toUpperCase() + said.doing.slice(1);
    byId("doing").textContent = said.line ? `In line, place ${said.line}` : doing || "Running the step";
  }

  const cancel = () => asking.ctx.sourceElement.dispatchEvent(new Event("htmx:abort"));
  byId("cancel").addEventListener("click", () => {
    if (!asking) return;
    cancel();
    announce("Cancelled. The answer is that of the job before.");
  });

  // A server with too many visitors is asked again; what it does not take at all can only be the config.
  form.addEventListener("htmx:before:response", async (event) => {
    const { ctx } = event.detail;
    if (ctx.sourceElement !== form || ![413, 503].includes(ctx.response.status)) return;
    event.preventDefault();
    if (ctx.response.status === 503) {
      again = setTimeout(() => ask("chosen"), 1000 * ctx.response.headers.get("retry-after"));
      return announce("Many are asking. This is asked again in some seconds.");
    }
    const { error } = await ctx.response.raw.json();
    byId("e-config").textContent = error.message;
    byId("field-config").classList.add("wrong");
    byId("f-config").ariaInvalid = "true";
    announce(`Cannot say: ${error.message}`);
  });
  document.addEventListener("htmx:error", () => announce("The server does not answer."));

  // What a new answer means for the rest of the page.
  document.addEventListener("htmx:after:swap", () => {
    announce(byId("result").querySelector("h1, h2")?.textContent ?? "");
    form.querySelector("[aria-invalid]")?.closest("details")?.setAttribute("open", "");
    timeline();
  });

  // Names are completed from a list: the keys of https://www.w3.org/WAI/ARIA/apg/patterns/combobox/
  const sources = {
    "/models": async (q) =>
      (await (await fetch(`/models?limit=12&q=${encodeURIComponent(q)}`)).json()).map((model) => [
        model.id,
        [model.parameters && `${(model.parameters / 1e9).toPrecision(3)} B`, model.source === "hub" && "on the Hub"]
          .filter(Boolean).join(", "),
      ]),
    "/gpus": async (q) => {
      sources.gpus ??= await (await fetch("/gpus")).json();
      const words = q.toLowerCase().split(/[\s-]+/).filter(Boolean);
      return sources.gpus
        .filter((gpu) => words.every((word) => [gpu.key, gpu.name, ...gpu.aliases].join(" ").toLowerCase().includes(word)))
        .map((gpu) => [gpu.key, `${gpu.name}, ${(gpu.total_memory / 2 ** 30).toFixed(1)} GiB`]);
    },
  };

  function combobox(input) {
    const list = byId(`l-${input.name}`);
    input.removeAttribute("list"); // the browser's own, for where there is no script
    Object.assign(input, { role: "combobox", ariaAutoComplete: "list", ariaExpanded: "false" });
    input.setAttribute("aria-controls", list.id);
    const options = () => [...list.children];
    let asked = 0;

    function close() {
      asked += 1;
      list.hidden = true;
      input.setAttribute("aria-expanded", "false");
      input.removeAttribute("aria-activedescendant");
    }

    function choose(option) {
      input.value = option.dataset.value;
      close();
      input.dispatchEvent(new Event("change", { bubbles: true }));
    }

    function mark(option) {
      options().forEach((other) => other.setAttribute("aria-selected", String(other === option)));
      if (!option) return input.removeAttribute("aria-activedescendant");
      input.setAttribute("aria-activedescendant", option.id);
      option.scrollIntoView({ block: "nearest" });
    }

    async function open(query) {
      const mine = (asked += 1);
      const found = await sources[input.dataset.source](query).catch(() => []);
      if (mine !== asked || document.activeElement !== input) return;
      list.replaceChildren(...found.map(([value, note], i) => {
        const option = document.createElement("li");
        Object.assign(option, { id: `${list.id}-${i}`, role: "option", ariaSelected: "false" });
        option.dataset.value = value;
        const said = document.createElement("span");
        said.textContent = note;
        option.append(value, " ", said);
        return option;
      }));
      list.hidden = !found.length;
      input.setAttribute("aria-expanded", String(found.length > 0));
      input.removeAttribute("aria-activedescendant");
    }

    input.addEventListener("input", () => open(input.value));
    input.addEventListener("pointerdown", () => list.hidden && setTimeout(() => (input.select(), open("")), 0));
    input.addEventListener("blur", close);
    list.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      const option = event.target.closest("[role=option]");
      if (option) choose(option);
    });
    input.addEventListener("keydown", (event) => {
      const all = options();
      const at = all.findIndex((option) => option.ariaSelected === "true");
      if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        event.preventDefault();
        if (list.hidden) return open("");
        mark(all[(at + (event.key === "ArrowDown" ? 1 : at < 0 ? 0 : -1) + all.length) % all.length]);
      } else if (event.key === "Enter" && !list.hidden && at >= 0) {
        event.preventDefault();
        choose(all[at]);
      } else if (event.key === "Escape" && !list.hidden) {
        close();
      }
    });
  }

  // Under the cursor, or under the slider, what is alive.
  function timeline() {
    const plot = byId("result").querySelector("svg.time");
    if (!plot || plot.told === plot.dataset.moments) return;
    plot.told = plot.dataset.moments;
    const scrub = byId("result").querySelector(".scrub");
    const readout = byId("result").querySelector(".readout");
    const cursor = plot.querySelector(".cursor");
    const { kinds, rows } = JSON.parse(plot.dataset.moments);
    const peak = cursor.getAttribute("x1");
    const atPeak = [...readout.childNodes];

    let resting, told;

    function move(x, ...said) {
      clearTimeout(resting);
      told = null;
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      readout.replaceChildren(...said);
    }

    function show(index) {
      const [x, event, when, module, allocated, sizes] = rows[index];
      const line = document.createElement("p");
      line.textContent = `${allocated}: ${when}${module && `, in ${module}`}.`;
      const alive = document.createElement("ul");
      sizes.forEach((size, i) => {
        if (!size) return;
        const item = document.createElement("li");
        const amount = document.createElement("b");
        amount.textContent = size;
        item.append(amount, ` ${kinds[i]}`);
        alive.append(item);
      });
      move(`${x}%`, line, alive);
      scrub.setAttribute("aria-valuetext", readout.innerText);
      if (plot.dataset.alive) resting = setTimeout(() => byModule(event), 150);
    }

    // By kind at once; by module where the cursor rests, from the server.
    async function byModule(event) {
      const mine = (told = {});
      const answer = await fetch(plot.dataset.alive + event).catch(() => ({}));
      const part = answer.ok ? await answer.text() : "";
      if (mine === told) readout.insertAdjacentHTML("beforeend", part);
    }

    const nearest = (x) => rows.reduce((best, [at], i) => (Math.abs(at - x) < Math.abs(rows[best][0] - x) ? i : best), 0);
    scrub.hidden = false;
    scrub.value = nearest(parseFloat(peak));
    scrub.oninput = () => show(Number(scrub.value));
    plot.onpointermove = (event) => {
      const box = plot.getBoundingClientRect();
      scrub.value = nearest((100 * (event.clientX - box.left)) / box.width);
      show(Number(scrub.value));
    };
    plot.onpointerleave = () => {
      scrub.value = nearest(parseFloat(peak));
      move(peak, ...atPeak);
    };
  }

  form.querySelectorAll("[data-source]").forEach(combobox);
  timeline();
})();
