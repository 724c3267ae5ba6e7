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

let request = new AbortController();

async function score() {
  request.abort();
  const text = element("text").value;
  if (!text) {
    element("result").hidden = true;
    element("alert").hidden = true;
    return;
  }
  const own = (request = new AbortController());
  let failure;
  try {
    const response = await fetch("explain", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ text, threshold: threshold() }),
      signal: own.signal,
    });
    const answer = await response.json();
    if (response.ok) show(text, answer);
    else failure = `The server refused the message: ${answer.error}.`;
  } catch {
    failure = "The server does not answer. Start it again, then change the message or the threshold to retry.";
  }
  if (own.signal.aborted) return;
  element("alert").hidden = !failure;
  element("alert").textContent = failure ?? "";
  element("result").classList.toggle("stale", Boolean(failure));
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
  showReasons(text, answer.contributions);
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

function showReasons(text, contributions) {
  const characters = [...text];
  const pushes = contributions ?? characters.map(() => 0);
  const strongest = Math.max(0.2, ...pushes.map(Math.abs));
  const words = [];
  const message = document.createDocumentFragment();
  let word = null;
  characters.forEach((character, i) => {
    if (/\s/u.test(character)) {
      word = null;
      message.append(character);
      return;
    }
    if (!word) {
      word = { text: "", push: 0, box: document.createElement("span") };
      words.push(word);
      message.append(word.box);
    }
    word.text += character;
    word.push += pushes[i];
    const mark = document.createElement("mark");
    const colour = pushes[i] > 0 ? "spam" : "ham";
    const strength = Math.sqrt(Math.abs(pushes[i]) / strongest); // the root, so that weak ones are seen too
    mark.style.backgroundColor = `rgb(var(--${colour}-rgb) / ${Math.round(65 * strength)}%)`;
    mark.textContent = character;
    word.box.append(mark);
  });
  for (const { box, push } of words) box.title = `${push > 0 ? "towards spam" : "towards ham"}: ${Math.abs(push).toFixed(2)}`;
  element("message").replaceChildren(message);
  list("towards-spam", words.filter(({ push }) => push >= 0.05), (a, b) => b.push - a.push);
  list("towards-ham", words.filter(({ push }) => push <= -0.05), (a, b) => a.push - b.push);
}

function list(id, words, order) {
  const box = element(id);
  box.replaceChildren();
  for (const { text, push } of words.sort(order).slice(0, 6)) {
    const word = document.createElement("b");
    word.textContent = text;
    box.append(word, ` ${Math.abs(push).toFixed(1)} \u2002`);
  }
  if (!words.length) box.textContent = "nothing";
}

element("text").addEventListener("input", score);
slider.addEventListener("input", () => { showThreshold(); score(); });
element("reset").addEventListener("click", () => { reset(); showThreshold(); score(); slider.focus(); });
element("form").addEventListener("submit", (event) => { event.preventDefault(); score(); });
element("examples").addEventListener("click", ({ target }) => {
  if (!target.dataset.text) return;
  element("text").value = target.dataset.text;
  score();
});

reset();
showThreshold();
score();
