// The same page within TensorBoard: its runs, read again while they grow. Follows read.js, draw.js, panels.js, main.js.

const EVERY = 5000, SOON = 700, MOST = 4;

/** TensorBoard calls this in the frame that it makes for the plugin. */
export async function render() {
  const here = (name) => new URL(name, import.meta.url);
  document.head.append(element("link", { rel: "stylesheet", href: here("page.css").href }), element("meta", { name: "viewport", content: "width=device-width, initial-scale=1" }));
  document.documentElement.lang = "en";
  const chosen = new Set(), offered = new Set(), box = element("div", { class: "controls", role: "group", "aria-label": "Runs" }), root = element("div"), status = element("p", { class: "notes", role: "status" });
  document.body.replaceChildren(element("main", { id: "gradwatch" }, box, status, root));
  let update = null, shown = "", stamp = "", waiting = 0;

  async function asked(name, query = "") {
    const answer = await fetch(`${here(name)}${query}`);
    if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
    return answer.json();
  }

  function boxes(runs) {
    box.replaceChildren(...runs.map((name) => {
      const tick = element("input", { type: "checkbox", checked: chosen.has(name), onchange: () => { if (tick.checked) chosen.add(name); else chosen.delete(name); again(0); } });
      return element("label", {}, tick, ` ${name}`);
    }));
  }

  async function look() {
    try {
      const { runs } = await asked("runs");
      if (JSON.stringify(runs) !== shown) {
        for (const name of runs) {  // the first few are shown, also those that come later; what was unticked stays so
          if (!offered.has(name) && chosen.size < MOST) chosen.add(name);
          offered.add(name);
        }
        shown = JSON.stringify(runs);
        boxes(runs);
      }
      if (!runs.length) { status.textContent = "No run of gradwatch below this log directory yet: gradwatch.watch(model, optimizer, logdir=...) writes one."; return EVERY; }
      const names = runs.filter((name) => chosen.has(name)), data = await asked("data", `?${names.map((name) => `run=${encodeURIComponent(name)}`).join("&")}`);
      if (data.format !== FORMAT) { status.textContent = "TensorBoard runs another version of gradwatch: reload this page."; return EVERY; }
      if (!names.length) status.textContent = "Tick a run to see it.";
      else status.textContent = data.reading.length ? `reading ${data.reading.join(", ")} …` : "";
      if (data.stamp !== stamp) {
        stamp = data.stamp;
        if (update) update(data); else if (data.runs.length) update = show(root, data);
      }
      return data.reading.length ? SOON : EVERY;
    } catch (error) {
      status.textContent = `TensorBoard does not answer: ${error.message}`;
      return EVERY;
    }
  }

  function again(soon) {
    clearTimeout(waiting);
    waiting = setTimeout(async () => { const next = document.hidden ? EVERY : await look(); again(next); }, soon);
  }
  again(0);
}
