"""Tests of engine/linear.py and folding.py: what is folded, and that it scores and explains as scikit-learn does."""

import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, example, given, settings
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

from engine import folding, linear
from engine.text import normalise, normalise_texts, origins, plain
from score import explain, load_model, score, score_batch

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
    alphabet=st.one_of(st.characters(), st.sampled_from("aA1iİΣςßﬁ  \t\n\x1c\x85\xa0\u2003\u3000'_-.!£&;#\u200b\u0301"))
)


@pytest.fixture(scope="module")
def model():
    """The saved model."""
    return load_model()


@pytest.fixture(scope="module")
def test_texts(prepared):
    """The texts of the test split."""
    return pd.read_csv(prepared / "data/test.csv", keep_default_na=False)["text"].tolist()


def fit(*vectorizers, **weights) -> Pipeline:
    """Return a logistic regression over the union of vectorizers, fitted to a few messages."""
    names = [f"v{i}" for i in range(len(vectorizers))]
    union = FeatureUnion(list(zip(names, vectorizers, strict=True)), transformer_weights=weights or None)
    return Pipeline([("features", union), ("classifier", LogisticRegression(C=10))]).fit(TEXTS, LABELS)


def project(vectorizer: CountVectorizer) -> Pipeline:
    """Return a vectorizer whose terms are summed up into two groups."""
    groups = sparse.csr_matrix(np.eye(2)[[0, 1, 1]])
    return make_pipeline(vectorizer, FunctionTransformer(safe_sparse_dot, accept_sparse=True, kw_args={"b": groups}))


digits = partial(re.compile(r"\d").sub, "0")
FOLDED = {
    "words": fit(TfidfVectorizer()),
    "words without a union": make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS, LABELS),
    "counts": fit(CountVectorizer()),
    "presence": fit(CountVectorizer(binary=True)),
    "binary tf-idf": fit(TfidfVectorizer(binary=True, sublinear_tf=True)),
    "bigrams": fit(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)),
    "bigrams of signs": fit(TfidfVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", ngram_range=(1, 2))),
    "bigrams without stop words": fit(TfidfVectorizer(ngram_range=(1, 2), stop_words=["you"])),
    "bigrams alone": fit(TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(2, 2))),
    "normalised": make_pipeline(
        FunctionTransformer(normalise_texts),
        TfidfVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(),
    ).fit(TEXTS, LABELS),
    "stop words": fit(TfidfVectorizer(stop_words=["you", "the"])),
    "group in the token": fit(TfidfVectorizer(token_pattern=r"\b(\w)\w+")),
    "tokens across words": fit(TfidfVectorizer(token_pattern=r"\w+ \w+")),
    "no norm": fit(TfidfVectorizer(norm=None, sublinear_tf=True)),
    "no idf": fit(TfidfVectorizer(use_idf=False)),
    "accents": fit(TfidfVectorizer(strip_accents="unicode")),
    "digits": fit(TfidfVectorizer(preprocessor=digits, token_pattern=r"(?u)\w+|[^\w\s]", sublinear_tf=True)),
    "plain": fit(TfidfVectorizer(preprocessor=plain, token_pattern=r"(?u)\w+|[^\w\s]", ngram_range=(1, 2))),
    "runs of digits": fit(TfidfVectorizer(preprocessor=partial(re.compile(r"\d+ ?").sub, "0"))),
    "some digits": fit(TfidfVectorizer(preprocessor=partial(re.compile(r"\d").sub, "0", count=2))),
    "characters": fit(TfidfVectorizer(analyzer="char", ngram_range=(1, 4))),
    "characters without a token": fit(TfidfVectorizer(analyzer="char", token_pattern=None)),
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
    "a step between": make_pipeline(TfidfVectorizer(), TruncatedSVD(2), LogisticRegression()).fit(TEXTS, LABELS),
    "hashing": make_pipeline(HashingVectorizer(n_features=64), LogisticRegression()).fit(TEXTS, LABELS),
    "own analyzer": fit(TfidfVectorizer(analyzer=str.split)),
    "own tokenizer": fit(TfidfVectorizer(tokenizer=str.split, token_pattern=None)),
    "another norm": fit(TfidfVectorizer(norm="l1")),
    "another projection": fit(make_pipeline(CountVectorizer(), FunctionTransformer(np.sqrt))),
    "single precision": fit(TfidfVectorizer(dtype=np.float32)),
    "union in a union": fit(make_union(TfidfVectorizer())),
    "sparse coefficients": fit(TfidfVectorizer()),
}
OTHER["sparse coefficients"][-1].sparsify()


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


def test_saved_model_takes_the_fastest_way(model):
    """Its patterns, which train.ipynb writes, are among those that make a vectorizer wordwise."""
    folded = folding.find_folded(model)
    assert folded.wordwise
    assert not folded.whole


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
    assert [propensity for _, propensity in score_batch(TEXTS, model, 0.5)] == pytest.approx(expected, abs=1e-12)
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
    assert model in folding._folded_models
    kept = len(folding._folded_models)
    del model
    assert len(folding._folded_models) == kept - 1


@pytest.mark.parametrize("text", [None, 5, b"free"])
def test_explain_refuses_what_is_no_text(model, text):
    with pytest.raises(TypeError, match="text must be a string"):
        explain(text, model)


@pytest.mark.parametrize("vectorizer", [CountVectorizer(), CountVectorizer(analyzer="char_wb", ngram_range=(2, 3))])
def test_explanation_is_placed_where_lower_case_is_longer(vectorizer):
    model, prefix, text = fit(vectorizer), "İ" * 10, " claim your prize"
    assert explain(prefix + text, model)[len(prefix) :] == pytest.approx(explain(text, model))
    assert sum(explain(text, model)) > 0


def test_a_word_that_comes_again_is_remembered():
    model = fit(TfidfVectorizer(token_pattern=r"(?u)\b\w+\b"))
    remembered, text = folding.find_folded(model).remembered, "zorp blick " + "x" * 40
    score(text, model, 0.5)
    assert not remembered.keys() & set(text.split())
    score(text, model, 0.5)
    assert remembered.keys() & set(text.split()) == {"zorp", "blick"}  # links are long, and seldom come again


def test_the_memory_of_words_has_an_end(monkeypatch):
    monkeypatch.setattr(linear, "WORDS_REMEMBERED", 5)
    monkeypatch.setattr(linear, "WORDS_NOTED", 7)
    model = fit(TfidfVectorizer())
    folded, most = folding.find_folded(model), [0, 0]
    for text in [*TEXTS, *TEXTS, "win WIN win your prize", *TEXTS]:
        assert_equal_to_sklearn(model, [text])
        most = [max(most[0], len(folded.remembered)), max(most[1], len(folded.noted))]
    assert most == [5, 7]


def test_a_fold_that_gives_something_else_is_not_used(monkeypatch):
    model = fit(TfidfVectorizer())
    monkeypatch.setattr(linear.LinearVectorizer, "log_odds", lambda *_: 0.1)
    assert explain(TEXTS[0], model) is None
    assert_equal_to_sklearn(model, TEXTS)


VECTORIZERS = st.fixed_dictionaries(
    {
        "analyzer": st.sampled_from(["word", "char", "char_wb"]),
        "ngram_range": st.sampled_from([(1, 1), (1, 2), (2, 3), (3, 5)]),
        "lowercase": st.booleans(),
        "strip_accents": st.sampled_from([None, "ascii", "unicode"]),
        "stop_words": st.sampled_from([None, "english", ["you", "win"]]),
        "token_pattern": st.sampled_from([r"(?u)\b\w\w+\b", r"(?u)\w+|[^\w\s]", r"\S+", r"(\w)\w*", None]),
        "preprocessor": st.sampled_from([None, digits, str.strip, str.swapcase]),
        "tokenizer": st.sampled_from([None, str.split]),
        "binary": st.booleans(),
        "max_features": st.sampled_from([None, 20]),
        "min_df": st.sampled_from([1, 2]),
    }
)
WEIGHTING = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(["l2", "l1", None]),
        "use_idf": st.booleans(),
        "smooth_idf": st.booleans(),
        "sublinear_tf": st.booleans(),
        "dtype": st.sampled_from([np.float64, np.float32]),
    }
)


@pytest.mark.filterwarnings("ignore")  # scikit-learn warns of parameters that have no effect
@settings(deadline=None, max_examples=150)
@given(VECTORIZERS, st.none() | WEIGHTING, st.booleans(), st.lists(ODD, max_size=3))
def test_any_vectorizer_is_scored_as_sklearn_scores_it(parameters, weighting, sparse_coefficients, texts):
    vectorizer = CountVectorizer() if weighting is None else TfidfVectorizer()
    vectorizer.set_params(**parameters, **(weighting or {}))
    try:
        model = make_pipeline(vectorizer, LogisticRegression()).fit(TEXTS, LABELS)
    except (TypeError, ValueError, AttributeError):
        assume(False)  # scikit-learn itself takes no such combination
    if sparse_coefficients:
        model[-1].sparsify()
    assert_equal_to_sklearn(model, [*TEXTS, *texts])
    if explain("free", model) is not None:
        assert_explained(model, [*TEXTS, *texts])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain & simple", "plain & simple"),
        ("&lt;3 &amp; &#163;5", "<3 & £5"),
        ("<#> 4471 is your code&lt;#&gt;", "  4471 is your code "),
        ("\uff56\uff45\uff52ify \U0001d432\U0001d428\U0001d42e\U0001d42b \ufb01le", "verify your file"),
        ("b\u200ba\u00adn\u2060k", "bank"),
        ("cafe\u0301", "café"),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert len(origins(text, expected)) == len(expected)


@settings(deadline=None)
@given(ODD)
def test_normalised_texts_stay_in_place(text):
    read = normalise(text)
    places = origins(text, read)
    assert len(places) == len(read)
    assert all(0 <= place < len(text) for place in places)
    assert list(places) == sorted(places)
