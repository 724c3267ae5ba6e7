"""The tests of assignments 3 and 4: the scoring function, the service, the container; tests/ has the rest."""

import signal
import subprocess
import uuid
from pathlib import Path

import numpy as np
import pytest
import requests
from helpers import HAM, ROOT, SPAM, answers, end, free_port, launched, missing, poll
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from score import load_card, load_model, score

set_hypothesis_home_dir(ROOT / ".hypothesis")  # and not in the folder where pytest was started


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
    """The image of the service, built on the image that BASE names or the Dockerfile's own."""
    try:
        version = subprocess.run(["docker", "version"], capture_output=True, text=True, timeout=60)
        absent = version.returncode != 0 and version.stderr.strip()
    except FileNotFoundError:
        absent = "docker is not installed"
    if absent:
        missing(f"no Docker engine answers: {absent}")
    return docker("build", "--quiet", "--build-arg", "BASE", "--tag", "sms-spam:test", ROOT)


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


def test_a_threshold_of_numpy_decides_as_any_other(model):
    assert type(score("x", model, np.float64(0.5))[0]) is bool


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
    with launched() as (process, url):
        for text in [*SPAM, *HAM, "", "£ and €"]:
            prediction, propensity = score(text, model, threshold)
            expected = {"prediction": prediction, "propensity": propensity, "threshold": threshold}
            assert requests.post(f"{url}/score", json={"text": text}, timeout=5).json() == expected
            assert requests.post(f"{url}/score", data={"text": text}, timeout=5).json() == expected
        absent = requests.post(f"{url}/score", json={}, timeout=5)
        assert (absent.status_code, absent.json()) == (400, {"error": "text is missing"})
        process.send_signal(signal.SIGTERM)
        log, _ = process.communicate(timeout=10)
        assert process.returncode == 0, log
        for text in SPAM + HAM:
            assert text not in log
        with pytest.raises(requests.ConnectionError):
            requests.get(url, timeout=1)


@pytest.mark.docker
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
        poll(lambda: process.poll() is not None or answers(url), "the container to answer")
        for text in [*SPAM, *HAM, "", "£ and €"]:
            prediction, propensity = score(text, model, threshold)
            answer = requests.post(f"{url}/score", json={"text": text}, timeout=5).json()
            assert answer["prediction"] is prediction
            assert answer["propensity"] == pytest.approx(propensity, abs=1e-9)
        assert docker("exec", name, "id", "-u") != "0"
        health = ("inspect", "--format", "{{.State.Health.Status}}", name)
        poll(lambda: docker(*health) == "healthy", "the container to be healthy")
        docker("stop", name)
        log, _ = process.communicate(timeout=30)
    finally:
        subprocess.run(["docker", "rm", "--force", name], capture_output=True, timeout=60)
        end(process)
    assert process.returncode == 0, log  # 137: it did not end when asked, and was killed


def docker(*arguments: str | Path) -> str:
    """Run a docker command that must succeed, and return what it printed."""
    command = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=600)
    assert command.returncode == 0, command.stderr
    return command.stdout.strip()
