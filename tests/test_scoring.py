"""Tests of score.py beyond the assignment: folding, loading, explanations, and how the model behaves."""

import json
import os
import pickle
import re
import shutil
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import LinearSVC
from sklearn.utils.extmath import safe_sparse_dot

import score as scoring
from score import explain, load_card, load_model, score, score_batch

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [
    "WINNER!! Claim your £900 prize, call 09061701461 now",
    "Free entry: txt WIN to 80086, win win win",
    "URGENT claim your FREE prize now",
    "ok see you at home, call me when you are there",
    "are you free for lunch now? i am at home",
    "sorry i missed your call, see you at lunch",
]
LABELS = [1, 1, 1, 0, 0, 0]
# Letters whose lower case is longer or depends on its neighbours, and all that counts as white space.
ODD = st.text(
    alphabet=st.one_of(st.characters(), st.sampled_from("aA1iİΣςßﬁ  \t\n\x1c\x85\xa0\u2003\u3000'_-.!£"))
)


@pytest.fixture(scope="module")
def model():
    """The saved model."""
    return load_model()


@pytest.fixture(scope="module")
def test_texts():
    """The texts of the test split, which `make test` prepares."""
    path = ROOT / "data" / "test.csv"
    if not path.exists():
        reason = f"{path} is missing: `make run` prepares it"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    import pandas as pd

    return pd.read_csv(path)["text"].tolist()


def fit(*vectorizers, **weights) -> Pipeline:
    """Return a logistic regression over the union of vectorizers, fitted to a few messages."""
    names = [f"v{i}" for i in range(len(vectorizers))]
    union = FeatureUnion(list(zip(names, vectorizers, strict=True)), transformer_weights=weights or None)
    return Pipeline([("features", union), ("classifier", LogisticRegression(C=10))]).fit(TEXTS, LABELS)


def project(vectorizer: CountVectorizer) -> Pipeline:
    """Return a vectorizer whose terms are summed up into two groups."""
    groups = sparse.csr_matrix(np.eye(2)[[0, 1, 1]])
    return make_pipeline(
        vectorizer, FunctionTransformer(safe_sparse_dot, accept_sparse=True, kw_args={"b": groups})
    )


digits = partial(re.compile(r"\d").sub, "0")
FOLDED = {
    "words": fit(TfidfVectorizer()),
    "words without a union": make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS, LABELS),
    "counts": fit(CountVectorizer()),
    "presence": fit(CountVectorizer(binary=True)),
    "binary tf-idf": fit(TfidfVectorizer(binary=True, sublinear_tf=True)),
    "bigrams": fit(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)),
    "stop words": fit(TfidfVectorizer(stop_words=["you", "the"])),
    "group in the token": fit(TfidfVectorizer(token_pattern=r"\b(\w)\w+")),
    "tokens across words": fit(TfidfVectorizer(token_pattern=r"\w+ \w+")),
    "no norm": fit(TfidfVectorizer(norm=None, sublinear_tf=True)),
    "no idf": fit(TfidfVectorizer(use_idf=False)),
    "accents": fit(TfidfVectorizer(strip_accents="unicode")),
    "digits": fit(TfidfVectorizer(preprocessor=digits, token_pattern=r"(?u)\w+|[^\w\s]", sublinear_tf=True)),
    "runs of digits": fit(TfidfVectorizer(preprocessor=partial(re.compile(r"\d+ ?").sub, "0"))),
    "some digits": fit(TfidfVectorizer(preprocessor=partial(re.compile(r"\d").sub, "0", count=2))),
    "characters": fit(TfidfVectorizer(analyzer="char", ngram_range=(1, 4))),
    "long characters": fit(TfidfVectorizer(analyzer="char", ngram_range=(4, 5), lowercase=False)),
    "characters of words": fit(TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3), sublinear_tf=True)),
    "long characters of words": fit(CountVectorizer(analyzer="char_wb", ngram_range=(5, 6))),
    "all together": fit(
        TfidfVectorizer(preprocessor=digits, sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
        project(CountVectorizer(vocabulary=["free", "call", "win"])),
        TfidfVectorizer(analyzer="char", ngram_range=(2, 2)),
        "drop",
        v2=0.5,
    ),
}
OTHER = {
    "another classifier": make_pipeline(TfidfVectorizer(), MultinomialNB()).fit(TEXTS, LABELS),
    "no predict_proba": make_pipeline(TfidfVectorizer(), LinearSVC()).fit(TEXTS, LABELS),
    "a step between": make_pipeline(TfidfVectorizer(), TruncatedSVD(2), LogisticRegression()).fit(
        TEXTS, LABELS
    ),
    "hashing": make_pipeline(HashingVectorizer(n_features=64), LogisticRegression()).fit(TEXTS, LABELS),
    "own analyzer": fit(TfidfVectorizer(analyzer=str.split)),
    "own tokenizer": fit(TfidfVectorizer(tokenizer=str.split, token_pattern=None)),
    "another norm": fit(TfidfVectorizer(norm="l1")),
    "another projection": fit(make_pipeline(CountVectorizer(), FunctionTransformer(np.sqrt))),
    "single precision": fit(TfidfVectorizer(dtype=np.float32)),
    "union in a union": fit(make_union(TfidfVectorizer())),
}


def decide(model: BaseEstimator, texts: list[str]) -> np.ndarray:
    """Return scikit-learn's own log-odds."""
    return model.decision_function(texts)


def assert_equal_to_sklearn(model: BaseEstimator, texts: list[str]) -> None:
    """Compare each way of scoring with predict_proba."""
    expected = model.predict_proba(texts)[:, 1]
    assert [score(text, model, 0.5)[1] for text in texts] == pytest.approx(expected, abs=1e-9)
    batch = score_batch(texts, model, 0.5)
    assert batch == [score(text, model, 0.5) for text in texts]


def assert_explained(model: BaseEstimator, texts: list[str]) -> None:
    """Check that the contributions of the characters add up to the log-odds."""
    intercept = model[-1].intercept_[0]
    for text, expected in zip(texts, decide(model, texts), strict=True):
        contributions = explain(text, model)
        assert len(contributions) == len(text)
        assert sum(contributions) + intercept == pytest.approx(expected, abs=1e-9)


def test_model_is_folded(model):
    assert explain("free", model) is not None


def test_scores_equal_sklearn_on_the_test_split(model, test_texts):
    assert len(test_texts) > 500
    assert_equal_to_sklearn(model, test_texts)
    assert_explained(model, test_texts)


@settings(deadline=None)
@given(ODD)
@example("")
@example("a" * 200)
@example("ΓΣ ΓΣΓ Σ")
@example("İİİ i̇ ﬁ")
@example("\ud800")
def test_scores_equal_sklearn_on_any_text(model, text):
    assert_equal_to_sklearn(model, [text])
    assert_explained(model, [text])


@pytest.mark.parametrize("name", FOLDED)
@settings(deadline=None, max_examples=30)
@given(text=st.one_of(ODD, st.lists(st.sampled_from(" ".join(TEXTS).split())).map(" ".join)))
@example(text="win win WIN claim 09061 12 34 call\t\tme  home")
@example(text=" ")
def test_folded_pipelines_equal_sklearn(name, text):
    assert_equal_to_sklearn(FOLDED[name], [text])
    assert_explained(FOLDED[name], [text])


@pytest.mark.parametrize("name", OTHER)
def test_other_models_are_scored_by_sklearn(name):
    model = OTHER[name]
    assert explain(TEXTS[0], model) is None
    if hasattr(model, "predict_proba"):
        expected = model.predict_proba(TEXTS)[:, 1]
    else:
        expected = 1 / (1 + np.exp(-model.decision_function(TEXTS)))
    assert [score(text, model, 0.5)[1] for text in TEXTS] == pytest.approx(expected, abs=1e-12)
    assert [propensity for _, propensity in score_batch(TEXTS, model, 0.5)] == pytest.approx(
        expected, abs=1e-12
    )
    assert score_batch([], model, 0.5) == []


@pytest.mark.parametrize("texts", [TEXTS, tuple(TEXTS), iter(TEXTS), []])
def test_score_batch(model, texts):
    expected = [score(text, model, 0.5) for text in TEXTS] if texts else []
    assert score_batch(texts, model, 0.5) == expected


@pytest.mark.parametrize("texts", ["free", ["free", None], [b"free"], 5, None])
def test_score_batch_refuses_what_are_no_texts(model, texts):
    with pytest.raises(TypeError):
        score_batch(texts, model, 0.5)


@pytest.mark.parametrize("classifier", [LogisticRegression(), LinearSVC()])
def test_three_classes_are_refused(classifier):
    model = make_pipeline(TfidfVectorizer(), classifier).fit(TEXTS, [0, 1, 2] * 2)
    with pytest.raises(ValueError, match="two classes"):
        score("free", model, 0.5)


def test_a_model_that_is_fitted_again_is_folded_again():
    model = fit(TfidfVectorizer())
    before = score(TEXTS[0], model, 0.5)
    model.fit(TEXTS, LABELS[::-1])
    assert_equal_to_sklearn(model, TEXTS)
    assert score(TEXTS[0], model, 0.5) != before


@pytest.mark.parametrize(
    "parameters",
    [
        {"features__v0__lowercase": False},
        {"features__v0__sublinear_tf": True},
        {"features__transformer_weights": {"v0": 3.0}},
        {"classifier": LogisticRegression(C=0.1).fit(FOLDED["words"][0].transform(TEXTS), LABELS)},
    ],
)
def test_a_model_with_other_parameters_is_folded_again(parameters):
    model = fit(TfidfVectorizer())
    score(TEXTS[0], model, 0.5)
    model.set_params(**parameters)
    assert_equal_to_sklearn(model, [*TEXTS, "win WIN win"])


def test_a_model_that_cannot_be_folded_any_more():
    model = fit(TfidfVectorizer())
    score(TEXTS[0], model, 0.5)
    model.set_params(classifier=MultinomialNB()).fit(TEXTS, LABELS)
    assert_equal_to_sklearn(model, TEXTS)


def test_a_model_is_not_kept_alive():
    model = fit(TfidfVectorizer())
    score(TEXTS[0], model, 0.5)
    assert model in scoring._folded_models
    kept = len(scoring._folded_models)
    del model
    assert len(scoring._folded_models) == kept - 1


def test_explanation_points_at_the_words(model):
    text = "hi mum, claim your FREE prize now"
    contributions = explain(text, model)
    prize = sum(contributions[text.index("FREE") : text.index(" now")])
    assert prize > sum(contributions[: text.index(",")])
    assert prize > 0


@pytest.mark.parametrize("text", [None, 5, b"free"])
def test_explain_refuses_what_is_no_text(model, text):
    with pytest.raises(TypeError, match="text must be a string"):
        explain(text, model)


@pytest.fixture
def saved(tmp_path):
    """A copy of the saved model and its card."""
    for suffix in (".joblib", ".json"):
        shutil.copy(scoring.MODEL_PATH.with_suffix(suffix), tmp_path)
    return tmp_path / scoring.MODEL_PATH.name


def write_card(path: Path, **changes) -> None:
    """Change entries of the card of a saved model."""
    path.with_suffix(".json").write_text(json.dumps(load_card(path) | changes))


def test_load_model(saved, model):
    assert score(TEXTS[0], load_model(str(saved)), 0.5) == score(TEXTS[0], model, 0.5)


def test_card_describes_the_model():
    card = load_card()
    assert 0 < card["threshold"] < 1
    assert [point["threshold"] for point in card["operating_points"]] == pytest.approx(np.linspace(0, 1, 101))


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
        ("operating_points", [{"precision": 0.9}]),
        ("operating_points", [{"threshold": None}]),
    ],
)
def test_load_model_with_a_card_of_wrong_types(saved, key, value):
    write_card(saved, **{key: value})
    with pytest.raises(ValueError, match=r"best_model\.json is not JSON with a valid"):
        load_model(saved)


# How the model behaves: what must not change its answer, and what must.


def log_odds(text: str, model: BaseEstimator) -> float:
    """Return the log-odds of spam."""
    return float(decide(model, [text])[0])


@pytest.mark.parametrize("name", ["Anna", "Priya", "John", "Mohammed", "Xiu", "Zbigniew"])
@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        ("Hi {}, are you coming home for dinner tonight?", False),
        ("{} said she will be late, so don't wait", False),
        ("Congratulations {}! You have won a £1000 prize. Call 09061701461 to claim", True),
    ],
)
def test_a_name_does_not_decide(model, text, name, prediction):
    assert score(text.format(name), model, load_card()["threshold"])[0] is prediction


@pytest.mark.parametrize("edit", [str.strip, lambda text: f"  {text} ", lambda text: text.replace(" ", "  ")])
@pytest.mark.parametrize("text", TEXTS)
def test_spacing_does_not_decide(model, text, edit):
    threshold = load_card()["threshold"]
    assert score(edit(text), model, threshold)[0] == score(text, model, threshold)[0]


@pytest.mark.parametrize("number", ["09061701461", "08712300220", "09058094455"])
def test_which_number_does_not_decide(model, number):
    assert score(f"You have won a prize! Call {number} to claim", model, load_card()["threshold"])[0]


@pytest.mark.parametrize(
    "addition", [" Call 09061701461 to claim", " FREE prize, txt WIN to 80086", " £1000 cash"]
)
@pytest.mark.parametrize("text", TEXTS[3:])
def test_an_offer_pushes_towards_spam(model, text, addition):
    assert log_odds(text + addition, model) > log_odds(text, model) + 0.5


@pytest.mark.parametrize("addition", [" see you at home later", " sorry i'm late, ok?", " haha love you"])
@pytest.mark.parametrize("text", TEXTS[:3])
def test_small_talk_pushes_towards_ham(model, text, addition):
    assert log_odds(text + addition, model) < log_odds(text, model)
