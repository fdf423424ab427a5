// The timeline of the step. uPlot draws what the server wrote into `.time`; what is alive at the moment under the
// pointer, or under the slider, is said beside it. Colours are the stylesheet's. A new answer (htmx) is drawn anew.
"use strict";
(() => {
  const pen = document.createElement("canvas").getContext("2d"); // measures names
  let chart, resting, told;

  // As app/render/words.py says it: from so many bytes on, in this unit, with so many digits.
  const KIB = 2 ** 10, MIB = 2 ** 20, GIB = 2 ** 30;
  const SIZES = [[10 * GIB, GIB, "GiB", 1], [100 * MIB, GIB, "GiB", 2], [MIB, MIB, "MiB", 1], [1, KIB, "KiB", 1]];
  function size(bytes) {
    if (!bytes) return "0";
    const [, unit, name, digits] = SIZES.find(([from]) => bytes >= from);
    const exactly = { minimumFractionDigits: digits, maximumFractionDigits: digits };
    return `${(bytes / unit).toLocaleString("en", { ...exactly, roundingMode: "halfEven", useGrouping: false })} ${name}`;
  }

  // Round amounts, and how an axis of such steps says them: 0.5 GiB, 1 GiB.
  const STEPS = [KIB, MIB, GIB].flatMap((unit) => [0.5, 1, 2, 5, 10, 20, 50, 100, 200].map((count) => count * unit));
  function amount(bytes, step) {
    const [, unit, name] = SIZES.find(([, unit]) => step >= unit / 2);
    return `${bytes / unit} ${name}`;
  }

  function draw(box) {
    const { kinds, alive, event, module, reserved, phases, peak, limit } = JSON.parse(box.dataset.moments);
    const section = box.parentElement;
    const [scrub, closer, all, readout] = [".scrub", ".closer", ".all", ".readout"].map((one) => section.querySelector(one));
    const atPeak = [...readout.childNodes];
    const first = event[0], last = event[event.length - 1];
    let moment = peak, pointed = false, sum = event.map(() => 0);
    const heights = alive.map((column) => (sum = column.map((bytes, i) => sum[i] + bytes)));
    const top = 1.1 * Math.max(limit ?? 0, ...reserved);

    const style = getComputedStyle(box);
    const colour = (name) => () => style.getPropertyValue(`--${name}`);
    const font = `12px ${style.fontFamily}`;

    // A name stands where its stretch begins; one that is too long for it stands in a lower line, or waits for a zoom.
    function named(side, stretches, { lines, ...more }) {
      const seen = ({ min, max }) => stretches.filter(([, from, to]) => from < max && to > min);
      return {
        scale: "x", side, gap: 4, align: 1, lineGap: 1.15, font, ticks: { show: false }, ...more,
        grid: { stroke: colour("edge"), width: 1 },
        splits: (u, _, min, max) => seen({ min, max }).map(([, from]) => Math.max(from, min)),
        values: (u, splits) => {
          const edges = [...splits, u.scales.x.max].map((x) => u.valToPos(x, "x"));
          const free = Array(lines).fill(0);
          pen.font = more.font ?? font;
          return seen(u.scales.x).map(([name], i) => {
            const ends = edges[i] + pen.measureText(name).width + 3;
            const line = ends <= edges[i + 1] ? 0 : free.findIndex((from, line) => line && from <= edges[i]);
            if (line < 0 || ends > edges.at(-1)) return null;
            free[line] = ends;
            return "\n".repeat(line) + name;
          });
        },
      };
    }
    const starts = [first, ...phases.map(([, , moment]) => event[moment])];
    const steps = [];
    phases.forEach(([title], i) => {
      if (steps.at(-1)?.[0] === title) steps.at(-1)[2] = starts[i + 1];
      else steps.push([title, starts[i], starts[i + 1]]);
    });

    const apart = (u, splits) => splits.map((bytes) => (Math.abs(bytes - (limit ?? Infinity)) > top / 8 ? bytes : null));
    const area = ([kind]) => ({ fill: colour(`k-${kind}`), width: 0, points: { show: false } });
    const u = new uPlot({
      width: box.clientWidth,
      height: box.clientHeight,
      padding: [0, 1, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: { show: false }, drag: { dist: 5 } },
      drawOrder: ["series", "axes"],
      scales: { x: { time: false }, y: { range: [0, top] } },
      series: [
        {},
        ...kinds.map(area).reverse(),
        { stroke: colour("soft"), width: 1.25, points: { show: false } },
        { width: 0, points: { show: true, size: 11, width: 2, stroke: colour("card"), fill: colour("ink") } },
      ],
      axes: [
        named(2, phases.map(([, name], i) => [name, starts[i], starts[i + 1]]), { lines: 3, size: 48, stroke: colour("soft") }),
        named(0, steps, { lines: 1, size: 22, stroke: colour("ink"), font: `570 ${font}` }),
        {
          side: 3, size: 0, gap: 8, show: limit !== null, stroke: colour("bad"), font, ticks: { show: false },
          grid: { stroke: colour("bad"), width: 1.5, dash: [5, 3] }, lineGap: 1.15,
          splits: () => [limit], values: () => ["the card\nends here"],
        },
        {
          side: 3, size: 64, gap: 8, stroke: colour("soft"), font, ticks: { show: false },
          space: 30, incrs: STEPS, filter: apart, grid: { stroke: colour("grid"), filter: apart },
          values: (u, splits, axis, space, step) => splits.map((bytes) => (bytes ? amount(bytes, step) : null)),
        },
      ],
      hooks: { draw: [settle] },
    }, [event, ...[...heights].reverse(), reserved, sum.map((bytes, i) => (i === peak ? bytes : null))], box);

    // What the slider can reach, and where the cursor is, after a zoom or another width.
    function settle(u) {
      const { min, max } = u.scales.x;
      [scrub.min, scrub.max, scrub.value] = [u.valToIdx(min), u.valToIdx(max), moment];
      closer.disabled = scrub.max - scrub.min < 4;
      all.hidden = min <= first && max >= last;
      u.setCursor({ left: u.valToPos(event[moment], "x"), top: 0 });
    }

    function move(to, ...said) {
      clearTimeout(resting);
      told = null;
      moment = to;
      readout.replaceChildren(...said);
      settle(u);
    }

    function show(i) {
      const line = document.createElement("p");
      const [title, phase] = phases.find(([, , end]) => i <= end);
      const when = title.toLowerCase() === phase ? title : `${title}, ${phase}`;
      line.textContent = `${size(sum[i])}: ${when}${module[i] && `, in ${module[i]}`}.`;
      const list = document.createElement("ul");
      kinds.forEach(([, name], kind) => {
        if (!alive[kind][i]) return;
        const item = document.createElement("li");
        const bytes = document.createElement("b");
        bytes.textContent = size(alive[kind][i]);
        item.append(bytes, ` ${name}`);
        list.append(item);
      });
      move(i, line, list);
      scrub.setAttribute("aria-valuetext", readout.innerText);
      if (box.dataset.alive) resting = setTimeout(() => byModule(event[i]), 150);
    }

    // By kind at once; by module where the cursor rests, from the server.
    async function byModule(event) {
      const mine = (told = {});
      const answer = await fetch(box.dataset.alive + event).catch(() => ({}));
      const part = answer.ok ? await answer.text() : "";
      if (mine === told) readout.insertAdjacentHTML("beforeend", part);
    }

    function zoom() {
      const { min, max } = u.scales.x;
      const quarter = (max - min) / 4;
      const from = Math.min(Math.max(event[scrub.value] - quarter, min), max - 2 * quarter);
      u.setScale("x", { min: from, max: from + 2 * quarter });
    }

    scrub.oninput = () => ((pointed = false), show(Number(scrub.value)));
    closer.onclick = zoom;
    all.onclick = () => (u.setScale("x", { min: first, max: last }), scrub.focus());
    u.over.onpointerdown = u.over.onpointermove = ({ clientX }) => {
      pointed = true;
      show(u.valToIdx(u.posToVal(clientX - u.over.getBoundingClientRect().left, "x")));
    };
    // A finger that is lifted leaves what it found, and a mouse what the slider found: the page may move away under it.
    u.over.onmouseleave = () => pointed && move(peak, ...atPeak);
    return u;
  }

  const sized = new ResizeObserver(([{ target }]) =>
    chart?.setSize({ width: target.clientWidth, height: target.clientHeight }));

  function start() {
    chart?.destroy();
    sized.disconnect();
    clearTimeout(resting);
    told = null;
    const box = document.querySelector(".time");
    chart = box && draw(box);
    if (box) sized.observe(box);
  }

  // What the stylesheet's colours depend on. Paper is always light, and drawn before the browser says that it prints.
  const redraw = () => chart?.redraw(false);
  for (const what of ["(prefers-color-scheme: dark)", "(forced-colors: active)"]) {
    matchMedia(what).addEventListener("change", redraw);
  }
  for (const [when, paper] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(when, () => redraw(document.documentElement.classList.toggle("paper", paper)));
  }
  document.fonts.ready.then(redraw);
  document.addEventListener("htmx:after:swap", start);
  start();
})();
