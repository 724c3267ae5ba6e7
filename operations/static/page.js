import { showPlots } from "./plots.js";
import {
  clear, clock, compare, element, isActive, jobSentence, jobTitle, showEvaluation, showFeedback, showJobs, showModels,
  showMonitoring, showTakedowns,
} from "./tables.js";

// Milliseconds
const WHILE_A_JOB_RUNS = 2_000;
const OTHERWISE = 10_000;
const PATIENCE = 30_000; // for an answer
const RETRY = 5_000; // where the service does not say when
const SPEECH = 15_000; // between two sentences on the progress of a job, as they are read out

let token = sessionStorage.getItem("token");
let session = new AbortController();

function tell(id, sentence) {
  const place = element(id);
  if (place.getAttribute("role") === "alert") place.hidden = !sentence;
  if (place.textContent !== sentence) place.textContent = sentence; // or it would be read out again
}

// Asking the service

class Refusal extends Error {
  constructor(sentence, wait) {
    super(sentence);
    this.wait = wait;
  }
}

async function ask(path, method = "GET") {
  const own = session;
  let response, answer;
  try {
    response = await fetch(path, {
      method,
      headers: { Authorization: `Bearer ${token}` },
      signal: AbortSignal.any([own.signal, AbortSignal.timeout(PATIENCE)]),
    });
    answer = await response.json();
  } catch {
    // No service, or a proxy in front of it that does not speak JSON: what there is of a response tells.
  }
  own.signal.throwIfAborted();
  if (response?.ok && answer !== undefined) return answer;
  if (response?.status === 401) {
    signOut("This is not the token of the operator: sign in with the one that the service was started with.");
    throw own.signal.reason;
  }
  const wait = 1000 * Number(response?.headers.get("Retry-After")) || RETRY;
  if (!response) throw new Refusal("the service does not answer", wait);
  throw new Refusal(answer?.error ?? `the service answered with status ${response.status}`, wait);
}

// The token

function signIn(event) {
  event.preventDefault();
  session.abort();
  session = new AbortController();
  token = element("token").value.trim();
  tell("trouble", "");
  // Others cannot be sent in a header.
  if (/^[\x21-\x7e]+$/.test(token)) poll();
  else signOut("A token has letters, digits and signs of ASCII only: sign in with the one that the service was started with.");
}

function enter() {
  if (!element("room").hidden) return;
  sessionStorage.setItem("token", token);
  const hadFocus = element("sign-in").contains(document.activeElement);
  element("sign-in").hidden = true;
  element("token").value = "";
  for (const part of document.querySelectorAll(".needs-token")) part.hidden = false;
  if (hadFocus) element("room").focus();
}

function signOut(sentence = "") {
  session.abort();
  sessionStorage.removeItem("token");
  token = null;
  known = fresh = null;
  refreshAt = 0;
  jobs = models = [];
  clear();
  showPlots([]);
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  for (const part of document.querySelectorAll(".needs-token")) part.hidden = true;
  element("sign-in").hidden = false;
  element("token").focus();
  element("token").select();
  tell("refusal", "");
  tell("trouble", sentence);
}

// What is asked again and again

let timer;
let isAsking = false;
let inHurry = false;
let refreshAt = 0; // when more than the jobs is asked for
let fresh = null; // the time of what is shown
let jobs = [];
let models = [];
let refusals = new Map(); // what the last job said that should have promoted a model

async function poll() {
  clearTimeout(timer);
  if (!token || document.hidden) return;
  if (isAsking) {
    inHurry = true;
    return;
  }
  [isAsking, inHurry] = [true, false];
  const own = session;
  let wait = OTHERWISE;
  try {
    await refresh();
    if (jobs.some(isActive)) wait = WHILE_A_JOB_RUNS;
    tell("trouble", "");
  } catch (error) {
    if (own.signal.aborted) return;
    if (!(error instanceof Refusal)) throw error;
    wait = error.wait;
    const state = fresh ? `; what it shows is of ${fresh}` : "";
    tell("trouble", `${error.message[0].toUpperCase()}${error.message.slice(1)}. The page goes on trying${state}.`);
  } finally {
    isAsking = false;
    if (inHurry) poll();
    else if (!own.signal.aborted) timer = setTimeout(poll, wait);
  }
}

async function refresh() {
  const before = jobs;
  jobs = await ask("jobs?limit=10");
  refusals = new Map(jobs.filter(({ kind, state }) => kind === "promote" && state === "failed").reverse()
    .map((job) => [job.arguments.model, job.message]));
  const wasActive = new Set(before.filter(isActive).map(({ id }) => id));
  if (jobs.some((job) => wasActive.has(job.id) && !isActive(job))) refreshAt = 0;
  if (Date.now() >= refreshAt) {
    // One after the other, as the service works on one at a time.
    models = await ask("models");
    const [takedowns, feedback] = [await ask("takedowns?limit=10"), await ask("feedback?limit=10")];
    const [evaluation] = await ask("evaluations?limit=1");
    const periods = await ask("monitoring?limit=30");
    showModels(models, refusals);
    showTakedowns(takedowns);
    showFeedback(feedback);
    showEvaluation(evaluation);
    showMonitoring(periods);
    showPlots(periods);
    document.querySelector("[data-order=roll_back]").hidden = !former();
    refreshAt = Date.now() + OTHERWISE - 500; // timers are not that exact
  }
  showJobs(jobs);
  enter();
  say();
  if (element("log").open) await showLog();
  fresh = clock(new Date());
  element("fresh").textContent = `as of ${fresh}`;
}

// Only the latest models are listed, and the one that serves may be older.
const serving = () => models.find(({ state }) => state === "serving");
const served = () => (serving() ? `model ${serving().id}` : "the one that serves");

function former() {
  const before = models.filter(({ state, promoted }) => state === "retired" && promoted);
  return before.sort((a, b) => new Date(b.promoted) - new Date(a.promoted))[0];
}

// What is read out: jobs that begin or end, and now and then how far one is

let known = null;
let spoken = 0;

function say() {
  const news = known && jobs.find(({ id, state }) => known.get(id) !== state);
  const active = jobs.find(isActive);
  if (news || !known || (active && Date.now() - spoken > SPEECH)) {
    const job = news || active;
    tell("status", job ? jobSentence(job) : "No job is running.");
    spoken = Date.now();
  }
  known = new Map(jobs.map(({ id, state }) => [id, state]));
}

// Orders

async function order(path, method = "POST") {
  const own = session;
  tell("refusal", "");
  try {
    await ask(path, method);
  } catch (error) {
    if (own.signal.aborted) return;
    if (!(error instanceof Refusal)) throw error;
    tell("refusal", `The order was not taken: ${error.message}.`);
  }
  poll();
}

function confirmOrder({ title, text, hint, yes, path, model }) {
  const dialog = element("confirm");
  element("confirm-title").textContent = title;
  element("confirm-text").textContent = text;
  element("confirm-hint").textContent = hint;
  element("confirm-yes").textContent = yes;
  compare(serving(), model);
  dialog.returnValue = "";
  dialog.onclose = () => dialog.returnValue && order(path);
  dialog.showModal();
}

function promote(id) {
  const model = models.find((other) => other.id === id);
  const refused = refusals.has(id) ? ` The last job refused: ${refusals.get(id)}.` : "";
  confirmOrder({
    title: `Promote model ${id}?`,
    text: `Model ${id} takes the place of ${served()} for all users. No message is lost meanwhile, and it can be rolled back.`,
    hint: `The job first compares the two by the conditions under operations.promotion in params.yaml: what a candidate may
      lose, and how many messages it must have scored on the side. If it does not meet them, nothing changes, and the job says
      why.${refused}`,
    yes: "Promote",
    path: `models/${id}/promote`,
    model,
  });
}

function rollBack() {
  const model = former();
  confirmOrder({
    title: `Roll back to model ${model.id}?`,
    text: `Model ${model.id}, which served before, takes the place of ${served()} for all users.`,
    hint: "No condition is checked. The model that goes cannot be rolled back to.",
    yes: "Roll back",
    path: "models/roll-back",
    model,
  });
}

let logged;

function openLog(id) {
  logged = id;
  element("log-title").textContent = jobTitle(jobs.find((job) => job.id === id));
  for (const part of ["log-message", "log-lines"]) element(part).textContent = "";
  element("log-result").hidden = true;
  element("log").showModal();
  poll();
}

async function showLog() {
  const asked = logged;
  const { log, message, state, result } = await ask(`jobs/${asked}`);
  if (asked !== logged) return;
  const lines = element("log-lines");
  const wasAtEnd = lines.scrollTop + lines.clientHeight >= lines.scrollHeight - 4;
  tell("log-message", `${state}: ${message}`);
  tell("log-lines", log);
  if (wasAtEnd) lines.scrollTop = lines.scrollHeight;
  element("log-result").hidden = !result;
  tell("log-result-lines", result ? JSON.stringify(result, null, 2) : "");
}

function click({ target }) {
  const { order: kind, id } = target.closest("[data-order]")?.dataset ?? {};
  const running = jobs.find((job) => job.kind === kind && isActive(job));
  if (!kind) return;
  if (kind === "log") openLog(Number(id));
  else if (kind === "cancel") order(`jobs/${id}`, "DELETE");
  else if (running) tell("status", `${jobSentence(running)} Wait for it, or cancel it.`);
  else if (kind === "promote") promote(Number(id));
  else if (kind === "roll_back") rollBack();
  else order(kind);
}

element("sign-in").addEventListener("submit", signIn);
element("sign-out").addEventListener("click", () => signOut());
document.addEventListener("click", click);
document.addEventListener("visibilitychange", poll);
if (token) poll();
else signOut();
