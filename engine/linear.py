"""A linear model over bags of words and characters, folded into dictionaries.

The idea. Such a model adds up: the log-odds of spam are the intercept, plus for each term of the message its
term frequency times its inverse document frequency times its coefficient, over the length of the message's
vector. The last two factors of each term never change after training, so they are multiplied once, when the
model is loaded, and kept in a dictionary. A message then takes one look-up and one addition for each term,
where `predict_proba` builds and checks a sparse matrix of one row.

Two more savings. The terms of a word are the same wherever it stands, so the sums of words seen before are
remembered, and only the pairs of neighbouring words are looked up anew. And because the log-odds are a sum,
each character of a message can be told what it added to them.

What cannot be folded is left to scikit-learn: `find_folded` returns None, and so it does for a model whose
folded form does not give what scikit-learn gives on a few messages.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.extmath import safe_sparse_dot

from engine.text import normalise, normalise_texts, origins, plain

# Tokens and characters that are the same in a word alone as in the middle of a text.
WORDWISE_PATTERNS = {r"(?u)\b\w\w+\b", r"(?u)\b\w+\b", r"(?u)\w+|[^\w\s]"}
WORDS_REMEMBERED = 2**15
LONGEST_WORD_REMEMBERED = 32  # characters; longer ones, links mostly, seldom come again
PROBES = (
    "",
    "WINNER!! Claim your £900 prize, call 09061701461 now now now",
    "running late,  see you at home at 8... ok?",
    "Ünïcödé İß ﬁ ĞΣ 😀 a\tb\nc &lt;#&gt; b\u200bank",
)


def logistic(log_odds: float) -> float:
    """Return the probability that belongs to log-odds, without overflow."""
    if log_odds >= 0:
        return 1 / (1 + math.exp(-log_odds))
    odds = math.exp(log_odds)
    return odds / (1 + odds)


class FoldedVectorizer:
    """One vectorizer with its coefficients folded into one weight for each term of its vocabulary.

    What a text adds to the log-odds is sum(tf * weight), divided by sqrt(sum(tf**2 * square)) where the
    vectorizer normalises. Both sums are first taken as if every occurrence of a term were its only one, then
    corrected for the few terms that occur again.
    """

    def __init__(self, vectorizer: CountVectorizer, coefficients: np.ndarray):
        """Fold a fitted vectorizer.

        Args:
            vectorizer: of a kind that `can_fold` accepts.
            coefficients: of the terms, shape (n_terms,), in log-odds.
        """
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
        self.windows: dict[int, list[tuple[int, int]]] = {}
        self.token = re.compile(vectorizer.token_pattern) if self.analyzer == "word" else None
        self.stop_words = vectorizer.get_stop_words() or ()
        self.is_wordwise = is_wordwise(vectorizer)
        # The pairs of neighbours that are terms, by their two tokens.
        self.pairs: dict[tuple[str, ...], int] = {}
        if self.is_wordwise and self.max_n == 2 and self.analyzer == "word":
            self.pairs = {tuple(term.split(" ")): i for term, i in self.index.items() if " " in term}

    def known_terms(self, text: str) -> tuple[Sequence[int], float, float]:
        """Return the terms of a text that are in the vocabulary, and their sums of weights and of squares."""
        index = self.index
        return self._sums([index[term] for term in self.analyze(text) if term in index])

    def known_terms_of_word(self, word: str) -> tuple[Sequence[int], float, float, tuple[str, ...]]:
        """Return what `known_terms` does, and the word's first and last token where pairs are terms.

        For a vectorizer that is wordwise: it needs less than scikit-learn's analyzer, which takes any text.
        """
        index, document = self.index, self.preprocess(word)
        if self.analyzer == "char_wb":
            padded = f" {document} "
            grams = [padded[i:j] for i, j in self._windows(len(padded))]
            return *self._sums([index[gram] for gram in grams if gram in index]), ()
        tokens = self.token.findall(document)
        terms = [index[token] for token in tokens if token in index and token not in self.stop_words]
        if not self.pairs or not tokens:
            return *self._sums(terms), ()
        terms += [self.pairs[pair] for pair in pairwise(tokens) if pair in self.pairs]
        return *self._sums(terms), (tokens[0], tokens[-1])

    def known_pairs(self, ends: Sequence[tuple[str, ...]]) -> tuple[Sequence[int], float, float]:
        """Return the pairs across words that are terms, given the first and last token of each word."""
        ends = [end for end in ends if end]
        pairs = [(before[1], after[0]) for before, after in pairwise(ends)]
        return self._sums([self.pairs[pair] for pair in pairs if pair in self.pairs])

    def _sums(self, terms: list[int]) -> tuple[Sequence[int], float, float]:
        """Return terms with their sums of weights and of squares."""
        if not terms:  # as in most words of most vectorizers
            return (), 0.0, 0.0
        weight, square = self.weight, self.square
        return terms, sum([weight[term] for term in terms]), sum([square[term] for term in terms])

    def log_odds(self, terms: Sequence[int], dot: float, square: float) -> float:
        """Return the log-odds that known terms add, given their sums of weights and of squares."""
        if self.counts_matter and len(counts := Counter(terms)) < len(terms):
            weights, squares, term_frequency = self.weight, self.square, self.term_frequency
            for term, count in counts.items():
                if count > 1:
                    tf = term_frequency(count)
                    dot += (tf - count) * weights[term]
                    square += (tf * tf - count) * squares[term]
        return dot / math.sqrt(square) if self.normalises and terms else dot

    def add_contributions(self, text: str, log_odds: list[float]) -> None:
        """Add to each character of a text its share of what the terms around it add to the log-odds."""
        document = self.preprocess(text)
        origin = self._origins(text, document)
        occurrences = [(self.index[term], place) for term, place in self._occurrences(document) if term in self.index]
        counts = Counter(term for term, _ in occurrences)
        tf = {term: self.term_frequency(count) for term, count in counts.items()}
        norm = math.sqrt(sum(tf[term] ** 2 * self.square[term] for term in tf)) if self.normalises else 1.0
        for term, place in occurrences:
            place = place or range(len(document))
            share = tf[term] * self.weight[term] / norm / counts[term] / len(place)
            for i in place:
                log_odds[origin[i]] += share

    def _origins(self, text: str, document: str) -> Sequence[int]:
        """Return for each character of a preprocessed text which character of the text it comes from."""
        if len(document) == len(text):
            return range(len(text))
        # The lower case of a dotted capital I, for one, is two characters.
        lengths = [len(self.preprocess(character)) for character in text]
        if sum(lengths) == len(document):
            return [i for i, length in enumerate(lengths) for _ in range(length)]
        return [i * len(text) // len(document) for i in range(len(document))]

    def _occurrences(self, document: str) -> Iterator[tuple[str, Sequence[int]]]:
        """Yield every term of a preprocessed text with the positions of its characters."""
        if self.analyzer == "word":
            found = (
                (match[match.re.groups], range(*match.span(match.re.groups))) for match in self.token.finditer(document)
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
            place = [i for i, c in enumerate(document) if not (i and c.isspace() and document[i - 1].isspace())]
            for i, j in self._windows(len(collapsed)):
                yield collapsed[i:j], place[i:j]

    def _windows(self, length: int) -> list[tuple[int, int]]:
        """Return the start and end of every n-gram in a sequence, as scikit-learn takes them."""
        if length in self.windows:
            return self.windows[length]
        sizes = range(self.min_n, min(self.max_n, length) + 1)
        if self.analyzer == "char_wb" and length < self.min_n:
            sizes = [length]
        windows = [(i, i + n) for n in sizes for i in range(length - n + 1)]
        if length <= LONGEST_WORD_REMEMBERED:
            self.windows[length] = windows
        return windows


class FoldedModel:
    """A pipeline of vectorizers and a logistic regression, folded."""

    def __init__(
        self,
        vectorizers: list[FoldedVectorizer],
        intercept: float,
        fitted: list[BaseEstimator],
        normalises: bool,
    ):
        """Put folded vectorizers together.

        Args:
            vectorizers: the parts whose log-odds add up.
            intercept: what is added to them.
            fitted: the estimators that were folded, to notice when one of them changes.
            normalises: whether the text is normalised first.
        """
        self.normalises = normalises
        self.vectorizers = vectorizers
        self.whole = [vectorizer for vectorizer in vectorizers if not vectorizer.is_wordwise]
        self.wordwise = [vectorizer for vectorizer in vectorizers if vectorizer.is_wordwise]
        self.remembered_word = lru_cache(WORDS_REMEMBERED)(self._word)
        self.intercept = intercept
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

    def propensity(self, text: str) -> float:
        """Return the probability of spam."""
        if self.normalises:
            text = normalise(text)
        log_odds = self.intercept
        for vectorizer in self.whole:
            log_odds += vectorizer.log_odds(*vectorizer.known_terms(text))
        words = text.split()
        if words and self.wordwise:
            # Most words of a language come again and again.
            columns = zip(
                *[
                    self.remembered_word(word) if len(word) <= LONGEST_WORD_REMEMBERED else self._word(word)
                    for word in words
                ],
                strict=True,
            )
            for vectorizer in self.wordwise:
                terms = list(chain.from_iterable(next(columns)))
                dot, square, ends = sum(next(columns)), sum(next(columns)), next(columns)
                if vectorizer.pairs:
                    pairs, dot_of_pairs, square_of_pairs = vectorizer.known_pairs(ends)
                    terms += pairs
                    dot, square = dot + dot_of_pairs, square + square_of_pairs
                log_odds += vectorizer.log_odds(terms, dot, square)
        return logistic(log_odds)

    def _word(self, word: str) -> tuple[Any, ...]:
        """Return the known terms, sums and ends of a word, of one vectorizer after another."""
        return tuple(chain.from_iterable(vectorizer.known_terms_of_word(word) for vectorizer in self.wordwise))

    def contributions(self, text: str) -> list[float]:
        """Return what each character adds to the log-odds."""
        read = normalise(text) if self.normalises else text
        log_odds, contributions = [0.0] * len(read), [0.0] * len(text)
        if read:
            for vectorizer in self.vectorizers:
                vectorizer.add_contributions(read, log_odds)
        for place, share in zip(origins(text, read), log_odds, strict=True):
            contributions[place] += share
        return contributions


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
        vectorizers.append(FoldedVectorizer(vectorizer, part if projection is None else projection @ part))
    return FoldedModel(vectorizers, float(classifier.intercept_[0]), fitted, normalises)


def _is_normaliser(step: BaseEstimator) -> bool:
    """Tell whether a step of a pipeline is the one that normalises texts."""
    return type(step) is FunctionTransformer and step.func is normalise_texts and not step.kw_args


def can_fold(vectorizer: BaseEstimator) -> bool:
    """Tell whether a vectorizer is fitted, and of a kind that FoldedVectorizer stands for."""
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


def is_wordwise(vectorizer: CountVectorizer) -> bool:
    """Tell whether the terms of a text are those of its words, split at white space, one by one.

    Pairs of neighbouring tokens count too: FoldedVectorizer.pairs sees to those of two words.
    """
    if vectorizer.preprocessor not in (None, plain):
        return False
    if vectorizer.strip_accents is not None:
        return False
    if vectorizer.analyzer == "word":
        return (
            tuple(vectorizer.ngram_range) in ((1, 1), (1, 2))
            and vectorizer.token_pattern in WORDWISE_PATTERNS
            and (vectorizer.ngram_range[1] == 1 or vectorizer.stop_words is None)
        )
    return vectorizer.analyzer == "char_wb"


def _once(count: int) -> float:
    return 1.0


@lru_cache(1024)
def _sublinear(count: int) -> float:
    return 1 + math.log(count)
