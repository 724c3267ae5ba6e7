"""A linear model as a file: compressed JSON, which can hold nothing but numbers and strings.

To read a pickle is to run it. To read this runs nothing, and takes neither scikit-learn nor NumPy. Whoever may have
written the file: what is read is a model that scores any text, or it ends in a ValueError.
"""

import gzip
import io
import zlib
from typing import Any

import orjson

from engine.linear import FREQUENCIES, WORDWISE_PATTERNS, WORDWISE_PREPROCESSING, LinearModel, LinearVectorizer

LARGEST = 2**23  # bytes, before and after decompression; what train.ipynb writes has 3 million
LARGEST_NUMBER = 1e9  # and its reciprocal the smallest square: whatever is summed up stays finite
MOST_VECTORIZERS = 8
LONGEST_NGRAM = 16
MODEL = {"normalises", "intercept", "vectorizers"}
VECTORIZER = {"analyzer", "ngrams", "preprocess", "pattern", "frequency", "normalises", "terms", "weights", "squares"}


def write_weights(model: LinearModel) -> bytes:
    """Return a model as the content of a file, the same bytes whenever it is written.

    Args:
        model: one of which every vectorizer takes a text word by word, and has no stop words.
    """
    names = {function: name for name, function in WORDWISE_PREPROCESSING.items()}
    about = {
        "normalises": model.normalises,
        "intercept": model.intercept,
        "vectorizers": [
            {
                "analyzer": vectorizer.analyzer,
                "ngrams": [vectorizer.min_n, vectorizer.max_n],
                "preprocess": names[vectorizer.preprocess],
                "pattern": vectorizer.token.pattern if vectorizer.token else None,
                "frequency": vectorizer.frequency,
                "normalises": vectorizer.normalises,
                "terms": list(vectorizer.index),
                "weights": vectorizer.weight[1:].tolist(),
                "squares": vectorizer.square[1:].tolist(),
            }
            for vectorizer in model.vectorizers
        ],
    }
    return gzip.compress(orjson.dumps(about), mtime=0)


def read_weights(content: bytes) -> LinearModel:
    """Return the model that the content of a file holds.

    Raises:
        ValueError: it is not what `write_weights` writes; the message says in what.
    """
    about = orjson.loads(unpack(content))
    _require(isinstance(about, dict) and set(about) == MODEL, f"it has not exactly the keys {', '.join(sorted(MODEL))}")
    _require(isinstance(about["normalises"], bool), "normalises is neither true nor false")
    _require(_are_numbers([about["intercept"]]), "the intercept is no number, or too large")
    parts = about["vectorizers"]
    _require(isinstance(parts, list) and 0 < len(parts) <= MOST_VECTORIZERS, "it has no list of a few vectorizers")
    return LinearModel([_read_vectorizer(part) for part in parts], about["intercept"], about["normalises"])


def unpack(content: bytes) -> bytes:
    """Return what was compressed, unless it is too large or damaged, which is a ValueError."""
    try:
        with gzip.open(io.BytesIO(content)) as file:
            unpacked = file.read(LARGEST + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"it is not compressed: {error}") from None
    _require(len(unpacked) <= LARGEST, f"it has more than {LARGEST:,} bytes")
    return unpacked


def _read_vectorizer(about: Any) -> LinearVectorizer:
    """Return one vectorizer, after looking at all that it says of itself."""
    keys = f"a vectorizer has not exactly the keys {', '.join(sorted(VECTORIZER))}"
    _require(isinstance(about, dict) and set(about) == VECTORIZER, keys)
    by_words, ngrams = about["analyzer"] == "word", about["ngrams"]
    _require(by_words or about["analyzer"] == "char_wb", "an analyzer is neither word nor char_wb")
    _require(isinstance(ngrams, list) and list(map(type, ngrams)) == [int, int], "ngrams are not two whole numbers")
    allowed = ngrams in ([1, 1], [1, 2]) if by_words else 1 <= ngrams[0] <= ngrams[1] <= LONGEST_NGRAM
    _require(allowed, f"ngrams are out of range: {ngrams}")
    patterns = WORDWISE_PATTERNS if by_words else {None}
    for key, known in (("pattern", patterns), ("preprocess", WORDWISE_PREPROCESSING), ("frequency", FREQUENCIES)):
        _require(about[key] is None or isinstance(about[key], str), f"{key} is no string")
        _require(about[key] in known, f"{key} is unknown")
    _require(isinstance(about["normalises"], bool), "normalises is neither true nor false")
    terms, weights, squares = about["terms"], about["weights"], about["squares"]
    _require(all(isinstance(column, list) for column in (terms, weights, squares)), "a list is missing")
    _require(len(terms) == len(weights) == len(squares), "terms, weights and squares are not equally many")
    _require(set(map(type, terms)) <= {str}, "a term is no string")
    _require(len(set(terms)) == len(terms), "a term is there twice")
    _require(_are_numbers(weights), "a weight is no number, or too large")
    in_range = _are_numbers(squares) and min(squares, default=1) >= 1 / LARGEST_NUMBER
    _require(in_range, "a square is no positive number, too small or too large")
    return LinearVectorizer(
        terms,
        weights,
        squares,
        analyzer=about["analyzer"],
        ngrams=tuple(ngrams),
        preprocess=WORDWISE_PREPROCESSING[about["preprocess"]],
        pattern=about["pattern"],
        frequency=about["frequency"],
        normalises=about["normalises"],
    )


def _are_numbers(values: list[Any]) -> bool:
    """Tell whether values are floating-point numbers, finite and not too large."""
    return set(map(type, values)) <= {float} and max(map(abs, values), default=0) <= LARGEST_NUMBER


def _require(condition: bool, otherwise: str) -> None:
    """Raise ValueError, with what is wrong, unless a condition holds."""
    if not condition:
        raise ValueError(otherwise)
