"""The production server: `python app.py` under slow clients, signals, lost workers and a bad environment."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from helpers import (
    HAM,
    SPAM,
    UNFINISHED,
    answers,
    assert_refuses_to_serve,
    children,
    launched,
    poll,
)

from engine import server as server_module

SPAM, HAM = SPAM[0], HAM[0]


def accepts_connections(url: str) -> bool:
    """Tell whether a server accepts a connection."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) == 0


@pytest.fixture(scope="module")
def server():
    """The address of a production server with two workers."""
    with launched(WORKERS="2") as (_, url):
        yield url


def test_schemathesis(server, tmp_path):
    (tmp_path / "schemathesis.toml").write_text(
        '[checks.negative_data_rejection]\nexpected-statuses = ["400", "405", "413", "415"]\n'
    )
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{server}/openapi.json"),
        *("--seed", "1", "--max-examples", "50", "--phases", "examples,coverage,fuzzing"),
        *("--request-timeout", "10", "--no-color"),
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[:4000] + run.stderr[-2000:]
    assert "No issues found" in run.stdout


@pytest.mark.parametrize(("texts", "status"), [(25, 200), (26, 413), (105, 413)])
def test_large_body_on_the_server(server, texts, status):
    response = requests.post(f"{server}/score/batch", json={"texts": ["x " * 5000] * texts}, timeout=10)
    assert response.status_code == status


@pytest.mark.parametrize(("kilobytes", "status"), [(1, 200), (132, 413)])
def test_body_of_unstated_length(server, kilobytes, status):
    chunks = [b'{"text": "free"}', *[b" " * 1000] * kilobytes]
    headers = {"Content-Type": "application/json"}
    response = requests.post(f"{server}/score", data=iter(chunks), headers=headers, timeout=10)
    assert response.status_code == status, response.text


def test_slow_clients_do_not_hold_up_others(server):
    address = ("127.0.0.1", int(server.rsplit(":", 1)[1]))
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(address)).sendall(UNFINISHED)
        for _ in range(20):
            assert requests.post(f"{server}/score", json={"text": HAM}, timeout=5).ok


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stop_under_load(stop):
    statuses, early_errors = [], []
    stopping = threading.Event()

    def send(url: str) -> None:
        with requests.Session() as session:
            while not stopping.is_set():
                try:
                    statuses.append(session.post(f"{url}/score", json={"text": SPAM}, timeout=10).status_code)
                except requests.ConnectionError as error:
                    if not stopping.is_set():
                        early_errors.append(error)

    with launched(WORKERS="2") as (process, url):
        workers = children(process)
        assert workers
        threads = [threading.Thread(target=send, args=(url,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        poll(lambda: len(statuses) > 200 or early_errors, "200 answers")
        begun = time.monotonic()
        stopping.set()
        process.send_signal(stop)
        log, _ = process.communicate(timeout=10)
        seconds = time.monotonic() - begun
        for thread in threads:
            thread.join()
        assert process.returncode == 0, log
        assert seconds < 5
        assert not early_errors
        assert set(statuses) == {200}
        assert log.count("\n") == 1, log
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_request_in_flight_is_answered_before_the_server_ends(tmp_path):
    program = f"""
import functools, pathlib, time, numpy, app, sklearn.base
class Held(sklearn.base.BaseEstimator):
    def predict_proba(self, texts):
        if texts == ["held"]:
            pathlib.Path({str(tmp_path)!r}, "begun").touch()
            while not pathlib.Path({str(tmp_path)!r}, "released").exists():
                time.sleep(0.01)
        return numpy.array([[0.25, 0.75]] * len(texts))
card = {{"name": "held", "sha256": "0", "threshold": 0.5, "operating_points": []}}
app.serve(functools.cache(lambda: app.create_app(Held(), card)))
"""
    answers_got = []
    with launched(sys.executable, "-c", program, WORKERS="1") as (
        process,
        url,
    ):
        thread = threading.Thread(
            target=lambda: answers_got.append(requests.post(f"{url}/score", json={"text": "held"}, timeout=10).json())
        )
        thread.start()
        poll((tmp_path / "begun").exists, "the request to begin")
        process.terminate()
        poll(lambda: not accepts_connections(url), "the server to begin its end")
        (tmp_path / "released").touch()
        log, _ = process.communicate(timeout=10)
        thread.join()
    assert answers_got == [{"prediction": True, "propensity": 0.75, "threshold": 0.5}]
    assert process.returncode == 0, log


def test_a_lost_worker_is_replaced():
    with launched(WORKERS="2") as (process, url):
        lost = children(process)[0]
        os.kill(lost, signal.SIGKILL)
        poll(lambda: len(set(children(process)) - {lost}) == 2, "a new worker")
        poll(lambda: answers(url), "the server to answer")
        assert requests.post(f"{url}/score", json={"text": HAM}, timeout=5).ok


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000\n", 4), ("800000 100000\n", 4), ("150000 100000\n", 2), ("50000 100000\n", 1), ("", 4), (None, 4)],
)
def test_cores_are_those_that_the_container_may_use(quota, cores, tmp_path, monkeypatch):
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(server_module, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert server_module.count_cores() == cores


def test_a_port_in_use_is_refused(server):
    assert_refuses_to_serve("Address already in use", PORT=server.rsplit(":", 1)[1])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PORT", "http", "PORT must be a positive whole number, not 'http'"),
        ("PORT", "0", "PORT must be a positive whole number"),
        ("PORT", "70000", "port must be 0-65535"),
        ("WORKERS", "-1", "WORKERS must be a positive whole number"),
        ("HOST", "no.such.host.", "no.such.host."),
    ],
)
def test_a_bad_environment_is_refused(name, value, message):
    assert_refuses_to_serve(message, **{name: value})


@pytest.mark.parametrize(("host", "shown"), [("localhost", "127.0.0.1"), ("", "127.0.0.1"), ("::1", "[::1]")])
def test_host(host, shown):
    if host == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    with launched(HOST=host, WORKERS="1", host=shown) as (process, url):
        assert process.stdout.readline().startswith(f"Serving on {url} with 1 worker")


def test_flask_run():
    command = (sys.executable, "-m", "flask", "--app", "app", "run", "--port", "{port}")
    with launched(*command) as (_, url):
        assert requests.post(f"{url}/score", json={"text": HAM}, timeout=5).json()["prediction"] is False
