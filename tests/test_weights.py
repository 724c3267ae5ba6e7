"""Tests of engine/weights.py: a file of weights scores as the pipeline does, without it; and no file can do harm."""

import csv
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import orjson
import pandas as pd
import pytest
from helpers import HAM, ROOT, SPAM, assert_refuses_to_serve
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

from engine.folding import find_folded
from engine.linear import LinearModel
from engine.saved import MODEL_PATH, WEIGHTS, copy_files, save_model
from engine.weights import LARGEST, read_weights, unpack, write_weights
from score import explain, load_card, load_model, load_scorer, score

TEXTS, LABELS = [*SPAM, *HAM], [1] * len(SPAM) + [0] * len(HAM)
# Runs what follows as where the libraries of the notebooks are not installed.
WITHOUT = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("joblib", "numpy", "pandas", "scipy", "sklearn"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
"""
SCORE_ALL = """
import json
from score import explain, load_scorer, score, score_batch
model, texts = load_scorer(), json.load(sys.stdin)
scores = [score(text, model, 0.5)[1] for text in texts]
assert scores == [propensity for _, propensity in score_batch(texts, model, 0.5)]
json.dump([scores, [model.intercept + sum(explain(text, model)) for text in texts[::10]]], sys.stdout)
"""


@pytest.fixture
def saved(tmp_path):
    """A copy of the saved model with all its files."""
    copy_files(MODEL_PATH, tmp_path / MODEL_PATH.name)
    return tmp_path / MODEL_PATH.name


@pytest.fixture(scope="module")
def small():
    """What the file of a small model says."""
    vectorizers = TfidfVectorizer(ngram_range=(1, 2)), CountVectorizer(analyzer="char_wb", ngram_range=(2, 3))
    pipeline = make_pipeline(make_union(*vectorizers), LogisticRegression()).fit(TEXTS, LABELS)
    return orjson.loads(unpack(write_weights(find_folded(pipeline))))


def pack(about) -> bytes:
    """Return a file that says something."""
    return gzip.compress(json.dumps(about).encode())


def assert_scores_or_is_refused(content: bytes) -> None:
    """Check that a file is a model that scores any text, or refused in a sentence."""
    try:
        model = read_weights(content)
    except ValueError as error:
        message = str(error)
        assert message
        assert "\n" not in message
        return
    for text in ("", *TEXTS, "x " * 500, "Ünïcödé 😀 İ"):
        assert 0 <= score(text, model, 0.5)[1] <= 1
        assert len(explain(text, model)) == len(text)


# The same scores


def score_without(texts: list[str]) -> tuple[list[float], list[float]]:
    """Return the propensities of texts, and of each tenth the log-odds by its explanation, without scikit-learn."""
    command = [sys.executable, "-c", WITHOUT + SCORE_ALL]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(texts), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def assert_equal_to_sklearn(texts: list[str]) -> None:
    """Compare the weights in a process of their own with what scikit-learn makes of the pipeline here."""
    pipeline = load_model()
    propensities, log_odds = score_without(texts)
    assert propensities == pytest.approx(pipeline.predict_proba(texts)[:, 1], rel=0, abs=1e-9)
    assert log_odds == pytest.approx(pipeline.decision_function(texts[::10]), rel=0, abs=1e-9)


def test_messages_of_today_are_scored_as_by_sklearn():
    with (ROOT / "data/today.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) > 9000
    assert_equal_to_sklearn([row["text"] for row in rows])


def test_messages_of_the_collection_are_scored_as_by_sklearn(prepared):
    texts = pd.read_csv(prepared / "data/raw_data.csv", keep_default_na=False)["text"].tolist()
    assert len(texts) > 5000
    assert_equal_to_sklearn(texts)


def test_random_unicode_is_scored_as_by_sklearn():
    rng, space = random.Random(0), [(0x20, 0x20)]
    latin, greek, halves, forms = (0, 0x24F), (0x370, 0x52F), (0xDC00, 0xDFFF), (0xFE00, 0xFFFF)
    ranges = [*space, (0, 0x7F), latin, greek, (0x2000, 0x206F), halves, forms, (0, 0xD7FF), (0xE000, 0x10FFFF)]
    texts = ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 200))) for _ in range(2000)]
    assert_equal_to_sklearn(texts)


def test_the_file_is_small_and_the_same_whenever_it_is_written():
    content = MODEL_PATH.with_suffix(WEIGHTS).read_bytes()
    assert len(content) < 1.5e6
    folded = find_folded(load_model())
    assert write_weights(folded) == write_weights(load_scorer())
    assert unpack(write_weights(folded)) == unpack(content)


# Without scikit-learn


def test_the_service_takes_no_scikit_learn():
    program = WITHOUT + (
        "from app import create_app\n"
        f"answer = create_app().test_client().post('/score', json={{'text': {SPAM[0]!r}}})\n"
        "assert answer.json['prediction'] is True, answer.text\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


SERVE = """
import os, app
from engine.saved import load_card, load_scorer
app.serve(lambda: app.create_app(load_scorer(os.environ["MODEL"]), load_card(os.environ["MODEL"])))
"""


def test_a_model_without_weights_is_refused_where_there_is_no_scikit_learn(tmp_path):
    path = tmp_path / "best_model.joblib"
    save_model(DummyClassifier().fit(TEXTS, LABELS), card_of("stub"), path, TEXTS)
    environment = {"MODEL": str(path), "PYTHONPATH": str(ROOT)}
    assert_refuses_to_serve(
        "takes scikit-learn, which is missing", sys.executable, "-c", WITHOUT + SERVE, **environment
    )


def test_a_model_without_weights_is_scored_by_its_pipeline(tmp_path):
    path, model = tmp_path / "best_model.joblib", DummyClassifier().fit(TEXTS, LABELS)
    save_model(model, card_of("stub"), path, TEXTS)
    assert not path.with_suffix(WEIGHTS).exists()
    assert score("", load_scorer(path), 0.5) == score("", model, 0.5)


# Saving


def card_of(name: str) -> dict:
    """Return what a card says before the model is saved."""
    return {"name": name, "threshold": 0.5, "operating_points": [], "versions": load_card()["versions"]}


def contents(path: Path) -> dict[str, bytes]:
    """Return the files of a saved model."""
    return {file.name: file.read_bytes() for file in path.parent.iterdir()}


def save_again(path: Path) -> bool:
    """Save a saved model as train.ipynb would, that has made the same one."""
    card = {key: value for key, value in load_card().items() if key not in ("sha256", "weights")}
    return save_model(load_model(), card, path, TEXTS)


def test_the_same_model_is_left_as_it_is(saved):
    before = contents(saved)
    assert not save_again(saved)
    assert contents(saved) == before == {file.name: file.read_bytes() for file in MODEL_PATH.parent.iterdir()}


def test_weights_that_another_machine_has_compressed_are_left_as_they_are(saved):
    content = gzip.compress(unpack(saved.with_suffix(WEIGHTS).read_bytes()), 1, mtime=0)
    write_checked(saved, content)
    before = contents(saved)
    assert not save_again(saved)
    assert contents(saved) == before


@pytest.mark.parametrize("content", [None, b"", b"damaged"])
def test_lost_weights_are_written_again_and_the_pipeline_is_left_as_it_is(saved, content):
    before = contents(saved)
    saved.with_suffix(WEIGHTS).unlink()
    if content is not None:
        saved.with_suffix(WEIGHTS).write_bytes(content)
    assert save_again(saved)
    assert contents(saved) == before


def test_a_model_that_is_not_linear_takes_the_weights_of_another_away(saved):
    save_model(DummyClassifier().fit(TEXTS, LABELS), card_of("stub"), saved, TEXTS)
    assert "weights" not in load_card(saved)
    assert sorted(contents(saved)) == ["best_model.joblib", "best_model.json"]


@pytest.mark.parametrize(
    "vectorizer",
    [
        TfidfVectorizer(preprocessor=str.strip),
        TfidfVectorizer(stop_words=["you"]),
        TfidfVectorizer(token_pattern=r"\S+"),
        TfidfVectorizer(strip_accents="unicode"),
        CountVectorizer(analyzer="char"),
        CountVectorizer(ngram_range=(1, 3)),
    ],
)
def test_a_model_that_a_file_cannot_describe_has_no_weights(tmp_path, vectorizer):
    path, model = tmp_path / "best_model.joblib", make_pipeline(vectorizer, LogisticRegression()).fit(TEXTS, LABELS)
    save_model(model, card_of("another"), path, TEXTS)
    assert "weights" not in load_card(path)
    assert score(SPAM[0], load_scorer(path), 0.5) == score(SPAM[0], model, 0.5)


# Files that somebody else wrote


def write_checked(path: Path, content: bytes) -> None:
    """Put something in the place of the weights of a saved model, with its checksum in the card."""
    path.with_suffix(WEIGHTS).write_bytes(content)
    weights = {"file": path.with_suffix(WEIGHTS).name, "sha256": hashlib.sha256(content).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(load_card(path) | {"weights": weights}))


def test_weights_of_another_model_are_refused(saved):
    saved.with_suffix(WEIGHTS).write_bytes(b"another")
    with pytest.raises(ValueError, match="does not have the sha256 of its card"):
        load_scorer(saved)


def test_weights_without_a_file(saved):
    saved.with_suffix(WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"best_model\.weights\.json\.gz is missing"):
        load_scorer(saved)


@pytest.mark.parametrize("weights", [None, "sha256", {}, {"sha256": 5}, ["sha256"]])
def test_a_card_with_weights_of_wrong_types(saved, weights):
    saved.with_suffix(".json").write_text(json.dumps(load_card(saved) | {"weights": weights}))
    with pytest.raises(ValueError, match=r"best_model\.json is not JSON with a valid"):
        load_scorer(saved)


def test_a_pipe_in_which_nothing_comes_is_refused(saved):
    saved.with_suffix(WEIGHTS).unlink()
    os.mkfifo(saved.with_suffix(WEIGHTS))
    with pytest.raises(ValueError, match="does not have the sha256"):
        load_scorer(saved)


def test_what_is_no_file_of_weights_is_refused_by_name(saved):
    write_checked(saved, b"no weights")
    with pytest.raises(ValueError, match=r"best_model\.weights\.json\.gz does not hold the weights of a model, for"):
        load_scorer(saved)


@pytest.mark.parametrize("filler", [b" ", b"[", b"[],", b"0,"])
def test_a_small_file_that_unpacks_to_a_large_one_is_refused(filler):
    content = gzip.compress(filler * (2**27 // len(filler)))
    assert len(content) < LARGEST
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than"):
            read_weights(content)
        assert tracemalloc.get_traced_memory()[1] < 5 * LARGEST
    finally:
        tracemalloc.stop()


def test_a_large_file_is_not_read(saved):
    with saved.with_suffix(WEIGHTS).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="does not have the sha256"):
        load_scorer(saved)


@pytest.mark.parametrize("kept", [0, 1, 9, 10, 20, 500, -9, -8, -1])
def test_a_truncated_file_is_refused(kept):
    content = MODEL_PATH.with_suffix(WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match=r"not compressed|empty"):
        read_weights(content[:kept])


ODD = [None, True, 0, -1, 5, 1.5, 1e308, "", "word", [], {}, [[]], [1.0], ["a", "a"]]


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_whatever_stands_in_the_place_of_a_part_is_refused_or_scores(small, odd):
    for key in small:
        assert_scores_or_is_refused(pack({**small, key: odd}))
    first, second = small["vectorizers"]
    for vectorizers in ([odd, second], [{**first, "more": odd}, second]):
        with pytest.raises(ValueError, match="exactly the keys"):
            read_weights(pack({**small, "vectorizers": vectorizers}))
    for key in first:
        assert_scores_or_is_refused(pack({**small, "vectorizers": [{**first, key: odd}, second]}))
        assert_scores_or_is_refused(pack({**small, "vectorizers": [first, {**second, key: odd}]}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weights", float("nan"), "expected"),
        ("weights", float("inf"), "expected"),
        ("weights", 1e10, "too large"),
        ("weights", 1, "no number"),
        ("weights", "1.0", "no number"),
        ("squares", 0.0, "no positive number"),
        ("squares", -1.0, "no positive number"),
        ("squares", 1e-300, "no positive number"),
        ("squares", None, "no positive number"),
        ("terms", None, "a term is no string"),
        ("terms", 5, "a term is no string"),
        ("terms", ["a"], "a term is no string"),
    ],
)
def test_one_bad_entry_among_many_is_refused(small, key, value, message):
    first, second = small["vectorizers"]
    changed = {**second, key: [*second[key][:-1], value]}
    with pytest.raises(ValueError, match=message):
        read_weights(pack({**small, "vectorizers": [first, changed]}))


def test_a_term_that_is_there_twice_is_refused(small):
    first, second = small["vectorizers"]
    terms = [first["terms"][0], *first["terms"][:-1]]
    with pytest.raises(ValueError, match="twice"):
        read_weights(pack({**small, "vectorizers": [{**first, "terms": terms}, second]}))


def test_a_pattern_that_takes_for_ever_is_refused(small):
    first, second = small["vectorizers"]
    with pytest.raises(ValueError, match="pattern is unknown"):
        read_weights(pack({**small, "vectorizers": [{**first, "pattern": "(x+x+)+y"}, second]}))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000, '"\\ud800"', "", "null", "\xff"])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match=r"line 1|keys"):
        read_weights(gzip.compress(text.encode("latin-1")))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


@settings(deadline=None)
@given(data=st.data())
def test_fuzzed_parts(small, data):
    changed = json.loads(json.dumps(small))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from([changed, *[part for part in changed["vectorizers"] if type(part) is dict]]))
        key = data.draw(st.sampled_from(sorted(place)))
        if key == "vectorizers":
            continue
        if isinstance(place[key], list) and place[key] and data.draw(st.booleans()):
            place[key][data.draw(st.integers(0, len(place[key]) - 1))] = data.draw(JSON)
        else:
            place[key] = data.draw(JSON)
    assert_scores_or_is_refused(pack(changed))


@settings(deadline=None)
@given(value=JSON)
def test_fuzzed_json(value):
    assert_scores_or_is_refused(pack(value))


@settings(deadline=None)
@given(data=st.data(), compressed=st.booleans())
def test_fuzzed_bytes(small, data, compressed):
    content = bytearray(pack(small) if compressed else json.dumps(small).encode())
    for _ in range(data.draw(st.integers(1, 8))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    assert_scores_or_is_refused(bytes(content) if compressed else gzip.compress(content))


def test_a_model_from_a_file_is_a_linear_model():
    assert type(load_scorer()) is LinearModel
