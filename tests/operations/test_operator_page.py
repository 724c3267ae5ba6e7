"""Tests of the operator's page in a real browser."""

import json
import re
import shutil
import sys
import time
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import numpy as np
import pytest
import sqlalchemy as sa
from helpers import launched, stub_card
from pages import expect_contrast, served
from playwright.sync_api import expect

from operations import evaluation, jobs, store
from operations.actions import act
from operations.evaluation import evaluate_window
from operations.spool import Recorder
from operations.store import SECOND, WORKERS, add_label, insert, migrate, now, open_store, register
from operations.web import create_operations_app
from score import load_card, load_model, score

pytestmark = pytest.mark.browser
TOKEN = "the-token-of-the-operator"
REGIONS = ("north", "south", "islands")
TAKEN_DOWN = [
    "Your parcel is held at our depot because a fee of £1.99 is unpaid. Pay today at parcel-desk.example/fee",
    "Your free trial ends today. Reply STOP to cancel or call 0800 555 0199, or £9.99 a month will be charged",
    "WINNER! Your number was drawn for a £500 voucher. To claim call 09061700000 now, 12 hours only",
    "Your bank\u200b account is locked. Verify your details now: \u202eelpmaxe.knab-ruoy\u202c",
    "Hi mum, I dropped my phone and this is my new number. Text me on WhatsApp on 07700 900123 as soon as you can x",
]
DELIVERED = "Crypto alert: your wallet received 2.4 BTC. Withdraw at coin-vault.example"
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title = 'owned'</script> \u202e\x07 FREE prize!"
)
COLUMNS = {  # the bin that changes most of each, its share before, and what an alarm says
    "propensity": ("0.62 to 0.98", 0.081, "The propensity is 0.62 to 0.98 in {} of the messages, and was in {}"),
    "prediction": ("above 0", 0.189, "{} of the messages are taken down, and {} were"),
    "characters": ("131 to 152", 0.101, "The number of characters is 131 to 152 in {} of the messages, and was in {}"),
    "digits": ("2 to 5", 0.097, "The number of digits is 2 to 5 in {} of the messages, and was in {}"),
}
PARAMS = {
    "retention_days": 7,
    "feedback_days": 7,
    "experiment": "unfiltered share",
    "shares": {"filtered": 0.9, "unfiltered": 0.1},
    "spool_bytes": 1e9,
    "shadow_share": 0.1,
}


def ago(**period):
    """Return a time before now, in microseconds."""
    return now() - int(timedelta(**period).total_seconds() * SECOND)


def add_messages(engine, texts, at, model=1):
    """Store messages that were scored by the saved model, a minute apart, and act on them; return their numbers."""
    filter_, threshold = load_model(), load_card()["threshold"]
    rows = []
    for i, text in enumerate(texts):
        prediction, propensity = score(text, filter_, threshold)
        row = {"message": (at - 60 * i * SECOND) * WORKERS, "model": model, "shadow": False, "text": text}
        row |= {"propensity": propensity, "threshold": threshold, "prediction": prediction}
        rows.append({**row, "sender": b"12345678", "region": REGIONS[i % 3], "arm": "filtered"})
    with engine.begin() as connection:
        insert(connection, rows)
    act(engine, 0.5)
    return [row["message"] for row in rows]


def add_traffic(engine, count=4000, model=1, candidate=2):
    """Store a day of messages without texts, some of which a candidate scored too, with what users said of them."""
    random = np.random.default_rng(0)
    spam = random.random(count) < 0.2
    propensities = np.where(spam, random.beta(8, 0.5, count), random.beta(0.3, 3 - 2.8 * (random.random(count) < 0.02)))
    numbers = (ago(days=1) + np.arange(count) * 79_200 * SECOND // count) * WORKERS
    rows = []
    for i in range(count):
        row = {"message": int(numbers[i]), "threshold": 0.909091, "propensity": float(propensities[i])}
        row["prediction"] = row["propensity"] >= row["threshold"]
        about = {"region": REGIONS[i % 3], "arm": "unfiltered" if i % 10 == 0 else "filtered"}
        rows.append({**row, "model": model, "shadow": False, **about})
        if i % 3 == 0:
            other = {"prediction": row["prediction"] ^ (i % 400 == 0)}
            rows.append({**row, **other, "model": candidate, "shadow": True})
    with engine.begin() as connection:
        insert(connection, [row for row in rows if not row["shadow"]])
        insert(connection, [row for row in rows if row["shadow"]])
    act(engine, 0.5)
    taken_down = propensities >= 0.909091
    for i in np.flatnonzero(taken_down & ~spam)[:9]:
        add_label(engine, int(numbers[i]), "complaint", 0)
    for i in np.flatnonzero(spam & (~taken_down | (np.arange(count) % 10 == 0))):
        add_label(engine, int(numbers[i]), "spam report", 1)
    with engine.begin() as connection:  # each was said two hours after its message
        received = store.labels.c.message / WORKERS + 7200 * SECOND
        connection.execute(store.labels.update().values(received=sa.cast(received, sa.BigInteger)))


def put_job(engine, kind, arguments=None, **values):
    """Store a job in some state, as if it had been run, and return its number."""
    number = jobs.enqueue(engine, kind, arguments)
    with engine.begin() as connection:
        connection.execute(store.jobs.update().where(store.jobs.c.id == number).values(**values))
    return number


def running(**values):
    """Return the columns of a job that some worker runs."""
    return {"state": "running", "worker": "w", "attempt": 1, "lease": 2**62, "started": now(), **values}


def over(state="done", minutes=60, took=100, **values):
    """Return the columns of a job that is over."""
    begun = ago(minutes=minutes)
    times = {"created": begun, "started": begun + SECOND, "finished": begun + (1 + took) * SECOND}
    message = {"done": "It is done.", "cancelled": "It was cancelled."}.get(state)
    return {"state": state, "progress": 1, "message": message, **times, **values}


def found(distances=(0.02, 0.01, 0.03, 0.02), share=0.2, precision=0.97, missed=(5, 500), **changes):
    """Return what was found when a period was looked at; a distance from 0.05 on is an alarm."""
    drift, alarms = [], {}
    for (column, (most, before, says)), distance in zip(COLUMNS.items(), distances, strict=True):
        row = {"column": column, "distance": distance, "p": 0.001, "corrected": 0.004, "alarm": distance >= 0.05}
        after = before + 0.8 * distance
        drift.append({**row, "bin": most, "before": before, "now": after})
        if row["alarm"]:
            sentence = f"{says.format(f'{after:.1%}', f'{before:.1%}')} of those that the model was tested on."
            alarms[f"drift of {column}"] = sentence
    reported = {"missed": evaluation.share(*missed), "spam": evaluation.share(30, 3000), "cost": 40.0}
    measured = {"reported": reported, "estimated": None, "regions": {}, "notes": []}
    result = {"messages": 3800, "drift": drift, "least": 0.05, "min_precision": 0.9}
    result |= {"spam_share": share, "expected_precision": precision}
    return result | {"evaluation": measured, "segments": [], "alarms": alarms, "streams": {}} | changes


def add_periods(engine, results, model=1):
    """Store what was found in days that ended so many days and an hour ago."""
    with engine.begin() as connection:
        for days, result in results.items():
            end = ago(hours=1, days=days)
            values = {"created": end + 60 * SECOND, "start": end - 86_400 * SECOND, "end": end, "model": model}
            connection.execute(store.drift.insert().values(**values, result=json.dumps(result)))


def month():
    """Return what was found on the nights of a month, at whose end a new kind of message and a new alarm arrive."""
    random, nights = np.random.default_rng(0), {}
    for days, new in zip(range(29, -1, -1), [0] * 22 + list(np.linspace(0.02, 0.12, 8)), strict=True):
        distances = random.uniform(0.005, 0.03, 4) + np.array([new, new / 3, new, new / 2])
        missed = (int(random.integers(2, 7) + 30 * new), 569)
        share = 0.2 + new / 2 + random.normal() / 100
        nights[days] = found(distances.round(4).tolist(), share, 0.97 - new / 3, missed)
    nights[0]["segments"] = [served_worse("language", "cy")]
    nights[0]["alarms"]["language cy, taken down"] = (
        "Of the messages taken down where the language is cy, at least 7.5% were so in error, 6.9 points more than "
        "elsewhere (1.0 to 22.0)."
    )
    return nights


def served_worse(segment, value):
    """Return a segment of which more messages are taken down in error than of others."""
    interval = {"gap": 0.069, "low": 0.01, "high": 0.22, "p": 0.0004, "corrected": 0.0008, "alarm": True}
    return {"segment": segment, "value": value, "of": "taken down", "messages": 80, "share": 0.075, **interval}


def fill(engine):
    """Put a little of everything in a store."""
    card = load_card()
    test = card["metrics"]["test"]
    better = {"today": {**test["today"], "aucpr": 0.9712, "ham_blocked": 0.0094}, "collection": test["collection"]}
    register(engine, card, "serving")
    register(engine, {**card, "sha256": sha256(b"candidate").hexdigest(), "metrics": {"test": better}}, "candidate", 4)
    former = stub_card(
        "sms-spam-nb", sha256=sha256(b"former").hexdigest(), metrics={"test": {"today": {"aucpr": 0.9131}}}
    )
    register(engine, former, "serving")
    with engine.begin() as connection:
        for number, values in (
            (1, {"promoted": ago(days=40), "created": ago(days=41)}),
            (2, {"created": ago(hours=5)}),
            (3, {"state": "retired", "promoted": ago(days=70), "created": ago(days=71)}),
        ):
            connection.execute(store.models.update().where(store.models.c.id == number).values(**values))
    add_traffic(engine)
    numbers = add_messages(engine, [*TAKEN_DOWN, DELIVERED], ago(seconds=30))
    evaluate_window(engine)
    add_periods(engine, month())
    add_label(engine, numbers[5], "spam report", 1, DELIVERED)
    add_label(engine, numbers[1], "complaint", 0, TAKEN_DOWN[1])
    add_label(engine, numbers[4], "reviewer", 1)
    put_job(engine, "evaluate", **over(minutes=900, took=3, result='{"messages": 3998, "taken_down": 420}'))
    put_job(engine, "train", **over(minutes=310, took=372, result='{"model": 2, "is_new": true}'))
    refusal = "model 2 is not promoted: it has scored 214 messages in shadow, of 1000 needed"
    put_job(engine, "promote", {"model": 2}, **over("failed", 290, 1, message=refusal))
    put_job(engine, "rescore", **over("cancelled", 120, 9))
    put_job(engine, "train", **running(progress=0.42, message="Executing train.ipynb, cell 17 of 38"))


@pytest.fixture
def engine(tmp_path):
    """A store in SQLite."""
    engine = open_store(f"sqlite:///{tmp_path / 'store.db'}", patience=1)
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def filled_file(tmp_path_factory):
    """The file of a store with a little of everything."""
    path = tmp_path_factory.mktemp("filled") / "store.db"
    engine = open_store(f"sqlite:///{path}")
    migrate(engine)
    fill(engine)
    engine.dispose()
    return path


@pytest.fixture
def filled(engine, filled_file):
    """A store with a little of everything."""
    engine.dispose()
    shutil.copy(filled_file, engine.url.database)
    return engine


@pytest.fixture
def url(engine, tmp_path, monkeypatch):
    """The address of the operator's service, in a thread."""
    monkeypatch.setattr(jobs, "STATE", tmp_path)
    recorder = Recorder(load_card(), PARAMS, tmp_path / "spool", b"key")
    with served(create_operations_app(engine, load_model(), load_card(), recorder, TOKEN)) as server:
        yield f"http://127.0.0.1:{server.port}"
    recorder.close()


@pytest.fixture
def open_page(browser):
    """A function that opens the page of a service and signs in, and makes sure that no script fails."""
    contexts, faults = [], []

    def make(url, token=TOKEN, **options):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(error))
        page.on("console", lambda said: faults.append(said.text) if "Content Security" in said.text else None)
        page.on("request", lambda sent: None if "//127.0.0.1" in sent.url else faults.append(sent.url))
        page.goto(f"{url}/operations")
        if token:
            sign_in(page, token)
        return page

    yield make
    for context in contexts:
        context.close()
    assert not faults


# The page's clock stands still, and with it its frames.
NEXT_TASK = """new Promise((done) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = done;
  port2.postMessage(0);
})"""


def sign_in(page, token=TOKEN):
    """Give the page a token."""
    page.get_by_label("Token").fill(token)
    page.keyboard.press("Enter")


def row(page, table, text):
    """Return the row of a table that holds a text."""
    return page.locator(f"#{table} tr", has_text=text)


def kinds(engine):
    """Return the kinds and arguments of the jobs of a store, the first one first."""
    return [(job["kind"], job["arguments"]) for job in reversed(jobs.list_jobs(engine))]


def change(engine, number, **values):
    """Change a job, as its worker does."""
    with engine.begin() as connection:
        connection.execute(store.jobs.update().where(store.jobs.c.id == number).values(**values))


# The token


def test_a_wrong_token_is_asked_for_again_and_the_right_one_is_kept_in_the_tab(url, open_page):
    page = open_page(url, token=None)
    expect(page.locator("main")).to_be_hidden()
    expect(page.get_by_label("Token")).to_be_focused()
    for wrong, sentence in (("wrong", "not the token of the operator"), ("t\u00f6ken", "signs of ASCII only")):
        sign_in(page, wrong)
        expect(page.locator("#trouble")).to_contain_text(sentence)
        expect(page.get_by_label("Token")).to_be_focused()
        assert page.evaluate("sessionStorage.length") == 0
    sign_in(page)
    expect(page.locator("main")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_label("Token")).to_be_hidden()
    page.reload()
    expect(page.locator("main")).to_be_visible()
    assert page.evaluate("[document.cookie, localStorage.length]") == ["", 0]
    assert TOKEN not in page.content()
    assert TOKEN not in page.url

    page.get_by_role("button", name="Sign out").click()
    expect(page.locator("main")).to_be_hidden()
    expect(page.get_by_label("Token")).to_have_value("")
    assert page.evaluate("sessionStorage.length") == 0
    page.reload()
    expect(page.get_by_label("Token")).to_be_focused()


def test_a_token_that_is_no_longer_right_takes_everything_away(url, engine, open_page):
    add_messages(engine, TAKEN_DOWN, now())
    add_periods(engine, month())
    page = open_page(url)
    expect(page.locator("#takedowns tr")).to_have_count(len(TAKEN_DOWN))
    expect(page.locator("figure")).to_have_count(6)
    page.route("**/jobs?*", lambda route: route.fulfill(status=401, json={"error": "no"}))
    page.get_by_role("button", name="Train").click()
    expect(page.locator("#trouble")).to_contain_text("not the token of the operator")
    expect(page.locator("main")).to_be_hidden()
    for gone in ("parcel-desk", "language is cy", "<figure"):
        assert gone not in page.content()


# What it shows


def test_an_empty_store_says_what_to_do(url, open_page):
    page = open_page(url)
    for sentence in (
        "No job has been ordered yet.",
        "There is no model yet:",
        "Nothing has been evaluated yet. Evaluate the last day",
        "No period has been looked at yet. Look at the last day",
        "Nothing has been taken down yet.",
        "Nobody has said anything yet.",
    ):
        expect(page.get_by_text(sentence)).to_be_visible()
    expect(page.locator("table")).to_have_count(page.locator("table:not(:visible)").count())
    expect(page.get_by_role("button", name="Roll back")).to_be_hidden()
    expect(page.get_by_role("status")).to_have_text("No job is running.")


def test_what_is_in_the_store_is_shown(url, filled, open_page):
    page = open_page(url)
    candidate, serving = row(page, "models", "candidate"), row(page, "models", "serving")
    expect(candidate).to_contain_text("0.97120.98460.94%0.0%1,3340.30% otherwise", use_inner_text=False)
    expect(candidate).to_contain_text("Refused: model 2 is not promoted: it has scored 214 messages")
    expect(serving).to_contain_text("0.96590.98461.1%0.0%", use_inner_text=False)
    expect(serving.get_by_role("button")).to_have_count(0)
    expect(row(page, "models", "retired")).to_contain_text("0.9131\u2013\u2013\u2013", use_inner_text=False)

    takedowns = page.locator("#takedowns tr")
    expect(takedowns).to_have_count(10)
    expect(takedowns.nth(2)).to_contain_text("09061700000+5.1", use_inner_text=False)
    expect(takedowns.nth(0)).to_contain_text("0.9903 ≥ 0.9091")
    expect(takedowns.nth(9)).to_contain_text("text not kept")
    iso = takedowns.nth(0).locator("time").get_attribute("title")
    assert abs(datetime.fromisoformat(iso) - datetime.now(UTC)) < timedelta(minutes=5)

    expect(page.locator("#feedback tr")).to_have_count(10)
    said = row(page, "feedback", "Your free trial")
    expect(said).to_contain_text("Complaint: it is ham")
    expect(said).to_contain_text("taken down0.9900 ≥ 0.9091", use_inner_text=False)
    expect(row(page, "feedback", "Reviewer: it is spam")).to_contain_text("text not kept")
    expect(row(page, "feedback", "Crypto alert")).to_contain_text("Report: it is spam")
    expect(row(page, "feedback", "delivered to a user without a filter").first).to_contain_text("≥ 0.9091")
    expect(row(page, "feedback", "delivered with a warning").first).to_contain_text("< 0.9091")

    with filled.connect() as connection:
        result = json.loads(connection.scalar(sa.select(store.evaluations.c.result)))
    expect(page.locator("#taken-down")).to_contain_text(f"{result['taken_down']:,}")
    expect(page.locator("#delivered")).to_contain_text(f"of {result['messages']:,} messages")
    missed, precision = result["reported"]["missed"], result["estimated"]["precision"]
    expect(row(page, "reported", "all")).to_contain_text(f"{missed['count']}, {missed['value']:.1%}")
    expect(page.locator("#reported tr")).to_have_count(1 + len(REGIONS))
    expect(row(page, "estimated", "precision")).to_contain_text(
        f"{100 * precision['low']:.1f} to {precision['high']:.1%}"
    )
    expect(page.locator("#period time")).to_have_count(3)

    expect(row(page, "jobs", "Job 2: train")).to_contain_text("done")
    expect(row(page, "jobs", "Job 2: train")).to_contain_text("6 min 12 s")
    expect(row(page, "jobs", "Job 5: train").get_by_role("progressbar")).to_have_attribute("value", "0.42")
    expect(page.get_by_role("status")).to_have_text("Job 5, train, is running: Executing train.ipynb, cell 17 of 38")


def test_an_evaluation_without_estimates_says_why(url, engine, open_page):
    add_messages(engine, TAKEN_DOWN, now())
    evaluate_window(engine)
    page = open_page(url)
    expect(page.locator("#notes")).to_contain_text("precision and recall cannot be estimated: wait")
    expect(page.locator("#estimated-part")).to_be_hidden()
    expect(row(page, "reported", "all")).to_contain_text("0, 0.0%")
    expect(row(page, "reported", "all")).to_contain_text("\u2013")  # nothing was delivered


def test_a_complaint_that_comes_before_its_message_is_stored(url, engine, open_page):
    add_label(engine, now() * WORKERS, "complaint", 0, "I miss it")
    page = open_page(url)
    expect(row(page, "feedback", "I miss it")).to_contain_text("not known yet")


def test_hostile_texts_are_inert(url, engine, open_page, tmp_path):
    [number] = add_messages(engine, [f"{HOSTILE} WINNER! To claim call 09061700000 now"], now())
    add_label(engine, number, "complaint", 0, HOSTILE)
    card = load_card()
    register(engine, {**card, "name": HOSTILE[:99]}, "serving")
    job = put_job(engine, "train", **over("failed", message=HOSTILE, result=json.dumps({"<b>": HOSTILE})))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / f"{job}.log").write_text(HOSTILE, encoding="utf-8")
    page = open_page(url)
    expect(page.locator("#takedowns .text")).to_contain_text("<img src=x")
    assert page.locator("#takedowns .sign").first.text_content() == "U+202E"
    assert "\u202e" not in page.locator("main").evaluate("main => main.querySelector('#takedowns').innerText")
    row(page, "jobs", "failed").get_by_role("button", name="Log").click()
    expect(page.locator("#log-lines")).to_contain_text("<script>")
    expect(page.locator("#log-result-lines")).to_contain_text("<img src=x")
    assert page.locator("img, body script, b:text-is('')").count() == 0
    assert page.title().startswith("Operations")
    assert page.locator("#jobs .block, #feedback .text").evaluate_all(
        "all => all.every(one => getComputedStyle(one).unicodeBidi === 'isolate')"
    )


def test_hostile_names_of_segments_are_inert(url, engine, open_page):
    result = found(segments=[served_worse("region", HOSTILE), served_worse("language", "w" * 300)])
    alarms = {f"region {HOSTILE}": f"More in {HOSTILE}", "toString": "x" * 300}
    add_periods(engine, {1: found(), 0: result | {"alarms": alarms}})
    page = open_page(url, viewport={"width": 360, "height": 700})
    expect(page.locator("#alarms")).to_contain_text("New: More in <img src=x")
    expect(page.locator("#alarms")).to_contain_text("New: xxx")
    expect(page.locator("#segments")).to_contain_text("region <img src=x")
    for part in ("#alarms", "#segments"):
        assert page.locator(f"{part} .sign").first.text_content() == "U+202E"
        assert "\u202e" not in page.locator(part).inner_text()
    assert page.locator("img, body script").count() == 0
    assert page.title().startswith("Operations")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_very_long_text_is_cut(url, engine, open_page):
    add_label(engine, now() * WORKERS, "complaint", 0, "x" * 10_000)
    page = open_page(url)
    expect(page.locator("#feedback .text")).to_contain_text("x … and 9,000 more characters")
    assert page.locator("#feedback .text").evaluate("text => text.offsetHeight") < 200


# Monitoring


def plot(page, title):
    """Return the figure of a plot."""
    return page.locator("figure", has_text=title)


# In the units of its axes: the points from left to right as shares of the width and of what is measured.
PLOTTED = """figure => {
  const box = (mark) => mark.getBoundingClientRect();
  const lines = [...figure.querySelectorAll(".grid")].map((line) => box(line));
  const top = parseFloat([...figure.querySelectorAll(".tick")].at(-1).textContent) / 100;
  const share = (y) => top * (lines[0].y - y) / (lines[0].y - lines.at(-1).y);
  const part = (x) => (x - lines[0].left) / lines[0].width;
  const middle = ({ x, y, width, height }) => [part(x + width / 2), share(y + height / 2)];
  const all = (kind) => [...figure.querySelectorAll(`g > ${kind}`)];
  return {
    points: all(".point").map((mark) => middle(box(mark))),
    alarms: all(".alarm").map((mark) => middle(box(mark))),
    intervals: all(".interval").map((mark) => [share(box(mark).bottom), share(box(mark).top)]),
    pieces: all(".line").map((line) => line.getAttribute("d").split("M").length - 1),
    models: [...figure.querySelectorAll(".model")].map((line) => part(box(line).x)),
    limits: [...figure.querySelectorAll("path.limit")].map((line) => share(box(line).y)),
    ends: [...figure.querySelectorAll("text:not(.tick)")].map((text) => text.textContent),
  };
}"""


def test_what_monitoring_found_is_shown(url, filled, open_page):
    page = open_page(url)
    alarms = page.locator("#alarms li")
    expect(alarms).to_have_count(5)
    expect(alarms.nth(0)).to_have_text(re.compile("^New: Of the messages taken down where the language is cy"))
    expect(alarms.nth(1)).to_have_text(re.compile("^In the last 2 periods: 23.4% of the messages are taken"))
    expect(page.get_by_text("Nothing was found")).to_be_hidden()
    expect(page.get_by_text("A new alarm orders an evaluation.")).to_contain_text("nothing is promoted")
    expect(page.locator("#looked-at")).to_contain_text("3,800 messages on which model 1 decided")
    expect(page.locator("#looked-at time")).to_have_count(3)
    expect(row(page, "drift", "characters")).to_contain_text("13.7%131 to 15210.1%21.1%alarm", use_inner_text=False)
    expect(row(page, "drift", "decision")).to_contain_text("taken down18.9%23.4%", use_inner_text=False)
    expect(row(page, "segments", "language cy")).to_contain_text("taken down807.5%6.91.0 to 22.0", use_inner_text=False)
    expect(page.locator("figure")).to_have_count(6)
    for figure in page.locator("figure").all():
        assert figure.locator("figcaption").text_content()
        assert len(figure.evaluate(PLOTTED)["points"]) == (60 if "precision" in figure.text_content() else 30)
    expect(page.locator("#history")).to_be_hidden()
    page.get_by_text("The figures of the plots, as a table").press("Enter")
    expect(page.locator("#history tr").first).to_contain_text(
        "model 113.5%alarm5.6%alarm13.7%alarm8.9%alarm25.7%93.0%9, 1.6%0.83 to 3.0%", use_inner_text=False
    )
    expect(page.locator("#history tr").last).to_contain_text("model 12.1%1.2%0.60%0.54%", use_inner_text=False)


def test_nothing_found_is_a_sentence(url, engine, open_page):
    add_periods(engine, {1: found((0.2, 0.01, 0.03, 0.02)), 0: found()})
    page = open_page(url)
    expect(page.get_by_text("Nothing was found in this period that raises an alarm.")).to_be_visible()
    expect(page.get_by_text("no region, language, kind of sender or length gets more wrong")).to_be_visible()
    expect(page.locator("#alarms")).to_be_hidden()
    expect(page.locator("#segments")).to_be_hidden()
    expect(row(page, "drift", "propensity")).to_contain_text("none")


def test_an_alarm_of_the_model_before_does_not_make_it_old(url, engine, open_page):
    add_periods(engine, {2: found((0.2, 0.01, 0.07, 0.02))}, model=1)
    add_periods(engine, {1: found((0.01, 0.01, 0.06, 0.02)), 0: found((0.2, 0.01, 0.07, 0.02))}, model=2)
    page = open_page(url)
    expect(page.locator("#alarms li")).to_have_text(
        [re.compile("New: The propensity"), re.compile("In the last 2 periods: The number of characters")]
    )
    drawn = plot(page, "Distance of the propensity").evaluate(PLOTTED)
    [before, after] = [drawn["points"][0][0], drawn["points"][1][0]]
    assert drawn["models"] == [pytest.approx((before + after) / 2, abs=0.01)]
    assert drawn["pieces"] == [2]


def test_points_are_where_the_axes_say(url, engine, open_page):
    distances = {8: 0.01, 4: 0.13, 3: 0.06, 0: 0.02}
    results = {
        days: found((distance, 0, 0, 0), 0.1 + days / 100, 0.9 - days / 100, (2 + days, 500))
        for days, distance in distances.items()
    }
    add_periods(engine, results)
    page = open_page(url)
    drawn = plot(page, "Distance of the propensity").evaluate(PLOTTED)
    assert [share for _, share in drawn["points"]] == pytest.approx(list(distances.values()), abs=0.001)
    left, *between, right = [part for part, _ in drawn["points"]]
    assert 0 < left < 0.05 < 0.95 < right < 1
    assert between == pytest.approx([left + (right - left) * (8 - days) / 8 for days in (4, 3)], abs=0.003)
    assert [share for _, share in drawn["alarms"]] == pytest.approx([0.13, 0.06], abs=0.001)
    assert drawn["limits"] == [pytest.approx(0.05, abs=0.001)]
    assert drawn["pieces"] == [1]
    first, last = [f"{at.day} {at:%b}" for at in (datetime.now() - timedelta(days=n, hours=1) for n in (8, 0))]
    assert drawn["ends"] == ["% of messages", "end of the period", first, last, "limit of an alarm: 5.0%"]
    assert (
        plot(page, "Distance of the number of characters").evaluate(PLOTTED)["limits"] == drawn["limits"]
    )  # on the same scale

    drawn = plot(page, "Spam and precision").evaluate(PLOTTED)
    shares = [0.1 + days / 100 for days in distances] + [0.9 - days / 100 for days in distances]
    assert [share for _, share in drawn["points"]] == pytest.approx(shares, abs=0.005)
    drawn = plot(page, "Missed by users").evaluate(PLOTTED)
    missed = [evaluation.share(2 + days, 500) for days in distances]
    assert [share for _, share in drawn["points"]] == pytest.approx([of["value"] for of in missed], abs=0.0005)
    for drawn_interval, of in zip(drawn["intervals"], missed, strict=True):
        assert drawn_interval == pytest.approx([of["low"], of["high"]], abs=0.0005)


def test_a_point_tells_its_values(url, engine, open_page):
    results = {2: found((0.2, 0, 0, 0), 0.31), 1: found(precision=0.912), 0: found(missed=(50, 1000))}
    add_periods(engine, results)
    page = open_page(url)
    distance, missed = plot(page, "Distance of the propensity"), plot(page, "Missed by users")
    reading, slider = distance.locator(".reading"), distance.get_by_role("slider")
    expect(reading).to_contain_text("2.0%")
    expect(missed.locator(".reading")).to_contain_text("5.0%, 50 messages (3.8 to 6.5%)")
    expect(distance.locator(".cursor")).to_have_css("display", "none")
    distance.locator(".point").first.hover()
    day = datetime.now() - timedelta(days=2, hours=1)
    expect(reading).to_have_text(re.compile(rf"^{day.day} {day:%b}, [\d:]+20.0%, alarm$"))
    expect(plot(page, "Spam and precision").locator(".reading")).to_contain_text("spam 31.0%precision 97.0%")
    expect(missed.locator(".cursor")).to_have_css("display", "inline")
    page.mouse.move(0, 0)
    expect(reading).to_contain_text("2.0%")
    expect(distance.locator(".cursor")).to_have_css("display", "none")

    slider.focus()
    for key, now_at, says in (
        ("ArrowLeft", "2", "precision 91.2%"),
        ("Home", "1", "31.0%"),
        ("ArrowLeft", "1", "31.0%"),
    ):
        page.keyboard.press(key)
        expect(slider).to_have_attribute("aria-valuenow", now_at)
        expect(plot(page, "Spam and precision").locator(".reading")).to_contain_text(says)
    expect(slider).to_have_attribute("aria-valuetext", re.compile("20.0%, alarm"))
    missed.locator(".point").nth(1).hover()
    page.mouse.move(0, 0)
    expect(slider).to_have_attribute("aria-valuenow", "2")
    page.keyboard.press("End")
    expect(slider).to_have_attribute("aria-valuenow", "3")
    page.keyboard.press("Tab")
    expect(plot(page, "Distance of the decision").get_by_role("slider")).to_be_focused()


def test_a_new_period_is_drawn_and_the_focus_stays(url, engine, open_page):
    add_periods(engine, {1: found()})
    number = put_job(engine, "monitor", **running())
    page = open_page(url)
    slider = plot(page, "Missed by users").get_by_role("slider")
    slider.focus()
    add_periods(engine, {0: found()})
    change(engine, number, state="done", finished=now())
    expect(slider.locator(".point")).to_have_count(2)
    expect(slider).to_be_focused()


def test_one_period_is_a_point_in_the_middle(url, engine, open_page):
    result = found((0.08, 0, 0, 0))
    del result["drift"][2:]
    add_periods(engine, {0: result})
    page = open_page(url)
    expect(page.locator("figure")).to_have_count(4)
    drawn = plot(page, "Distance of the propensity").evaluate(PLOTTED)
    assert drawn["points"] == drawn["alarms"] == [pytest.approx([0.5, 0.08], abs=0.001)]
    assert drawn["ends"][1].startswith("end of the period: ")
    assert len(drawn["ends"]) == 3


def test_what_is_missing_is_no_point(url, engine, open_page):
    nothing = found(drift=[], share=None, precision=None, missed=(0, 0))
    nothing["evaluation"]["notes"] = ["Nobody has said anything of these messages yet."]
    add_periods(engine, {2: found(), 1: nothing, 0: found()})
    page = open_page(url)
    drawn = plot(page, "Distance of the number of characters").evaluate(PLOTTED)
    assert len(drawn["points"]) == 2
    assert drawn["pieces"] == [2]  # no line leads over the gap
    plot(page, "Distance of the number of characters").get_by_role("slider").press("ArrowLeft")
    expect(plot(page, "Distance of the number of characters").locator(".reading")).to_contain_text("not known")
    expect(plot(page, "Spam and precision").locator(".reading")).to_contain_text("spam not knownprecision not known")
    expect(page.locator("#history tr").nth(1)).to_contain_text("model 1" + 7 * "\u2013", use_inner_text=False)

    with engine.begin() as connection:
        connection.execute(store.drift.delete())
    add_periods(engine, {0: nothing})
    page = open_page(url)
    expect(page.get_by_text("The card of this model has no reference to compare with")).to_be_visible()
    expect(page.locator("#monitoring-notes")).to_have_text("Nobody has said anything of these messages yet.")
    expect(page.locator("figure")).to_have_count(0)


# Orders


def test_orders_become_jobs_and_their_progress_is_shown(url, engine, open_page, tmp_path):
    page = open_page(url)
    status = page.get_by_role("status")
    expect(status).to_have_text("No job is running.")
    page.get_by_role("button", name="Train on what came back").click()
    expect(status).to_have_text("Job 1, train, waits for a worker.")
    page.get_by_role("button", name="Train on what came back").click()
    expect(status).to_have_text("Job 1, train, waits for a worker. Wait for it, or cancel it.")
    page.get_by_role("button", name="Evaluate the last day").click()
    page.get_by_role("button", name="Look at the last day").click()
    expect(page.locator("#jobs tr")).to_have_count(3)
    assert kinds(engine) == [("train", {}), ("evaluate", {}), ("monitor", {})]

    change(engine, 1, **running(progress=0.25, message="Executing prepare.ipynb"))
    expect(row(page, "jobs", "Job 1").get_by_role("progressbar")).to_have_attribute("value", "0.25")
    expect(status).to_have_text("Job 1, train, is running: Executing prepare.ipynb")
    log = page.get_by_role("button", name="Log of job 1")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "1.log").write_text("a line\n")
    log.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#log-lines")).to_have_text("a line\n", use_inner_text=False)
    (tmp_path / "jobs" / "1.log").write_text("a line\nanother\n")
    change(engine, 1, progress=0.5)
    expect(page.locator("#log-lines")).to_contain_text("another")
    page.keyboard.press("Escape")
    expect(log).to_be_focused()
    expect(row(page, "jobs", "Job 1").get_by_role("progressbar")).to_have_attribute("value", "0.5")
    expect(log).to_be_focused()  # though its row has changed
    change(engine, 1, state="failed", message="train.ipynb failed: no room on the disk", finished=now())
    expect(status).to_have_text("Job 1, train, has failed: train.ipynb failed: no room on the disk")
    expect(page.get_by_role("progressbar")).to_have_count(0)


def test_a_job_is_cancelled(url, engine, open_page):
    number = put_job(engine, "train", **running(progress=0.1))
    page = open_page(url)
    page.get_by_role("button", name=f"Cancel job {number}").click()
    expect(row(page, "jobs", "train")).to_contain_text("It was cancelled.")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    assert jobs.find_job(engine, number)["state"] == "cancelled"


def test_an_order_that_is_refused_says_why(url, engine, open_page):
    number = put_job(engine, "train", **running())
    page = open_page(url)
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    jobs.cancel(engine, number)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#refusal")).to_contain_text(
        f"The order was not taken: job {number} is over, so it cannot be cancelled: it is cancelled."
    )
    page.get_by_role("button", name="Evaluate").click()
    expect(page.locator("#refusal")).to_be_hidden()


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def test_promoting_is_confirmed_by_keyboard(url, filled, open_page):
    page = open_page(url)
    button = row(page, "models", "candidate").get_by_role("button", name="Promote")
    dialog = page.get_by_role("dialog", name="Promote model 2?")
    button.focus()
    press(page, "Enter")
    expect(dialog).to_contain_text("Model 2 takes the place of model 1 for all users.")
    expect(dialog).to_contain_text("operations.promotion in params.yaml")
    expect(dialog).to_contain_text("it has scored 214 messages in shadow, of 1000 needed")
    expect(row(page, "comparison", "AUCPR today")).to_contain_text("0.96590.9712", use_inner_text=False)
    for keys in (["Escape"], ["Enter", "Tab", "Enter"]):  # the Enter on the title does nothing
        press(page, *keys)
        expect(dialog).to_be_hidden()
        expect(button).to_be_focused()
        assert len(kinds(filled)) == 5
        press(page, "Enter")
        expect(dialog).to_be_visible()
    press(page, "Tab", "Tab", "Enter")
    expect(page.get_by_role("status")).to_have_text("Job 6, promote model 2, waits for a worker.")
    assert kinds(filled)[5:] == [("promote", {"model": 2})]
    change(filled, 6, state="failed", message="model 2 is not promoted: AUCPR (today) falls", finished=now())
    expect(page.get_by_role("status")).to_contain_text("has failed: model 2 is not promoted: AUCPR (today) falls")
    expect(row(page, "models", "candidate")).to_contain_text("Refused: model 2 is not promoted: AUCPR (today) falls")


def test_rolling_back_is_confirmed(url, filled, open_page):
    page = open_page(url)
    page.get_by_role("button", name="Roll back").click()
    dialog = page.get_by_role("dialog", name="Roll back to model 3?")
    expect(dialog).to_contain_text("Model 3, which served before, takes the place of model 1")
    dialog.get_by_role("button", name="Not now").click()
    page.get_by_role("button", name="Roll back").click()
    dialog.get_by_role("button", name="Roll back").click()
    expect(page.get_by_role("status")).to_have_text("Job 6, roll back, waits for a worker.")
    assert kinds(filled)[5:] == [("roll_back", {})]


def test_a_candidate_beside_a_model_that_is_not_listed(url, engine, open_page):
    register(engine, load_card(), "candidate")
    page = open_page(url)
    page.get_by_role("button", name="Promote").click()
    dialog = page.get_by_role("dialog", name="Promote model 1?")
    expect(dialog).to_contain_text("Model 1 takes the place of the one that serves for all users.")
    expect(dialog.locator("table")).to_be_hidden()
    dialog.get_by_role("button", name="Promote").click()
    expect(page.get_by_role("status")).to_have_text("Job 1, promote model 1, waits for a worker.")


# Faults


def test_a_store_that_is_away_is_told_and_asked_again(url, engine, open_page, tmp_path):
    add_messages(engine, TAKEN_DOWN, now())
    page = open_page(url)
    expect(page.locator("#takedowns tr")).to_have_count(len(TAKEN_DOWN))
    engine.dispose()
    (tmp_path / "store.db").rename(tmp_path / "away.db")
    (tmp_path / "store.db").mkdir()
    page.get_by_role("button", name="Evaluate").click()
    expect(page.locator("#refusal")).to_contain_text("The order was not taken: the store does not answer")
    expect(page.locator("#trouble")).to_contain_text("The store does not answer; messages are scored all the same")
    expect(page.locator("#trouble")).to_contain_text("The page goes on trying; what it shows is of ")
    expect(page.locator("#takedowns tr")).to_have_count(len(TAKEN_DOWN))
    (tmp_path / "store.db").rmdir()
    (tmp_path / "away.db").rename(tmp_path / "store.db")
    expect(page.locator("#trouble")).to_be_hidden(timeout=15_000)


def test_too_many_requests_are_waited_out(url, open_page):
    page = open_page(url, token=None)
    page.clock.install()
    asked = []

    def refuse(route):
        asked.append(route.request.url)
        route.fulfill(status=429, headers={"Retry-After": "40"}, json={"error": "too many requests: wait 40 seconds"})

    page.route("**/jobs?*", refuse)
    sign_in(page)
    expect(page.locator("#trouble")).to_have_text("Too many requests: wait 40 seconds. The page goes on trying.")
    page.clock.run_for(39_000)
    assert len(asked) == 1
    page.unroute("**/jobs?*")
    page.clock.run_for(2_000)
    expect(page.locator("#trouble")).to_be_hidden()
    expect(page.locator("main")).to_be_visible()


@pytest.mark.parametrize(("status", "says"), [(None, "does not answer"), (502, "answered with status 502")])
def test_a_service_that_is_gone_is_told(url, open_page, status, says):
    page = open_page(url)
    expect(page.locator("main")).to_be_visible()
    page.route("**/*", lambda route: route.fulfill(status=status, body="<h1>bad") if status else route.abort())
    page.get_by_role("button", name="Train").click()
    expect(page.locator("#refusal")).to_have_text(f"The order was not taken: the service {says}.")
    expect(page.locator("#trouble")).to_contain_text(
        f"The service {says}. The page goes on trying; what it shows is of"
    )


def test_it_asks_modestly_and_not_at_all_while_hidden(url, engine, open_page):
    page = open_page(url, token=None)
    page.clock.install()
    page.clock.pause_at(datetime.now() + timedelta(minutes=1))  # or it would go on while this machine is busy
    asked, waiting = [], set()
    page.on("request", lambda sent: (asked.append(sent.url), waiting.add(sent)))
    for end in ("requestfinished", "requestfailed"):
        page.on(end, lambda sent: waiting.discard(sent))  # it may have been sent before anybody counted

    def requests_in(seconds):
        before = len(asked)
        for _ in range(seconds):
            page.clock.run_for(1000)
            settled, still, deadline = -1, 0, time.monotonic() + 30
            while still < 20:  # what follows an answer is asked a moment later
                assert time.monotonic() < deadline, waiting
                page.evaluate(NEXT_TASK)
                still = still + 1 if settled == len(asked) and not waiting else 0
                settled = len(asked)
        return len(asked) - before

    sign_in(page)
    expect(page.get_by_role("status")).to_have_text("No job is running.")
    assert 10 <= requests_in(30) <= 20
    put_job(engine, "train", **running())
    page.clock.run_for(10_000)
    expect(page.get_by_role("progressbar")).to_be_visible()
    assert 20 <= requests_in(30) <= 35
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    requests_in(3)  # those that are on their way
    assert requests_in(15) == 0
    before = len(asked)
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    requests_in(1)
    assert len(asked) > before


def test_without_javascript_it_says_what_it_needs(url, open_page):
    page = open_page(url, token=None, java_script_enabled=False)
    expect(page.locator("noscript p")).to_contain_text("This page needs JavaScript")
    expect(page.locator("noscript a")).to_have_attribute("href", "operations/openapi.json")
    for part in page.locator("main, form, dialog").all():
        expect(part).to_be_hidden()
    answer = page.goto(f"{url}/operations/openapi.json")
    assert answer.json()["openapi"].startswith("3.1")


# How it looks


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (320, "dark"), (768, "light")])
def test_it_fits_the_screen_and_stands_out(url, filled, open_page, width, scheme):
    add_label(filled, now() * WORKERS, "complaint", 0, "x" * 300)
    add_messages(filled, [f"WINNER! To claim call 09061700000 now {'w' * 200}"], now())
    page = open_page(url, viewport={"width": width, "height": 700}, color_scheme=scheme)
    expect(page.get_by_role("button", name="Promote")).to_be_visible()
    page.locator("summary").click()
    expect(page.locator("#history tr")).to_have_count(30)

    def fits():
        return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth") and page.locator(
            "dialog[open], .card"
        ).evaluate_all("all => all.every(one => one.scrollWidth <= one.clientWidth)")

    assert fits()
    found = expect_contrast(page)
    assert {entry["kind"] for entry in found} == {"text", "border", "meter", "gap", "line", "focus"}
    for name in ("Promote", "Log of job 3"):
        page.get_by_role("button", name=name).press("Enter")
        expect(page.locator("dialog[open]")).to_be_visible()
        assert fits()
        expect_contrast(page, "dialog[open]")
        page.keyboard.press("Escape")
    labels = page.locator("#jobs td[data-label]").first.evaluate("cell => getComputedStyle(cell, '::before').content")
    assert labels == ('"State"' if width == 320 else "none")
    page.get_by_role("button", name="Sign out").click()
    sign_in(page, "wrong")
    expect(page.locator("#trouble")).to_be_visible()
    expect_contrast(page)
    assert fits()


def test_forced_colours(url, filled, open_page):
    page = open_page(url, forced_colors="active")
    expect(page.get_by_role("progressbar")).to_be_visible()
    page.locator("summary").click()
    assert "line" in {entry["kind"] for entry in expect_contrast(page)}


def test_tables_say_what_they_hold(url, filled, open_page):
    page = open_page(url)
    expect(page.locator("#models tr")).to_have_count(3)
    for table in page.locator("table").all():
        assert table.locator("caption").text_content()
        assert table.locator("thead th").evaluate_all("all => all.every(one => one.scope === 'col')")
    for name in ("jobs", "models", "reported", "estimated", "drift", "segments", "history"):
        rows = page.locator(f"#{name} tr")
        assert page.locator(f"#{name} th[scope=row]").count() == rows.count() > 0


# The program


def test_the_service_as_it_is_run(open_page, engine, tmp_path):
    environment = {
        "OPERATIONS_STATE": str(tmp_path),
        "DATABASE_URL": engine.url.render_as_string(),
        "OPERATIONS_TOKEN": TOKEN,
        "OPERATIONS_KEY": "k" * 16,
        "WORKERS": "2",
    }
    with launched(sys.executable, "-m", "operations.web", **environment) as (_, url):
        add_messages(engine, TAKEN_DOWN, now())
        page = open_page(url)
        expect(page.locator("#takedowns tr")).to_have_count(len(TAKEN_DOWN))
        expect(row(page, "models", "serving")).to_be_visible()
        page.get_by_role("button", name="Train").click()
        expect(page.get_by_role("status")).to_have_text("Job 1, train, waits for a worker.")
        assert kinds(engine) == [("train", {})]
