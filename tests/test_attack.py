"""The program of `make attack`: whether it sees the faults that it looks for, and whom it attacks."""

import contextlib
import random
import socket
import subprocess
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks import hunt
from benchmarks.attack import render
from benchmarks.floods import Target, Watch, request
from benchmarks.inputs import MAKERS, Input, make_input

SEND = {path: request(path, b"{}") for path in ("/ok", "/bad", "/fault", "/busy", "/full", "/hang", "/drop")}


class Stub(BaseHTTPRequestHandler):
    """A server with planted faults: the path says what it does."""

    protocol_version = "HTTP/1.1"
    released = threading.Event()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/hang":
            self.released.wait(30)
        if self.path in ("/hang", "/drop"):
            self.close_connection = True
            return
        self.send_response({"/ok": 200, "/bad": 400, "/fault": 500, "/busy": 503, "/full": 503}[self.path])
        self.send_header("Content-Length", "0")
        if self.path == "/busy":
            self.send_header("Retry-After", "1")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def stub():
    """The stub, as a target."""
    Stub.released.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Target(server.server_port)
        Stub.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def client(stub, monkeypatch):
    """A client of the hunt, who does not wait for long."""
    monkeypatch.setattr(hunt, "HANG", 0.5)
    client = hunt.Client(stub)
    yield client
    client.close()


@pytest.mark.parametrize(
    ("content", "answers", "outcome"),
    [
        (SEND["/ok"], 1, "2xx"),
        (SEND["/bad"], 1, "4xx"),
        (SEND["/busy"], 1, "503"),
        (SEND["/fault"], 1, "5xx"),
        (SEND["/full"], 1, "5xx"),
        (SEND["/hang"], 1, "hang"),
        (SEND["/drop"], 1, "dropped"),
        (SEND["/ok"] * 3, 3, "2xx"),
        (SEND["/ok"] + SEND["/fault"] + SEND["/ok"], 3, "5xx"),
        (SEND["/ok"] + SEND["/drop"], 2, "dropped"),
        (b"", 0, "closed"),
        (SEND["/drop"], 0, "closed"),
        (SEND["/hang"], 0, "hang"),
        (SEND["/ok"] + SEND["/fault"], 0, "5xx"),
    ],
)
def test_what_comes_of_an_input_is_seen(client, content, answers, outcome):
    assert client.send(Input("raw", content, answers)) == outcome
    assert client.send(Input("raw", SEND["/ok"])) == "2xx"


def test_faults_are_counted_and_kept(stub, monkeypatch):
    paths = ("/ok", "/fault", "/drop", "/busy")
    monkeypatch.setattr(hunt, "make_input", lambda rng: Input("planted", SEND[rng.choice(paths)]))
    found = hunt.send_all(stub, 200, 60)
    counts = found.counts["planted"]
    assert counts.total() == 200
    assert set(counts) == {"2xx", "5xx", "dropped", "503"}
    assert sorted(outcome for _, outcome, _ in found.examples) == ["5xx"] * 5 + ["dropped"] * 5


def test_inputs_are_the_same_again_and_of_every_kind():
    first, second = ([make_input(rng) for _ in range(300)] for rng in (random.Random(1), random.Random(1)))
    assert first == second
    assert {item.kind for item in first} == set(MAKERS)


@pytest.mark.parametrize("path", ["/ok", "/fault", "/busy", "/drop"])
def test_a_watch_sees_who_is_not_answered(stub, path):
    with Watch(stub, SEND[path], clients=1, pause=0) as watch:
        while len(watch.good) + len(watch.lost) < 5:
            watch.ending.wait(0.01)
    seen = watch.seen
    assert (seen.answered > 0, seen.refused > 0, len(seen.lost) > 0) == (
        path == "/ok",
        path == "/busy",
        path in ("/fault", "/drop"),
    )
    assert f"{len(seen.lost)} lost; closed for" in str(seen) or not seen.lost


@pytest.mark.parametrize("url", ["http://192.0.2.1:5000", "http://localhost:5000", "https://[::1]:5000"])
def test_no_other_machine_is_attacked(url):
    with pytest.raises(ValueError, match=r"only a server on 127.0.0.1 may be attacked, not http"):
        Target.of(url, 1)


def test_no_server_of_others_is_attacked():
    with contextlib.ExitStack() as stack:
        theirs = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        process = stack.enter_context(subprocess.Popen(["sleep", "60"]))
        stack.callback(process.kill)
        with pytest.raises(ValueError, match=r"only a server that this program has started may be attacked"):
            Target.of(f"http://127.0.0.1:{theirs.getsockname()[1]}", process.pid)


def test_the_report_shows_what_was_found():
    found = hunt.Found()
    for kind in MAKERS:
        found.add(Input(kind, b"|"), "4xx")
    found.add(Input("JSON", b"{"), "5xx")
    found.counts["schemathesis"] = Counter(passed=9, failed=1)
    report = render(
        "a machine",
        found,
        [("a fault", "all answered", True)],
        [("a flood", "1 lost", "0 lost", False)],
        [("batches", Counter({"200": 1000}), 2.0, 30.0)],
    )
    assert "| JSON | 2 | 0 | 0 | 1 | 0 | 0 | 1 | 0 | 0 |" in report
    assert "| all | 6 | 0 | 0 | 5 | 0 | 0 | 1 | 0 | 0 |" in report
    assert "- JSON, 5xx: `{`" in report
    assert "10 more requests, made from `/openapi.json`: 1 failed" in report
    assert "| a fault | all answered | pass |" in report
    assert "| a flood | 1 lost | 0 lost | fault |" in report
    assert "| batches | 1,000 times 200 | 2.0 | 30.0 | 15.0 | fault |" in report
