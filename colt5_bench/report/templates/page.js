const data = JSON.parse(document.getElementById("data").textContent);

/** An element with its properties and children. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/* Plots that are drawn, of all that there are. On paper every one is, dark on light, and as wide as the paper. */

const figures = [], drawn = new Set();

onTheme.push(() => drawn.forEach((figure) => figure.draw()));
onPrinting.push(() => figures.forEach((figure) => drawn.add(figure)));

/* Plots: a card is drawn when it comes near the window, and anew when a choice or the theme changes. */

/** Plotly takes longer to load than all else together: it comes when there is something to draw. */
function loadPlotly() {
  if (!window.Plotly) document.head.append(make("script", { textContent: find("#plotly").textContent }));
}

const INK = "#000000";

/** Only these buttons, as plotly has others that upload what is shown; and no address that anything could be sent to. */
const CONFIG = {
  responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", topojsonURL: "about:blank",
  modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  toImageButtonOptions: { format: "svg" },
};

/** Of a plot on paper, in pixels: it has no window to go by. */
const PRINTED = 640;

function themed(layout) {
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const ink = colour("--ink");
  const grid = { gridcolor: colour("--grid") };
  const lines = { ...grid, linecolor: colour("--line"), zeroline: false, automargin: true };
  const axis = (own) => ({ ...own, ...lines, ...(own.minor ? { minor: { ...own.minor, ...grid } } : {}) });
  return {
    ...layout, ...(printing ? { width: PRINTED } : {}), xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
    font: { color: ink, size: 12, family: getComputedStyle(document.body).fontFamily },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 50, r: 14, t: 26, b: 44 },
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", xref: "container", x: 0 },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: ink }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--quiet"), activecolor: ink },
  };
}

/** Black would be lost on dark. */
function inked(trace) {
  if (trace.line?.color !== INK) return trace;
  const color = getComputedStyle(root).getPropertyValue("--ink").trim();
  return { ...trace, line: { ...trace.line, color }, marker: { ...trace.marker, color } };
}

function makeCard(card, chosen) {
  const plot = make("div");
  plot.setAttribute("role", "img");
  plot.style.minHeight = `${Math.max(...card.drawings.map((drawing) => drawing.layout.height))}px`;
  const caption = make("figcaption", {}, make("h3", { textContent: card.title }), make("p", { textContent: card.note }));
  const broad = card.drawings[0].data[0].type === "heatmap";
  const figure = make("figure", { className: broad ? "card broad" : "card" }, caption, make("div", { className: "plot" }, plot));
  const fits = (drawing) => Object.entries(drawing.when).every(([name, value]) => chosen[name] === value);
  figure.draw = () => {
    loadPlotly();
    drawn.add(figure);
    const drawing = card.drawings.find(fits);
    plot.setAttribute("aria-label", [card.title, ...Object.values(drawing?.when ?? {})].join(", "));
    if (drawing) {
      find(".nothing", plot)?.remove();
      Plotly.react(plot, drawing.data.map(inked), themed(drawing.layout), CONFIG);
    } else {
      Plotly.purge(plot);
      plot.replaceChildren(make("p", { className: "nothing", textContent: "Nothing was measured here." }));
    }
  };
  return figure;
}

/** A labelled list to choose from; `null` stands for all. */
function makeChoice(name, values, onChange, all) {
  const options = values.map((value) => new Option(value));
  const select = make("select", {}, ...(all ? [new Option("all", "")] : []), ...options);
  select.addEventListener("change", () => onChange(select.value));
  return make("label", { textContent: name }, select);
}

const near = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((each) => each.isIntersecting)) {
    near.unobserve(entry.target);
    entry.target.draw();
  }
}, { rootMargin: "300px" });

for (const [suite, cards] of Object.entries(data.suites)) {
  const section = document.getElementById(`suite-${suite}`);
  const choices = new Map();
  for (const [name, value] of cards.flatMap((card) => card.drawings.flatMap((drawing) => Object.entries(drawing.when)))) {
    choices.set(name, (choices.get(name) ?? new Set()).add(value));
  }
  const chosen = Object.fromEntries([...choices].map(([name, values]) => [name, [...values][0]]));
  const own = cards.map((card) => makeCard(card, chosen));
  const choose = (name) => (value) => {
    chosen[name] = value;
    own.filter((figure) => drawn.has(figure)).forEach((figure) => figure.draw());
  };
  const several = [...choices].filter(([, values]) => values.size > 1);
  find(".choices", section).append(...several.map(([name, values]) => makeChoice(name, [...values], choose(name))));
  find(".cards", section).append(...own);
  own.forEach((figure) => near.observe(figure));
  figures.push(...own);
}

/* Records: filtered, sorted, and shown a hundred at a time. */

const PAGE = 100;
const headings = [...document.querySelectorAll("#table thead th[aria-sort]")];
const CASE = 2, STATUS = 4, MEASURED = headings.length - 1;
const COMMON = [0, 1, 3, STATUS, MEASURED];
const numeric = headings.map((heading) => heading.classList.contains("number"));
const texts = data.rows.map((row, at) => [...row.slice(0, STATUS + 1), row[MEASURED], data.details[at].case, data.details[at].reason].join(" ").toLowerCase());
const state = { words: [], equal: new Map(), sort: null, down: false, shown: PAGE };

/** A figure with an interval is a pair of it and of how it is said: it is sorted by the one and shown as the other. */
const amount = (cell) => Array.isArray(cell) ? cell[0] : cell;

/** Three digits, and all of those before the point. */
function short(value) {
  if (Array.isArray(value)) return value[1];
  if (typeof value !== "number") return value ?? "-";
  const size = Math.abs(value);
  if (size >= 100) return Math.round(value).toLocaleString("en");
  return size >= 1e-3 || size === 0 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

/** Numbers by size, then what is none (NaN), and at the end, whatever the direction, what is not there. */
function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  const sign = state.down ? -1 : 1;
  if (typeof a !== typeof b) return sign * ((typeof a === "string") - (typeof b === "string"));
  return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
}

function selected() {
  const sorted = [...data.rows.keys()].filter((at) =>
    state.words.every((word) => texts[at].includes(word)) &&
    [...state.equal].every(([column, value]) => data.rows[at][column] === value));
  if (state.sort !== null) sorted.sort((a, b) => compare(amount(data.rows[a][state.sort]), amount(data.rows[b][state.sort])) || a - b);
  return sorted;
}

function makeCopy(command) {
  const button = make("button", { type: "button", className: "copy", textContent: "Copy" });
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(command);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}

function makeRow(at) {
  const row = make("tr");
  row.addEventListener("click", (event) => {
    // Whoever copies, or marks text, wants no record to open.
    if (!event.target.closest(".copy") && !String(getSelection())) openRecord(at);
  });
  data.rows[at].forEach((value, column) => {
    const cell = row.insertCell();
    if (numeric[column]) Object.assign(cell, { className: "number", title: amount(value) ?? "", textContent: short(value) });
    else if (column === CASE) {
      // By this the keyboard opens the row: what it clicks is in the row.
      cell.append(make("button", { type: "button", className: "open", textContent: value || "all fields" }));
    } else cell.textContent = value;
    if (column === STATUS) Object.assign(cell, { className: `status-${value.split(" ")[0]}`, title: data.details[at].reason });
  });
  const { command } = data.details[at];
  const cell = make("td", { className: "command" }, makeCopy(command), make("code", { textContent: command, title: command }));
  row.append(cell);
  return row;
}

function show() {
  const places = selected();
  const shown = places.slice(0, state.shown);
  find("#table tbody").replaceChildren(...shown.map(makeRow));
  const of = places.length < data.rows.length ? ` of ${data.rows.length.toLocaleString("en")}` : "";
  const part = shown.length < places.length ? `, the first ${shown.length} shown` : "";
  find("#count").textContent = `${places.length.toLocaleString("en")}${of} records${part}`;
  find(".more").hidden = shown.length === places.length;
}

function restart() {
  state.shown = PAGE;
  show();
}

headings.forEach((heading, column) => find("button", heading).addEventListener("click", () => {
  Object.assign(state, { down: state.sort === column && !state.down, sort: column });
  headings.forEach((each) => each.setAttribute("aria-sort", each === heading ? (state.down ? "descending" : "ascending") : "none"));
  restart();
}));

for (const column of COMMON) {
  const values = [...new Set(data.rows.map((row) => row[column]))];
  const choose = (value) => { value ? state.equal.set(column, value) : state.equal.delete(column); restart(); };
  if (values.length > 1) find("#filters").append(makeChoice(headings[column].textContent, values, choose, true));
}
find("#filters").addEventListener("submit", (event) => event.preventDefault());
find("#words").addEventListener("input", (event) => {
  state.words = wordsOf(event.target.value);
  restart();
});
find("#more").addEventListener("click", () => { state.shown += PAGE; show(); });
find("#all").addEventListener("click", () => { state.shown = Infinity; show(); });
show();

/* One record. */

function makeTable({ title, head, rows }) {
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { textContent: name })))));
  for (const row of rows) {
    const cells = row.map((value) => make("td", { textContent: short(value), title: value ?? "", className: typeof value === "number" ? "number" : "" }));
    table.append(make("tr", {}, ...cells));
  }
  return [make("h3", { textContent: title }), make("div", { className: "scroll", tabIndex: 0 }, table)];
}

function openRecord(at) {
  const record = data.details[at];
  const [suite, implementation, , direction, status] = data.rows[at];
  const measured = make("p", { className: "lead", textContent: data.rows[at][MEASURED] });
  find("#record-title").textContent = `${suite} · ${implementation} · ${direction}`;
  const ending = make("p", { className: `status-${status.split(" ")[0]}`, textContent: [status, record.reason].filter(Boolean).join(": ") });
  const command = make("pre", {}, make("code", { textContent: record.command }));
  find("#record-body").replaceChildren(ending, measured, command, makeCopy(record.command), ...record.sections.flatMap(makeTable));
  find("#record").showModal();
}
