"""What bounds the work that one client can make: limits, turns, deadlines; and what every answer carries."""

import contextlib
import http.client
import io
import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import process_time
from unicodedata import normalize
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from helpers import HAM, ROOT, LengthModel, launched, stub_card
from sklearn.base import BaseEstimator
from werkzeug.test import encode_multipart

import app as service
from app import create_app
from engine.fields import LONGEST_BATCH, LONGEST_TEXT, SMALL_BODY
from engine.shortcut import Shortcut
from engine.text import normalise
from engine.work import DEADLINE, Queue

FORM = "application/x-www-form-urlencoded"
HELD = "h" * (SMALL_BODY + 1)


class HeldModel(BaseEstimator):
    """A stub that does not answer for a text called held until it is released."""

    def __init__(self):
        self.begun, self.released, self.calls = threading.Event(), threading.Event(), []

    def predict_proba(self, texts):
        self.calls.append(texts)
        if HELD in texts:
            self.begun.set()
            assert self.released.wait(30)
        return np.full((len(texts), 2), 0.5)


@pytest.fixture(scope="module")
def client():
    """A client of the application with the stub."""
    return create_app(LengthModel(), stub_card()).test_client()


@pytest.fixture
def held(monkeypatch):
    """A function that makes an application with a queue of its own, and returns its model and how to post to it."""
    model = HeldModel()
    with ThreadPoolExecutor() as pool:

        def make(**queue):
            monkeypatch.setattr(service, "Queue", partial(Queue, **queue))
            clients = create_app(model, stub_card()).test_client
            return model, lambda path, **fields: pool.submit(lambda: clients().post(path, json=fields))

        try:
            yield make
        finally:  # or a failing test would hang
            model.released.set()


def assert_busy(response):
    """Check that an answer refuses work for now."""
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    assert "try again later" in response.json["error"]


# Turns


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/score/batch", {"texts": ["x"]}), ("/explain", {"text": "x"}), ("/score", {"text": "x" * SMALL_BODY})],
)
def test_a_full_queue_refuses_heavy_work_at_once(held, path, fields):
    model, post = held(most_waiting=0)
    first = post("/score/batch", texts=[HELD])
    assert model.begun.wait(30)
    assert_busy(post(path, **fields).result(30))
    model.released.set()
    assert first.result(30).status_code == 200
    assert post(path, **fields).result(30).status_code == 200


def test_messages_are_scored_while_heavy_work_runs_and_waits(held):
    model, post = held(most_waiting=1)
    heavy = [post("/score/batch", texts=[HELD]) for _ in range(2)]
    assert model.begun.wait(30)
    assert post("/score", text=HAM[0]).result(30).status_code == 200
    model.released.set()
    assert [work.result(30).status_code for work in heavy] == [200, 200]


@pytest.mark.parametrize("path", ["/score/batch", "/explain", "/score"])
def test_work_that_has_waited_until_the_deadline_is_refused(held, path):
    model, post = held(deadline=0.1)
    first = post("/score/batch", texts=[HELD])
    assert model.begun.wait(30)
    assert_busy(post(path, text=HELD, texts=["never scored"]).result(30))
    model.released.set()
    first.result(30)
    assert ["never scored"] not in model.calls


def test_a_batch_is_dropped_at_its_deadline(monkeypatch):
    calls = []

    class Slow(LengthModel):
        def predict_proba(self, texts):
            calls.append(texts)
            now = len(calls) * DEADLINE / 3
            monkeypatch.setattr("engine.work.monotonic", lambda: now)
            return super().predict_proba(texts)

    client = create_app(Slow(), stub_card()).test_client()
    assert_busy(client.post("/score/batch", json={"texts": ["x"] * 1000}))
    assert 2 < len(calls) < 6
    assert client.post("/score/batch", json={"texts": ["x"]}).status_code == 200


def test_a_place_is_given_back_after_an_error():
    queue = Queue(most_waiting=0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            queue.run(lambda: 1 / 0)
    assert queue.run(abs, -1) == 1


# Limits


def test_a_batch_of_ordinary_messages_fits_with_room(client):
    texts = ["x" * 160] * 1000
    assert sum(map(len, texts)) < 0.7 * LONGEST_BATCH
    assert client.post("/score/batch", json={"texts": texts}).status_code == 200
    cyrillic = json.dumps({"texts": ["ж" * 160] * 1000})
    assert client.post("/score/batch", data=cyrillic, content_type="application/json").status_code == 200


def test_the_characters_of_a_batch_are_limited(client):
    texts = ["€" * LONGEST_TEXT] * (LONGEST_BATCH // LONGEST_TEXT)
    body = json.dumps({"texts": texts}, ensure_ascii=False).encode()
    assert client.post("/score/batch", data=body, content_type="application/json").status_code == 200
    response = client.post("/score/batch", data=body.replace(b"]", b', "\xc2\xa3"]'), content_type="application/json")
    assert response.status_code == 413
    assert response.json == {"error": "the texts of a batch have at most 250000 characters, not 250001"}


@pytest.mark.parametrize("path", ["/score", "/score/batch", "/explain"])
@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"text": "x", **{f"{i:05}": 1 for i in range(12_000)}}, separators=(",", ":")),
        json.dumps({"texts": [[]] * 12_000}, separators=(",", ":")),
        '{"text": ' + '{"":' * 12_000,
        json.dumps({"text": [0] * 12_001}).encode("utf-16"),
    ],
)
def test_json_of_too_many_values(client, path, body):
    response = client.post(path, data=body, content_type="application/json")
    assert response.status_code == 413
    if len(body) <= 2**17:
        assert response.json == {"error": "the body has more than 12000 commas and opening brackets"}


@pytest.mark.parametrize("character", [",", "[", "{", "\U0001f600"])
def test_a_text_may_consist_of_any_character(client, character):
    for path in ("/score", "/explain"):
        assert client.post(path, json={"text": character * LONGEST_TEXT}).status_code == 200
        form = f"text={quote(character) * LONGEST_TEXT}"
        assert client.post(path, data=form, content_type=FORM).status_code == 200


def multipart(fields):
    """Return the body and the content type of a form."""
    boundary, body = encode_multipart(fields)
    return {"data": body, "content_type": f"multipart/form-data; boundary={boundary}"}


@pytest.mark.parametrize("encode", [multipart, lambda fields: {"data": fields}])
@pytest.mark.parametrize(("fields", "status"), [(100, 200), (101, 413), (900, 413)])
def test_the_fields_of_a_form_are_limited(client, encode, fields, status):
    response = client.post("/score", **encode({"text": "x", **{str(i): "" for i in range(fields - 1)}}))
    assert response.status_code == status
    if status == 413:
        assert response.json == {"error": "a form has at most 100 fields"}


@pytest.mark.parametrize("length", [1, 40_000])
def test_a_form_that_is_not_utf_8_is_refused(client, length):
    response = client.post("/score", data="text=" + "%ff" * length, content_type=FORM)
    assert response.status_code == 400
    assert "the body is not a valid form" in response.json["error"]


def test_the_first_of_several_fields_counts(client):
    assert client.post("/score", data="text=x&text=xx&threshold=", content_type=FORM).status_code == 400
    assert client.post("/score", data="text=x&text=xx", content_type=FORM).json["propensity"] == 0.01


def test_marks_take_a_time_that_grows_with_their_number():
    def seconds(text):
        begun = process_time()
        normalise(text)
        return process_time() - begun

    for marks in ("\u0301\u0323", "\uff9e\u0301", "&#x301;\u0323"):
        usual, odd = (min(seconds(text[:10_000]) for _ in range(5)) for text in ("e\u0301" * 10_000, marks * 10_000))
        assert odd < 10 * usual


def test_a_long_text_is_normalised_as_a_short_one():
    for text in ("Ünïcödé e\u0301\u0323 ｶﾞ ﬁ 😀... ", "ｶﾞ", "\u1112\u1161\u11ab", "e\u0301\u0323"):
        assert normalise(text * 1000) == normalise(text) * 1000 == normalize("NFKC", text) * 1000


# Answers


@pytest.mark.parametrize(
    "request_",
    [
        {"path": "/score", "method": "POST", "json": {"text": "x"}},
        {"path": "/score", "method": "POST", "data": {"text": "x"}},
        {"path": "/score", "method": "POST", "json": {}},
        {"path": "/score", "method": "POST", "json": {"text": "broken"}},
        {"path": "/score", "method": "GET"},
        {"path": "/score/batch", "method": "POST", "json": {"texts": ["x"]}},
        {"path": "/explain", "method": "POST", "json": {"text": "x"}},
        *[{"path": path} for path in ("/", "/docs", "/health", "/metrics", "/nothing", "/static/page.js")],
    ],
)
def test_every_answer_has_the_headers(request_):
    class Broken(LengthModel):
        def predict_proba(self, texts):
            if texts == ["broken"]:
                raise RuntimeError("broken inside")
            return super().predict_proba(texts)

    with create_app(Broken(), stub_card()).test_client().open(**request_) as response:
        policy = response.headers["Content-Security-Policy"]
        assert policy == "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Cache-Control"] == ("no-cache" if "static" in request_["path"] else "no-store")
        assert response.headers["Server"] == ""


@pytest.fixture(scope="module")
def server():
    """The address of a production server that does not explain."""
    with launched(WORKERS="1", EXPLAIN="off") as (_, url):
        yield urlsplit(url)


@pytest.mark.parametrize(
    ("method", "path", "content_type", "length", "status", "closes"),
    [
        ("POST", "/score", "application/json", 2, 400, False),
        ("POST", "/score", FORM, 2, 400, False),
        ("POST", "/score", "text/plain", 2, 415, True),
        ("POST", "/score", "application/json", 131_073, 413, True),
        ("POST", "/score/batch", "application/json", 1_048_577, 413, True),
        ("POST", "/explain", "application/json", 2, 403, True),
        ("POST", "/nothing", FORM, 2, 404, True),
        ("PUT", "/score", FORM, 2, 405, True),
        ("GET", "/nothing", None, 0, 404, False),
    ],
)
def test_the_server_closes_where_it_leaves_a_body_unread(server, method, path, content_type, length, status, closes):
    with contextlib.closing(http.client.HTTPConnection(server.hostname, server.port, timeout=10)) as connection:
        connection.putrequest(method, path)
        if content_type:
            connection.putheader("Content-Type", content_type)
            connection.putheader("Content-Length", length)
        connection.endheaders(None if closes else b"{}"[:length])  # what is not read need not be sent
        with connection.getresponse() as response:
            response.read()
        assert response.status == status
        assert (response.headers["Connection"] == "close") is closes
        assert (connection.sock is None) is closes
        assert response.headers["Server"] == ""
        assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("request_line", [b"GARBAGE", b"GET /health HTTP/1.1"])
def test_the_server_does_not_say_its_name(server, request_line):
    with socket.create_connection((server.hostname, server.port), timeout=10) as client:
        client.sendall(request_line + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
        with client.makefile("rb") as answer:
            assert b"granian" not in answer.read().lower()


def test_explanations_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("EXPLAIN", "off")
    client = create_app(LengthModel(), stub_card()).test_client()
    response = client.post("/explain", json={"text": "x"})
    assert (response.status_code, response.json) == (403, {"error": "this server does not explain its scores"})
    assert client.post("/score", json={"text": "x"}).status_code == 200
    assert client.get("/").status_code == 200


@pytest.mark.parametrize("value", ["On", "1", "of"])
def test_a_switch_is_on_or_off(monkeypatch, value):
    monkeypatch.setenv("EXPLAIN", value)
    with pytest.raises(ValueError, match=f"EXPLAIN must be on or off, not '{value}'"):
        create_app(LengthModel(), stub_card())


def test_the_oldest_objects_are_never_collected_in_a_worker():
    """A full collection would stop all requests for as long as it takes to look at every remembered word."""
    program = """
import gc
from engine.work import favour_light_work
favour_light_work()
before = gc.get_stats()[2]["collections"]
remembered = [[] for _ in range(10**6)]
print(gc.get_stats()[2]["collections"] - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_small_requests_are_answered_one_at_a_time():
    """Threads that wait for the interpreter wake each other up: at the operator's peak that took half a second."""
    inside, most, both_have_read = 0, 0, threading.Barrier(2)

    def answer(body):
        nonlocal inside, most
        inside, most = inside + 1, max(most, inside + 1)
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.2)  # for another one, which must not come
        inside -= 1
        return {}

    class Body(io.BytesIO):
        def read(self, *args):
            both_have_read.wait(10)
            return super().read(*args)

    together, app = threading.Barrier(2), Shortcut(None, "/score", answer, {}, 100)
    request = {"PATH_INFO": "/score", "REQUEST_METHOD": "POST", "CONTENT_TYPE": "application/json"}
    environs = [request | {"CONTENT_LENGTH": "2", "wsgi.input": Body(b"{}")} for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda environ: app(environ, lambda *_: None), environs))
    assert answers == [[b"{}\n"], [b"{}\n"]]
    assert most == 1
