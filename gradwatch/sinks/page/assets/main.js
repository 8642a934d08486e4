// The page: its state, its parts, and what follows what.

/** Shows data in an element; returns `update(data)`, which shows newer data of the same runs and keeps what is chosen. */
function show(root, data) {
  let runs = data.runs.map(readRun);
  const said = element("div", { class: "said", "aria-live": "polite" });
  const state = {
    run: 0, step: null, row: null, sequence: 0,
    table: { sort: "order", down: false, filter: "", ill: false, fold: 0, open: new Set() },
    column: (run) => Math.max(lastUpTo(run.steps, state.step ?? Infinity), 0),
    choose(run, step, row) {
      state.run = runs.indexOf(run);
      state.step = step;
      if (row !== undefined && row !== null) state.row = row;
      refresh();
      const layer = run.layers[state.row];
      said.textContent = layer ? `${layer.name}, step ${step}: gradient ${size(known(run, "norm", state.row, state.column(run)))}` : `step ${step}`;
    },
  };
  let figures = [], live = [];
  const overview = element("div"), details = element("section", { "aria-label": "Details" });
  root.replaceChildren(overview, details, said, tip);

  function openAlert(run, alert) {
    state.choose(run, alert.since, alert.rows.length ? alert.rows[0] : null);
    const at = run.sequences.findIndex((one) => one.module === alert.place && alert.code.startsWith("GW3"));
    if (at >= 0) { state.sequence = at; refresh(); }
    overview.querySelectorAll(".run")[runs.indexOf(run)]?.querySelector(".layers")?.scrollIntoView({ block: "nearest" });
  }

  function overviewOf(run, bounds) {
    const mine = [], add = (figure) => { mine.push(figure); return figure; };
    const selected = () => ({ step: runs[state.run] === run ? state.step : null, row: runs[state.run] === run ? state.row : null });
    const parts = [element("h1", {}, `${run.name}`, run.measured ? `: ${run.measured.toLocaleString("en")} measured steps, ${run.first.toLocaleString("en")} to ${run.last.toLocaleString("en")}` : ""), headline(run)];
    if (!run.measured) return { section: element("section", { class: "run" }, ...parts), mine };
    parts.push(element("h2", {}, "Alerts by step"), add(timeline(run, (alert) => openAlert(run, alert))));
    const rows = run.columns.norm, height = Math.min(Math.max(run.layers.length * 17, 90), 460);
    if (run.layers.length) {
      const map = add(heatmap({
        run, steps: run.steps, rows: run.layers.length, height, bounds, names: (row) => run.layers[row].name || "(the model)", marks: run.marks, selected,
        cell: (row, column) => rows[row][column], label: `Gradient norm of ${run.layers.length} layers by step; arrow keys move`,
        told: (row, column) => `${run.layers[row].name}\nstep ${run.steps[column]}: gradient ${size(rows[row][column])}\nsensitivity ${size(known(run, "sensitivity", row, column))}`,
        chosen: (row, column) => state.choose(run, run.steps[column], row),
      }));
      parts.push(element("h2", {}, "Gradient of each layer by step ", element("small", {}, "first layer on top; dark is little")), element("div", { class: "layers" }, map), scaleLegend(bounds, "gradient norm", [["exactly 0", NAUGHT], ["not finite", BROKEN]]));
    }
    if (run.sequences.length) {
      const one = run.sequences[Math.min(state.sequence, run.sequences.length - 1)], count = Math.ceil(one.length / one.width);
      const choice = run.sequences.length > 1 ? element("select", { "aria-label": "Module", onchange: (event) => { state.sequence = Number(event.target.value); build(); } }, ...run.sequences.map((s, i) => element("option", { value: i, selected: s === one }, s.module || "the model"))) : null;
      const need = one.need === null ? [] : [{ values: one.steps.map(() => one.need / one.width), dashed: true, text: `need ${one.need}` }];
      const end = one.horizon[one.horizon.length - 1];
      const map = add(heatmap({
        run, steps: one.steps, rows: count, height: 190, bounds: [-6, 0], selected: () => ({ step: selected().step, row: null }),
        names: (row) => (row === 0 ? "newest" : `${row * one.width} back`), labelled: () => ticks(0, one.length - 1, 6).filter((lag) => lag % one.width === 0).map((lag) => lag / one.width), cell: (row, column) => one.gain[column][row] ?? NaN,
        lines: [{ values: one.horizon.map((h) => (h === null ? null : h / one.width)), text: end === null ? "" : `horizon ${end}` }, ...need], label: `Gain by lag and step: ${one.sentence}`,
        told: (row, column) => `${row * one.width} timesteps back, step ${one.steps[column]}\n${size(one.gain[column][row])} of the largest gain\nhorizon ${number(one.horizon[column])}${one.need === null ? "" : `, need ${one.need}`}`,
        chosen: (row, column) => state.choose(run, one.steps[column], null),
      }));
      parts.push(element("h2", {}, "How far back it learns, by step ", element("small", {}, one.module || "the model", one.of ? `, ${one.of}` : "")), choice && element("div", { class: "controls" }, choice), map, scaleLegend([-6, 0], "share of the largest gain"));
    }
    parts.push(...losses(run, add, selected));
    const notes = [run.thinned ? `${run.thinned.toLocaleString("en")} older snapshots were dropped to keep the record's bound` : "", run.broken ? `${run.broken} lines of the record could not be read` : ""].filter(Boolean);
    if (notes.length) parts.push(element("p", { class: "notes" }, notes.join("; ")));
    return { section: element("section", { class: "run", "aria-label": run.name }, ...parts), mine };
  }

  function losses(run, add, selected) {
    const finite = (value) => typeof value === "number", parts = [];
    const curve = (name, low, middle, high, words, colourOf, told) => {
      const points = middle.map((value, i) => [run.steps[i], value]).filter(([, value]) => Number.isFinite(value) || finite(value)), band = low.map((value, i) => [run.steps[i], value, high[i]]).filter(([, a, b]) => Number.isFinite(a) && Number.isFinite(b));
      const all = [...points.map(([, value]) => value), ...band.flatMap(([, a, b]) => [a, b])].filter(Number.isFinite);
      if (!all.length) return;
      let [from, to] = [Math.min(...all), Math.max(...all)];
      if (from === to) { from -= 0.5; to += 0.5; }
      parts.push(element("h2", {}, name), add(lines({
        series: [{ colour: colourOf, points, band }], height: 110, left: margin, xs: [run.first, run.last + 1], ys: [from, to], cursor: () => selected().step, label: `${name} by step`,
        xticks: (inside) => ticks(run.first, run.last, inside / 90).filter(Number.isInteger), yticks: () => ticks(from, to, 4), xwords: (value) => value.toLocaleString("en"), ywords: words,
        told: (value) => { const column = lastUpTo(run.steps, value); return `step ${run.steps[column]}: ${told(column)}`; }, chosen: (value) => state.choose(run, run.steps[lastUpTo(run.steps, value)], null),
      })));
    };
    const loss = run.loss.map((band) => band.map((value) => (finite(value) ? value : NaN)));
    curve("Loss", ...loss, number, "var(--mark)", (column) => number(run.loss[1][column]));
    curve("Norm of the whole gradient", ...run.norm.map((band) => [...band]), (value) => size(value), "var(--bar)", (column) => size(run.norm[1][column]));
    return parts;
  }

  function detailsOf(run) {
    live = [];
    if (!run || !run.measured) return [];
    const add = (figure) => { live.push(figure); return figure; }, step = state.step ?? run.last, one = run.sequences[Math.min(state.sequence, run.sequences.length - 1)];
    const left = [element("h2", {}, `The network at step ${step.toLocaleString("en")} `, element("small", {}, "solid: gradient, dashed: sensitivity; click for another layer")), add(profile(run, state))];
    if (one) left.push(element("h2", {}, `Gain by lag at step ${one.steps[lastUpTo(one.steps, step)].toLocaleString("en")} `, element("small", {}, one.module || "the model")), add(gainAt(one, state)), element("p", { class: "hint" }, one.sentence));
    if (state.row !== null && run.layers[state.row]) {
      const layer = run.layers[state.row], panel = history(run, state.row, state);
      live.push(...panel.querySelectorAll("figure"));
      left.push(element("h2", {}, `${layer.name || "(the model)"} `, element("small", {}, `${layer.kind}, ${layer.parameters.toLocaleString("en")} parameters${layer.at ? `, ${layer.at}` : ""}`)), panel);
    }
    const right = [element("h2", {}, "Alerts, why, and what to try"), alertList(run, (alert) => openAlert(run, alert))];
    const rows = element("div", {}, table(run, state, changed));
    function changed(what) { if (what === "rows") rows.replaceChildren(table(run, state, changed)); else refresh(); }
    return [element("div", { class: "details" }, element("div", {}, ...left), element("div", {}, ...right)), element("h2", {}, `Layers at step ${step.toLocaleString("en")}`), tableControls(run, state, changed), rows];
  }

  function picker() {
    if (runs.length < 2) return [];
    return [element("div", { class: "controls", role: "group", "aria-label": "Run" }, "Details of: ", ...runs.map((run, i) => element("button", { type: "button", "aria-current": String(i === state.run), onclick: () => { state.run = i; refresh(); } }, run.name)))];
  }

  function refresh() {
    details.replaceChildren(...picker(), ...detailsOf(runs[state.run]));
    for (const figure of [...figures, ...live]) figure.redraw();
  }

  function build() {
    const bounds = range(runs.flatMap((run) => run.columns.norm));
    const made = runs.map((run) => overviewOf(run, bounds));
    figures = made.flatMap(({ mine }) => mine);
    overview.replaceChildren(element("div", { class: `runs${runs.length > 1 ? " several" : ""}` }, ...made.map(({ section }) => section)));
    refresh();
  }

  let waiting = 0;
  const again = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(() => { for (const figure of [...figures, ...live]) figure.redraw(); }); };
  new ResizeObserver(again).observe(root);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  addEventListener("beforeprint", again);
  build();
  return (newer) => { runs = newer.runs.map(readRun); state.run = Math.min(state.run, Math.max(runs.length - 1, 0)); build(); };
}
