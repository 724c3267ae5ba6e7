// What the operator's page shows of the API's answers. Texts come from strangers, so they become text nodes, never HTML.

export const element = (id) => document.getElementById(id);

export function furnish(made, attributes, ...children) {
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children.filter((child) => child != null));
  return made;
}

export const make = (name, ...rest) => furnish(document.createElement(name), ...rest);

// Writes rows to the body of a table. What has not changed stays in place, and with it the focus; where there are no
// rows, the sentence after the table takes its place.
function fill(id, rows) {
  const body = element(id), table = body.parentElement;
  const labels = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const kept = Object.entries(rows).map(([key, cells]) => {
    cells.forEach((cell, i) => labels[i] && cell.setAttribute("data-label", labels[i]));
    const row = element(`${id}-${key}`) ?? make("tr", { id: `${id}-${key}` });
    cells.forEach((cell, i) => {
      if (!row.cells[i]) row.append(cell);
      else if (!row.cells[i].isEqualNode(cell)) row.cells[i].replaceWith(cell);
    });
    return row;
  });
  for (const row of [...body.rows]) if (!kept.includes(row)) row.remove();
  kept.forEach((row, i) => row !== body.rows[i] && body.insertBefore(row, body.rows[i] ?? null));
  table.hidden = !kept.length;
  const sentence = table.nextElementSibling;
  if (sentence?.matches(".empty")) sentence.hidden = kept.length > 0;
}

// Keys that look like numbers would be sorted.
const keyed = (items, key, draw) => Object.fromEntries(items.map((item) => [`n${key(item)}`, draw(item)]));

export function clear() {
  for (const body of document.querySelectorAll("tbody, #alarms")) body.replaceChildren();
}

// Words, numbers and times

export const count = (number) => new Intl.NumberFormat("en").format(number);
const fixed = (number, digits) => (number == null ? "–" : number.toFixed(digits).replace("-", "\u2212"));
// Small shares get a digit more, or 3 of 10,000 would look like none.
export const percent = (share) => (share == null ? "–" : `${(100 * share).toFixed(share > 0 && share < 0.01 ? 2 : 1)}%`);
export const range = ({ low, high }, write) => `${write(low).replace("%", "")} to ${write(high)}`;

export const clock = (date) => date.toLocaleTimeString("en-GB");
export const day = (date) => date.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
export const minute = (date) => `${day(date)}, ${clock(date).slice(0, 5)}`;

function time(iso) {
  const date = new Date(iso);
  const isToday = date.toDateString() === new Date().toDateString();
  return make("time", { datetime: iso, title: iso }, isToday ? clock(date) : minute(date));
}

function took({ started, finished }) {
  if (!started || !finished) return "";
  const seconds = Math.round((new Date(finished) - new Date(started)) / 1000);
  const [minutes, hours] = [Math.floor(seconds / 60), Math.floor(seconds / 3600)];
  return hours ? `${hours} h ${minutes % 60} min` : minutes ? `${minutes} min ${seconds % 60} s` : `${seconds} s`;
}

// Characters that nobody sees, or that turn around what is beside them, are told by their number.
const UNSEEN =
  /([\0-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\u{e0000}-\u{e007f}])/u;
const LONGEST = 1000; // characters shown of a text

function written(text) {
  const shown = text.slice(0, LONGEST).split(UNSEEN).map((part, i) =>
    i % 2 ? make("span", { class: "sign" }, `U+${part.codePointAt().toString(16).toUpperCase().padStart(4, "0")}`) : part);
  return make("bdi", {}, ...shown, text.length > LONGEST ? ` … and ${count(text.length - LONGEST)} more characters` : null);
}

const message = (text) =>
  text == null ? make("span", { class: "none" }, "text not kept")
  : make("div", { class: "text" }, written(text));

// Jobs

const KINDS = {
  prepare: "prepare the data", rescore: "score again", roll_back: "roll back", close_days: "close days",
  forget: "forget texts",
};
export const isActive = ({ state }) => state === "waiting" || state === "running";

export function jobTitle({ id, kind, arguments: { model } }) {
  return `Job ${id}: ${KINDS[kind] ?? kind}${model == null ? "" : ` model ${model}`}`;
}

export function jobSentence(job) {
  const end = { running: ` is running: ${job.message}`, failed: ` has failed: ${job.message}`, waiting: " waits for a worker.",
    done: " is done.", cancelled: " was cancelled." }[job.state] ?? ` is ${job.state}.`;
  return `${jobTitle(job).replace(": ", ", ")},${end}`;
}

const button = (order, { id }, label, spoken) =>
  make("button", { type: "button", "data-order": order, "data-id": id, "aria-label": `${spoken} ${id}` }, label);

export function showJobs(jobs) {
  fill("jobs", keyed(jobs, ({ id }) => id, (job) => {
    const { id, state, progress, message, created } = job;
    const bar = { max: 1, value: progress, "aria-label": `Progress of job ${id}` };
    return [
      make("th", { scope: "row", class: "title" }, jobTitle(job)),
      make("td", {}, make("span", { class: `state ${state}` }, state)),
      make("td", { class: "block" }, message, state === "running" ? make("progress", bar) : null),
      make("td", { class: "number" }, time(created)),
      make("td", { class: "number" }, took(job)),
      make("td", { class: "actions" },
        isActive(job) ? button("cancel", job, "Cancel", "Cancel job") : null, button("log", job, "Log", "Log of job")),
    ];
  }));
}

// Models

function measured({ metrics }) {
  const { today, collection } = metrics.test ?? {};
  return {
    "AUCPR today": fixed(today?.aucpr, 4),
    "AUCPR 2006": fixed(collection?.aucpr, 4),
    "Ham blocked today": percent(today?.ham_blocked),
    "Ham blocked 2006": percent(collection?.ham_blocked),
  };
}

const scoredBeside = ({ shadow }) => (shadow ? count(shadow.messages) : "–");
const changed = ({ shadow }) => (shadow?.messages ? percent(shadow.changed / shadow.messages) : "–");

export function showModels(models, refusals) {
  fill("models", keyed(models, ({ id }) => id, (model) => {
    const { id, name, sha256, threshold, state, created, promoted, shadow } = model;
    const born = make("small", {}, `threshold ${fixed(threshold, 4)}, sha256 ${sha256.slice(0, 8)}, made `, time(created));
    if (promoted) born.append(", promoted ", time(promoted));
    const refused = state === "candidate" && refusals.get(id);
    return [
      make("th", { scope: "row" }, make("b", {}, `${id} `, written(name)), born,
        refused ? make("small", {}, make("b", {}, "Refused: "), refused) : null),
      make("td", {}, make("span", { class: `state ${state}` }, state)),
      ...Object.values(measured(model)).map((figure) => make("td", { class: "number" }, figure)),
      make("td", { class: "number" },
        ...(shadow ? [scoredBeside(model), make("small", {}, `${changed(model)} otherwise`)] : [])),
      make("td", { class: "actions" }, state === "candidate" ? button("promote", model, "Promote…", "Promote… model") : null),
    ];
  }));
}

export function compare(old, other) {
  if (!old) {
    fill("comparison", {});
    return;
  }
  element("old-model").textContent = `model ${old.id} serves`;
  element("new-model").textContent = `model ${other.id}`;
  const [before, after] = [old, other].map((model) => ({
    ...measured(model),
    "Messages scored on the side": scoredBeside(model),
    "of them decided otherwise": changed(model),
    Threshold: fixed(model.threshold, 4),
  }));
  fill("comparison", Object.fromEntries(Object.keys(before).map((name) => [name.replaceAll(" ", "-"), [
    make("th", { scope: "row" }, name),
    ...[before, after].map((of) => make("td", { class: "number" }, of[name])),
  ]])));
}

// Evaluations

const cost = (value) => fixed(value, 1);

const reported = (share) =>
  make("td", { class: "number" }, ...(share ? [`${count(share.count)}, ${percent(share.value)}`,
    make("small", {}, range(share, percent))] : ["–"]));

export function showEvaluation(evaluation) {
  element("evaluation").hidden = !evaluation;
  element("no-evaluation").hidden = Boolean(evaluation);
  if (!evaluation) return;
  const { created, start, end, result } = evaluation;
  element("period").replaceChildren("From ", time(start), " to ", time(end), "; evaluated ", time(created), ".");
  for (const part of ["taken_down", "delivered"]) {
    const share = result.messages ? `${percent(result[part] / result.messages)} of ${count(result.messages)} messages` : "";
    element(part.replace("_", "-")).replaceChildren(count(result[part]), make("small", {}, share));
  }
  element("cost").replaceChildren(cost(result.reported.cost), make("small", {}, "by what users said, where a spam let through costs 1"));
  const parts = [["all", result.reported], ...Object.entries(result.regions)];
  fill("reported", keyed(parts.map(([region, said], i) => ({ region, said, i })), ({ i }) => i, ({ region, said }) => [
    make("th", { scope: "row" }, written(region)),
    reported(said.missed),
    reported(said.spam),
    make("td", { class: "number" }, cost(said.cost)),
  ]));
  showEstimates(result.estimated);
  element("notes").replaceChildren(...result.notes.map((note) => make("li", {}, note)));
}

function showEstimates(estimated) {
  element("estimated-part").hidden = !estimated;
  const row = (name, figure, write) => [
    make("th", { scope: "row" }, name),
    make("td", { class: "number" }, figure ? write(figure.value) : "–"),
    make("td", { class: "number" }, figure?.low == null ? "" : range(figure, write)),
  ];
  const { precision, recall, ham_blocked, aucpr, cost: price, calibration } = estimated ?? {};
  const value = (name) => calibration && { value: calibration[name] };
  fill("estimated", !estimated ? {} : {
    precision: row("precision", precision, percent),
    recall: row("recall: spam caught", recall, percent),
    blocked: row("ham blocked", ham_blocked, percent),
    aucpr: row("AUCPR", aucpr, (figure) => fixed(figure, 3)),
    cost: row("cost of 1,000 messages", price, cost),
    slope: row("calibration: slope, at best 1", value("slope"), (figure) => fixed(figure, 2)),
    intercept: row("calibration: intercept, at best 0", value("intercept"), (figure) => fixed(figure, 2)),
  });
}

// Monitoring

export const COLUMNS = {
  propensity: "propensity", prediction: "decision", characters: "number of characters", digits: "number of digits",
};
const DECISIONS = { "up to 0": "not taken down", "above 0": "taken down" };
export const distanceOf = (column) => ({ result }) => result.drift.find((row) => row.column === column);
export const missedOf = ({ result }) => result.evaluation.reported.missed;

export function showMonitoring(periods) {
  const [latest] = periods;
  element("monitoring").hidden = !latest;
  element("no-monitoring").hidden = Boolean(latest);
  if (!latest) return;
  const { created, start, end, model, result } = latest;
  element("looked-at").replaceChildren(
    `${count(result.messages)} messages on which model ${model} decided, from `, time(start), " to ", time(end), "; looked at ",
    time(created), ".");
  showAlarms(result.alarms, periods.filter((period) => period.model === model));
  fill("drift", keyed(result.drift, ({ column }) => column, (row) => [
    make("th", { scope: "row" }, COLUMNS[row.column] ?? row.column),
    make("td", { class: "number" }, percent(row.distance)),
    make("td", {}, row.column === "prediction" ? DECISIONS[row.bin] : row.bin),
    make("td", { class: "number" }, percent(row.before)),
    make("td", { class: "number" }, percent(row.now)),
    make("td", {}, row.alarm ? make("span", { class: "state failed" }, "alarm") : "none"),
  ]));
  fill("segments", keyed(result.segments.map((row, i) => ({ ...row, i })), ({ i }) => i, (row) => [
    make("th", { scope: "row" }, `${row.segment} `, written(row.value)),
    make("td", {}, row.of),
    make("td", { class: "number" }, count(row.messages)),
    make("td", { class: "number" }, percent(row.share)),
    make("td", { class: "number" }, points(row.gap), make("small", {}, range(row, points))),
  ]));
  element("monitoring-notes").replaceChildren(...result.evaluation.notes.map((note) => make("li", {}, note)));
  fill("history", keyed(periods, ({ id }) => id, (period) => [
    make("th", { scope: "row" }, time(period.end), make("small", {}, `model ${period.model}`)),
    ...Object.keys(COLUMNS).map((column) => {
      const row = distanceOf(column)(period);
      return make("td", { class: "number" }, percent(row?.distance), row?.alarm ? make("small", {}, "alarm") : null);
    }),
    make("td", { class: "number" }, percent(period.result.spam_share)),
    make("td", { class: "number" }, percent(period.result.expected_precision)),
    reported(missedOf(period)),
  ]));
}

const points = (share) => fixed(100 * share, 1);

// An alarm is new if the period before, by the same model, did not have it: that is what orders an evaluation.
function showAlarms(alarms, periods) {
  const lasts = (name) => {
    const without = periods.findIndex(({ result }) => !Object.hasOwn(result.alarms, name));
    return without < 0 ? periods.length : without;
  };
  const found = Object.entries(alarms).map(([name, sentence]) => ({ sentence, times: lasts(name) }));
  element("alarms").replaceChildren(...found.sort((a, b) => a.times - b.times).map(({ sentence, times }) => make("li", {},
    make("span", { class: "state failed" }, times === 1 ? "New: " : `In the last ${times} periods: `), written(sentence))));
  element("no-alarms").hidden = found.length > 0;
}

// Messages

const where = (iso, region) =>
  make("td", { class: "number" }, time(iso), region == null ? null : make("small", {}, written(region)));

const against = ({ propensity, threshold }) => `${fixed(propensity, 4)} ${propensity < threshold ? "<" : "≥"} ${fixed(threshold, 4)}`;

function meter({ propensity, threshold }) {
  const fill = make("div", { class: "fill" }), mark = make("div", { class: "mark" });
  fill.style.width = percent(propensity);
  mark.style.left = percent(threshold);
  return make("div", { class: "meter", "aria-hidden": "true" }, fill, mark);
}

export function showTakedowns(takedowns) {
  fill("takedowns", keyed(takedowns, (of) => of.message, (takedown) => {
    const { text, why, time: at, region } = takedown;
    const words = why?.map(({ word, log_odds }) => make("li", {}, written(word), `+${fixed(log_odds, 1)}`));
    return [
      make("td", { class: "block" }, message(text),
        words?.length ? make("ul", { class: "words", "aria-label": "Words that led to it" }, ...words) : null),
      make("td", { class: "number spam" }, against(takedown), meter(takedown)),
      where(at, region),
    ];
  }));
}

const SAID = { complaint: "Complaint", "spam report": "Report", reviewer: "Reviewer" };
const DONE = { "take down": "taken down", label: "delivered with a warning", deliver: "delivered" };

// Some users get everything, so that the errors of the filter are known.
const decided = ({ action, prediction }) =>
  action === "deliver" && prediction ? "delivered to a user without a filter" : (DONE[action] ?? "not acted on yet");

export function showFeedback(feedback) {
  fill("feedback", keyed(feedback, (of) => `${of.message}-${of.source.replace(" ", "-")}`, ({ source, label, text, received, scored }) => [
    make("td", { class: "block" },
      make("div", { class: `state ${label}` }, `${SAID[source] ?? source}: it is ${label}`), message(text)),
    make("td", {}, ...(scored ? [decided(scored), make("small", {}, against(scored))]
      : ["not known yet"])),
    where(received, scored?.region),
  ]));
}
