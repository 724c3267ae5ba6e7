"""Score texts with a trained model: the propensity of spam, and the decision at a threshold.

Any fitted scikit-learn estimator that takes raw texts can be scored. A logistic regression over bags of words
or characters, the kind of model that is saved in ``models/``, is folded into dictionaries on its first use: a
message needs a few hundred look-ups and additions, and the `predict_proba` of scikit-learn spends far longer
on validating than on those.
"""

import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import joblib
import numpy as np
import sklearn
from sklearn.base import BaseEstimator
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.extmath import safe_sparse_dot

MODEL_PATH = Path(__file__).resolve().parent / "models" / "best_model.joblib"
CARD_TYPES = {"name": str, "sha256": str, "threshold": Real, "operating_points": list, "versions": dict}
# Tokens and characters that are the same in a word alone as in the middle of a text.
WORDWISE_PATTERNS = {r"(?u)\b\w\w+\b", r"(?u)\b\w+\b", r"(?u)\w+|[^\w\s]", r"\d"}
WORDS_REMEMBERED = 2**14
LONGEST_WORD_REMEMBERED = 32


def score(text: str, model: BaseEstimator, threshold: float) -> tuple[bool, float]:
    """Decide whether a text is spam.

    Args:
        text: one message, as the user typed it; an empty one is a message too.
        model: a fitted estimator or pipeline that takes raw texts and tells two classes apart, the second in
            its `classes_` being spam. Its `predict_proba` is the propensity, or where it has none, the
            logistic function of its `decision_function`.
        threshold: the propensity, in [0, 1], from which a text is spam. At 0 every text is, at 1 none.

    Returns:
        The prediction, True for spam, and the propensity, in [0, 1].

    Raises:
        TypeError: an argument is not of its type.
        ValueError: the threshold is outside [0, 1], or the model does not tell two classes apart.
        sklearn.exceptions.NotFittedError: the model is not fitted.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, not {type(text).__name__}")
    check_threshold(threshold)
    folded = _folded(model)
    propensity = _propensities([text], model)[0] if folded is None else folded.propensity(text)
    return threshold <= propensity and threshold < 1, propensity


def score_batch(texts: Sequence[str], model: BaseEstimator, threshold: float) -> list[tuple[bool, float]]:
    """Decide on many texts at once.

    Args:
        texts: the messages.
        model: as in `score`.
        threshold: as in `score`, the same for all texts.

    Returns:
        A prediction and a propensity for each text, in the order of the texts.

    Raises:
        TypeError, ValueError, sklearn.exceptions.NotFittedError: as in `score`.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of strings, not one string")
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}] must be a string, not {type(text).__name__}")
    check_threshold(threshold)
    folded = _folded(model)
    propensities = _propensities(texts, model) if folded is None else map(folded.propensity, texts)
    return [(threshold <= propensity and threshold < 1, propensity) for propensity in propensities]


def explain(text: str, model: BaseEstimator) -> list[float] | None:
    """Tell how much each character of a text pushed it towards spam.

    The log-odds of a linear model are a sum over the words and n-grams of the text; what each of them adds is
    shared out evenly over its characters.

    Args:
        text: one message.
        model: as in `score`.

    Returns:
        Natural log-odds for each character of the text, positive towards spam, negative towards ham; with the
        intercept of the model they add up to the log-odds of the propensity. None if the model is not linear
        in the words and n-grams of the text.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, not {type(text).__name__}")
    folded = _folded(model)
    return None if folded is None else folded.contributions(text)


def check_threshold(threshold: float) -> None:
    """Raise TypeError or ValueError unless the threshold is a number in [0, 1]."""
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise TypeError(f"threshold must be a number, not {type(threshold).__name__}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be between 0 and 1, not {threshold}")


def load_card(path: str | Path = MODEL_PATH) -> dict[str, Any]:
    """Read the card of a saved model: its name, versions, metrics, threshold and checksum.

    Args:
        path: the model's joblib file; the card lies beside it and ends in .json.

    Raises:
        FileNotFoundError: there is no card.
        ValueError: the card is not a JSON object with all that scoring needs, each of its type.
    """
    card_path = Path(path).with_suffix(".json")
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{card_path} is missing: train.ipynb writes it with the model") from None
    except (ValueError, RecursionError):
        card = None
    if not _is_card(card):
        raise ValueError(
            f"{card_path} is not JSON with a valid {', '.join(CARD_TYPES)}: "
            "run train.ipynb again, or restore it"
        )
    return card


def _is_card(card: Any) -> bool:
    """Tell whether a card has all that scoring needs."""
    if not isinstance(card, dict) or not all(
        isinstance(card.get(key), kind) for key, kind in CARD_TYPES.items()
    ):
        return False
    try:
        for point in [card, *card["operating_points"]]:
            check_threshold(point["threshold"])
    except (KeyError, TypeError, ValueError):
        return False
    return True


def load_model(path: str | Path = MODEL_PATH) -> BaseEstimator:
    """Load a saved model, after checking that it is the one its card describes.

    A pickle can run any code when it is read, and works only in the version of scikit-learn that wrote it, so
    both are checked before.

    Args:
        path: the model's joblib file; the card lies beside it and ends in .json.

    Raises:
        FileNotFoundError: the model or its card is missing.
        ValueError: the file is not the one of the card, or is from another version of scikit-learn.
    """
    path = Path(path)
    card = load_card(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: train.ipynb writes it") from None
    if hashlib.sha256(content).hexdigest() != card["sha256"]:
        raise ValueError(
            f"{path} does not have the sha256 of its card: run train.ipynb again, or restore both"
        )
    saved_with = card["versions"].get("scikit-learn")
    if saved_with != sklearn.__version__:
        raise ValueError(
            f"{path} was saved with scikit-learn {saved_with}, but {sklearn.__version__} is installed: "
            "run pip install -r requirements.txt"
        )
    return joblib.load(io.BytesIO(content))


def _propensities(texts: list[str], model: BaseEstimator) -> list[float]:
    """Score texts through scikit-learn."""
    if isinstance(model, type) or not (
        hasattr(model, "predict_proba") or hasattr(model, "decision_function")
    ):
        raise TypeError(
            "model must be a fitted estimator with predict_proba or decision_function, "
            f"not {model.__name__ if isinstance(model, type) else type(model).__name__}"
        )
    if not texts:
        return []
    if hasattr(model, "predict_proba"):
        propensities = np.asarray(model.predict_proba(texts))
        if propensities.shape != (len(texts), 2):
            raise ValueError(f"model must tell two classes apart, not {propensities.shape[-1]}")
        return propensities[:, 1].tolist()
    decisions = np.asarray(model.decision_function(texts))
    if decisions.shape != (len(texts),):
        raise ValueError(f"model must tell two classes apart, not {decisions.shape[-1]}")
    return [_logistic(decision) for decision in decisions.tolist()]


def _logistic(decision: float) -> float:
    if decision >= 0:
        return 1 / (1 + math.exp(-decision))
    odds = math.exp(decision)
    return odds / (1 + odds)


class _FoldedVectorizer:
    """One vectorizer with its coefficients folded into one weight for each term of its vocabulary.

    What a text adds to the decision is sum(tf * weight), divided by sqrt(sum(tf**2 * square)) where the
    vectorizer normalises. Both sums are first taken as if every occurrence of a term were its only one, then
    corrected for the few terms that occur again.
    """

    def __init__(self, vectorizer: CountVectorizer, coefficients: np.ndarray):
        tfidf = getattr(vectorizer, "_tfidf", None)  # as it was fitted; what the vectorizer says may be newer
        idf = tfidf.idf_ if tfidf and tfidf.use_idf else np.ones(len(coefficients))
        self.index = {term: int(i) for term, i in vectorizer.vocabulary_.items()}
        self.weight: list[float] = (idf * coefficients).tolist()
        self.square: list[float] = (idf**2).tolist()
        self.normalises = tfidf is not None and tfidf.norm == "l2"
        self.term_frequency: Callable[[int], float] = float
        if vectorizer.binary:
            self.term_frequency = _once
        elif tfidf and tfidf.sublinear_tf:
            self.term_frequency = _sublinear
        self.counts_matter = self.normalises or self.term_frequency is not float

        self.analyze = vectorizer.build_analyzer()
        self.analyzer = vectorizer.analyzer
        self.preprocess = vectorizer.build_preprocessor()
        self.min_n, self.max_n = vectorizer.ngram_range
        self.token = re.compile(vectorizer.token_pattern)
        self.stop_words = vectorizer.get_stop_words() or ()
        self.is_wordwise = _is_wordwise(vectorizer)

    def known_terms(self, text: str) -> tuple[Sequence[int], float, float]:
        """Return the terms of a text that are in the vocabulary, and their sums of weights and of squares."""
        index, weight, square = self.index, self.weight, self.square
        terms = [index[term] for term in self.analyze(text) if term in index]
        if not terms:  # as in most words of most vectorizers
            return (), 0.0, 0.0
        return terms, sum([weight[term] for term in terms]), sum([square[term] for term in terms])

    def decision(self, terms: Sequence[int], dot: float, square: float) -> float:
        """Return the log-odds that known terms add to the decision."""
        if self.counts_matter and len(counts := Counter(terms)) < len(terms):
            weights, squares, term_frequency = self.weight, self.square, self.term_frequency
            for term, count in counts.items():
                if count > 1:
                    tf = term_frequency(count)
                    dot += (tf - count) * weights[term]
                    square += (tf * tf - count) * squares[term]
        return dot / math.sqrt(square) if self.normalises and terms else dot

    def _windows(self, length: int) -> list[tuple[int, int]]:
        """Return the start and end of every n-gram in a sequence, as scikit-learn takes them."""
        sizes = range(self.min_n, min(self.max_n, length) + 1)
        if self.analyzer == "char_wb" and length < self.min_n:
            sizes = [length]
        return [(i, i + n) for n in sizes for i in range(length - n + 1)]

    def add_contributions(self, text: str, log_odds: list[float]) -> None:
        """Add to each character of a text its share of what the terms around it add to the decision."""
        document = self.preprocess(text)
        # A preprocessor may change the length (the lower case of a dotted capital I is two characters).
        scale = len(text) / max(1, len(document))
        occurrences = [
            (self.index[term], place) for term, place in self._occurrences(document) if term in self.index
        ]
        counts = Counter(term for term, _ in occurrences)
        tf = {term: self.term_frequency(count) for term, count in counts.items()}
        norm = math.sqrt(sum(tf[term] ** 2 * self.square[term] for term in tf)) if self.normalises else 1.0
        for term, place in occurrences:
            place = place or range(len(document))
            share = tf[term] * self.weight[term] / norm / counts[term] / len(place)
            for i in place:
                log_odds[int(i * scale)] += share

    def _occurrences(self, document: str) -> Iterator[tuple[str, Sequence[int]]]:
        """Yield every term of a preprocessed text with the positions of its characters."""
        if self.analyzer == "word":
            found = (
                (match[match.re.groups], range(*match.span(match.re.groups)))
                for match in self.token.finditer(document)
            )
            tokens = [(token, place) for token, place in found if token not in self.stop_words]
            for i, j in self._windows(len(tokens)):
                yield (
                    " ".join(token for token, _ in tokens[i:j]),
                    [k for _, place in tokens[i:j] for k in place],
                )
        elif self.analyzer == "char_wb":
            for match in re.finditer(r"\S+", document):
                padded, place = f" {match[0]} ", range(match.start() - 1, match.end() + 1)
                for i, j in self._windows(len(padded)):
                    yield padded[i:j], place[max(i, 1) : min(j, len(padded) - 1)]
        else:
            collapsed = re.sub(r"\s\s+", " ", document)
            place = [
                i for i, c in enumerate(document) if not (i and c.isspace() and document[i - 1].isspace())
            ]
            for i, j in self._windows(len(collapsed)):
                yield collapsed[i:j], place[i:j]


def _is_wordwise(vectorizer: CountVectorizer) -> bool:
    """Tell whether the terms of a text are those of its words, split at white space, one by one."""
    replace = vectorizer.preprocessor
    if replace is not None and not (
        type(replace) is partial
        and isinstance(pattern := getattr(replace.func, "__self__", None), re.Pattern)
        and pattern.pattern in WORDWISE_PATTERNS
        and len(replace.args) == 1
        and not replace.keywords
    ):
        return False
    if vectorizer.strip_accents is not None:
        return False
    if vectorizer.analyzer == "word":
        return vectorizer.ngram_range == (1, 1) and vectorizer.token_pattern in WORDWISE_PATTERNS
    return vectorizer.analyzer == "char_wb"


def _once(count: int) -> float:
    return 1.0


@lru_cache(1024)
def _sublinear(count: int) -> float:
    return 1 + math.log(count)


class _FoldedModel:
    """A pipeline of vectorizers and a logistic regression, folded."""

    def __init__(self, vectorizers: list[_FoldedVectorizer], intercept: float, fitted: list[BaseEstimator]):
        self.vectorizers = vectorizers
        self.whole = [vectorizer for vectorizer in vectorizers if not vectorizer.is_wordwise]
        self.wordwise = [vectorizer for vectorizer in vectorizers if vectorizer.is_wordwise]
        self.remembered_word = lru_cache(WORDS_REMEMBERED)(self._word)
        self.intercept = intercept
        self.state = [(vars(estimator), vars(estimator).copy()) for estimator in fitted]

    def is_current(self) -> bool:
        """Tell whether no part of the pipeline was fitted again or given other parameters since.

        A change inside an array or a list is not seen: scikit-learn itself makes new ones.
        """
        try:
            # Attributes are compared by identity first, so this does not look into arrays that are the same.
            return all([now == then for now, then in self.state])  # noqa: C419, a generator takes twice as long
        except ValueError:  # two different arrays have no truth value
            return False

    def propensity(self, text: str) -> float:
        """Return the probability of spam."""
        decision = self.intercept
        for vectorizer in self.whole:
            decision += vectorizer.decision(*vectorizer.known_terms(text))
        words = text.split()
        if words and self.wordwise:
            # Most words of a language come again and again; the very long ones are not worth their memory.
            word = self.remembered_word if max(map(len, words)) <= LONGEST_WORD_REMEMBERED else self._word
            columns = zip(*map(word, words), strict=True)
            for vectorizer in self.wordwise:
                terms, dot, square = next(columns), sum(next(columns)), sum(next(columns))
                decision += vectorizer.decision(list(chain.from_iterable(terms)), dot, square)
        return _logistic(decision)

    def _word(self, word: str) -> tuple[Sequence[int] | float, ...]:
        """Return the known terms and sums of a word, of one vectorizer after another."""
        return tuple(chain.from_iterable(vectorizer.known_terms(word) for vectorizer in self.wordwise))

    def contributions(self, text: str) -> list[float]:
        """Return what each character adds to the decision, in log-odds."""
        log_odds = [0.0] * len(text)
        if text:
            for vectorizer in self.vectorizers:
                vectorizer.add_contributions(text, log_odds)
        return log_odds


_folded_models: WeakKeyDictionary[Pipeline, _FoldedModel] = WeakKeyDictionary()


def _folded(model: BaseEstimator) -> _FoldedModel | None:
    """Return the folded form of a model, made on first use, or None where there is none."""
    if type(model) is not Pipeline:
        return None
    folded = _folded_models.get(model)
    if folded is None or not folded.is_current():
        folded = _fold(model)
        if folded is None:
            _folded_models.pop(model, None)
        else:
            _folded_models[model] = folded
    return folded


def _fold(model: Pipeline) -> _FoldedModel | None:
    """Fold a pipeline of vectorizers and a logistic regression; None for anything else."""
    if len(model.steps) != 2:
        return None
    features, classifier = model.steps[0][1], model.steps[1][1]
    if type(classifier) is not LogisticRegression or np.shape(getattr(classifier, "coef_", ()))[:1] != (1,):
        return None
    fitted, branches = [model, classifier], [(features, 1.0)]
    if type(features) is FeatureUnion:
        fitted.append(features)
        scale = features.transformer_weights or {}
        branches = [
            (part, scale.get(name, 1.0)) for name, part in features.transformer_list if part != "drop"
        ]
    vectorizers, remaining = [], classifier.coef_[0]
    for vectorizer, weight in branches:
        projection = None
        if type(vectorizer) is Pipeline and len(vectorizer.steps) == 2:
            fitted.append(vectorizer)
            (_, vectorizer), (_, projected) = vectorizer.steps
            fitted.append(projected)
            if type(projected) is not FunctionTransformer or projected.func is not safe_sparse_dot:
                return None
            projection = projected.kw_args["b"]
        if not _can_fold(vectorizer):
            return None
        fitted.append(vectorizer)
        if type(vectorizer) is TfidfVectorizer:
            fitted.append(vectorizer._tfidf)
        width = len(vectorizer.vocabulary_) if projection is None else projection.shape[1]
        coefficients, remaining = weight * remaining[:width], remaining[width:]
        vectorizers.append(
            _FoldedVectorizer(vectorizer, coefficients if projection is None else projection @ coefficients)
        )
    return _FoldedModel(vectorizers, float(classifier.intercept_[0]), fitted)


def _can_fold(vectorizer: BaseEstimator) -> bool:
    """Tell whether a vectorizer is fitted, and of a kind that _FoldedVectorizer stands for."""
    return (
        type(vectorizer) in (CountVectorizer, TfidfVectorizer)
        and hasattr(vectorizer, "vocabulary_")
        and vectorizer.input == "content"
        and vectorizer.analyzer in ("word", "char", "char_wb")
        and vectorizer.tokenizer is None
        and vectorizer.dtype in (np.float64, np.int64)
        and (type(vectorizer) is CountVectorizer or vectorizer._tfidf.norm in (None, "l2"))
    )
