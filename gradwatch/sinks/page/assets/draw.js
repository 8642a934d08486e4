// Elements, axes, heatmaps and lines. Text goes in as text and never as markup.
const LEFT = 150, RIGHT = 14;

function element(kind, attributes = {}, ...content) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...content.filter((part) => part !== undefined && part !== null));
  return made;
}

function shape(kind, attributes = {}, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Room for names at the left of a picture of some width. */
function margin(width) {
  return width < 520 ? 78 : LEFT;
}

/** A step -> where it stands; one step alone has all the width. */
function axis(run, width) {
  const left = margin(width), inside = width - left - RIGHT, span = Math.max(run.last - run.first, 0);
  const gap = span ? inside / (span + 1) : inside;
  return {
    left, inside,
    x: (step) => left + (step - run.first) * gap,
    step: (x) => Math.min(Math.max(Math.floor(run.first + (x - left) / gap), run.first), run.last),
  };
}

/** A name, or as much of its end as there is room for. */
function fitted(name, width, wide = (text) => text.length * 7.2) {
  let shown = name;
  while (wide(shown) > width && shown.length > 4) shown = `…${shown.slice(2)}`;
  return shown;
}

const tip = element("div", { class: "tip", hidden: true });

function point(event, text) {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8)}px`;
}

/** The rows of a heatmap that have their names written: those in `first` before others, so far apart as a name is high. */
function evenly(rows, first = []) {
  return (tall, line) => {
    const places = [], at = (row) => Math.min(Math.max((row + 0.5) * line, 7), tall - 7);
    const free = (row) => places.every((other) => Math.abs(at(row) - at(other)) >= 13);
    for (const row of [...first, ...Array.from({ length: rows }, (_, i) => i)]) if (free(row)) places.push(row);
    return places;
  };
}

/** Where columns end: where the next begins, but for a gap, far longer than is usual, in which nothing was measured. */
function columnEnds(steps, ends, last) {
  const apart = steps.slice(1).map((step, i) => step - steps[i]).sort((a, b) => a - b), usual = apart.length ? apart[apart.length >> 1] : 1;
  const longest = Math.max(50 * usual, (last - steps[0]) / 10);
  return steps.map((step, i) => {
    const next = i + 1 < steps.length ? steps[i + 1] : last + 1, own = (ends ? ends[i] : step) + 1;
    return next - own > longest ? own + 3 * usual : next;
  });
}

/**
 * A heatmap: rows by steps. `cell(row, column)` gives a level, or NaN for nothing; `lines` are drawn over it, each with
 * a value by column in rows. `.redraw()` draws what is chosen; the cells are drawn once for each size and colour scheme.
 */
function heatmap({ run, steps, ends, rows, height, cell, bounds, names, labelled = evenly(rows), marks = [], lines = [], told, chosen, selected, label, key }) {
  const canvas = element("canvas", { tabindex: 0, role: "img", "aria-label": label, "data-key": key });
  const figure = element("figure", {}, canvas), still = document.createElement("canvas");
  const tall = Math.round(height), axes = 24, until = columnEnds(steps, ends, run.last);
  let drawn = "", row = null;

  function cells(width, ratio, css) {
    const { left, inside, x } = axis(run, width), pen = still.getContext("2d"), line = tall / rows;
    still.width = width * ratio;
    still.height = (tall + axes) * ratio;
    pen.scale(ratio, ratio);
    for (let column = 0; column < steps.length; column++) {
      const from = Math.floor(x(steps[column])), wide = Math.max(Math.ceil(Math.min(x(until[column]), left + inside)) - from, 1);
      for (let at = 0; at < rows; at++) {
        const level = cell(at, column);
        if (Number.isNaN(level)) continue;
        const [r, g, b] = level === Infinity ? BROKEN : level === -Infinity ? NAUGHT : colour((level - bounds[0]) / (bounds[1] - bounds[0]));
        pen.fillStyle = `rgb(${r},${g},${b})`;
        pen.fillRect(from, Math.floor(at * line), wide, Math.ceil((at + 1) * line) - Math.floor(at * line));
      }
    }
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const at of labelled(tall, line)) {
      const grave = marks[at] === "error" || marks[at] === "warning";
      pen.fillStyle = css(grave ? `--${marks[at]}` : "--soft");
      pen.fillText((grave ? "▲ " : "") + fitted(names(at), left - (grave ? 28 : 14), (text) => pen.measureText(text).width), left - 12, Math.min(Math.max((at + 0.5) * line, 7), tall - 7));
    }
    marks.forEach((mark, at) => {
      if (!mark || mark === "info") return;
      pen.fillStyle = css(`--${mark}`);
      pen.fillRect(left - 4, Math.floor(at * line), 3, Math.max(Math.ceil(line), 2));
    });
    for (const { values, dashed, text } of lines) drawLine(pen, values, dashed, text, line, left, inside, x);
    pen.fillStyle = css("--soft");
    for (const step of ticks(run.first, run.last, inside / 90)) {
      if (!Number.isInteger(step)) continue;
      const words = step.toLocaleString("en"), half = pen.measureText(words).width / 2;
      pen.textAlign = "center";
      pen.fillText(words, Math.min(Math.max(x(step), left + half), left + inside - half), tall + 13);
    }
  }

  function drawLine(pen, values, dashed, text, line, left, inside, x) {
    pen.beginPath();
    let open = false;
    values.forEach((value, column) => {
      if (value === null || value === undefined) { open = false; return; }
      const y = Math.min(Math.max(value * line, 1), tall - 1), from = x(steps[column]), to = Math.min(x(until[column]), left + inside);
      if (open) pen.lineTo(from, y); else pen.moveTo(from, y);
      pen.lineTo(to, y);
      open = true;
    });
    for (const [stroke, thick] of [["#000000", 4], ["#ffffff", 2]]) {
      pen.setLineDash(dashed ? [7, 5] : []);
      pen.lineWidth = thick;
      pen.strokeStyle = stroke;
      pen.stroke();
    }
    pen.setLineDash([]);
    const last = values.findLast((value) => value !== null && value !== undefined);
    if (!text || last === undefined) return;
    const y = Math.min(Math.max(last * line - 9, 9), tall - 8), wide = pen.measureText(text).width + 8;
    pen.textAlign = "right";
    pen.fillStyle = "#000000";
    pen.fillRect(left + inside - wide - 4, y - 8, wide, 16);
    pen.fillStyle = "#ffffff";
    pen.fillText(text, left + inside - 8, y);
  }

  function redraw() {
    const width = figure.clientWidth || 600, ratio = window.devicePixelRatio || 1, { left, inside, x } = axis(run, width);
    const style = getComputedStyle(canvas), css = (name) => style.getPropertyValue(name).trim(), look = `${width} ${ratio} ${css("--ink")}`;
    if (drawn !== look) { cells(width, ratio, css); drawn = look; }
    canvas.width = width * ratio;
    canvas.height = (tall + axes) * ratio;
    canvas.style.height = `${tall + axes}px`;
    const pen = canvas.getContext("2d"), now = selected(), line = tall / rows;
    pen.drawImage(still, 0, 0);
    pen.scale(ratio, ratio);
    const at = now.row ?? row;
    for (const [stroke, thick] of [["#000000", 3], ["#ffffff", 1]]) {
      pen.strokeStyle = stroke;
      pen.lineWidth = thick;
      if (now.step !== null) { pen.beginPath(); pen.moveTo(x(now.step), 0); pen.lineTo(x(now.step), tall); pen.stroke(); }
      if (at !== null && line >= 8) pen.strokeRect(left, at * line, inside, line);
    }
    if (at !== null) {  // a row may be too low for a frame: it is pointed at from both sides
      pen.fillStyle = css("--mark");
      for (const [tip, base] of [[left, left - 9], [left + inside, left + inside + 9]]) {
        pen.beginPath();
        pen.moveTo(tip, (at + 0.5) * line);
        pen.lineTo(base, (at + 0.5) * line - 6);
        pen.lineTo(base, (at + 0.5) * line + 6);
        pen.fill();
      }
    }
  }

  function found(event) {
    const box = canvas.getBoundingClientRect(), place = axis(run, box.width), px = event.clientX - box.left, py = event.clientY - box.top;
    if (px < 0 || py < 0 || py >= tall || !steps.length) return null;
    return { column: lastUpTo(steps, place.step(px)), row: Math.min(Math.floor(py / (tall / rows)), rows - 1) };
  }

  canvas.addEventListener("pointermove", (event) => { const hit = found(event); point(event, hit && told(hit.row, hit.column)); });
  canvas.addEventListener("pointerleave", (event) => point(event, ""));
  canvas.addEventListener("click", (event) => { const hit = found(event); if (hit) { row = hit.row; chosen(hit.row, hit.column); } });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] }[event.key];
    if (!move || !steps.length) return;
    event.preventDefault();
    const now = selected(), from = now.step === null ? steps.length - 1 : lastUpTo(steps, now.step);
    row = Math.min(Math.max((now.row ?? row ?? 0) + move[0], 0), rows - 1);
    chosen(row, Math.min(Math.max(from + move[1], 0), steps.length - 1));
  });
  return Object.assign(figure, { redraw });
}

/** Lines over steps or lags in one frame: each with a name, a colour, points [x, y] and perhaps a band [x, low, high]. */
function lines({ series, height, left, xs, ys, xticks, yticks, xwords, ywords, cursor, told, chosen, verticals = [], label }) {
  const svg = shape("svg", { role: "img", "aria-label": label });
  const figure = element("figure", {}, svg);
  function redraw() {
    const width = figure.clientWidth || 600, start = left(width), inside = width - start - RIGHT, tall = height;
    svg.setAttribute("viewBox", `0 0 ${width} ${tall + 22}`);
    svg.style.height = `${tall + 22}px`;
    const x = (value) => start + (inside * (value - xs[0])) / Math.max(xs[1] - xs[0], 1e-9), y = (value) => tall - ((tall - 6) * (Math.min(Math.max(value, ys[0]), ys[1]) - ys[0])) / Math.max(ys[1] - ys[0], 1e-9);
    svg.replaceChildren();
    for (const value of yticks(tall)) {
      svg.append(shape("line", { class: "axis", x1: start, x2: start + inside, y1: y(value), y2: y(value) }), shape("text", { x: start - 6, y: y(value) + 4, "text-anchor": "end" }, ywords(value)));
    }
    for (const value of xticks(inside)) {
      const words = xwords(value), half = words.length * 3.4;
      svg.append(shape("text", { x: Math.min(Math.max(x(value), start + half), start + inside - half), y: tall + 17, "text-anchor": "middle" }, words));
    }
    for (const { at, name, dashed } of verticals) {
      const turned = x(at) + 4 + name.length * 7 > start + inside;  // the name stands where there is room for it
      svg.append(shape("line", { x1: x(at), x2: x(at), y1: 0, y2: tall, stroke: "currentColor", "stroke-dasharray": dashed ? "6 4" : "none" }), shape("text", { class: "strong", x: x(at) + (turned ? -4 : 4), y: dashed ? 24 : 11, "text-anchor": turned ? "end" : "start" }, name));
    }
    for (const { colour: stroke, points: all, band = [], dashed } of series) {
      const points = all.filter(([, value]) => Number.isFinite(value)), gap = ([, value]) => !Number.isFinite(value);
      if (band.length) svg.append(shape("path", { class: "band", fill: stroke, d: `M${[...band.map(([at, , high]) => `${x(at)},${y(high)}`), ...band.toReversed().map(([at, low]) => `${x(at)},${y(low)}`)].join("L")}Z` }));
      let path = "", open = false;
      for (const one of all) {  // what is no size breaks the line, and has a mark of its own
        if (gap(one)) { open = false; continue; }
        path += `${open ? "L" : "M"}${x(one[0])},${y(one[1])}`;
        open = true;
      }
      if (path) svg.append(shape("path", { class: "series", stroke, "stroke-dasharray": dashed ? "5 3" : "none", d: path }));
      for (const [at, value] of dashed ? [] : all) {
        if (value === -Infinity) svg.append(shape("rect", { class: "naught", x: x(at) - 3, y: tall - 6, width: 6, height: 6 }));
        if (value === Infinity) svg.append(shape("rect", { x: x(at) - 3, y: 0, width: 6, height: 6, fill: `rgb(${BROKEN})` }));
      }
      if (points.length === 1) svg.append(shape("circle", { cx: x(points[0][0]), cy: y(points[0][1]), r: 3, fill: stroke }));
    }
    const now = cursor && cursor();
    if (now !== null && now !== undefined) svg.append(shape("line", { x1: x(now), x2: x(now), y1: 0, y2: tall, stroke: "currentColor", "stroke-width": 1.3 }));
    svg.onpointermove = (event) => {
      const box = svg.getBoundingClientRect(), value = xs[0] + ((event.clientX - box.left - start) / inside) * (xs[1] - xs[0]);
      point(event, value >= xs[0] && value <= xs[1] ? told(value) : "");
    };
    svg.onpointerleave = (event) => point(event, "");
    svg.onclick = (event) => {
      const box = svg.getBoundingClientRect();
      if (chosen) chosen(xs[0] + ((event.clientX - box.left - start) / inside) * (xs[1] - xs[0]));
    };
  }
  return Object.assign(figure, { redraw });
}

function scaleLegend(bounds, unit, extras = []) {
  const strip = element("canvas", { width: 150, height: 11, "aria-hidden": "true" }), pen = strip.getContext("2d");
  for (let i = 0; i < 150; i++) { pen.fillStyle = `rgb(${colour(i / 149)})`; pen.fillRect(i, 0, 1, 11); }
  const swatch = ([name, rgb]) => { const mark = element("i"); mark.style.background = `rgb(${rgb})`; return element("span", {}, mark, name); };
  return element("div", { class: "legend" }, element("span", {}, `${unit}, on a log scale: ${size(bounds[0])} `), strip, element("span", {}, ` ${size(bounds[1])}`), ...extras.map(swatch));
}
