// The page: its state, its parts, and what follows what.

/** Shows data in an element; returns `update(data)`, which shows newer data of the same runs and keeps what is chosen. */
function show(root, data) {
  let runs = data.runs.map(readRun);
  const said = element("div", { class: "said", "aria-live": "polite" });
  // What is chosen is kept by name: runs and layers may come and go.
  const state = {
    name: runs.length ? runs[0].name : null, layer: null, step: null, module: null,
    table: { sort: "order", down: false, filter: "", ill: false, fold: 0, open: new Set() },
    get run() { return runs.find((run) => run.name === state.name) || runs[0]; },
    get row() { return state.rowOf(state.run); },
    rowOf(run) { const at = run && state.layer !== null ? run.layers.findIndex((layer) => layer.name === state.layer) : -1; return at < 0 ? null : at; },
    sequence: (run) => run.sequences.find((one) => one.module === state.module) || run.sequences[0],
    column: (run) => Math.max(lastUpTo(run.steps, state.step ?? Infinity), 0),
    choose(run, step, row, words) {
      state.name = run.name;
      state.step = step ?? run.last;
      if (row !== undefined && row !== null) state.layer = run.layers[row].name;
      staying(sectionOf(run), refresh);
      const at = state.rowOf(run);
      said.textContent = words || (at === null ? `step ${state.step}` : `${state.layer}, step ${state.step}: gradient ${size(known(run, "norm", at, state.column(run)))}`);
    },
  };
  let figures = [], live = [];
  const overview = element("div"), details = element("section", { "aria-label": "Details", class: "below" });
  root.replaceChildren(overview, details, said, tip);

  function openAlert(run, alert) {
    if (run.sequences.some((one) => one.module === alert.place) && alert.code.startsWith("GW3")) { state.module = alert.place; build(); }
    state.choose(run, alert.since, alert.rows.length ? alert.rows[0] : null);
    sectionOf(run)?.querySelector(".layers")?.scrollIntoView({ block: "nearest" });
  }

  function overviewOf(run, bounds) {
    const mine = [], add = (figure) => { mine.push(figure); return figure; };
    const selected = () => ({ step: state.run === run ? state.step : null, row: state.run === run ? state.row : null });
    const steps = run.measured ? `: ${run.measured.toLocaleString("en")} measured step${run.measured > 1 ? "s" : ""}, ${run.first.toLocaleString("en")} to ${run.last.toLocaleString("en")}` : "";
    const parts = [element("h1", {}, run.name, steps), headline(run)];
    if (!run.measured) return { section: element("section", { class: "run" }, ...parts), mine };
    parts.push(element("h2", {}, "Alerts by step"), add(timeline(run, (alert) => openAlert(run, alert))));
    const rows = run.columns.norm, height = Math.min(Math.max(run.layers.length * 17, 90), 460);
    if (run.layers.length) {
      const ill = run.marks.flatMap((mark, row) => (mark && (!run.marks[row - 1] || !run.marks[row + 1]) ? [row] : []));
      const map = add(heatmap({
        run, steps: run.steps, ends: run.ends, rows: run.layers.length, height, bounds, names: (row) => run.layers[row].name || "(the model)", labelled: evenly(run.layers.length, ill), marks: run.marks, selected, key: `layers-${run.name}`,
        cell: (row, column) => rows[row][column], label: `Gradient norm of ${run.layers.length} layers by step; arrow keys move`,
        told: (row, column) => `${run.layers[row].name}\n${when(run, column)}: gradient ${size(rows[row][column])}\nsensitivity ${size(known(run, "sensitivity", row, column))}`,
        chosen: (row, column) => state.choose(run, run.steps[column], row),
      }));
      parts.push(element("h2", {}, "Gradient of each layer by step ", element("small", {}, "first layer on top; dark is little")), element("div", { class: "layers" }, map), scaleLegend(bounds, "gradient norm", [["exactly 0", NAUGHT], ["not finite", BROKEN]]));
    }
    if (run.sequences.length) parts.push(...lags(run, add, selected));
    parts.push(...losses(run, add, selected));
    const notes = [run.thinned ? `${run.thinned.toLocaleString("en")} older snapshots were dropped to keep the record's bound` : "", run.broken ? `${run.broken} lines of the record could not be read` : ""].filter(Boolean);
    if (notes.length) parts.push(element("p", { class: "notes" }, notes.join("; ")));
    return { section: element("section", { class: "run", "aria-label": run.name }, ...parts), mine };
  }

  function lags(run, add, selected) {
    const one = state.sequence(run), count = Math.ceil(one.length / one.width), end = one.horizon[one.horizon.length - 1];
    const choice = run.sequences.length > 1 ? element("select", { "aria-label": "Module", "data-key": `module-${run.name}`, onchange: (event) => { state.module = event.target.value; build(); } }, ...run.sequences.map((s) => element("option", { value: s.module, selected: s === one }, s.module || "the model"))) : null;
    const need = one.need === null ? [] : [{ values: one.steps.map(() => one.need / one.width), dashed: true, text: `need ${one.need}` }];
    const words = (row, column) => `${lagsOf(one, row)} timesteps back, step ${one.steps[column].toLocaleString("en")}\n${share(one.gain[column][row])} of the largest gain\nhorizon ${number(one.horizon[column])}${one.need === null ? "" : `, need ${one.need}`}`;
    const map = add(heatmap({
      run, steps: one.steps, rows: count, height: 190, bounds: [-6, 0], selected: () => ({ step: selected().step, row: null }), key: `lags-${run.name}`,
      names: (row) => (row === 0 ? "newest" : `${row * one.width} back`), labelled: () => ticks(0, one.length - 1, 6).filter((lag) => lag % one.width === 0).map((lag) => lag / one.width), cell: (row, column) => one.gain[column][row] ?? NaN,
      lines: [{ values: one.horizon.map((h) => (h === null ? null : h / one.width)), text: end === null ? "" : `horizon ${end}` }, ...need], label: `Gain by lag and step: ${one.sentence}; arrow keys move`,
      told: words, chosen: (row, column) => state.choose(run, one.steps[column], null, words(row, column)),
    }));
    return [element("h2", {}, "How far back it learns, by step ", element("small", {}, one.module || "the model", one.of ? `, ${one.of}` : "")), choice && element("div", { class: "controls" }, choice), map, scaleLegend([-6, 0], "share of the largest gain", [["exactly 0", NAUGHT]])];
  }

  function losses(run, add, selected) {
    const parts = [], curve = (name, [low, middle, high], words, colourOf, told) => {
      const points = [...middle].map((value, i) => [run.steps[i], value]), band = [...low].map((value, i) => [run.steps[i], value, high[i]]).filter(([, a, b]) => Number.isFinite(a) && Number.isFinite(b));
      const all = [...points.map(([, value]) => value), ...band.flatMap(([, a, b]) => [a, b])].filter(Number.isFinite);
      if (!points.some(([, value]) => !Number.isNaN(value))) return;
      parts.push(element("h2", {}, name));
      if (!all.length) { parts.push(element("p", { class: "hint" }, "not finite, or exactly 0, at every step")); return; }
      let [from, to] = [Math.min(...all), Math.max(...all)];
      if (from === to) { from -= 0.5; to += 0.5; }
      parts.push(add(lines({
        series: [{ colour: colourOf, points, band }], height: 110, left: margin, xs: [run.first, run.last + 1], ys: [from, to], cursor: () => selected().step, label: `${name} by step`,
        xticks: (inside) => ticks(run.first, run.last, inside / 90).filter(Number.isInteger), yticks: () => ticks(from, to, 4), xwords: (value) => value.toLocaleString("en"), ywords: words,
        told: (value) => { const column = lastUpTo(run.steps, value); return `${when(run, column)}: ${told(column)}`; }, chosen: (value) => state.choose(run, run.steps[lastUpTo(run.steps, value)], null),
      })));
    };
    const loss = run.loss.map((band) => band.map((value) => (value === null ? NaN : value === "inf" ? Infinity : value)));
    curve("Loss", loss, number, "var(--mark)", (column) => number(run.loss[1][column]));
    curve("Norm of the whole gradient", run.norm, size, "var(--bar)", (column) => size(run.norm[1][column]));
    return parts;
  }

  function detailsOf(run) {
    live = [];
    if (!run || !run.measured) return [];
    const add = (figure) => { live.push(figure); return figure; }, step = state.step ?? run.last, one = state.sequence(run), row = state.rowOf(run);
    const left = [element("h2", {}, `The network at ${when(run, state.column(run))} `, element("small", {}, "solid: gradient, dashed: sensitivity; click for another layer")), run.layers.length ? add(profile(run, state)) : ""];
    if (one) left.push(element("h2", {}, `Gain by lag at step ${one.steps[lastUpTo(one.steps, step)].toLocaleString("en")} `, element("small", {}, one.module || "the model")), add(gainAt(one, state)), element("p", { class: "hint" }, one.sentence));
    if (row !== null) {
      const layer = run.layers[row], panel = history(run, row, state);
      live.push(...panel.querySelectorAll("figure"));
      left.push(element("h2", {}, `${layer.name || "(the model)"} `, element("small", {}, `${layer.kind}, ${layer.parameters.toLocaleString("en")} parameters${layer.at ? `, ${layer.at}` : ""}`)), panel);
    }
    const right = [element("h2", {}, "Alerts, why, and what to try"), alertList(run, (alert) => openAlert(run, alert))];
    const rows = element("div", {}, table(run, state, changed));
    function changed(what) { if (what === "rows") rows.replaceChildren(table(run, state, changed)); else refresh(); }
    return [element("div", { class: "details" }, element("div", {}, ...left), element("div", {}, ...right)), element("h2", {}, `Layers at ${when(run, state.column(run))}`), tableControls(run, state, changed), rows];
  }

  function picker() {
    if (runs.length < 2) return [];
    return [element("div", { class: "controls", role: "group", "aria-label": "Run" }, "Details of: ", ...runs.map((run) => element("button", { type: "button", "data-key": `run-${run.name}`, "aria-current": String(run === state.run), onclick: () => { state.name = run.name; staying(details, refresh); } }, run.name)))];
  }

  /** What is wrong with each of many runs, on top of them all. */
  function index() {
    if (runs.length < 3) return "";
    const link = (run) => element("button", { type: "button", onclick: () => sectionOf(run).scrollIntoView() }, run.name);
    return element("ol", { class: "index", "aria-label": "Runs" }, ...runs.map((run) => element("li", {}, link(run), ...run.headline.map(({ severity, text }) => element("span", {}, " ", icon(severity), text)))));
  }

  function sectionOf(run) {
    return overview.querySelectorAll(".run")[runs.indexOf(run)];
  }

  /** Puts the details below the run they are of, as soon as something was chosen in it. */
  function place() {
    const home = state.step === null || runs.length < 2 ? null : sectionOf(state.run);
    (home || overview).after(details);
  }

  /** Does something that moves what is on the page, but for an element, which stays where it is on the screen. */
  function staying(one, work) {
    const from = one?.getBoundingClientRect().top;
    work();
    if (one) scrollBy(0, one.getBoundingClientRect().top - from);
  }

  /** Does something that makes elements anew, and puts the focus, the caret and the table back where they were. */
  function keeping(work) {
    const at = document.activeElement, key = root.contains(at) ? at.getAttribute("data-key") : null, caret = key === "search" ? [at.selectionStart, at.selectionEnd] : null;
    const scrolled = root.querySelector("[data-key=table]")?.scrollTop ?? 0;
    work();
    const region = root.querySelector("[data-key=table]");
    if (region) region.scrollTop = scrolled;
    const again = key === null ? null : [...root.querySelectorAll("[data-key]")].find((one) => one.getAttribute("data-key") === key);
    if (again && again !== document.activeElement) again.focus({ preventScroll: true });
    if (again && caret) again.setSelectionRange(...caret);
  }

  function refresh() {
    keeping(() => {
      details.replaceChildren(...picker(), ...detailsOf(state.run));
      place();
      for (const figure of [...figures, ...live]) figure.redraw();
    });
  }

  function build() {
    keeping(() => {
      const bounds = range(runs.flatMap((run) => run.columns.norm)), made = runs.map((run) => overviewOf(run, bounds));
      figures = made.flatMap(({ mine }) => mine);
      overview.replaceChildren(index(), element("div", { class: `runs${runs.length > 1 ? " several" : ""}` }, ...made.map(({ section }) => section)));
      details.replaceChildren(...picker(), ...detailsOf(state.run));
      place();
      for (const figure of [...figures, ...live]) figure.redraw();
    });
    if (!runs.length) said.textContent = "no run is chosen";
  }

  let waiting = 0;
  const again = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(() => { for (const figure of [...figures, ...live]) figure.redraw(); }); };
  new ResizeObserver(again).observe(root);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  addEventListener("beforeprint", again);
  build();
  return (newer) => { runs = newer.runs.map(readRun); build(); };
}
