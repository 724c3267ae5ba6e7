"use strict";

const card = JSON.parse(document.getElementById("card").textContent);
const element = (id) => document.getElementById(id);
// Small shares get a digit more, or 3 of 10,000 would look like none.
const percent = (share) => (share == null ? "–" : `${(100 * share).toFixed(share > 0 && share < 0.01 ? 2 : 1)}%`);
const likelihood = (propensity) =>
  propensity < 0.001 ? "less than 0.1%" : propensity > 0.999 ? "more than 99.9%" : percent(propensity);

// A card may have no measurements: the slider moves all the same.
const hundredths = Array.from({ length: 101 }, (_, i) => ({ threshold: i / 100 }));
const grid = card.operating_points.length ? card.operating_points : hundredths;
// The chosen threshold seldom lies on the card's grid, so it gets a place of its own on the slider, with the
// figures of the point next to it.
const distance = (point) => Math.abs(point.threshold - card.threshold);
const nearest = grid.reduce((a, b) => (distance(b) < distance(a) ? b : a));
const chosen = { ...nearest, threshold: card.threshold };
const points = [...grid.filter((point) => point.threshold !== card.threshold), chosen];
points.sort((a, b) => a.threshold - b.threshold);

// The card may have a lower threshold too, from which a message is delivered with a warning label.
const label = card.thresholds.precision < card.threshold ? card.thresholds.precision : null;
const written = (threshold) => String(Number(threshold.toFixed(4)));

const slider = element("threshold");
slider.max = points.length - 1;
const reset = () => { slider.value = points.indexOf(chosen); };
const threshold = () => points[slider.value].threshold;

function showThreshold() {
  const point = points[slider.value];
  element("threshold-value").textContent = written(point.threshold);
  slider.setAttribute("aria-valuetext", written(point.threshold));
  for (const source of element("trade-off") ? ["today", "collection"] : []) {
    for (const figure of ["recall", "ham_blocked"]) {
      element(`${source}-${figure}`).textContent = percent(point[source]?.[figure]);
    }
  }
  element("reset").hidden = point === chosen;
}

// The first letter is scored at once, those typed after it at most as often as this, in milliseconds.
const PACE = 120;
let asked = -PACE;
let due;
let request = new AbortController();

function scoreSoon() {
  clearTimeout(due);
  due = setTimeout(score, asked + PACE - performance.now());
}

async function score() {
  clearTimeout(due);
  request.abort();
  const text = element("text").value;
  if (!text) {
    element("result").hidden = true;
    showFailure("");
    return;
  }
  asked = performance.now();
  const own = (request = new AbortController());
  let response, answer;
  try {
    response = await fetch(card.explains ? "explain" : "score", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ text, threshold: threshold() }),
      signal: own.signal,
    });
    answer = await response.json();
  } catch {
    // No server, or a proxy in front of it that does not speak JSON: what there is of a response tells.
  }
  if (own.signal.aborted) return;
  if (response?.ok && answer) {
    showFailure("");
    show(text, answer);
    return;
  }
  element("result").hidden = true; // it belongs to another message or threshold
  if (response?.status === 503 || response?.status === 429) {
    showFailure("The server is busy. Your message stays here, and the page soon tries again.");
    due = setTimeout(score, 1000 * (Number(response.headers.get("Retry-After")) || 2));
  } else if (response && !response.ok) {
    showFailure(`The server refused the message: ${answer?.error ?? `status ${response.status}`}.`);
  } else {
    showFailure("The server does not answer. Change the message or the threshold to try again.");
  }
}

function showFailure(sentence) {
  const alert = element("alert");
  alert.hidden = !sentence;
  if (alert.textContent !== sentence) alert.textContent = sentence; // or it would be read out again
}

function show(text, answer) {
  const result = element("result");
  result.hidden = false;
  result.classList.toggle("spam", answer.prediction);
  result.classList.toggle("ham", !answer.prediction);
  element("verdict").textContent = answer.prediction ? "Spam" : "Ham";
  element("propensity").textContent = `${likelihood(answer.propensity)} likely to be spam`;
  element("fill").style.width = percent(answer.propensity);
  element("mark").style.left = percent(answer.threshold);
  showAction(answer);
  if (card.explains) showReasons(text, answer.contributions);
}

function showAction({ prediction, propensity, threshold }) {
  const labels = label != null && label < threshold;
  const limit = `the threshold of ${written(threshold)}`;
  element("label-mark").hidden = !labels;
  element("label-mark").style.left = percent(label);
  element("action").textContent =
    prediction ? `Taken down: it reaches ${limit}.`
    : !labels ? `Delivered: it does not reach ${limit}.`
    : propensity < label ? `Delivered: it reaches neither ${written(label)}, for a warning label, nor ${limit}.`
    : `Delivered with a warning label: it reaches ${written(label)}, but not ${limit}.`;
}

// A word that adds less would be written as 0.0; and a page of thousands of marks is slow.
const LEAST_PUSH = 0.05;
const MOST_MARKS = 200;

function showReasons(text, contributions) {
  element("why").hidden = !contributions;
  if (!contributions) return;
  let at = 0;
  const parts = text.match(/\s+|\S+/gu).map((part) => {
    const own = contributions.slice(at, (at += [...part].length));
    return { text: part, push: /\S/u.test(part) ? own.reduce((a, b) => a + b, 0) : 0 };
  });
  const counting = parts.filter(({ push }) => Math.abs(push) >= LEAST_PUSH);
  counting.sort((a, b) => Math.abs(b.push) - Math.abs(a.push));
  const marked = new Set(counting.slice(0, MOST_MARKS));
  const strongest = Math.max(0.2, Math.abs(counting[0]?.push ?? 0));
  const message = document.createDocumentFragment();
  message.append(...parts.map((part) => (marked.has(part) ? mark(part, strongest) : part.text)));
  message.normalize();
  element("message").replaceChildren(message);
  element("cut").hidden = marked.size === counting.length;

  const totals = new Map();
  for (const part of parts) totals.set(part.text, (totals.get(part.text) ?? 0) + part.push);
  const words = [...totals].sort(([, a], [, b]) => b - a);
  list("towards-spam", words.filter(([, push]) => push >= LEAST_PUSH));
  list("towards-ham", words.filter(([, push]) => push <= -LEAST_PUSH).reverse());
}

function mark({ text, push }, strongest) {
  const word = document.createElement("mark");
  word.textContent = text;
  word.className = push > 0 ? "spam" : "ham";
  word.dataset.push = `${push > 0 ? "+" : "\u2212"}${Math.abs(push).toFixed(1)}`;
  word.style.setProperty("--strength", Math.sqrt(Math.abs(push) / strongest)); // the root, so that weak ones are seen too
  return word;
}

function list(id, words) {
  const items = words.slice(0, 6).map(([text, push]) => {
    const item = document.createElement("li");
    const word = document.createElement("b");
    word.textContent = text;
    item.append(word, ` ${Math.abs(push).toFixed(1)}`);
    return item;
  });
  element(id).replaceChildren(...items);
}

element("text").addEventListener("input", scoreSoon);
slider.addEventListener("input", () => { showThreshold(); scoreSoon(); });
element("reset").addEventListener("click", () => { reset(); showThreshold(); scoreSoon(); slider.focus(); });
element("form").addEventListener("submit", (event) => { event.preventDefault(); scoreSoon(); });
element("examples").addEventListener("click", ({ target }) => {
  if (!target.dataset.text) return;
  element("text").value = target.dataset.text;
  scoreSoon();
});

reset();
showThreshold();
for (const part of document.querySelectorAll(".needs-script")) part.hidden = false;
score();
