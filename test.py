"""The tests of assignments 3 and 4: the scoring function, the service, the container; tests/ has the rest."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from score import load_card, load_model, score

ROOT = Path(__file__).resolve().parent
set_hypothesis_home_dir(ROOT / ".hypothesis")  # and not in the folder where pytest was started
SPAM = [
    "URGENT! You have won a 1 week FREE membership in our £100,000 prize Jackpot! Call 09061701461 to claim",
    "WINNER!! You have been selected to receive a £900 prize reward. To claim call 09058094455 now",
    "Txt STOP to end. Your mobile was awarded a FREE Nokia, reply WIN to 80182, 150p per msg",
]
HAM = [
    "Sorry, I'll call you later, I'm in a meeting",
    "ok see you at home, do you need me to get some milk?",
    "haha yeah i know, what time are you going to be there tomorrow",
]


@pytest.fixture(scope="module")
def model():
    """The saved model."""
    return load_model()


@pytest.fixture(scope="module")
def threshold():
    """The threshold that was chosen for it."""
    return load_card()["threshold"]


@pytest.fixture
def image():
    """The image of the service; skipped where no Docker engine answers, a failure with REQUIRE_DOCKER=1."""
    try:
        version = subprocess.run(["docker", "version"], capture_output=True, text=True, timeout=60)
        absent = version.returncode != 0 and version.stderr.strip()
    except FileNotFoundError:
        absent = "docker is not installed"
    if absent:
        give_up = pytest.fail if os.environ.get("REQUIRE_DOCKER") == "1" else pytest.skip
        give_up(f"no Docker engine answers: {absent}")
    return docker("build", "--quiet", "--tag", "sms-spam:test", ROOT)


def test_score(model, threshold):
    result = score(SPAM[0], model, threshold)  # smoke test
    assert type(result) is tuple
    assert [type(part) for part in result] == [bool, float]  # format test
    for text in SPAM:
        assert score(text, model, threshold)[0] == 1, text
    for text in HAM:
        assert score(text, model, threshold)[0] == 0, text


@settings(deadline=None)
@given(st.one_of(st.text(), st.sampled_from(SPAM + HAM)), st.floats(0, 1))
def test_score_of_any_text(model, text, threshold):
    prediction, propensity = score(text, model, threshold)
    assert type(prediction) is bool
    assert type(propensity) is float
    assert prediction in (0, 1)
    assert 0 <= propensity <= 1
    assert score(text, model, threshold) == (prediction, propensity)
    assert score(text, model, 0)[0] == 1
    assert score(text, model, 1)[0] == 0
    assert score(text, model, 0.0)[1] == score(text, model, 1.0)[1] == propensity
    if 0 < threshold < 1:
        assert prediction == (propensity >= threshold)


@pytest.mark.parametrize("propensity", [0.0, 1.0])
def test_threshold_0_and_1_decide_alone(propensity):
    class Certain(BaseEstimator):
        def predict_proba(self, texts):
            return np.array([[1 - propensity, propensity]] * len(texts))

    assert score("", Certain(), 0) == (True, propensity)
    assert score("", Certain(), 1) == (False, propensity)


@pytest.mark.parametrize("text", [None, 1, 1.5, b"free", ["free"], {"text": "free"}])
def test_score_refuses_what_is_no_text(model, text):
    with pytest.raises(TypeError, match="text must be a string"):
        score(text, model, 0.5)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), float("inf"), 2])
def test_score_refuses_a_threshold_out_of_range(model, threshold):
    with pytest.raises(ValueError, match="threshold must be between 0 and 1"):
        score("free", model, threshold)


@pytest.mark.parametrize("threshold", [None, "0.5", True, [0.5], 0.5j])
def test_score_refuses_a_threshold_that_is_no_number(model, threshold):
    with pytest.raises(TypeError, match="threshold must be a number"):
        score("free", model, threshold)


@pytest.mark.parametrize("estimator", [None, "model", LogisticRegression, TfidfVectorizer()])
def test_score_refuses_what_is_no_model(estimator):
    with pytest.raises(TypeError, match="model must be a fitted estimator"):
        score("free", estimator, 0.5)


def test_score_refuses_an_unfitted_model():
    with pytest.raises(NotFittedError):
        score("free", make_pipeline(TfidfVectorizer(), LogisticRegression()), 0.5)


def test_flask(model, threshold):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, ROOT / "app.py"],
        env={**os.environ, "PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its workers can be ended with it
    )
    try:
        wait_until_healthy(url, process)
        for text in [*SPAM, *HAM, "", "£ and €"]:
            prediction, propensity = score(text, model, threshold)
            expected = {"prediction": prediction, "propensity": propensity, "threshold": threshold}
            assert requests.post(f"{url}/score", json={"text": text}, timeout=5).json() == expected
            assert requests.post(f"{url}/score", data={"text": text}, timeout=5).json() == expected
        missing = requests.post(f"{url}/score", json={}, timeout=5)
        assert (missing.status_code, missing.json()) == (400, {"error": "text is missing"})
        process.send_signal(signal.SIGTERM)
        log, _ = process.communicate(timeout=10)
    finally:
        end_group(process)
    assert process.returncode == 0, log
    for text in SPAM + HAM:
        assert text not in log
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=1)


def test_docker(image, model, threshold):
    name, port = f"sms-spam-test-{uuid.uuid4().hex}", free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--rm", "--read-only", "--cap-drop=ALL", "--name", name, "--publish", f"127.0.0.1:{port}:5000"]
    process = subprocess.Popen(
        ["docker", "run", *options, image],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until_healthy(url, process)
        for text in [*SPAM, *HAM, "", "£ and €"]:
            prediction, propensity = score(text, model, threshold)
            answer = requests.post(f"{url}/score", json={"text": text}, timeout=5).json()
            assert answer["prediction"] is prediction
            assert answer["propensity"] == pytest.approx(propensity, abs=1e-9)
        assert docker("exec", name, "id", "-u") != "0"
        deadline = time.monotonic() + 30
        while (health := docker("inspect", "--format", "{{.State.Health.Status}}", name)) != "healthy":
            assert time.monotonic() < deadline, f"the container is {health}"
            time.sleep(0.2)
        docker("stop", name)
        log, _ = process.communicate(timeout=30)
    finally:
        subprocess.run(["docker", "rm", "--force", name], capture_output=True, timeout=60)
        end_group(process)
    assert process.returncode == 0, log  # 137: it did not end when asked, and was killed


def docker(*arguments: str | Path) -> str:
    """Run a docker command that must succeed, and return what it printed."""
    command = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=600)
    assert command.returncode == 0, command.stderr
    return command.stdout.strip()


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(url: str, process: subprocess.Popen, seconds: float = 30) -> None:
    """Poll a service until it answers; fail when its process ends or the time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the service ended with status {process.returncode}: {process.stdout.read()}")
        try:
            if requests.get(f"{url}/health", timeout=1).ok:
                return
        except requests.RequestException:
            time.sleep(0.05)
    pytest.fail(f"{url} did not answer within {seconds} s")


def end_group(process: subprocess.Popen) -> None:
    """End what is left of a process and of those that it started."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
