"""The tests of assignments 3 and 4: the scoring function, the service, the container; tests/ has the rest."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from score import load_card, load_model, score

ROOT = Path(__file__).resolve().parent
SPAM = (
    "URGENT! You have won a 1 week FREE membership in our £100,000 prize Jackpot! Call 09061701461 to claim"
)
HAM = "Sorry, I'll call you later, I'm in a meeting"


@pytest.fixture(scope="module")
def model():
    """The saved model."""
    return load_model()


@pytest.fixture(scope="module")
def threshold():
    """The threshold that was chosen for it."""
    return load_card()["threshold"]


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(url: str, process: subprocess.Popen, seconds: float = 30) -> None:
    """Poll a service until it answers; fail when its process ends or the time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the service ended with status {process.returncode}"
        try:
            if requests.get(f"{url}/health", timeout=1).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.05)
    pytest.fail(f"{url} did not answer within {seconds} s")


@pytest.mark.parametrize("text", [SPAM, HAM, "", " ", "ß", "£" * 1000, "\x00\ud800"])
def test_score(text, model, threshold):
    prediction, propensity = score(text, model, threshold)
    assert type(prediction) is bool
    assert type(propensity) is float
    assert prediction in (0, 1)
    assert 0 <= propensity <= 1
    assert score(text, model, 0)[0] == 1
    assert score(text, model, 1)[0] == 0


def test_score_obvious_spam(model, threshold):
    assert score(SPAM, model, threshold)[0] == 1


def test_score_obvious_ham(model, threshold):
    assert score(HAM, model, threshold)[0] == 0


def test_flask(model, threshold):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, ROOT / "app.py"],
        env={**os.environ, "PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until_healthy(url, process)
        for text in (SPAM, HAM):
            prediction, propensity = score(text, model, threshold)
            expected = {"prediction": prediction, "propensity": propensity, "threshold": threshold}
            assert requests.post(f"{url}/score", json={"text": text}, timeout=5).json() == expected
            assert requests.post(f"{url}/score", data={"text": text}, timeout=5).json() == expected
        process.send_signal(signal.SIGTERM)
        log, _ = process.communicate(timeout=10)
        assert process.returncode == 0, log
    finally:
        process.kill()
        process.wait()
    assert SPAM not in log
    assert HAM not in log
