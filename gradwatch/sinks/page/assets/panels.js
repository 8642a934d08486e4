// What stands around the pictures: sentences, alerts, the table of layers, and what is there at a chosen step.

const WORDS = { ok: "fine", info: "for information", warning: "warning", error: "error" };
const ICONS = { ok: "✓", info: "i", warning: "▲", error: "✕" };

function icon(severity) {
  return element("span", { class: `severity ${severity}`, "aria-label": WORDS[severity] }, `${ICONS[severity]} `);
}

function headline(run) {
  return element("ul", { class: "headline" }, ...run.headline.map(({ severity, text, remedy }) => element("li", { class: severity },
    icon(severity), text, remedy && element("small", {}, `Try: ${remedy}`))));
}

/** The bars of all alerts on the axis of the steps. */
function timeline(run, open) {
  const figure = element("figure"), most = 14, shown = gravest(run.alerts).slice(0, most), svg = shape("svg", { role: "group", "aria-label": "When alerts were open" });
  figure.append(svg);
  figure.redraw = () => {
    const width = figure.clientWidth || 600, { left, inside, x } = axis(run, width), tall = 20;
    svg.setAttribute("viewBox", `0 0 ${width} ${Math.max(shown.length, 1) * tall}`);
    svg.style.height = `${Math.max(shown.length, 1) * tall}px`;
    svg.replaceChildren();
    shown.forEach((alert, row) => {
      const from = x(alert.since), to = Math.max(x(alert.cleared ?? run.last + 1), from + 4), y = row * tall;
      const bar = shape("g", { tabindex: 0, role: "button", "data-key": `bar-${run.name}-${row}` });
      bar.append(shape("title", {}, `${alert.code} ${alert.kind}: since step ${alert.since}${alert.cleared === null ? ", still open" : ` until step ${alert.cleared}`}`));
      bar.append(shape("rect", { x: from, y: y + 4, width: Math.min(to, left + inside) - from, height: 12, rx: 3, fill: `var(--${alert.severity})` }));
      bar.append(shape("text", { class: "strong", x: left - 6, y: y + 14, "text-anchor": "end" }, left < LEFT ? alert.code : `${ICONS[alert.severity]} ${alert.code} ${fitted(alert.place, left - 74)}`));
      bar.addEventListener("click", () => open(alert));
      bar.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(alert); } });
      svg.append(bar);
    });
    if (!shown.length) svg.append(shape("text", { x: left, y: 14 }, "no alert"));
  };
  if (run.alerts.length > most) figure.append(element("p", { class: "hint" }, `and ${run.alerts.length - most} more below`));
  return figure;
}

/** The gravest first, then those that are open, then as they began. */
function gravest(alerts) {
  const grave = { error: 0, warning: 1, info: 2 };
  return alerts.toSorted((a, b) => grave[a.severity] - grave[b.severity] || (a.cleared !== null) - (b.cleared !== null) || a.began - b.began);
}

function alertList(run, open) {
  if (!run.alerts.length) return element("p", { class: "hint" }, "No alert in the whole run.");
  return element("ul", { class: "alerts" }, ...gravest(run.alerts).map((alert) => element("li", { class: `${alert.severity}${alert.cleared === null ? "" : " over"}` },
    element("p", {}, element("span", { class: `severity ${alert.severity}` }, `${ICONS[alert.severity]} ${alert.code} ${alert.kind}`), ` ${WORDS[alert.severity]}, since step ${alert.since}`, alert.cleared === null ? ", still open " : `, cleared at step ${alert.cleared} `, element("button", { type: "button", onclick: () => open(alert) }, "show")),
    element("p", {}, alert.message),
    alert.cause && element("p", {}, `Why: ${alert.cause}`),
    alert.remedy && element("p", { class: "try" }, `Try: ${alert.remedy}`))));
}

const COLUMNS = [["norm", "gradient"], ["sensitivity", "sensitivity"], ["update", "update / weight"], ["weight", "weight"], ["zeros", "zeros"]];

/** The number of a layer at a column: a gradient is of that column, what is measured at probes is the newest up to there. */
function known(run, name, row, column) {
  const levelsOf = run.columns[name][row];
  if (!levelsOf) return NaN;
  if (name === "norm" || name === "sensitivity") return levelsOf[column];
  for (let at = column; at >= 0; at--) if (!Number.isNaN(levelsOf[at])) return levelsOf[at];
  return NaN;
}

function block(name, depth) {
  return name.split(".").slice(0, depth).join(".");
}

/** The table of layers at a step: sorted, filtered, folded by the first parts of the names. */
function table(run, state, changed) {
  const column = state.column(run), kept = state.table, needle = kept.filter.toLowerCase();
  let rows = run.layers.map((layer, row) => ({ row, layer, values: Object.fromEntries(COLUMNS.map(([name]) => [name, known(run, name, row, column)])) }));
  rows = rows.filter(({ layer, row }) => `${layer.name} ${layer.kind}`.toLowerCase().includes(needle) && (!kept.ill || (run.gravest[row] && run.gravest[row] !== "info")));
  const order = (value) => (Number.isNaN(value) ? Infinity : value);
  if (kept.sort !== "order") {
    rows.sort((a, b) => kept.sort === "name" ? a.layer.name.localeCompare(b.layer.name) : order(a.values[kept.sort]) - order(b.values[kept.sort]));
    if (kept.down) rows.reverse();
  } else if (kept.down) rows.reverse();
  const heading = (key, text) => element("th", { scope: "col", "aria-sort": kept.sort !== key ? "none" : kept.down ? "descending" : "ascending" },
    element("button", { type: "button", "data-key": `sort-${key}`, onclick: () => { kept.down = kept.sort === key && !kept.down; kept.sort = key; changed("table"); } }, text, kept.sort === key ? (kept.down ? " ▼" : " ▲") : ""));
  const codes = (row) => [...new Set(run.alerts.filter((a) => a.rows.includes(row)).map((a) => a.code))].join(" ");
  const body = [];
  const line = ({ row, layer, values }) => element("tr", { class: run.gravest[row], tabindex: 0, "data-key": `row-${row}`, "aria-selected": String(state.row === row), onclick: () => state.choose(run, state.step, row), onkeydown: (event) => { if (event.key === "Enter") state.choose(run, state.step, row); } },
    element("td", {}, layer.name || "(the model)"), element("td", {}, layer.kind), ...COLUMNS.map(([name]) => element("td", {}, size(values[name]))), element("td", {}, codes(row)));
  if (kept.fold) {
    const blocks = new Map();
    for (const one of rows) { const key = block(one.layer.name, kept.fold); blocks.set(key, [...(blocks.get(key) || []), one]); }
    for (const [name, mine] of blocks) {
      const least = (key) => Math.min(...mine.map((one) => order(one.values[key]))), open = kept.open.has(name);
      body.push(element("tr", { class: "block", onclick: () => { if (open) kept.open.delete(name); else kept.open.add(name); changed("table"); } },
        element("td", {}, element("button", { type: "button", "aria-expanded": String(open) }, open ? "−" : "+"), ` ${name || "(the model)"}: ${mine.length} layer${mine.length > 1 ? "s" : ""}, the least of each`), element("td"),
        ...COLUMNS.map(([key]) => element("td", {}, size(least(key) === Infinity ? NaN : least(key)))), element("td", {}, [...new Set(mine.flatMap(({ row }) => codes(row).split(" ")))].join(" ").trim())));
      if (open) body.push(...mine.map(line));
    }
  } else body.push(...rows.map(line));
  return element("div", { class: "scroll", tabindex: 0, role: "region", "data-key": "table", "aria-label": "Table of layers" }, element("table", {},
    element("caption", { class: "said" }, `Layers of ${run.name} at step ${state.step ?? run.last}`),
    element("thead", {}, element("tr", {}, heading("order", "layer"), element("th", { scope: "col" }, "kind"), ...COLUMNS.map(([key, text]) => heading(key, text)), element("th", { scope: "col" }, "alerts"))),
    element("tbody", {}, ...body)));
}

function tableControls(run, state, changed) {
  const kept = state.table;
  const search = element("input", { type: "search", "data-key": "search", placeholder: "filter layers", "aria-label": "Filter layers", value: kept.filter, oninput: (event) => { kept.filter = event.target.value; changed("rows"); } });
  const ill = element("button", { type: "button", "data-key": "ill", "aria-pressed": String(kept.ill), onclick: () => { kept.ill = !kept.ill; changed("table"); } }, "with alerts only");
  const deepest = Math.min(Math.max(...run.layers.map((l) => l.name.split(".").length), 1), 5);
  const fold = element("select", { "data-key": "fold", "aria-label": "Fold by block", onchange: (event) => { kept.fold = Number(event.target.value); changed("table"); } },
    ...Array.from({ length: deepest }, (_, depth) => element("option", { value: depth, selected: kept.fold === depth }, depth ? `folded at depth ${depth}` : "all layers")));
  return element("div", { class: "controls" }, search, ill, fold);
}

/** The network from its first layer to its last at a step: how large the gradient and the sensitivity are. */
function profile(run, state) {
  const column = state.column(run), names = run.layers.map((l) => l.name);
  const of = (name, stroke, dashed) => ({ colour: stroke, dashed, points: run.layers.map((_, row) => [row, known(run, name, row, column)]) });
  const series = [of("norm", "var(--bar)"), of("sensitivity", "var(--warning)", true)], all = series.flatMap((one) => one.points.map(([, level]) => level)).filter(Number.isFinite);
  const ys = all.length ? [Math.floor(Math.min(...all)), Math.ceil(Math.max(...all, Math.min(...all) + 1))] : [-1, 0], last = Math.max(names.length - 1, 1);
  const nearest = (value) => Math.min(Math.max(Math.round(value), 0), names.length - 1);
  return lines({
    series, height: 190, left: () => 62, xs: [0, last], ys, label: `Gradient and sensitivity from the first layer to the last at step ${state.step ?? run.last}`,
    xticks: (inside) => ticks(0, last, Math.min(inside / 110, names.length)).filter(Number.isInteger), yticks: () => ticks(ys[0], ys[1], 5).filter(Number.isInteger),
    xwords: (value) => fitted(names[value] || "", 100), ywords: (value) => `1e${value}`, cursor: () => state.rowOf(run),
    told: (value) => { const row = nearest(value); return `${names[row]}\n${COLUMNS.slice(0, 2).map(([name, text]) => `${text} ${size(known(run, name, row, column))}`).join("\n")}`; },
    chosen: (value) => state.choose(run, state.step, nearest(value)),
  });
}

/** The lags that a row stands for. */
function lagsOf(one, row) {
  return one.width === 1 ? String(row) : `${row * one.width} to ${Math.min((row + 1) * one.width, one.length) - 1}`;
}

/** The gain by lag of a module at the probe at or before a step. */
function gainAt(one, state) {
  const at = lastUpTo(one.steps, state.step ?? Infinity), points = one.gain[at].map((level, row) => [row * one.width, level === -Infinity ? -99 : level]);
  const verticals = [];
  if (one.horizon[at] !== null) verticals.push({ at: one.horizon[at], name: `horizon ${one.horizon[at]}${one.censored[at] ? " or more" : ""}` });
  if (one.need !== null) verticals.push({ at: Math.min(one.need, one.length), name: `need ${one.need}`, dashed: true });
  return lines({
    series: [{ colour: "var(--bar)", points }, { colour: "var(--soft)", dashed: true, points: [[0, -3], [one.length, -3]] }], height: 190, left: () => 62, xs: [0, one.length], ys: [-9, 0], verticals,
    label: `Gain by lag of ${one.module || "the model"} at step ${one.steps[at]}: ${one.sentence}`,
    xticks: (inside) => ticks(0, one.length, inside / 70), yticks: () => [0, -3, -6, -9], xwords: (value) => String(value), ywords: (value) => `1e${value}`,
    told: (value) => { const row = Math.min(Math.max(Math.floor(value / one.width), 0), one.gain[at].length - 1); return `${lagsOf(one, row)} timesteps back: ${share(one.gain[at][row])} of the largest`; },
  });
}

/** All that was measured of one layer, over the run. */
function history(run, row, state) {
  const parts = COLUMNS.map(([name, text]) => {
    const levelsOf = run.columns[name][row], points = [...levelsOf].map((level, column) => [run.steps[column], level]).filter(([, level]) => !Number.isNaN(level)), all = points.map(([, level]) => level).filter(Number.isFinite);
    if (!all.length) return null;
    const low = Math.floor(Math.min(...all)), ys = [low, Math.max(Math.ceil(Math.max(...all)), low + 1)];
    return [text, lines({
      series: [{ colour: "var(--bar)", points }], height: 78, left: () => 62, xs: [run.first, Math.max(run.last, run.first + 1)], ys, label: `${text} of ${run.layers[row].name} over the run`,
      xticks: (inside) => ticks(run.first, run.last, inside / 90).filter(Number.isInteger), yticks: () => ys, xwords: (value) => value.toLocaleString("en"), ywords: (value) => `1e${value}`, cursor: () => state.step,
      told: (value) => { const column = lastUpTo(run.steps, value); return `${when(run, column)}: ${text} ${size(known(run, name, row, column))}`; }, chosen: (value) => state.choose(run, run.steps[lastUpTo(run.steps, value)], row),
    })];
  }).filter(Boolean);
  return element("div", {}, ...parts.flatMap(([text, figure]) => [element("div", { class: "hint" }, text), figure]));
}
