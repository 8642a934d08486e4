// What the data say: codes to numbers, numbers to words, numbers to colours. Nothing here draws.
const LOWEST = -46, STEPS_A_DECADE = 700, NONE = 65535, NOT_FINITE = 65534;
const GAIN_FLOOR = -12, GAIN_STEPS = 20, GAIN_ZERO = 253, GAIN_NOT_FINITE = 254, GAIN_NONE = 255;

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** Codes of sizes -> log10 of each: NaN where there is no number, -Infinity for 0, Infinity for what is not finite. */
function levels(text) {
  const raw = bytes(text), found = new Float64Array(raw.length / 2);
  for (let i = 0; i < found.length; i++) {
    const code = raw[2 * i] + 256 * raw[2 * i + 1];
    found[i] = code === NONE ? NaN : code === NOT_FINITE ? Infinity : code === 0 ? -Infinity : code / STEPS_A_DECADE + LOWEST;
  }
  return found;
}

/** Codes of a gain by lag -> log10 of its share of the maximum. */
function gains(text) {
  return Array.from(bytes(text), (code) => code === GAIN_NONE ? NaN : code === GAIN_NOT_FINITE ? Infinity : code === GAIN_ZERO ? -Infinity : code / GAIN_STEPS + GAIN_FLOOR);
}

/** A size, from its log10, in words. */
function size(level) {
  if (Number.isNaN(level)) return "none";
  if (level === -Infinity) return "exactly 0";
  if (level === Infinity) return "not finite";
  const exponent = Math.floor(level), value = 10 ** (level - exponent);
  return exponent >= -2 && exponent < 4 ? String(Number((10 ** level).toPrecision(3))) : `${value.toFixed(2)}e${exponent}`;
}

/** A share of the largest gain, from its log10, in words. */
function share(level) {
  return level === GAIN_FLOOR ? "less than 1e-12" : size(level);
}

/** Which steps a column stands for. */
function when(run, column) {
  const from = run.steps[column], to = run.ends[column];
  return from === to ? `step ${from.toLocaleString("en")}` : `steps ${from.toLocaleString("en")} to ${to.toLocaleString("en")}, median`;
}

function number(value) {
  if (value === null || value === undefined) return "none";
  if (value === "inf") return "not finite";
  const big = Math.abs(value);
  return big !== 0 && (big < 1e-2 || big >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

/** Cividis, which looks the same to the colour-blind: dark is little, bright is much. */
const CIVIDIS = [[0, 32, 76], [0, 42, 102], [31, 56, 109], [66, 71, 109], [91, 86, 112], [113, 102, 116], [136, 118, 119], [160, 135, 117], [186, 154, 109], [213, 174, 94], [240, 196, 70], [255, 233, 69]];
const NAUGHT = [0, 0, 0], BROKEN = [214, 39, 118];

function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1), below = Math.min(Math.floor(at), CIVIDIS.length - 2);
  return CIVIDIS[below].map((from, i) => Math.round(from + (CIVIDIS[below + 1][i] - from) * (at - below)));
}

/** From the smallest to the largest of many levels, but for the outermost thousandth at each end: never less than 3. */
function range(rows) {
  const known = [];
  for (const row of rows) for (const level of row) if (Number.isFinite(level)) known.push(level);
  if (!known.length) return [-3, 0];
  known.sort((a, b) => a - b);
  const low = known[Math.floor(known.length * 0.001)], high = known[Math.ceil(known.length * 0.999) - 1];
  return [Math.floor(Math.min(low, high - 3)), Math.ceil(high)];
}

/** Round numbers between two others. */
function ticks(from, to, most) {
  const span = to - from;
  if (!(span > 0)) return [from];
  const rough = span / Math.max(most, 1), unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * unit).find((width) => width >= rough);
  const found = [];
  for (let at = Math.ceil(from / step - 1e-9) * step; at <= to + 1e-9 * span; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

/** The last of sorted numbers that is not above one; the first if all are. */
function lastUpTo(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (sorted[middle] <= value) low = middle; else high = middle - 1;
  }
  return low;
}

/** A run as it came -> one whose numbers can be drawn. */
function readRun(raw) {
  const columns = {};
  for (const [name, rows] of Object.entries(raw.columns)) columns[name] = rows.map(levels);
  return {
    ...raw, columns, norm: raw.norm.map(levels),
    sequences: raw.sequences.map((one) => ({ ...one, gain: one.gain.map(gains) })),
    // What is wrong through time is not seen in a layer's gradient, and is marked in its own picture.
    marks: raw.layers.map((_, row) => ["error", "warning"].find((severity) => raw.alerts.some((a) => !a.code.startsWith("GW3") && a.severity === severity && a.rows.includes(row)))),
    gravest: raw.layers.map((_, row) => ["error", "warning", "info"].find((severity) => raw.alerts.some((a) => a.severity === severity && a.rows.includes(row)))),
  };
}
