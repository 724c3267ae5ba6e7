"""Score texts with a trained model: the propensity of spam, and the decision at a threshold.

Any fitted scikit-learn estimator that takes raw texts can be scored: `predict_proba` gives the propensity.
For the kind of model that is saved in ``models/``, a logistic regression over bags of words and characters,
``engine/linear.py`` computes the same numbers in a small part of the time; saved as weights, such a model
is scored where scikit-learn is not installed.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.linear import LinearModel, logistic
from engine.saved import check_threshold, load_card, load_model, load_scorer

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

__all__ = ["check_threshold", "explain", "load_card", "load_model", "load_scorer", "score", "score_batch"]


def score(text: str, model: "BaseEstimator | LinearModel", threshold: float) -> tuple[bool, float]:
    """Decide whether a text is spam.

    Args:
        text: one message, as the user typed it; an empty one is a message too.
        model: a fitted estimator or pipeline that takes raw texts and tells two classes apart, the second in
            its `classes_` being spam. Its `predict_proba` is the propensity, or where it has none, the
            logistic function of its `decision_function`. Or the weights of a linear one, from `load_scorer`.
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
    linear = _find_linear(model)
    propensity = _propensities([text], model)[0] if linear is None else linear.propensity(text)
    return _is_spam(propensity, threshold), propensity


def score_batch(
    texts: Sequence[str], model: "BaseEstimator | LinearModel", threshold: float
) -> list[tuple[bool, float]]:
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
    linear = _find_linear(model)
    propensities = _propensities(texts, model) if linear is None else map(linear.propensity, texts)
    return [(_is_spam(propensity, threshold), propensity) for propensity in propensities]


def explain(text: str, model: "BaseEstimator | LinearModel") -> list[float] | None:
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

    Raises:
        TypeError: the text is not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, not {type(text).__name__}")
    linear = _find_linear(model)
    return None if linear is None else linear.contributions(text)


def _find_linear(model: "BaseEstimator | LinearModel") -> LinearModel | None:
    """Return a model if it is linear, or what it is folded to; None for any other."""
    if isinstance(model, LinearModel):
        return model
    if "sklearn" not in sys.modules:  # so it is no pipeline of it
        return None
    from engine.folding import find_folded  # here, because who serves weights does without scikit-learn

    return find_folded(model)


def _is_spam(propensity: float, threshold: float) -> bool:
    """Decide; a threshold of NumPy's would give a NumPy bool, which JSON does not know."""
    return bool(threshold <= propensity and threshold < 1)


def _propensities(texts: list[str], model: "BaseEstimator") -> list[float]:
    """Return the propensities of texts, as scikit-learn gives them."""
    has_proba = hasattr(model, "predict_proba")
    if isinstance(model, type) or not (has_proba or hasattr(model, "decision_function")):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a fitted estimator with predict_proba or decision_function, not {kind}")
    if not texts:
        return []
    import numpy as np  # here, because who serves weights does without it

    if has_proba:
        propensities = np.asarray(model.predict_proba(texts))
        if propensities.shape != (len(texts), 2):
            raise ValueError(f"model must tell two classes apart, not {propensities.shape[-1]}")
        return propensities[:, 1].tolist()
    decisions = np.asarray(model.decision_function(texts))
    if decisions.shape != (len(texts),):
        raise ValueError(f"model must tell two classes apart, not {decisions.shape[-1]}")
    return [logistic(decision) for decision in decisions.tolist()]
