"""What propensities tell of messages without labels, for as long as they are calibrated at even odds."""

import numpy as np
from scipy.optimize import brentq


def estimate_spam_share(propensities: np.ndarray) -> float:
    """Return the share of spam that makes propensities most likely, if they are calibrated at even odds.

    That is where the steps of Saerens, Latinne and Decaestecker (Neural Computation 14, 2002) end.

    Args:
        propensities: of the messages, shape (n_messages,).
    """
    odds = _odds(propensities)

    def slope(share: float) -> float:
        return float(np.mean((odds - 1) / (share * odds + 1 - share)))

    return 0.0 if slope(0) <= 0 else 1.0 if slope(1) >= 0 else float(brentq(slope, 0, 1))


def expected_precision(propensities: np.ndarray, threshold: float, spam_share: float) -> float:
    """Return how much of what is taken down should be spam, if propensities are calibrated at even odds.

    Args:
        propensities: of the messages, shape (n_messages,).
        threshold: from which they are taken down; NaN is returned where none is.
        spam_share: of all messages.
    """
    odds = _odds(propensities[propensities >= threshold])
    spam = spam_share * odds
    return float(np.mean(spam / (spam + 1 - spam_share))) if len(odds) else np.nan


def _odds(propensities: np.ndarray) -> np.ndarray:
    """Return the odds of propensities, made finite."""
    propensities = np.clip(propensities, 1e-9, 1 - 1e-9)
    return propensities / (1 - propensities)
