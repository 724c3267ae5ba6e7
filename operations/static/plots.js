// The plots of monitoring, over the latest periods. Each is a slider: keys, a mouse or a finger choose a period, and all plots
// tell its values below their titles.
import { COLUMNS, clock, count, day, distanceOf, element, furnish, make, minute, missedOf, percent, range } from "./tables.js";

// In units of a drawing, which is scaled to its place.
const [WIDTH, HEIGHT] = [300, 160];
const [LEFT, RIGHT, TOP, BOTTOM] = [42, 296, 28, 134];
const TOPS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]; // where an axis of shares may end
const SHAPES = {
  first: "M-2.5 0a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0z", second: "M-2.5-2.5h5v5h-5z", alarm: "M0-5l5.6 10h-11.2z",
};
const ORDER = ["first", "second"]; // of the lines of a plot

const draw = (name, ...rest) => furnish(document.createElementNS("http://www.w3.org/2000/svg", name), ...rest);
const ended = ({ end }) => new Date(end);

// What is plotted: each line tells of a period its value, maybe with an interval, or nothing.

function promised(figure, alarm) {
  return ({ result }) => result[figure] != null && { value: result[figure], alarm: Object.hasOwn(result.alarms, alarm) };
}

function distance(column) {
  return (period) => {
    const row = distanceOf(column)(period);
    return row && { value: row.distance, alarm: row.alarm };
  };
}

const DISTANCES = Object.entries(COLUMNS).map(([column, name]) =>
  ({ title: `Distance of the ${name}`, unit: "% of messages", lines: [{ of: distance(column) }], limit: "least" }));
const OTHERS = [
  {
    title: "Spam and precision, as expected",
    unit: "% of messages, % of those taken down",
    lines: [
      { name: "spam", of: promised("spam_share") },
      { name: "precision", of: promised("expected_precision", "expected precision") },
    ],
    limit: "min_precision",
  },
  { title: "Missed by users, at least", unit: "% of those taken down, with 95% interval", lines: [{ of: missedOf }] },
];

let periods = []; // the earliest one first
let plots = [];

export function showPlots(latest) {
  const sorted = latest.toReversed().sort((a, b) => ended(a) - ended(b));
  if (sorted.map(({ id }) => id).join() === periods.map(({ id }) => id).join()) return; // what was found does not change
  periods = sorted;
  const focused = document.activeElement.id;
  plots = [DISTANCES, ...OTHERS.map((plot) => [plot])].flatMap((alike) => {
    const told = alike.filter(({ lines }) => lines.some(({ of }) => periods.some(of)));
    return told.map((plot) => drawPlot(plot, topOf(told)));
  });
  element("plots").replaceChildren(...plots.map(({ figure }) => figure));
  choose(null);
  element(focused)?.focus();
}

// The limit of an alarm, as it was when the latest period was looked at.
const limitOf = ({ limit }) => periods.at(-1)?.result[limit];

// Returns where the axis of plots ends that share one.
function topOf(alike) {
  const lines = alike.flatMap((plot) => plot.lines);
  const values = lines.flatMap(({ of }) => periods.map(of)).filter(Boolean).map(({ value, high }) => high ?? value);
  return TOPS.find((top) => top >= Math.max(...values, limitOf(alike[0]) ?? 0)) ?? 1;
}

function x(period) {
  const [first, last] = [ended(periods[0]), ended(periods.at(-1))];
  const part = last > first ? (ended(period) - first) / (last - first) : 0.5;
  return LEFT + 8 + part * (RIGHT - LEFT - 16);
}

function drawPlot(plot, top) {
  const { title, unit, lines } = plot;
  const id = `plot-${title.replaceAll(/\W+/g, "-").toLowerCase()}`;
  const y = (value) => BOTTOM - (value / top) * (BOTTOM - TOP);
  const cursor = draw("path", { class: "cursor" });
  const svg = draw("svg", {
    id, viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "slider", "aria-label": `${title}: periods`, "aria-valuemin": 1,
    "aria-valuemax": periods.length,
  });
  svg.append(...axes(unit, top, y), ...otherModels(), ...limitLine(limitOf(plot), top, y), cursor);
  svg.append(...lines.map(({ of }, i) => drawLine(of, y, ORDER[i])));
  const reading = make("p", { class: "reading" });
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("focus", () => choose(svg.ariaValueNow - 1));
  svg.addEventListener("blur", () => choose(null));
  svg.addEventListener("keydown", step);
  return { figure: make("figure", {}, make("figcaption", {}, title), reading, svg), svg, cursor, reading, lines };
}

function axes(unit, top, y) {
  const [first, last] = [ended(periods[0]), ended(periods.at(-1))];
  const write = day(first) === day(last) ? (date) => clock(date).slice(0, 5) : day;
  const below = (place, anchor, text) => draw("text", { x: place, y: BOTTOM + 18, "text-anchor": anchor }, text);
  return [
    draw("text", { x: 0, y: 11 }, unit),
    ...[0, top / 2, top].flatMap((value) => [
      draw("path", { class: "grid", d: `M${LEFT} ${y(value)}H${RIGHT}` }),
      draw("text", { class: "tick", x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, `${100 * value}%`),
    ]),
    below((LEFT + RIGHT) / 2, "middle", last > first ? "end of the period" : `end of the period: ${minute(last)}`),
    ...(last > first ? [below(LEFT, "start", write(first)), below(RIGHT, "end", write(last))] : []),
  ];
}

function limitLine(limit, top, y) {
  if (limit == null) return [];
  const place = { x: LEFT + 4, y: y(limit) + (limit > top / 2 ? 13 : -4) };
  return [
    draw("path", { class: "limit", d: `M${LEFT} ${y(limit)}H${RIGHT}` }),
    draw("text", { class: "limit", ...place }, `limit of an alarm: ${percent(limit)}`),
  ];
}

const isOther = (period, i) => i > 0 && period.model !== periods[i - 1].model;

function otherModels() {
  const between = (i) => (x(periods[i - 1]) + x(periods[i])) / 2;
  return [...periods.keys()].filter((i) => isOther(periods[i], i)).map((i) =>
    draw("path", { class: "model", d: `M${between(i)} ${TOP}V${BOTTOM}` }));
}

// The line is broken where a value is missing and where another model takes over, as its reference is another one.
function drawLine(of, y, name) {
  const marks = [];
  let line = "", isBroken = true;
  for (const [i, period] of periods.entries()) {
    const { value, low, high, alarm } = of(period) || {}, at = x(period);
    isBroken ||= isOther(period, i);
    if (value != null) {
      const shape = alarm ? "alarm" : name;
      line += `${isBroken ? "M" : "L"}${at} ${y(value)}`;
      if (low != null) marks.push(draw("path", { class: "interval", d: `M${at - 2} ${y(low)}h4m-2 0V${y(high)}m-2 0h4` }));
      marks.push(draw("path", { class: `point ${shape}`, d: SHAPES[shape], transform: `translate(${at} ${y(value)})` }));
    }
    isBroken = value == null;
  }
  return draw("g", { class: name }, draw("path", { class: "line", d: line }), ...marks);
}

// Choosing a period

function choose(number) {
  const chosen = number ?? periods.length - 1;
  for (const { svg, cursor, reading, lines } of plots) {
    const period = periods[chosen];
    cursor.toggleAttribute("hidden", number == null);
    cursor.setAttribute("d", `M${x(period)} ${TOP}V${BOTTOM}`);
    const told = make("p", { class: "reading" }, make("span", {}, minute(ended(period))), ...lines.map((line, i) =>
      make("b", {}, lines.length > 1 ? swatch(ORDER[i]) : null, tell(line, period))));
    if (!reading.isEqualNode(told)) reading.replaceChildren(...told.childNodes);
    svg.ariaValueNow = chosen + 1;
    svg.ariaValueText = reading.textContent;
  }
}

function tell({ name, of }, period) {
  const { value, low, high, count: number, alarm } = of(period) || {};
  const interval = low == null ? "" : `, ${count(number)} messages (${range({ low, high }, percent)})`;
  return `${name ? `${name} ` : ""}${value == null ? "not known" : percent(value)}${interval}${alarm ? ", alarm" : ""}`;
}

const swatch = (name) => draw("svg", { class: `swatch ${name}`, viewBox: "-10 -5 20 10", "aria-hidden": "true" },
  draw("path", { class: "line", d: "M-10 0H10" }), draw("path", { class: "point", d: SHAPES[name] }));

function point({ clientX, currentTarget }) {
  const { left, width } = currentTarget.getBoundingClientRect();
  const away = periods.map((period) => Math.abs(x(period) - ((clientX - left) / width) * WIDTH));
  choose(away.indexOf(Math.min(...away)));
}

// What keys or a finger have chosen stays.
function leave({ pointerType }) {
  if (pointerType === "mouse" && !element("plots").contains(document.activeElement)) choose(null);
}

function step(event) {
  const now = event.currentTarget.ariaValueNow - 1, last = periods.length - 1;
  const next = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, Home: 0, End: last }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  choose(Math.max(0, Math.min(last, next)));
}
