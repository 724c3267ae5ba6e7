"""A linear model over bags of words and characters: nothing but numbers and strings.

The idea. Such a model adds up: the log-odds of spam are the intercept, plus for each term of the message its
term frequency times its inverse document frequency times its coefficient, over the length of the message's
vector. The last two factors of each term never change after training, so they are multiplied once and kept in a
dictionary. A message then takes one look-up and one addition for each term, where `predict_proba` builds and
checks a sparse matrix of one row.

Two more savings. The terms of a word are the same wherever it stands, so the sums of words that come again are
remembered, and only the pairs of neighbouring words are looked up anew. And because the log-odds are a sum,
each character of a message can be told what it added to them.

Nothing here takes scikit-learn: `engine/folding.py` makes such a model from a fitted pipeline, `engine/weights.py`
writes it to a file and reads it.
"""

import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any

from engine.text import normalise, origins, plain

# What is the same in a word alone as in the middle of a text: tokens, and what may be done to a text before.
WORDWISE_PATTERNS = {r"(?u)\b\w\w+\b", r"(?u)\b\w+\b", r"(?u)\w+|[^\w\s]"}
WORDWISE_PREPROCESSING: dict[str, Callable[[str], str]] = {"none": str, "lower": str.lower, "plain": plain}
# Half a KB each. One that comes for the first time is only noted: most such words are numbers, names and slips.
WORDS_REMEMBERED, WORDS_NOTED = 2**14, 2**14
LONGEST_WORD_REMEMBERED = 32  # characters; longer ones, links mostly, seldom come again
NOTHING: Mapping[str, int] = {}


def logistic(log_odds: float) -> float:
    """Return the probability that belongs to log-odds, without overflow."""
    if log_odds >= 0:
        return 1 / (1 + math.exp(-log_odds))
    odds = math.exp(log_odds)
    return odds / (1 + odds)


def _once(count: int) -> float:
    return 1.0


@lru_cache(1024)
def _sublinear(count: int) -> float:
    return 1 + math.log(count)


FREQUENCIES: dict[str, Callable[[int], float]] = {"count": float, "once": _once, "sublinear": _sublinear}


def _pairs(firsts: Sequence[str], followers: Sequence[Mapping[str, int]]) -> list[int]:
    """Return the terms that neighbours make, given the first token of each and what makes pairs with its last."""
    return [after[first] for after, first in zip(followers, firsts[1:], strict=False) if first in after]


class LinearVectorizer:
    """What one vectorizer of scikit-learn's adds to the log-odds: a weight for each term of its vocabulary.

    For a text that is sum(tf * weight), divided by sqrt(sum(tf**2 * square)) where the vectorizer normalises. Both
    sums are first taken as if every occurrence of a term were its only one, then corrected for the few terms that
    occur again.
    """

    def __init__(
        self,
        terms: Sequence[str],
        weights: Sequence[float],
        squares: Sequence[float],
        *,
        analyzer: str,
        ngrams: tuple[int, int],
        preprocess: Callable[[str], str],
        frequency: str,
        normalises: bool,
        pattern: str | None = None,
        stop_words: Sequence[str] = (),
    ):
        """Take what there is to know of a vectorizer.

        Args:
            terms: its vocabulary, shape (n_terms,), no term twice.
            weights: of the terms: inverse document frequency times coefficient, in log-odds.
            squares: of the terms: the square of the inverse document frequency.
            analyzer: "word", "char" or "char_wb", as scikit-learn names them.
            ngrams: how many tokens or characters a term has, from and to.
            preprocess: what is done to a text first.
            frequency: how often a term occurs counts as it is ("count"), not at all ("once"), or as 1 + ln
                ("sublinear").
            normalises: whether the length of a text's vector is 1.
            pattern: of a token, if the analyzer is "word".
            stop_words: tokens that are left out.
        """
        # From 1, so that what is no term can be filtered out as false.
        self.index = {term: i for i, term in enumerate(terms, 1)}
        # Arrays take a quarter of what lists do, and reading them writes nothing, so workers go on sharing them.
        self.weight, self.square = array("d", [0.0, *weights]), array("d", [0.0, *squares])
        self.analyzer, self.preprocess, self.frequency, self.normalises = analyzer, preprocess, frequency, normalises
        self.min_n, self.max_n = ngrams
        self.token = re.compile(pattern) if analyzer == "word" else None
        self.stop_words = stop_words
        self.term_frequency = FREQUENCIES[frequency]
        self.counts_matter = normalises or frequency != "count"
        self.windows: dict[int, list[tuple[int, int]]] = {}
        self.grams: dict[int, Callable[[str], Sequence[str]]] = {}
        self.is_wordwise = self._is_wordwise()
        # The pairs of neighbours that are terms: for a first token, the second ones.
        self.pairs: dict[str, dict[str, int]] = {}
        if self.is_wordwise and self.max_n == 2 and analyzer == "word":
            for term, i in self.index.items():
                first, space, second = term.partition(" ")
                if space:
                    self.pairs.setdefault(first, {})[second] = i

    def _is_wordwise(self) -> bool:
        """Tell whether the terms of a text are those of its words, split at white space, one by one.

        Pairs of neighbouring tokens count too: `known_pairs` sees to those of two words.
        """
        if self.preprocess not in WORDWISE_PREPROCESSING.values():
            return False
        if self.analyzer != "word":
            return self.analyzer == "char_wb"
        is_short = (self.min_n, self.max_n) in ((1, 1), (1, 2))
        return is_short and self.token.pattern in WORDWISE_PATTERNS and not self.stop_words

    def known_terms(self, text: str) -> tuple[Sequence[int], float, float]:
        """Return the terms of a text that are in the vocabulary, and their sums of weights and of squares."""
        document = self.preprocess(text)
        return self._sums(filter(None, [self.index.get(term) for term, _ in self._occurrences(document)]))

    def known_terms_of_word(self, word: str) -> tuple[Any, ...]:
        """Return what `known_terms` does, and the word's first token and what makes pairs with its last.

        For a vectorizer that is wordwise. The last two are None where pairs are no terms, or the word has no token.
        """
        get, document = self.index.get, self.preprocess(word)
        if self.analyzer == "char_wb":
            return *self._sums(filter(None, map(get, self._grams(f" {document} ")))), None, None
        tokens = self.token.findall(document)
        terms = list(filter(None, map(get, tokens)))
        if not self.pairs or not tokens:
            return *self._sums(terms), None, None
        if len(tokens) > 1:
            terms += _pairs(tokens, [self.pairs.get(token, NOTHING) for token in tokens])
        return *self._sums(terms), tokens[0], self.pairs.get(tokens[-1], NOTHING)

    def known_pairs(
        self, firsts: Sequence[str | None], followers: Sequence[Mapping[str, int] | None]
    ) -> tuple[Sequence[int], float, float]:
        """Return the pairs across words that are terms, given the last two parts of `known_terms_of_word`."""
        if None in firsts:
            firsts = [first for first in firsts if first is not None]
            followers = [of_last for of_last in followers if of_last is not None]
        return self._sums(_pairs(firsts, followers))

    def _sums(self, terms: Iterable[int]) -> tuple[Sequence[int], float, float]:
        """Return terms with their sums of weights and of squares."""
        terms = tuple(terms)
        if not terms:  # as in most words of most vectorizers
            return (), 0.0, 0.0
        return terms, sum(map(self.weight.__getitem__, terms)), sum(map(self.square.__getitem__, terms))

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

    def _grams(self, padded: str) -> Sequence[str]:
        """Return the n-grams of a word between two spaces."""
        if grams := self.grams.get(len(padded)):  # all at once, in half the time
            return grams(padded)
        windows = [slice(i, j) for i, j in self._windows(len(padded))]
        if len(windows) > 1 and len(padded) <= LONGEST_WORD_REMEMBERED:
            self.grams[len(padded)] = itemgetter(*windows)
        return [padded[window] for window in windows]


class LinearModel:
    """A logistic regression over vectorizers."""

    def __init__(self, vectorizers: list[LinearVectorizer], intercept: float, normalises: bool):
        """Put vectorizers together.

        Args:
            vectorizers: the parts whose log-odds add up.
            intercept: what is added to them.
            normalises: whether the text is normalised first.
        """
        self.normalises = normalises
        self.vectorizers = vectorizers
        self.whole = [vectorizer for vectorizer in vectorizers if not vectorizer.is_wordwise]
        self.wordwise = [vectorizer for vectorizer in vectorizers if vectorizer.is_wordwise]
        self.remembered: dict[str, tuple[Any, ...]] = {}
        self.noted: set[str] = set()
        self.intercept = intercept

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
            remembered = self.remembered.get
            columns = zip(*[remembered(word) or self._look_up(word) for word in words], strict=True)
            for vectorizer in self.wordwise:
                terms = list(chain.from_iterable(next(columns)))
                dot, square, firsts, followers = sum(next(columns)), sum(next(columns)), next(columns), next(columns)
                if vectorizer.pairs:
                    pairs, dot_of_pairs, square_of_pairs = vectorizer.known_pairs(firsts, followers)
                    terms += pairs
                    dot, square = dot + dot_of_pairs, square + square_of_pairs
                log_odds += vectorizer.log_odds(terms, dot, square)
        return logistic(log_odds)

    def _look_up(self, word: str) -> tuple[Any, ...]:
        """Return the known terms, sums and ends of a word, of one vectorizer after another; remember it if noted."""
        known = tuple(chain.from_iterable(vectorizer.known_terms_of_word(word) for vectorizer in self.wordwise))
        if word in self.noted:
            if len(self.remembered) >= WORDS_REMEMBERED:
                self.remembered.clear()
            self.remembered[word] = known
        elif len(word) <= LONGEST_WORD_REMEMBERED:
            if len(self.noted) >= WORDS_NOTED:
                self.noted.clear()
            self.noted.add(word)
        return known

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
