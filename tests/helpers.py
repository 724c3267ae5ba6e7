"""What the test modules share: examples, servers, and the cells of notebooks."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from sklearn.base import BaseEstimator

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = "http://127.0.0.1:9"  # the discard port: refuses the connection
BUCKET = "sms-data"  # of the object store that the fixture `bucket` starts
SPAM = [
    "URGENT! You have won a 1 week FREE membership in our £100,000 prize Jackpot! Call 09061701461 to claim",
    "WINNER!! You have been selected to receive a £900 prize reward. To claim call 09058094455 now",
    "Txt STOP to end. Your mobile was awarded a FREE Nokia, reply WIN to 80182, 150p per msg",
]
UNFINISHED = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
HAM = [
    "Sorry, I'll call you later, I'm in a meeting",
    "ok see you at home, do you need me to get some milk?",
    "haha yeah i know, what time are you going to be there tomorrow",
]


def missing(what: str) -> None:
    """Skip a test because something is not on this machine; on a CI machine, fail."""
    pytest.fail(what) if os.environ.get("CI") == "true" else pytest.skip(what)


# Servers

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # of pytest-xdist
TRIED = itertools.count(os.getpid())


def free_port() -> int:
    """Return a port of this machine that nothing listens on.

    Nothing takes it before the caller does: outgoing connections have ports above these, and other workers others.
    """
    for number in TRIED:
        port = 20_000 + 10 * (number % 1200) + WORKER % 10
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def poll(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Wait until a condition holds and return it, or fail."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.02)
    pytest.fail(f"waited {seconds} s in vain for {what}")


def answers(url: str) -> bool:
    """Tell whether a server answers."""
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{url}/health", timeout=1).ok
    return False


@contextlib.contextmanager
def launched(
    *command: str, host: str = "127.0.0.1", seconds: float = 30, folder: Path = ROOT, **environment: str
) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run a server and give its process and address once it answers; leave nothing of it behind.

    Args:
        command: what runs it, `python app.py` by default; {port} stands for the port.
        host: how its address is written.
        seconds: how long it may take to answer.
        folder: where it is run.
        environment: variables that it gets besides those of this process.
    """
    port = environment.setdefault("PORT", str(free_port()))
    process = subprocess.Popen(
        [part.replace("{port}", port) for part in command or (sys.executable, str(ROOT / "app.py"))],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its workers can be ended with it
    )
    url = f"http://{host}:{port}"
    try:
        poll(lambda: process.poll() is not None or answers(url), "the server to answer", seconds)
        if process.poll() is not None:
            pytest.fail(f"the server ended with status {process.returncode}: {process.stdout.read()}")
        yield process, url
    finally:
        end(process)


@contextlib.contextmanager
def operated(
    state: Path, folder: Path = ROOT, **environment: str
) -> Iterator[tuple[subprocess.Popen, str, dict[str, str]]]:
    """Run all programs of operations; give the process, the service's address, and the header that bears the token.

    Args:
        state: the folder of their state.
        folder: of the project.
        environment: variables that they get besides those of this process.
    """
    clean = dict.fromkeys(("DATABASE_URL", "OPERATIONS_TOKEN", "OPERATIONS_KEY"), "")  # none of this machine's own
    variables = {**clean, "OPERATIONS_STATE": str(state), "WORKERS": "1", **environment}
    with launched(sys.executable, "-m", "operations", seconds=90, folder=folder, **variables) as (process, url):
        yield process, url, {"Authorization": f"Bearer {(state / 'token').read_text()}"}


def end(process: subprocess.Popen) -> None:
    """End a server, and what is left of its workers."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def assert_refuses_to_serve(message: str, *command: str, **environment: str) -> None:
    """Check that a server, by default `python app.py`, ends at once with one line that holds a message."""
    process = subprocess.Popen(
        command or [sys.executable, ROOT / "app.py"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        log, _ = process.communicate(timeout=30)
    finally:
        end(process)
    assert process.returncode == 1
    assert log.startswith("Cannot serve")
    assert message in log
    assert log.count("\n") == 1, log


def children(process: subprocess.Popen) -> list[int]:
    """Return the process ids of the workers of a server."""
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def counted(exposition: str, sample: str) -> float:
    """Return the value of a sample in what /metrics answers, 0 where it is not there."""
    match = re.search(rf"^{re.escape(sample)} (.*)$", exposition, re.MULTILINE)
    return float(match[1]) if match else 0


class LengthModel(BaseEstimator):
    """A stub whose propensity is the length of the text in percent."""

    def predict_proba(self, texts):
        share = np.minimum([len(text) / 100 for text in texts], 1)
        return np.column_stack([1 - share, share])


def stub_card(name: str = "stub", **entries: Any) -> dict[str, Any]:
    """Return the card of a stub."""
    return {"name": name, "sha256": "0", "threshold": 0.5, "operating_points": [], **entries}


# Notebooks


def code_cells(path: Path) -> list[dict[str, Any]]:
    """Return the code cells of a notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(path: Path) -> str:
    """Return what the cells of an executed notebook printed or displayed as text."""
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join("".join(text) for text in texts)


def run_notebook(
    notebook: Path, folder: Path, parameters: dict[str, Any] | None = None, **environment: str
) -> tuple[subprocess.CompletedProcess, Path]:
    """Execute a notebook in a folder.

    Returns:
        The finished process, and the path of the executed notebook in `folder`/build.
    """
    executed = folder / "build" / notebook.name
    executed.parent.mkdir(exist_ok=True)
    # What runs elsewhere is not what is measured here.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    command = ["-m", "papermill", "--no-progress-bar", "-y", json.dumps(parameters or {})]
    done = subprocess.run(
        [sys.executable, *command, str(notebook), str(executed)],
        cwd=folder,
        env={**outside, **environment},
        capture_output=True,
        text=True,
    )
    return done, executed
