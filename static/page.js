// The page works without this file. With it the answer follows what is typed (htmx merges it into the page), and names
// are completed.
"use strict";
(() => {
  const form = document.getElementById("job");
  if (!form) return;
  const byId = (id) => document.getElementById(id);
  const announce = (text) => (byId("announce").textContent = text);
  // What is changed before htmx has taken the form over is asked for when it has.
  let early;
  const ask = (how) => (form._htmx?.initialized ? form.dispatchEvent(new Event(how)) : (early = how));
  form.addEventListener("htmx:after:init", (event) => event.target === form && early && ask(early));

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
  form.addEventListener("input", () => rest());
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

  // While a step runs: what is being done, for how long, and a way out. What was typed stays. A request has an id by
  // which the server is asked about it; a new one ends the one before.
  const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("");
  let asking, again;
  document.addEventListener("htmx:before:request", ({ detail: { ctx } }) => {
    asking?.over();
    clearTimeout(again);
    const name = (ctx.request.headers["X-Request-Id"] = newId());
    byId("result").setAttribute("aria-busy", "true");
    asking = { ctx, over: follow(name, byId("doing"), byId("elapsed"), "Running the step") };
  });
  document.addEventListener("htmx:finally:request", ({ detail: { ctx } }) => {
    if (asking?.ctx !== ctx) return;
    asking.over();
    asking = null;
    byId("result").removeAttribute("aria-busy");
    rest();
  });

  function follow(name, doing, elapsed, first) {
    const start = performance.now();
    let over = false;
    doing.textContent = first;
    elapsed.textContent = "";
    const clock = setInterval(async () => {
      elapsed.textContent = `${((performance.now() - start) / 1000).toFixed(1)} s`;
      const said = await fetch(`/progress/${name}`).then((answer) => answer.json()).catch(() => ({}));
      if (over || said.state === "done") return;
      doing.textContent = said.line ? `In line, place ${said.line}` : said.doing ? upper(said.doing) : first;
    }, 250);
    return () => clearInterval(clock, (over = true));
  }

  const upper = (text) => text[0].toUpperCase() + text.slice(1);

  byId("cancel").addEventListener("click", () => {
    if (!asking) return;
    form.dispatchEvent(new Event("htmx:abort"));
    announce("Cancelled. The answer is that of the job before.");
  });

  // Once nobody has typed for a moment, the advice is asked for, part by part, each in its place. An edit ends it.
  let aside = new AbortController(), resting;
  function rest(wait = 600) {
    aside.abort();
    clearTimeout(resting);
    resting = setTimeout(advise, wait);
  }

  async function advise() {
    const section = byId("advice");
    const parts = section?.querySelectorAll("[data-ask]") ?? [];
    if (asking || !parts.length) return; // an answer that is on its way comes here again
    const mine = (aside = new AbortController());
    section.setAttribute("aria-busy", "true");
    section.querySelector("button").onclick = () => mine.abort("stopped");
    let ended = ": done.";
    for (const part of parts) {
      const trouble = await fill(part, mine.signal, section);
      if (mine.signal.aborted && mine.signal.reason !== "stopped") return;
      if (!trouble) continue;
      const retry = document.createElement("button");
      Object.assign(retry, { type: "button", className: "quiet", textContent: "Go on", onclick: () => rest(0) });
      part.replaceChildren(`${trouble} `, retry);
      ended = `: ${trouble}`;
      break;
    }
    section.removeAttribute("aria-busy");
    announce(section.querySelector("h2").textContent + ended);
  }

  // The part takes its place; else, why not.
  async function fill(part, signal, section) {
    const name = newId();
    const over = follow(name, section.querySelector(".doing"), section.querySelector(".elapsed"), "Working it out");
    try {
      const answer = await fetch(part.dataset.ask, { signal, headers: { "X-Request-Id": name } });
      if (answer.ok) part.outerHTML = await answer.text();
      else return `This could not be worked out: ${(await answer.json()).error.message}.`;
    } catch {
      return signal.aborted ? "Stopped." : "The server does not answer.";
    } finally {
      over();
    }
  }

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
  });

  // Names are completed from a list: the keys of https://www.w3.org/WAI/ARIA/apg/patterns/combobox/
  const sources = {
    "/models": async (q) => {
      const answer = await fetch(`/models?limit=12&q=${encodeURIComponent(q)}`);
      const silent = q && answer.headers.get("hub-search") === "unanswered";
      return (await answer.json()).map((model) => [
        model.id,
        [model.parameters && `${(model.parameters / 1e9).toPrecision(3)} B`, model.source === "hub" && "on the Hub"]
          .filter(Boolean).join(", "),
      ]).concat(silent ? [["", "The Hub does not answer: these are the built-in models."]] : []);
    },
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
    const options = () => [...list.querySelectorAll("[data-value]")];
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
        if (value) option.dataset.value = value;
        else option.ariaDisabled = "true"; // it only says something
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
      const option = event.target.closest("[data-value]");
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

  form.querySelectorAll("[data-source]").forEach(combobox);
  rest();
})();
