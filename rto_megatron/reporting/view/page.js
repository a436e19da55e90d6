"use strict";
// Text of a run reaches the page through textContent alone: nothing in it is read as markup or as code.
const runs = JSON.parse(document.getElementById("data").textContent);
const chosen = runs.map(() => null);
const order = runs.map(() => ({ column: null, isDescending: false }));

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function number(value) {
  if (value === null || value === undefined) return "none";
  return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(4))) : String(value);
}

// Curves

function svg(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function path(points, toX, toY) {
  let text = "";
  let isBroken = true;
  for (const [step, value] of points) {
    if (value !== null) text += `${isBroken ? "M" : "L"}${toX(step).toFixed(2)} ${toY(value).toFixed(2)}`;
    isBroken = value === null;
  }
  return text;
}

function curve(name) {
  const figure = element("figure");
  const own = runs.map((run) => run.curves[name] || []);
  const found = own.flat().filter(([, value]) => value !== null);
  const [steps, values] = [found.map(([step]) => step), found.map(([, value]) => value)];
  const [left, right] = [Math.min(...steps), Math.max(...steps)];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const toX = (step) => (right > left ? (200 * (step - left)) / (right - left) : 100);
  const toY = (value) => (high > low ? 98 - (96 * (value - low)) / (high - low) : 50);
  const last = own.map((points) => (points.length ? number(points[points.length - 1][1]) : "none"));
  figure.append(element("figcaption", "", `${name}: ${last.join(" | ")}`));
  const drawing = svg("svg", { viewBox: "0 0 200 100", preserveAspectRatio: "none" });
  own.forEach((points, place) => drawing.append(svg("path", { class: `run${place}`, d: path(points, toX, toY) })));
  figure.append(drawing, element("div", "note", `step ${left} to ${right}; ${number(low)} to ${number(high)}`));
  return figure;
}

function drawCurves() {
  const wanted = document.getElementById("filter").value;
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].sort();
  document.getElementById("curves").replaceChildren(...names.filter((name) => name.includes(wanted)).map(curve));
}

// Responses and their tokens

function chooseIn(place, row) {
  chosen[place] = row;
  // The other run shows its response to the same prompt, of the same step if there is one.
  runs.forEach((run, other) => {
    if (other === place) return;
    const same = run.rollouts.filter((one) => one.prompt_id === row.prompt_id);
    const nearest = (one) => Math.abs(one.step - row.step) + (one.sample === row.sample ? 0 : 0.5);
    if (same.length) chosen[other] = same.reduce((best, one) => (nearest(one) < nearest(best) ? one : best));
  });
  drawRuns();
}

function drawRows(run, place) {
  const table = element("table");
  const [head, body] = [element("tr"), element("tbody")];
  const columns = run.columns;
  for (const column of [...columns, "response"]) {
    const cell = element("th", "", column);
    cell.addEventListener("click", () => {
      const isDescending = order[place].column === column && !order[place].isDescending;
      order[place] = { column, isDescending };
      drawRuns();
    });
    head.append(cell);
  }
  const { column, isDescending } = order[place];
  const rows = [...run.rollouts];
  if (column) rows.sort((a, b) => (a[column] < b[column] ? -1 : a[column] > b[column] ? 1 : 0));
  if (isDescending) rows.reverse();
  for (const row of rows) {
    const line = element("tr", row === chosen[place] ? "chosen" : "");
    for (const name of columns) line.append(element("td", "", number(row[name])));
    line.append(element("td", "", row.pieces.join("").slice(0, 160)));
    line.addEventListener("click", () => chooseIn(place, row));
    body.append(line);
  }
  const top = element("thead");
  top.append(head);
  table.append(top, body);
  const frame = element("div", "rows");
  frame.append(table);
  return frame;
}

function largest(quantity) {
  const values = chosen.flatMap((row) => (row && row.tokens[quantity]) || []).filter((value) => value !== null);
  return values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
}

function colour(value, scale) {
  if (value === null || value === undefined || scale === 0) return "";
  const strength = (0.75 * Math.min(1, Math.abs(value) / scale)).toFixed(3);
  return value < 0 ? `rgba(207, 34, 46, ${strength})` : `rgba(9, 105, 218, ${strength})`;
}

function drawNumbers(target, row, token) {
  const table = element("table");
  const lines = [["token", `${token}: ${JSON.stringify(row.pieces[token])}`], ["id", row.response_ids[token]]];
  for (const [name, values] of Object.entries(row.tokens)) lines.push([name, number(values[token])]);
  for (const [name, value] of lines) {
    const line = element("tr");
    line.append(element("td", "", name), element("td", "", value));
    table.append(line);
  }
  target.replaceChildren(table);
}

function drawResponse(row, place, quantity, scale) {
  const frame = element("div");
  const numbers = element("div", "numbers");
  numbers.id = `numbers-${place}`;
  const text = element("div", "text");
  text.id = `tokens-${place}`;
  row.pieces.forEach((piece, token) => {
    const values = row.tokens[quantity];
    const span = element("span", "", piece === "" ? "\u00b7" : piece);
    span.style.backgroundColor = colour(values && values[token], scale);
    span.title = `${quantity} ${number(values && values[token])}`;
    span.tabIndex = 0;
    for (const kind of ["mouseenter", "focus"]) span.addEventListener(kind, () => drawNumbers(numbers, row, token));
    text.append(span);
  });
  frame.append(element("h3", "", `Prompt ${row.prompt_id}`), element("div", "text prompt", row.prompt));
  frame.append(element("h3", "", `Response of step ${row.step}, reward ${number(row.reward)}`), text, numbers);
  return frame;
}

function drawRuns() {
  const quantity = document.getElementById("quantity").value;
  const scale = largest(quantity);
  document.getElementById("scale").textContent = `full colour at ${number(scale)}`;
  const frames = runs.map((run, place) => {
    const frame = element("div", "run");
    frame.append(element("h3", `run${place}`, run.name), element("p", "note", run.note));
    if (run.rollouts.length) frame.append(drawRows(run, place));
    if (chosen[place]) frame.append(drawResponse(chosen[place], place, quantity, scale));
    return frame;
  });
  const scrolled = [...document.querySelectorAll(".rows")].map((one) => one.scrollTop);
  document.getElementById("runs").replaceChildren(...frames);
  document.querySelectorAll(".rows").forEach((one, place) => (one.scrollTop = scrolled[place] || 0));
}

document.title = `rto view: ${runs.map((run) => run.name).join(" and ")}`;
document.getElementById("title").textContent = runs.map((run) => run.name).join(" and ");
runs.forEach((run, place) => document.getElementById("legend").append(element("b", `run${place}`, ` ${run.name} `)));
for (const name of new Set(runs.flatMap((run) => run.quantities))) {
  document.getElementById("quantity").append(element("option", "", name));
}
document.getElementById("filter").addEventListener("input", drawCurves);
document.getElementById("quantity").addEventListener("change", drawRuns);
const first = runs.findIndex((run) => run.rollouts.length);
if (first >= 0) {
  runs.forEach((run, place) => (chosen[place] = run.rollouts[0] || null));
  chooseIn(first, runs[first].rollouts[0]);
} else {
  drawRuns();
}
drawCurves();
