"""Tests of the operator's page in a real browser."""

import json
import shutil
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import sqlalchemy as sa
from helpers import launched, poll, stub_card
from pages import expect_contrast, served
from playwright.sync_api import expect

from operations import jobs, store
from operations.actions import act
from operations.evaluation import evaluate_window
from operations.spool import Recorder
from operations.store import SECOND, WORKERS, add_label, insert, migrate, now, open_store, register
from operations.web import create_operations_app
from score import load_card, load_model, score

pytestmark = [pytest.mark.browser, pytest.mark.operations]
TOKEN = "the-token-of-the-operator"
REGIONS = ("north", "south", "islands")
TAKEN_DOWN = [
    "Your parcel is held at our depot because a fee of £1.99 is unpaid. Pay today at parcel-desk.example/fee or it goes "
    "back to the sender",
    "Your free trial ends today. Reply STOP to cancel or call 0800 555 0199, or £9.99 a month will be charged",
    "WINNER! Your number was drawn for a £500 voucher. To claim call 09061700000 now, 12 hours only",
    "Your bank\u200b account is locked. Verify your details now: \u202eelpmaxe.knab-ruoy\u202c",
    "Hi mum, I dropped my phone and this is my new number. Text me on WhatsApp on 07700 900123 as soon as you can x",
]
DELIVERED = "Crypto alert: your wallet received 2.4 BTC. Withdraw at coin-vault.example"
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title = 'owned'</script> \u202e\x07 FREE prize!"
)
PARAMS = {
    "retention_days": 7,
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
    numbers = (ago(days=1, hours=1) + np.arange(count) * 82_800 * SECOND // count) * WORKERS
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


def fill(engine):
    """Put a little of everything in a store."""
    card = load_card()
    test = card["metrics"]["test"]
    better = {"today": {**test["today"], "aucpr": 0.9712, "ham_blocked": 0.0094}, "collection": test["collection"]}
    register(engine, card, "serving")
    register(engine, {**card, "sha256": "b" * 64, "metrics": {"test": better}}, "candidate", 4)
    former = stub_card("sms-spam-nb", sha256="c" * 64, metrics={"test": {"today": {"aucpr": 0.9131}}})
    register(engine, former, "serving")
    with engine.begin() as connection:
        for number, values in (
            (1, {"promoted": ago(days=2), "created": ago(days=3)}),
            (2, {"created": ago(hours=5)}),
            (3, {"state": "retired", "promoted": ago(days=30), "created": ago(days=31)}),
        ):
            connection.execute(store.models.update().where(store.models.c.id == number).values(**values))
    add_traffic(engine)
    numbers = add_messages(engine, [*TAKEN_DOWN, DELIVERED], ago(seconds=30))
    evaluate_window(engine)
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
        page.on("pageerror", faults.append)
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


def sign_in(page, token=TOKEN):
    """Give the page a token."""
    page.get_by_label("Token").fill(token)
    page.keyboard.press("Enter")


def row(page, table, text):
    """Return the row of a table that holds a text."""
    return page.locator(f"#{table} tr", has_text=text)
