"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const COLOURS = ["#3b82c4", "#e07b39", "#3f9b5b", "#c94f5c", "#8d6cc0", "#8c6a55", "#cf6fb0", "#7d868f", "#a9a032", "#35a7b5"];

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "circle", "line", "text"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Pictures and curves lie in chunks of text, one line each, and are split when first asked for.
const chunks = new Map();
function line(kind, number) {
  const id = `${kind}-${Math.floor(number / data.chunk)}`;
  if (!chunks.has(id)) chunks.set(id, find(id).textContent.split("\n"));
  return chunks.get(id)[number % data.chunk];
}

// Boards: sort, find, pick columns

const MISSING = ["", "-"];
function compare(first, second, sign) {
  if (MISSING.includes(first) || MISSING.includes(second)) return MISSING.includes(first) - MISSING.includes(second);
  const [left, right] = [first, second].map((text) => parseFloat(text.replaceAll(",", "")));
  const bothNumbers = !Number.isNaN(left) && !Number.isNaN(right);
  return sign * (bothNumbers ? left - right : first.localeCompare(second));
}

// The state of the page stands in its address, so that a link shows what was seen.

const address = new URLSearchParams(location.search);
function remember(name, value) {
  if (value === "" || value === null) address.delete(name);
  else address.set(name, value);
  const text = address.toString();
  try { history.replaceState(null, "", `${text ? `?${text}` : location.pathname}${location.hash}`); } catch { /* a file that may not */ }
}
function restored(field, name) {
  if (address.has(name)) field.value = address.get(name);
  field.addEventListener(field.tagName === "SELECT" ? "change" : "input", () => remember(name, field.value));
}

function sortable(table, name) {
  const headings = [...table.tHead.rows[0].cells];
  const sort = (heading, order) => {
    const place = heading.cellIndex;
    headings.forEach((each) => each.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", order);
    const text = (row) => row.cells[place].textContent;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => compare(text(a), text(b), order === "ascending" ? 1 : -1));
    table.tBodies[0].append(...rows);
  };
  for (const heading of headings) {
    heading.firstChild.addEventListener("click", () => {
      const next = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      sort(heading, next);
      remember(`${name}.sort`, `${heading.dataset.key} ${next}`);
    });
  }
  const [key, order] = (address.get(`${name}.sort`) ?? "").split(" ");
  const known = headings.find((each) => each.dataset.key === key);
  if (known && ["ascending", "descending"].includes(order)) sort(known, order);
}

function searchable(table, tools, name) {
  const [words, lost] = [tools.querySelector(".find"), tools.querySelector(".lost")];
  const look = () => {
    const wanted = words.value.toLowerCase().split(/\s+/);
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      const price = parseFloat(row.dataset.lost);
      row.hidden = !wanted.every((word) => text.includes(word)) || (Boolean(lost?.value) && !(price <= Number(lost.value)));
    }
  };
  for (const [field, what] of [[words, "find"], [lost, "lost"]]) {
    if (!field) continue;
    restored(field, `${name}.${what}`);
    field.addEventListener("input", look);
  }
  look();
}

function pickable(table, fieldset) {
  const narrow = window.innerWidth < 640;
  [...table.tHead.rows[0].cells].forEach((heading, place) => {
    const box = make("input", { type: "checkbox" });
    const show = () => { for (const row of table.rows) row.cells[place].hidden = !box.checked; };
    // The order of the lines says on a phone what the rank would.
    box.checked = narrow ? Number(heading.dataset.rank) <= 1 && heading.dataset.key !== "rank" : Number(heading.dataset.rank) <= 3;
    box.addEventListener("change", show);
    show();
    fieldset.append(make("label", {}, box, ` ${heading.textContent}`));
  });
}

function quoted(text) {
  const safe = /^[=+@-]/.test(text) && Number.isNaN(Number(text)) && text !== "-" ? `'${text}` : text;
  return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}
function shownCsv(table) {
  const rows = [...table.rows].filter((row) => !row.hidden);
  return rows.map((row) => [...row.cells].filter((cell) => !cell.hidden).map((cell) => quoted(cell.textContent)).join(",")).join("\n");
}
function download(name, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([`${text}\n`], { type: "text/csv" })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

for (const table of document.querySelectorAll("table.board")) {
  const tools = table.parentElement.previousElementSibling;
  const name = tools.dataset.state;
  sortable(table, name);
  searchable(table, tools, name);
  pickable(table, tools.querySelector("fieldset"));
  tools.querySelector(".csv").addEventListener("click", () => download(`${name}.csv`, shownCsv(table)));
}

const context = find("context");
if (context) {
  const show = () => {
    document.querySelectorAll(".context").forEach((each, place) => { each.hidden = place !== Number(context.value); });
  };
  restored(context, "context");
  context.addEventListener("change", show);
  show();
}

// Cells: a filter, the heat map, the pictures, the curves

const FIELDS = Object.keys(data.levels);
const form = find("filter");
for (const name of FIELDS) {
  data.levels[name].forEach((label, number) => form.elements[name].append(make("option", { value: number }, label)));
  const number = data.levels[name].indexOf(address.get(name));
  if (number >= 0) form.elements[name].value = number;
}

// A line of `data.cells` and of `data.entries` starts with the numbers of its labels, in the order of FIELDS.
function chosen(lines, but = []) {
  const wanted = FIELDS.map((name) => (but.includes(name) || form.elements[name].value === "" ? null : Number(form.elements[name].value)));
  return lines.filter((each) => wanted.every((value, place) => value === null || each[place] === value));
}
const label = (each, name) => data.levels[name][each[FIELDS.indexOf(name)]];
const attackOf = (each) => {
  const knowledge = label(each, "knowledge");
  return label(each, "attack") + (knowledge === "oblivious" ? "" : ` (${knowledge})`);
};
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function choose(labels) {
  for (const [name, text] of Object.entries(labels)) {
    const number = data.levels[name].indexOf(text);
    if (number >= 0) form.elements[name].value = number;
  }
  refresh();
}

function drawHeat() {
  const [attack, knowledge, defense] = ["attack", "knowledge", "defense"].map((name) => FIELDS.indexOf(name));
  const sums = new Map();
  const lines = new Map();
  const columns = new Set();
  for (const each of chosen(data.entries, ["seed"])) {
    const value = each[FIELDS.length];
    const key = `${each[attack]}/${each[knowledge]}`;
    lines.set(key, each);
    columns.add(each[defense]);
    const place = `${key}/${each[defense]}`;
    if (value !== null) sums.set(place, [...(sums.get(place) ?? []), value]);
  }
  const order = [...columns].sort((a, b) => a - b);
  const head = make("tr", {}, make("th"), ...order.map((number) => make("th", { scope: "col" }, data.levels.defense[number])));
  const sorted = [...lines.entries()].sort(([, a], [, b]) => a[attack] - b[attack] || a[knowledge] - b[knowledge]);
  const body = sorted.map(([key, each]) => make("tr", {}, make("th", { scope: "row" }, attackOf(each)), ...order.map((number) => {
    const values = sums.get(`${key}/${number}`);
    if (!values) return make("td");
    const value = mean(values);
    const heat = Math.min(1, Math.max(0, (value - 5) / 30)).toFixed(2);
    const names = { attack: label(each, "attack"), knowledge: label(each, "knowledge"), defense: data.levels.defense[number] };
    const tip = `${attackOf(each)} against ${names.defense}\n${value.toFixed(2)} dB, mean over ${values.length} contexts`;
    const button = make("button", { type: "button", tabindex: -1, "aria-label": tip, style: `--heat:${heat}`, "data-tip": tip }, value.toFixed(1));
    button.addEventListener("click", () => { choose(names); find("gallery").scrollIntoView(); });
    return make("td", {}, button);
  })));
  const table = document.querySelector("table.heat");
  table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
  table.querySelector("button")?.setAttribute("tabindex", 0);
}

// One cell of the heat map is a tab stop; arrows, Home and End move it.
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] };
function move(event) {
  const from = event.target.closest("td");
  if (!from || !MOVES[event.key]) return;
  event.preventDefault();
  const [down, right] = MOVES[event.key];
  const rows = [...from.closest("tbody").rows];
  let [line, column] = [from.parentElement.rowIndex - 1, from.cellIndex];
  const last = rows[0].cells.length - 1;
  let step = right;
  if (Math.abs(right) === Infinity) [column, step] = right < 0 ? [0, 1] : [last + 1, -1];
  do {
    [line, column] = [line + down, column + step];
  } while (rows[line]?.cells[column] && !rows[line].cells[column].querySelector("button"));
  focusCell(from.firstChild, rows[line]?.cells[column]?.querySelector("button"));
}
function focusCell(from, to) {
  if (!to) return;
  from.setAttribute("tabindex", -1);
  to.setAttribute("tabindex", 0);
  to.focus();
}
document.querySelector("table.heat").addEventListener("keydown", move);

const [MEAN, FAILED, IMAGES, PICKS, NUMBER] = [0, 1, 2, 3, 4].map((place) => FIELDS.length + place);
const STEP = 12;
let shown = [];

function image(text, description) {
  return text ? make("img", { src: `data:image/webp;base64,${text}`, alt: description }) : make("span", {}, "none");
}

function card(each) {
  const pictures = line("pictures", each[NUMBER]).split(" ");
  const pairs = each[PICKS].map(([truth, value, status], place) => {
    const share = `${100 * data.quantiles[place]} %`;
    const pair = make("div", { class: "pair" },
      image(truth < 0 ? "" : line("truths", truth), `truth at the ${share} quantile`),
      image(pictures[place], `reconstruction at the ${share} quantile`));
    const exact = value >= data.exact ? " (pixel-exact)" : "";
    const caption = `${share}: ${value === null ? "-" : `${value.toFixed(1)} dB${exact}`}${status === "ok" ? "" : `, ${status}`}`;
    return make("figure", {}, pair, make("figcaption", {}, caption));
  });
  const psnr = each[MEAN] === null ? "-" : `${each[MEAN].toFixed(1)} dB`;
  const failed = each[FAILED] ? `, ${each[FAILED]} failed` : "";
  const place = ["model", "dataset", "setting"].map((name) => label(each, name)).join(" · ");
  return make("article", {},
    make("h4", {}, `${attackOf(each)} against ${label(each, "defense")}`),
    make("p", {}, `${place} · seed ${label(each, "seed")} · mean ${psnr} over ${each[IMAGES]} images${failed}`),
    make("div", { class: "pictures" }, ...pairs));
}

function drawCards() {
  shown = chosen(data.cells);
  const order = find("order").value;
  if (order !== "given") shown.sort((a, b) => (order === "high" ? b[MEAN] - a[MEAN] : a[MEAN] - b[MEAN]));
  find("count").textContent = `${shown.length} of ${data.cells.length} cells`;
  find("cards").replaceChildren();
  more();
}

function more() {
  const there = find("cards").childElementCount;
  find("cards").append(...shown.slice(there, there + STEP).map(card));
  find("more").hidden = find("cards").childElementCount >= shown.length;
}

function drawCurves() {
  const lines = [];
  for (const each of chosen(data.cells)) {
    if (lines.length === COLOURS.length) break;
    const losses = line("curves", each[NUMBER]).split(" ").filter(Boolean).map(Number);
    if (losses.length < 2 || !(losses[0] > 0)) continue;
    const name = `${attackOf(each)} against ${label(each, "defense")} · ${label(each, "model")} · ${label(each, "dataset")} · ${label(each, "setting")} · seed ${label(each, "seed")}`;
    lines.push({ name, points: losses.map((loss, place) => [place / (losses.length - 1), Math.max(loss / losses[0], 1e-12)]) });
  }
  if (!lines.length) return find("curves").replaceChildren(make("p", {}, "None of the chosen cells kept a curve."));
  const { svg, x, y } = axes(lines.flatMap((each) => each.points), "share of the iterations", "loss / first loss", { logY: true });
  lines.forEach((each, place) => {
    const path = each.points.map(([a, b], step) => `${step ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
    svg.append(make("path", { class: "curve", d: path, stroke: COLOURS[place], "data-tip": each.name, tabindex: 0 }));
  });
  find("curves").replaceChildren(svg, legend(lines.map((each) => each.name)));
}

function refresh() {
  for (const name of FIELDS) {
    const { value } = form.elements[name];
    remember(name, value === "" ? "" : data.levels[name][value]);
  }
  drawHeat();
  drawCards();
  drawCurves();
}

form.addEventListener("change", refresh);
form.addEventListener("reset", () => setTimeout(refresh));
restored(find("order"), "order");
find("order").addEventListener("change", drawCards);
find("more").addEventListener("click", more);
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-attack], a[data-defense]");
  if (!link) return;
  form.reset();
  const { attack, defense } = link.dataset;
  choose(attack ? { attack } : { defense });
});

// Plots

function ticks(low, high, log) {
  if (log) {
    const from = Math.floor(Math.log10(low));
    const exponents = Array.from({ length: Math.ceil(Math.log10(high)) - from + 1 }, (_, step) => from + step);
    const fine = exponents.length < 4 ? [1, 2, 5] : [1];
    return exponents.flatMap((each) => fine.map((factor) => factor * 10 ** each)).filter((each) => each >= low * 0.999 && each <= high * 1.001);
  }
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, place) => (first + place) * step);
}

const brief = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const nice = (value) => (value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(0) : brief.format(value));

function scale(values, log, start, end) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (log) [low, high] = [low / 1.2, high * 1.2];
  else [low, high] = low === high ? [low - 1, high + 1] : [low - 0.04 * (high - low), high + 0.04 * (high - low)];
  const inner = log ? Math.log10 : (value) => value;
  const map = (value) => start + ((inner(value) - inner(low)) / (inner(high) - inner(low))) * (end - start);
  return { map, ticks: ticks(low, high, log) };
}

function axes(points, nameX, nameY, { logX = false, logY = false } = {}) {
  const [width, height, left, bottom] = [640, 360, 64, 44];
  const horizontal = scale(points.map(([x]) => x), logX, left, width - 12);
  const vertical = scale(points.map(([, y]) => y), logY, height - bottom, 12);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${nameY} against ${nameX}` });
  for (const tick of horizontal.ticks) {
    const at = horizontal.map(tick);
    svg.append(make("line", { class: "axis", x1: at, x2: at, y1: 12, y2: height - bottom }),
      make("text", { x: at, y: height - bottom + 16, "text-anchor": "middle" }, nice(tick)));
  }
  for (const tick of vertical.ticks) {
    const at = vertical.map(tick);
    svg.append(make("line", { class: "axis", x1: left, x2: width - 12, y1: at, y2: at }),
      make("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, nice(tick)));
  }
  svg.append(make("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, nameX),
    make("text", { transform: `translate(14 ${(height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, nameY));
  return { svg, x: horizontal.map, y: vertical.map };
}

function legend(names) {
  const item = (name, place) => make("li", {}, make("i", { style: `background:${COLOURS[place % COLOURS.length]}` }), name);
  return make("ul", { class: "legend" }, ...names.map(item));
}

// Points are {name, x, y, low, high, front}.
function scatter(target, points, nameX, logX) {
  const known = points.filter((each) => each.x !== null && each.y !== null && (!logX || each.x > 0));
  if (!known.length) return target.replaceChildren(make("p", {}, "Not measured."));
  const ends = known.flatMap((each) => [each.y, each.low ?? each.y, each.high ?? each.y].map((value) => [each.x, value]));
  const { svg, x, y } = axes(ends, nameX, "PSNR above the floor, dB", { logX });
  known.forEach((each, place) => {
    const colour = COLOURS[place % COLOURS.length];
    const interval = each.low === null ? "" : ` [${each.low.toFixed(1)}, ${each.high.toFixed(1)}]`;
    const tip = `${each.name}\n${each.y.toFixed(1)}${interval} dB above the floor\n${nameX}: ${each.x.toLocaleString("en", { maximumSignificantDigits: 4 })}`;
    if (each.low !== null) svg.append(make("line", { x1: x(each.x), x2: x(each.x), y1: y(each.low), y2: y(each.high), stroke: colour }));
    svg.append(make("circle", { cx: x(each.x), cy: y(each.y), r: 6, stroke: colour, "stroke-width": 2,
      fill: each.front ? colour : "var(--paper)", tabindex: 0, role: "img", "aria-label": tip, "data-tip": tip }));
  });
  target.replaceChildren(svg, legend(known.map((each) => each.name)));
}

const COSTS = { test_accuracy: "test accuracy", bytes: "bytes a message" };
for (const [name, text] of Object.entries(COSTS)) {
  if (data.pareto.some((each) => each[name] !== null)) find("cost").append(make("option", { value: name }, text));
}
function drawPareto() {
  const cost = find("cost").value || "bytes";
  scatter(find("pareto"), data.pareto.map((each) => ({ ...each, x: each[cost] })), COSTS[cost], cost === "bytes");
}
find("cost").addEventListener("change", drawPareto);
drawPareto();
scatter(find("effort"), data.compute, "gradient evaluations", true);
refresh();

// Tips, for the mouse and for the keyboard

function tip(event) {
  const text = event.target.closest?.("[data-tip]")?.dataset.tip;
  find("tip").hidden = !text;
  if (!text) return;
  find("tip").textContent = text;
  const box = event.target.getBoundingClientRect();
  const left = Math.min(box.left, window.innerWidth - find("tip").offsetWidth - 8);
  find("tip").style.left = `${Math.max(8, left)}px`;
  const above = box.top - find("tip").offsetHeight - 6;
  find("tip").style.top = `${above > 0 ? above : box.bottom + 6}px`;
}
document.addEventListener("mouseover", tip);
document.addEventListener("focusin", tip);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") find("tip").hidden = true; });
