"""Fold a fitted scikit-learn pipeline into the linear model of `engine/linear.py`, which gives the same numbers.

What cannot be folded is left to scikit-learn: `find_folded` returns None, and so it does for a model whose folded form
does not give what scikit-learn gives on a few messages.
"""

from weakref import WeakKeyDictionary

import numpy as np
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.extmath import safe_sparse_dot

from engine.linear import LinearModel, LinearVectorizer
from engine.text import normalise_texts, plain

PROBES = (
    "",
    "WINNER!! Claim your £900 prize, call 09061701461 now now now",
    "running late,  see you at home at 8... ok?",
    "Ünïcödé İß ﬁ ĞΣ 😀 a\tb\nc &lt;#&gt; b\u200bank",
)


class FoldedModel(LinearModel):
    """A pipeline of vectorizers and a logistic regression, folded."""

    def __init__(
        self, vectorizers: list[LinearVectorizer], intercept: float, normalises: bool, fitted: list[BaseEstimator]
    ):
        """Put folded vectorizers together.

        Args:
            vectorizers, intercept, normalises: as LinearModel takes them.
            fitted: the estimators that were folded, to notice when one of them changes.
        """
        super().__init__(vectorizers, intercept, normalises)
        self.state = [(vars(estimator), vars(estimator).copy()) for estimator in fitted]
        self.agrees = False

    def is_current(self) -> bool:
        """Tell whether no part of the pipeline was fitted again or given other parameters since.

        A change inside an array or a list is not seen: scikit-learn itself makes new ones.
        """
        try:
            # Attributes are compared by identity first, so this does not look into arrays that are the same.
            return all([now == then for now, then in self.state])  # noqa: C419, a generator takes twice as long
        except ValueError:  # two different arrays have no truth value
            return False


_folded_models: WeakKeyDictionary[Pipeline, FoldedModel] = WeakKeyDictionary()


def find_folded(model: BaseEstimator) -> FoldedModel | None:
    """Return the folded form of a model, made on first use, or None where there is none."""
    if type(model) is not Pipeline:
        return None
    folded = _folded_models.get(model)
    if folded is None or not folded.is_current():
        folded = fold(model)
        if folded is None:
            _folded_models.pop(model, None)
            return None
        expected = model.predict_proba(list(PROBES))[:, 1]
        given = [folded.propensity(text) for text in PROBES]
        folded.agrees = np.allclose(given, expected, rtol=0, atol=1e-9)
        _folded_models[model] = folded
    return folded if folded.agrees else None


def fold(model: Pipeline) -> FoldedModel | None:
    """Fold a pipeline of vectorizers and a logistic regression; None for anything else."""
    parts = [part for _, part in model.steps]
    normalises = len(parts) == 3 and _is_normaliser(parts[0])
    if len(parts) != 2 + normalises:
        return None
    features, classifier = parts[-2:]
    if type(classifier) is not LogisticRegression:
        return None
    coefficients = getattr(classifier, "coef_", None)
    if coefficients is None or issparse(coefficients) or np.shape(coefficients)[:1] != (1,):
        return None
    fitted, branches = [model, *parts], [(features, 1.0)]
    if type(features) is FeatureUnion:
        scale = features.transformer_weights or {}
        branches = [(part, scale.get(name, 1.0)) for name, part in features.transformer_list if part != "drop"]
    vectorizers, remaining = [], coefficients[0]
    for vectorizer, weight in branches:
        projection = None
        if type(vectorizer) is Pipeline and len(vectorizer.steps) == 2:
            fitted.append(vectorizer)
            (_, vectorizer), (_, projected) = vectorizer.steps
            fitted.append(projected)
            if type(projected) is not FunctionTransformer or projected.func is not safe_sparse_dot:
                return None
            projection = projected.kw_args["b"]
        if not can_fold(vectorizer):
            return None
        fitted.append(vectorizer)
        if type(vectorizer) is TfidfVectorizer:
            fitted.append(vectorizer._tfidf)
        width = len(vectorizer.vocabulary_) if projection is None else projection.shape[1]
        part, remaining = weight * remaining[:width], remaining[width:]
        vectorizers.append(fold_vectorizer(vectorizer, part if projection is None else projection @ part))
    return FoldedModel(vectorizers, float(classifier.intercept_[0]), normalises, fitted)


def fold_vectorizer(vectorizer: CountVectorizer, coefficients: np.ndarray) -> LinearVectorizer:
    """Fold a fitted vectorizer with the coefficients of its terms.

    Args:
        vectorizer: of a kind that `can_fold` accepts.
        coefficients: of the terms, shape (n_terms,), in log-odds.
    """
    tfidf = getattr(vectorizer, "_tfidf", None)  # as it was fitted; what the vectorizer says may be newer
    idf = tfidf.idf_ if tfidf and tfidf.use_idf else np.ones(len(coefficients))
    # The rare terms last, so that those which most messages hold lie together in memory, and in a file.
    terms = sorted(vectorizer.vocabulary_, key=lambda term: (idf[vectorizer.vocabulary_[term]], term))
    order = [vectorizer.vocabulary_[term] for term in terms]
    return LinearVectorizer(
        terms,
        (idf * coefficients)[order].tolist(),
        (idf**2)[order].tolist(),
        analyzer=vectorizer.analyzer,
        ngrams=tuple(vectorizer.ngram_range),
        preprocess=_preprocessing(vectorizer),
        pattern=vectorizer.token_pattern,
        frequency="once" if vectorizer.binary else "sublinear" if tfidf and tfidf.sublinear_tf else "count",
        normalises=tfidf is not None and tfidf.norm == "l2",
        stop_words=vectorizer.get_stop_words() or (),
    )


def _preprocessing(vectorizer: CountVectorizer):
    """Return what a vectorizer does to a text first, plainly where it is plain."""
    if vectorizer.strip_accents is None and vectorizer.preprocessor in (None, plain):
        return vectorizer.preprocessor or (str.lower if vectorizer.lowercase else str)
    return vectorizer.build_preprocessor()


def _is_normaliser(step: BaseEstimator) -> bool:
    """Tell whether a step of a pipeline is the one that normalises texts."""
    return type(step) is FunctionTransformer and step.func is normalise_texts and not step.kw_args


def can_fold(vectorizer: BaseEstimator) -> bool:
    """Tell whether a vectorizer is fitted, and of a kind that LinearVectorizer stands for."""
    return (
        type(vectorizer) in (CountVectorizer, TfidfVectorizer)
        and hasattr(vectorizer, "vocabulary_")
        and vectorizer.input == "content"
        and vectorizer.analyzer in ("word", "char", "char_wb")
        and (vectorizer.analyzer != "word" or isinstance(vectorizer.token_pattern, str))
        and vectorizer.tokenizer is None
        and vectorizer.dtype in (np.float64, np.int64)
        and (type(vectorizer) is CountVectorizer or vectorizer._tfidf.norm in (None, "l2"))
    )
