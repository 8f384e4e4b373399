"use strict";
// Draws what is in #data. Choices are in the address after #, so that a link keeps them. Texts of the user go into the
// page as text, and into charts through plain(): plotly reads tags.

const page = JSON.parse(document.getElementById("data").textContent);
const [INK, FAINT, COLOURS] = [page.colours.ink, page.colours.faint, page.colours.lines];
const DASHES = ["solid", "dash", "dashdot", "dot"];
const SYMBOLS = ["circle", "diamond", "square", "triangle-up"];
const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;" };
const LONGEST = 32; // characters of a label beside a chart
const MOST_LABELS = 30; // of a factor's chart
const MOST_COMPONENTS = 4; // chosen at first
const TOUCHED = matchMedia("(pointer: coarse)").matches; // there a drag scrolls the page
const choices = new URLSearchParams();

const plain = text => String(text).replace(/[&<>]/g, sign => ENTITIES[sign]);
const short = text => plain(text.length > LONGEST ? text.slice(0, LONGEST - 1) + "…" : text);
const number = value => value === null ? "–" : String(Number(value.toPrecision(5)));
const section = name => document.getElementById(name);
const title = axis => plain(axis.name + axis.unit);

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function table(head, rows, caption) {
  const row = (cells, tag) => make("tr", {}, ...cells.map((cell, k) =>
    tag === "th" ? make("th", { scope: "col" }, cell) : k === 0 ? make("th", { scope: "row" }, cell) : make("td", {}, cell)));
  const body = make("tbody", {}, ...rows.map(cells => row(cells, "td")));
  const whole = make("table", { "aria-label": caption });
  if (head.length) whole.append(make("thead", {}, row(head, "th")));
  whole.append(body);
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, whole);
}

function box(parent, heading) { // where a chart goes
  const chart = make("div", { class: "chart", role: "img", "aria-label": heading });
  parent.append(make("div", {}, make("h3", {}, heading), chart));
  return chart;
}

function draw(chart, traces, x, y, more = {}) {
  const axis = (words, extra) => ({
    title: { text: words, standoff: 8 }, automargin: true, zeroline: false, gridcolor: "#ececec", linecolor: FAINT,
    ...extra,
  });
  const { xaxis, yaxis, ...rest } = more;
  const layout = {
    height: 340, margin: { l: 56, r: 10, t: 26, b: 46 }, font: { family: "system-ui, sans-serif", size: 13, color: INK },
    hovermode: "closest", dragmode: TOUCHED ? false : "zoom", paper_bgcolor: "#fff", plot_bgcolor: "#fff",
    legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", traceorder: "normal",
      itemclick: false, itemdoubleclick: false },
    xaxis: axis(x, xaxis), yaxis: axis(y, yaxis), ...rest,
  };
  Plotly.react(chart, traces, layout, {
    responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]],
  });
}

const clear = (colour, share) =>
  `rgba(${[1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16)).join(",")},${share})`;

function band(x, lower, upper, colour, name) {
  const edge = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
  return [
    { ...edge, y: lower, showlegend: false },
    { ...edge, y: upper, fill: "tonexty", fillcolor: clear(colour, 0.2), name, showlegend: Boolean(name) },
  ];
}

function bars(values, lower, upper, colour) { // of errors
  return { type: "data", symmetric: false, color: clear(colour, 0.6), thickness: 1.5, width: 0,
    array: values.map((value, k) => upper[k] - value), arrayminus: values.map((value, k) => value - lower[k]) };
}

// Choices and the address

function choose(name, value) {
  choices.set(name, value);
  history.replaceState(null, "", "#" + choices);
  render();
}

function read() {
  const text = location.hash.slice(1); // or the name of a section
  if (text.includes("=")) for (const [name, value] of new URLSearchParams(text)) choices.set(name, value);
}

const chosen = (name, otherwise) => choices.has(name) ? choices.get(name) : otherwise;

function select(words, name, values, current) {
  const list = make("select", { name }, ...values.map(([value, text]) => make("option", { value }, text)));
  list.value = current;
  list.addEventListener("change", () => choose(name, list.value));
  return make("label", {}, words, list);
}

function slider(words, name, texts, current) {
  const shown = make("output", {}, texts[current]);
  const range = make("input", { type: "range", name, min: 0, max: texts.length - 1, step: 1, value: current,
    "aria-valuetext": texts[current] });
  range.addEventListener("input", () => {
    shown.textContent = texts[range.value];
    range.setAttribute("aria-valuetext", texts[range.value]);
    choose(name, texts[range.value]);
  });
  return make("label", {}, make("span", {}, words + " ", shown), range);
}

function tick(words, name, on, change) {
  const check = make("input", { type: "checkbox", name });
  check.checked = on;
  check.addEventListener("change", () => change(check.checked));
  return make("label", { class: "tick" }, check, words);
}

function controls(parent) {
  const node = make("div", { class: "controls" });
  parent.append(node);
  return node;
}

// Sections

function glance() {
  const words = page.axes.map(axis => [axis.name, ...axis.words]);
  const kernels = words.some(row => row[3]);
  const head = ["mode", "kind", "values", "kernel"].slice(0, kernels ? 4 : 3);
  section("glance").append(make("div", { class: "pair" },
    table([], page.facts, "The fit"), table(head, words.map(row => row.slice(0, head.length)), "Modes")));
}

const factorCharts = [];

function factors() {
  const place = section("factors");
  if (!page.factors.length) {
    place.append(make("p", { class: "note" }, "This kind of model has no factors of single modes to show."));
    return;
  }
  const effects = page.factors.some(factor => [factor, factor.lines, factor.dots].some(part => part && part.effect));
  const row = controls(place);
  if (effects) {
    row.append(select("Show", "factor", [["components", "components"], ["effect", `main effects on ${page.value}`]],
      chosen("factor", "components")));
  }
  if (page.shared) row.append(components("components", page.factors));
  place.append(make("p", { class: "note" }, "Bands and bars are two standard deviations. The sign and scale of a " +
    "component are shared between the modes. " +
    (page.factors.some(factor => factor.lines && factor.dots) ? "Dots are coordinates that were seen, which have " +
      "something for themselves; the line is the smooth function between them." : "")));
  const grid = make("div", { class: "grid" });
  place.append(grid);
  for (const factor of page.factors) {
    if (!factor.labels && !factor.lines && !factor.dots) {
      grid.append(make("p", { class: "note" }, factor.note));
      continue;
    }
    const chart = box(grid, factor.mode);
    const cell = chart.parentNode;
    if (!page.shared) cell.insertBefore(components(`components.${factor.mode}`, [factor]), chart);
    const note = make("p", { class: "note" });
    if (factor.labels && factor.labels.length > MOST_LABELS) {
      const name = `find.${factor.mode}`;
      const search = make("input", { type: "search", name, value: chosen(name, ""), placeholder: "part of a label" });
      search.addEventListener("input", () => choose(name, search.value));
      const field = controls(cell);
      field.append(make("label", {}, "Find", search));
      cell.insertBefore(field, chart);
    }
    cell.append(note);
    factorCharts.push({ factor, chart, note });
  }
}

function strongest(group) { // by the product over the modes, as in CP one component has a part in each
  const n = group[0].strength.length;
  const strength = Array.from({ length: n }, (_, k) => group.reduce((size, factor) => size * factor.strength[k], 1));
  return strength.map((size, k) => [size, k]).sort((a, b) => b[0] - a[0]).map(([, k]) => k);
}

function picked(name, group) {
  if (choices.has(name)) return choices.get(name).split(",").filter(Boolean).map(text => Number(text) - 1);
  return strongest(group).slice(0, MOST_COMPONENTS).sort((a, b) => a - b);
}

function components(name, group) {
  const set = make("fieldset", {}, make("legend", {}, "Components, strongest first"));
  for (const k of strongest(group)) {
    set.append(tick(String(k + 1), name, picked(name, group).includes(k), on => {
      const now = new Set(picked(name, group));
      if (on) now.add(k); else now.delete(k);
      choose(name, [...now].sort((a, b) => a - b).map(j => j + 1).join(","));
    }));
  }
  return set;
}

function renderFactors() {
  const effect = chosen("factor", "components") === "effect";
  for (const { factor, chart, note } of factorCharts) {
    const group = page.shared ? page.factors.filter(other => other.strength.length === factor.strength.length) : [factor];
    const shown = picked(page.shared ? "components" : `components.${factor.mode}`, group)
      .filter(k => k >= 0 && k < factor.strength.length);
    const series = part => !part ? [] : effect
      ? (part.effect ? [{ name: "main effect", mean: part.effect, std: part.effect_std }] : [])
      : shown.map(k => ({ name: String(k + 1), mean: part.mean[k], std: part.std && part.std[k] }));
    const unit = effect ? plain(page.value) : "latent value";
    if (factor.labels) drawLabels(factor, chart, note, series(factor), unit);
    else drawFunctions(factor, chart, series, unit);
  }
}

const around = (series, side) => series.mean.map((mean, k) => mean + side * 2 * series.std[k]);

function drawFunctions(factor, chart, series, unit) {
  const axis = page.axes.find(other => other.name === factor.mode);
  const traces = [];
  series(factor.lines).forEach((one, place) => {
    const colour = COLOURS[place % COLOURS.length];
    if (one.std) traces.push(...band(factor.lines.x, around(one, -1), around(one, 1), colour));
    traces.push({ x: factor.lines.x, y: one.mean, mode: "lines", name: one.name,
      line: { color: colour, width: 2.5, dash: DASHES[Math.floor(place / COLOURS.length) % DASHES.length] } });
  });
  series(factor.dots).forEach((one, place) => {
    const colour = COLOURS[place % COLOURS.length];
    traces.push({ x: factor.dots.x, y: one.mean, mode: "markers", name: one.name, showlegend: !factor.lines,
      marker: { color: colour, size: 5, symbol: SYMBOLS[Math.floor(place / COLOURS.length) % SYMBOLS.length] },
      ...(one.std ? { error_y: bars(one.mean, around(one, -1), around(one, 1), colour) } : {}) });
  });
  if (traces.length) {
    traces.push({ x: factor.ticks, y: factor.ticks.map(() => 0.02), yaxis: "y2", mode: "markers", showlegend: false,
      hoverinfo: "x", marker: { symbol: "line-ns-open", color: INK, size: 7 } });
  }
  draw(chart, traces, title(axis), unit,
    { xaxis: axis.dates ? { type: "date" } : {}, yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true } });
}

function drawLabels(factor, chart, note, series, unit) {
  const text = chosen(`find.${factor.mode}`, "").toLowerCase();
  const size = k => Math.max(0, ...series.map(one => Math.abs(one.mean[k] ?? 0)));
  const matching = factor.labels.map((_, k) => k).filter(k => factor.labels[k].toLowerCase().includes(text));
  const places = [...matching].sort((a, b) => size(b) - size(a)).slice(0, MOST_LABELS).sort((a, b) => a - b);
  const step = 0.66 / Math.max(series.length, 1);
  const traces = series.map((one, place) => {
    const colour = COLOURS[place % COLOURS.length];
    const part = { mean: places.map(k => one.mean[k]), std: one.std && places.map(k => one.std[k]) };
    return { x: part.mean, y: places.map((_, row) => row + (place - (series.length - 1) / 2) * step), mode: "markers",
      name: one.name, text: places.map(k => plain(factor.labels[k])),
      hovertemplate: "%{text}: %{x:.4g}<extra>%{fullData.name}</extra>",
      marker: { color: colour, size: 7, symbol: SYMBOLS[Math.floor(place / COLOURS.length) % SYMBOLS.length] },
      ...(part.std ? { error_x: bars(part.mean, around(part, -1), around(part, 1), colour) } : {}) };
  });
  const axis = page.axes.find(other => other.name === factor.mode);
  draw(chart, traces, unit, title(axis), {
    height: Math.max(340, 110 + places.length * Math.max(19, 6 * series.length)),
    yaxis: { tickvals: places.map((_, row) => row), ticktext: places.map(k => short(factor.labels[k])),
      range: [places.length - 0.4, -0.6], showgrid: false, tickfont: { size: 12 } },
    xaxis: { zeroline: true, zerolinecolor: FAINT },
  });
  const left = matching.length > places.length ? `${places.length} of ${matching.length} labels, those of the largest ` +
    "values of what is chosen. " : matching.length ? "" : "No label has this part. ";
  note.textContent = left + factor.note;
}

// Predictions

const predictions = {};

function predicting() {
  const place = section("predictions");
  predictions.controls = controls(place);
  predictions.chart = box(place, "Predictions along a mode");
  predictions.heading = predictions.chart.previousSibling;
  predictions.note = make("p", { class: "note" });
  predictions.numbers = make("details", {}, make("summary", {}, "Numbers of this view"), make("div", { class: "tall" }));
  predictions.numbers.addEventListener("toggle", () => {
    if (predictions.numbers.open !== (chosen("numbers", "0") === "1")) choose("numbers", predictions.numbers.open ? "1" : "0");
  });
  place.append(predictions.note, predictions.numbers);
}

function bytes(text, Kind) {
  return new Kind(Uint8Array.from(atob(text), sign => sign.charCodeAt(0)).buffer);
}

function unpack(run) { // once, when it is first looked at
  if (!run.numbers) {
    run.numbers = { codes: bytes(run.codes, Uint16Array), low: bytes(run.low, Float64Array), step: bytes(run.step, Float64Array) };
  }
  return run.numbers;
}

function curves(run, combination) { // mean, then ends of the intervals
  const { codes, low, step } = unpack(run);
  const n = run.x.length;
  return Array.from({ length: run.stats }, (_, s) => Array.from({ length: n }, (_, p) => {
    const code = codes[(combination * run.stats + s) * n + p];
    return code === 65535 ? null : low[combination] + code * step[combination];
  }));
}

function current() { // mode to go along, values of the others, level
  const run = page.runs.find(one => page.axes[one.mode].name === chosen("along", "")) ||
    page.runs.find(one => page.axes[one.mode].continuous) || page.runs[0];
  const at = run.choices.map(choice => {
    const name = page.axes[choice.mode].name;
    const start = page.axes[choice.mode].continuous ? Math.floor(choice.texts.length / 2) : 0;
    const found = choice.texts.indexOf(chosen(`at.${name}`, choice.texts[start]));
    return found < 0 ? start : found;
  });
  const combination = run.choices.reduce((index, choice, k) => index * choice.texts.length + at[k], 0);
  const level = Math.max(0, page.levels.findIndex(one => String(100 * one) === chosen("level", "90")));
  return { run, at, combination, level };
}

function renderControls({ run, at, level }) {
  const shape = run.mode + "/" + level; // a slider that is being moved must stay
  if (predictions.shape !== shape) {
    const keep = document.activeElement && document.activeElement.name;
    predictions.controls.replaceChildren(
      select("Along", "along", page.runs.map(one => [page.axes[one.mode].name, page.axes[one.mode].name]), page.axes[run.mode].name),
      ...run.choices.map((choice, k) => {
        const axis = page.axes[choice.mode];
        return axis.continuous ? slider(axis.name, `at.${axis.name}`, choice.texts, at[k])
          : select(axis.name, `at.${axis.name}`, choice.texts.map(text => [text, text]), choice.texts[at[k]]);
      }),
      ...(run.stats > 1 ? [select("Intervals", "level", page.levels.map(one => [String(100 * one), `${100 * one} %`]), String(100 * page.levels[level]))] : []),
      tick("same scale for all", "fixed", chosen("fixed", "0") === "1", on => choose("fixed", on ? "1" : "0")),
    );
    const again = keep && [...predictions.controls.querySelectorAll("[name]")].find(node => node.name === keep);
    if (again) again.focus();
    predictions.shape = shape;
  }
}

function renderPredictions() {
  const state = current();
  const { run, at, combination, level } = state;
  renderControls(state);
  const axis = page.axes[run.mode];
  const [mean, ...ends] = curves(run, combination);
  const [lower, upper] = [ends[2 * level], ends[2 * level + 1]];
  const percent = `${100 * page.levels[level]} % interval`;
  const where = run.choices.map((choice, k) => `${page.axes[choice.mode].name} ${choice.texts[at[k]]}`).join(", ");
  const seen = run.places.map(place => place >= 0);
  const all = run.x.map((_, k) => k);
  const dots = !axis.continuous || run.apart ? all.filter(k => seen[k]) : [];
  const line = axis.continuous ? all.filter(k => !run.apart || !seen[k]) : [];
  const take = (values, places) => places.map(k => values[k]);
  const hover = "%{text}: %{y:.5g}<extra></extra>";
  const traces = [];
  if (line.length > 1) {
    const x = take(run.x, line);
    if (lower) traces.push(...band(x, take(lower, line), take(upper, line), COLOURS[0], percent));
    traces.push({ x, y: take(mean, line), mode: "lines", name: "mean", line: { color: COLOURS[0], width: 2.5 },
      text: take(run.texts, line), hovertemplate: hover });
    const marked = run.apart ? [] : line.filter(k => seen[k]);
    traces.push({ x: take(run.x, marked), y: take(mean, marked), mode: "markers", showlegend: false, hoverinfo: "skip",
      marker: { color: COLOURS[0], size: 5 } });
  }
  if (dots.length) {
    const y = take(mean, dots);
    traces.push({ x: take(run.x, dots), y, mode: "markers",
      name: run.apart ? "at coordinates that were seen" : lower ? `mean and ${percent}` : "mean",
      text: take(run.texts, dots).map(plain), hovertemplate: hover, marker: { color: run.apart ? INK : COLOURS[0], size: 7 },
      ...(lower ? { error_y: bars(y, take(lower, dots), take(upper, dots), run.apart ? INK : COLOURS[0]) } : {}) });
  }
  traces.push(...observedHere(run, at));
  let range = {};
  if (chosen("fixed", "0") === "1") {
    const { low, step } = unpack(run);
    let [least, most] = [Infinity, -Infinity];
    low.forEach((from, c) => { least = Math.min(least, from); most = Math.max(most, from + 65534 * step[c]); });
    range = { range: [least, most] };
  }
  const x = axis.dates ? { type: "date" } : axis.continuous ? {}
    : { tickvals: run.x, ticktext: run.texts.map(short), showgrid: false, range: [-0.6, run.x.length - 0.4], tickfont: { size: 12 } };
  draw(predictions.chart, traces, title(axis), plain(page.value), { height: 420, xaxis: x, yaxis: range, showlegend: true });
  predictions.heading.textContent = `${page.value} along ${axis.name}` + (where ? `, at ${where}` : "");
  predictions.chart.setAttribute("aria-label", predictions.heading.textContent);
  predictions.note.textContent = (run.stats > 1 ? "Intervals are of a new measurement, noise included. " :
    "This model has no intervals. ") + run.notes.join(" ");
  const open = chosen("numbers", "0") === "1";
  predictions.numbers.open = open;
  predictions.numbers.lastChild.replaceChildren(...(open ? [table(
    [axis.name, "mean", ...(lower ? ["lower", "upper"] : [])],
    all.map(k => [run.texts[k], number(mean[k]), ...(lower ? [number(lower[k]), number(upper[k])] : [])]), "Numbers")] : []));
}

function observedHere(run, at) { // rows held out that have the chosen values
  if (!page.held) return [];
  const here = page.held.y.map((_, row) => row).filter(row => run.choices.every((choice, k) =>
    page.held.positions[choice.mode][row] === choice.places[at[k]]));
  const xs = page.held.x[run.mode];
  const points = here.map(row => [xs ? xs[row] : run.places.indexOf(page.held.positions[run.mode][row]), page.held.y[row]])
    .filter(([x]) => x !== -1 || xs);
  if (!points.length) return [];
  return [{ x: points.map(([x]) => x), y: points.map(([, y]) => y), mode: "markers", name: "observed, held out",
    marker: { symbol: "x-thin-open", color: COLOURS[1], size: 9, line: { width: 2 } } }];
}

// Rows held out, diagnostics

const heldCharts = {};

function held() {
  if (!page.held) return;
  const place = section("held");
  place.hidden = false;
  section("to-held").hidden = false;
  place.append(table([], page.held.scores, "Scores"), make("p", { class: "note" }, page.held.note));
  const grid = make("div", { class: "grid" });
  place.append(grid);
  heldCharts.scatter = box(grid, "Predicted against observed");
  if (!page.held.curve) return;
  const { levels, inside } = page.held.curve;
  const line = Array.from({ length: 101 }, (_, k) => k / 100);
  const error = line.map(p => 2 * Math.sqrt(p * (1 - p) / page.held.n));
  draw(box(grid, "Calibration: share of values inside their intervals"), [
    ...band(line, line.map((p, k) => p - error[k]), line.map((p, k) => p + error[k]), FAINT, "two standard errors"),
    { x: line, y: line, mode: "lines", name: "calibrated", line: { color: INK, width: 1, dash: "dash" }, hoverinfo: "skip" },
    { x: levels, y: inside, mode: "lines+markers", name: "this model", line: { color: COLOURS[0], width: 2.5 } },
  ], "probability of the interval", "share inside", { xaxis: { range: [0, 1.02] }, yaxis: { range: [0, 1.02] } });
}

function renderHeld() {
  if (!page.held) return;
  const { level } = current();
  const [mean, ...ends] = page.held.predicted;
  const [lower, upper] = [ends[2 * level], ends[2 * level + 1]];
  const rows = page.held.y.map((_, row) => row);
  const outside = row => Boolean(lower) && (page.held.y[row] < lower[row] || page.held.y[row] > upper[row]);
  const percent = `${100 * page.levels[level]} % interval`;
  const part = (places, colour, symbol, name) => {
    const y = places.map(row => mean[row]);
    return { x: places.map(row => page.held.y[row]), y, mode: "markers", name, marker: { color: colour, symbol, size: 5 },
      ...(lower ? { error_y: { ...bars(y, places.map(row => lower[row]), places.map(row => upper[row]), colour), color: clear(colour, 0.25) } } : {}) };
  };
  const ends2 = [Math.min(...page.held.y), Math.max(...page.held.y)];
  draw(heldCharts.scatter, [
    part(rows.filter(row => !outside(row)), COLOURS[0], "circle", lower ? `inside its ${percent}` : "rows"),
    part(rows.filter(outside), COLOURS[1], "diamond", `outside its ${percent}`),
    { x: ends2, y: ends2, mode: "lines", line: { color: INK, width: 1 }, showlegend: false, hoverinfo: "skip" },
  ], `observed ${plain(page.value)}`, "predicted");
}

function diagnostics() {
  const place = section("diagnostics");
  const grid = make("div", { class: "grid" });
  place.append(grid);
  for (const one of page.charts) {
    const chart = box(grid, one.title);
    const named = one.kind === "bars"; // bars lie, so that names have room
    const traces = one.series.map((series, k) => named
      ? { type: "bar", orientation: "h", x: series.y, y: series.x.map((_, at) => at), marker: { color: COLOURS[0] },
          text: series.x.map(plain), textposition: "none", hovertemplate: "%{text}: %{x:.4g}<extra></extra>" }
      : { x: series.x, y: series.y, mode: series.x.length === 1 ? "markers" : "lines", name: plain(series.name || ""),
          line: { color: COLOURS[series.name ? k % COLOURS.length : 0], width: 2,
            dash: DASHES[series.name ? Math.floor(k / COLOURS.length) % DASHES.length : 0] },
          showlegend: Boolean(series.name) });
    const names = named ? one.series[0].x : [];
    const lines = one.series.length > 1 && one.series[0].name ? one.series.length : 0;
    draw(chart, traces, plain(named ? one.y : one.x), plain(named ? one.x : one.y), {
      height: Math.max(340, 110 + 20 * names.length) + 22 * lines,
      xaxis: named ? {} : { rangemode: "tozero" },
      yaxis: named ? { tickvals: names.map((_, at) => at), ticktext: names.map(short), autorange: "reversed", showgrid: false } : {},
      legend: { orientation: "h", x: 0, y: -0.22, xanchor: "left", yanchor: "top", itemclick: false, itemdoubleclick: false },
    });
  }
  for (const one of page.tables) place.append(make("h3", {}, one.title), table(one.head, one.rows, one.title));
  if (!page.charts.length && !page.tables.length) {
    place.append(make("p", { class: "note" }, "This kind of model keeps no record of its fit."));
  }
}

function render() {
  renderFactors();
  renderPredictions();
  renderHeld();
}

window.addEventListener("error", event => {
  const fault = section("fault");
  fault.hidden = false;
  fault.textContent = `This page could not be drawn: ${event.message}`;
});
document.querySelector("nav").addEventListener("click", event => { // the address keeps the choices
  if (!event.target.hash) return;
  event.preventDefault();
  const target = section(event.target.hash.slice(1));
  target.scrollIntoView();
  target.focus({ preventScroll: true });
});
window.addEventListener("hashchange", () => { if (location.hash.includes("=")) location.reload(); });

section("title").textContent = page.title;
read();
glance();
factors();
predicting();
held();
diagnostics();
render();
document.body.dataset.drawn = "yes";
