"""Tests of engine/saved.py: a model is loaded only with its card, and only in the version that wrote it."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import joblib
import numpy as np
import pytest
from helpers import SPAM
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline

from engine.saved import MODEL_PATH
from score import load_card, load_model, score


@pytest.fixture
def saved(tmp_path):
    """A copy of the saved model and its card."""
    for suffix in (".joblib", ".json"):
        shutil.copy(MODEL_PATH.with_suffix(suffix), tmp_path)
    return tmp_path / MODEL_PATH.name


def write_card(path: Path, **changes) -> None:
    """Change entries of the card of a saved model."""
    path.with_suffix(".json").write_text(json.dumps(load_card(path) | changes))


def test_load_model(saved):
    assert score(SPAM[0], load_model(str(saved)), 0.5) == score(SPAM[0], load_model(), 0.5)


def test_card_describes_the_model():
    card = load_card()
    assert 0 < card["threshold"] < 1
    assert card["threshold"] == card["thresholds"][card["thresholds"]["used"]]
    assert 0 < card["thresholds"]["precision"] < card["thresholds"]["cost"] < 1  # a label comes before a take-down
    assert set(card["metrics"]["test"]) == {"collection", "today"}
    for metrics in card["metrics"]["test"].values():
        assert set(metrics) == {"aucpr", "precision", "recall", "ham_blocked", "cost"}


@pytest.mark.parametrize("source", ["collection", "today"])
def test_operating_points_of_the_card(source):
    points = load_card()["operating_points"]
    assert [point["threshold"] for point in points] == pytest.approx(np.linspace(0, 1, 101))
    for figure in ("recall", "ham_blocked"):
        shares = [point[source][figure] for point in points]
        assert (shares[0], shares[-1]) == (1, 0)
        assert shares == sorted(shares, reverse=True)
    assert all(point[source]["recall"] >= point[source]["ham_blocked"] for point in points)


def test_load_model_runs_no_code_of_another_file(saved, tmp_path):
    trace = tmp_path / "trace"

    class Payload:
        def __reduce__(self):
            return Path.touch, (trace,)

    saved.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="does not have the sha256 of its card"):
        load_model(saved)
    assert not trace.exists()
    joblib.load(saved)
    assert trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        {"not": "a model"},
        LinearRegression().fit([[0], [1]], [0, 1]),
        LogisticRegression().fit([[0], [1]], [0, 1]),  # of numbers, not of texts
        make_pipeline(CountVectorizer(), LogisticRegression()).fit(["a cat", "a dog", "a cow"], [0, 1, 2]),
        make_pipeline(CountVectorizer(), LogisticRegression()),  # not fitted
    ],
)
def test_load_model_of_another_kind(saved, content):
    joblib.dump(content, saved)
    write_card(saved, sha256=hashlib.sha256(saved.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="does not hold a model that tells spam from ham"):
        load_model(saved)


def test_load_model_of_no_pickle(saved):
    saved.write_bytes(b"no pickle")
    write_card(saved, sha256=hashlib.sha256(b"no pickle").hexdigest())
    with pytest.raises(ValueError, match="does not hold a model that tells spam from ham"):
        load_model(saved)


def test_load_model_of_another_version(saved):
    write_card(saved, versions={"scikit-learn": "0.1"})
    with pytest.raises(ValueError, match=r"saved with scikit-learn 0\.1"):
        load_model(saved)


def test_load_model_without_a_file(saved):
    saved.unlink()
    with pytest.raises(FileNotFoundError, match=r"best_model\.joblib is missing"):
        load_model(saved)


def test_load_model_without_a_card(saved):
    saved.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"best_model\.json is missing"):
        load_model(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"name": "model"}', "[" * 100_000])
def test_load_model_with_a_broken_card(saved, content):
    saved.with_suffix(".json").write_text(content)
    with pytest.raises(ValueError, match=r"best_model\.json is not JSON with a valid"):
        load_model(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", None),
        ("sha256", 5),
        ("threshold", None),
        ("threshold", "0.5"),
        ("threshold", True),
        ("threshold", 1.5),
        ("threshold", float("nan")),
        ("versions", None),
        ("versions", ["1.9.1"]),
        ("operating_points", None),
        ("operating_points", {}),
        ("operating_points", [0.5]),
        ("operating_points", [{"today": {"recall": 0.9, "ham_blocked": 0.1}}]),
        ("operating_points", [{"threshold": None}]),
    ],
)
def test_load_model_with_a_card_of_wrong_types(saved, key, value):
    write_card(saved, **{key: value})
    with pytest.raises(ValueError, match=r"best_model\.json is not JSON with a valid"):
        load_model(saved)
