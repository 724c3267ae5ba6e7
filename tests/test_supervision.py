"""engine/supervisor.py under fault: workers that die or hang, a killed parent, new models, full disks, the end."""

import contextlib
import hashlib
import json
import os
import pickle
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
    UNFINISHED,
    answers,
    assert_refuses_to_serve,
    children,
    counted,
    free_port,
    launched,
    poll,
)

from engine.saved import MODEL_PATH, WEIGHTS, copy_files

pytestmark = pytest.mark.fault

HAM = HAM[0]
COUNTED = 'http_requests_total{method="POST",path="/score",status="200"}'
# `python app.py`, for the model in the folder of $MODELS and with other constants of the supervisor.
PROGRAM = """
import os, pathlib, app, engine.supervisor
from engine.saved import load_card, load_scorer
saved = pathlib.Path(os.environ["MODELS"], "best_model.joblib")
{settings}
app.serve(lambda: app.create_app(load_scorer(saved), load_card(saved)))
"""


@contextlib.contextmanager
def launched_with(models: Path, settings: str = "", **environment: str):
    """Run the server for the model of a folder, with constants of engine/supervisor.py."""
    program = PROGRAM.format(settings=settings)
    with launched(sys.executable, "-c", program, MODELS=str(models), **{"WORKERS": "2", **environment}) as server:
        yield server


@pytest.fixture
def models(tmp_path):
    """A folder with a copy of the saved model."""
    copy_files(MODEL_PATH, tmp_path / MODEL_PATH.name)
    return tmp_path


def change_card(models: Path, **changes) -> None:
    """Change entries of the card in a folder."""
    path = models / "best_model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def score(url: str) -> bool:
    """Tell whether a message is scored, on a connection of its own."""
    return requests.post(f"{url}/score", json={"text": HAM}, timeout=5).json()["prediction"] is False


def is_running(pid: int) -> bool:
    """Tell whether a process is there and more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def both_workers(process: subprocess.Popen) -> set[int]:
    """Wait until a server has two workers and return their process ids."""
    return set(poll(lambda: len(children(process)) == 2 and children(process), "two workers"))


def kill_workers(process: subprocess.Popen) -> None:
    """Kill the workers of a server and wait until it has two others."""
    lost = both_workers(process)
    for worker in lost:
        os.kill(worker, signal.SIGKILL)
    poll(lambda: len(set(children(process)) - lost) == 2, "new workers")


def reload(process: subprocess.Popen) -> None:
    """Send SIGHUP to a server and wait until it has other workers."""
    old = both_workers(process)
    process.send_signal(signal.SIGHUP)
    poll(lambda: not old & set(children(process)), "the old workers to end")


def read_log(process: subprocess.Popen) -> str:
    """End a server and return all that it printed."""
    process.terminate()
    return process.communicate(timeout=30)[0]


@contextlib.contextmanager
def clients(url: str, keep_alive: bool, number: int = 4):
    """Score without pause from several clients and yield two lists that grow: the statuses, the errors."""
    statuses, errors, stopping = [], [], threading.Event()

    def send() -> None:
        session = requests.Session()
        while not stopping.is_set():
            try:
                with contextlib.nullcontext(session) if keep_alive else requests.Session() as client:
                    statuses.append(client.post(f"{url}/score", json={"text": HAM}, timeout=20).status_code)
            except requests.RequestException as error:
                errors.append(error)
        session.close()

    threads = [threading.Thread(target=send) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield statuses, errors
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


# The parent


def test_a_killed_parent_takes_its_workers_with_it():
    port = str(free_port())
    with launched(WORKERS="2", PORT=port) as (process, url):
        workers = both_workers(process)
        process.kill()
        poll(lambda: not any(map(is_running, workers)), "the workers to end")
        with launched(WORKERS="2", PORT=port) as (_, url):
            assert score(url)


# Workers


def test_workers_that_die_one_after_the_other_are_replaced():
    with launched(WORKERS="2") as (process, url):
        for _ in range(3):
            assert score(url)
            kill_workers(process)
        exposition = requests.get(f"{url}/metrics", timeout=5).text
        assert counted(exposition, COUNTED) == 3  # by workers of which none is there any more


def test_a_worker_that_dies_at_once_is_not_started_without_a_pause(models):
    settings = "engine.supervisor.count_as = lambda place: None if place else os._exit(1)"
    with launched_with(models, settings) as (process, url):
        seen = set()
        poll(lambda: seen.update(children(process)) or len(seen) > 3, "new workers")
        begun, before = time.monotonic(), len(seen)
        poll(lambda: seen.update(children(process)) or len(seen) > before + 2, "new workers")
        assert time.monotonic() - begun > 1
        assert poll(lambda: answers(url), "the other worker to answer")


def test_a_stopped_worker_is_replaced(models):
    with launched_with(models, "engine.supervisor.PATIENCE = 2") as (process, url):
        stopped, other = both_workers(process)
        os.kill(stopped, signal.SIGSTOP)
        poll(lambda: len(set(children(process)) - {stopped}) == 2, "a new worker")
        assert other in children(process)
        for _ in range(10):
            assert score(url)
        assert f"Worker {stopped} is replaced: it gave no sign of life for 2 s\n" in read_log(process)


def test_workers_that_were_stopped_with_their_parent_live_on(models):
    with launched_with(models, "engine.supervisor.PATIENCE = 2") as (process, url):
        workers = both_workers(process)
        os.killpg(process.pid, signal.SIGSTOP)
        begun = time.monotonic()
        poll(lambda: time.monotonic() > begun + 3, "longer than a silent worker may live")
        os.killpg(process.pid, signal.SIGCONT)
        before = time.monotonic()
        while time.monotonic() < before + 1:
            assert score(url)
        assert set(children(process)) == workers


# A new model


@pytest.mark.parametrize("keep_alive", [True, False])
def test_a_new_model_is_taken_on_without_a_lost_request(models, keep_alive):
    with launched_with(models) as (process, url), clients(url, keep_alive) as (statuses, errors):
        for name in ("second", "third"):
            change_card(models, name=name)
            reload(process)
            assert requests.get(f"{url}/health", timeout=5).json()["model"] == name
            exposition = requests.get(f"{url}/metrics", timeout=5).text
            assert exposition.count("spam_model_info{") == 1
        assert not errors
        assert set(statuses) == {200}
        answered = len(statuses)
        poll(lambda: counted(requests.get(f"{url}/metrics", timeout=5).text, COUNTED) >= answered, "all to be counted")


def test_a_new_model_comes_with_a_worker_for_one_that_is_lost(models):
    with launched_with(models, "engine.supervisor.RETRY = 3600") as (process, url):
        old = both_workers(process)
        os.kill(min(old), signal.SIGKILL)
        poll(lambda: len(children(process)) == 1, "the loss")
        process.send_signal(signal.SIGHUP)
        poll(lambda: not old & set(children(process)), "the old workers to end")
        assert len(children(process)) == 2
        for _ in range(20):  # by either of the new ones
            assert score(url)


def test_a_bad_model_is_refused_and_the_old_one_goes_on(models):
    with launched_with(models) as (process, url):
        workers = both_workers(process)
        change_card(models, weights={"sha256": "0"})
        process.send_signal(signal.SIGHUP)
        reader, log = process.stdout.fileno(), []
        os.set_blocking(reader, False)

        def read_so_far():
            with contextlib.suppress(BlockingIOError):
                log.append(os.read(reader, 10_000).decode())
            return "".join(log)

        poll(lambda: "is refused" in read_so_far(), "the refusal")
        assert set(children(process)) == workers
        assert score(url)
        os.set_blocking(reader, True)
        lines = ("".join(log) + read_log(process)).splitlines()
        assert len(lines) == 2
        assert lines[1].startswith("The model in models/ is refused, the old one goes on: ")
        assert lines[1].endswith("run train.ipynb again, or restore both")


def test_another_file_is_refused_at_start(models):
    content = pickle.dumps({"not": "a model"})
    (models / MODEL_PATH.name).with_suffix(WEIGHTS).write_bytes(content)
    change_card(models, weights={"sha256": hashlib.sha256(content).hexdigest()})
    program = PROGRAM.format(settings="")
    message = "does not hold the weights of a model"
    assert_refuses_to_serve(message, sys.executable, "-c", program, MODELS=str(models))


# Connections


def test_idle_connections_keep_nobody_out(models):
    with launched_with(models, "engine.supervisor.IDLE = 2", WORKERS="1") as (_, url), contextlib.ExitStack() as stack:
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        idle = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(1200)]
        assert score(url)
        assert idle[0].recv(1) == idle[-1].recv(1) == b""  # the server hangs up


# The end


def test_ready_turns_first(models):
    with launched(WORKERS="2") as (process, url):
        assert requests.get(f"{url}/health/ready", timeout=5).json() == {"status": "ok"}
        process.terminate()
        poll(lambda: requests.get(f"{url}/health/ready", timeout=5).status_code == 503, "the end to begin")
        answer = requests.get(f"{url}/health/ready", timeout=5)
        assert "about to end" in answer.json()["error"]
        assert answer.headers["Connection"] == "close"
        assert requests.get(f"{url}/health/live", timeout=5).json() == {"status": "ok"}
        assert score(url)
        assert process.wait(timeout=10) == 0


def test_a_stalled_client_does_not_hold_up_the_end(models):
    with (
        launched_with(models, "engine.supervisor.DRAIN = 2", WORKERS="1") as (process, url),
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as stalled,
    ):
        stalled.sendall(UNFINISHED)
        assert score(url)
        begun = time.monotonic()
        process.terminate()
        assert process.wait(timeout=30) == 0
        # A request that the server has yet to answer is given that time, and it cannot tell the two apart.
        assert 3 <= time.monotonic() - begun < 8


def test_ctrl_c_in_a_terminal_is_a_quick_end():
    with launched(WORKERS="2") as (process, _):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        log, _ = process.communicate(timeout=10)
        assert process.returncode == 0
        assert log.count("\n") == 1, log


# The port


@pytest.mark.parametrize(("taken", "host"), [("0.0.0.0", "127.0.0.1"), ("0.0.0.0", "::"), ("::", "127.0.0.1")])
def test_a_port_that_another_has_on_all_addresses_is_refused(taken, host):
    if ":" in taken + host and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    v6 = taken == "::"
    family = socket.AF_INET6 if v6 else socket.AF_INET
    with socket.create_server((taken, 0), family=family, dualstack_ipv6=v6, reuse_port=True) as other:
        port = str(other.getsockname()[1])
        assert_refuses_to_serve("Address already in use", HOST=host, PORT=port, WORKERS="1")


# Another system


def test_another_system_serves_by_one_process():
    program = "import app, engine.server; engine.server.LINUX = False; engine.server.serve(app.create_app)"
    with launched(sys.executable, "-c", program) as (process, url):
        assert requests.post(f"{url}/score", json={"text": HAM}, timeout=5).json()["prediction"] is False
        process.terminate()
        log, _ = process.communicate(timeout=10)
        assert process.returncode == 0, log
        assert "without supervision, which takes Linux" in log
