"""A saved model and its card: one loader, one writer.

The card lies beside the model's joblib file and says what it is: name, versions, thresholds, metrics, and
the sha256 of the file. The checksum guards against mix-ups: a card of another run, a file cut short.
It is no guard against an attacker: who can replace the model can replace the card, and a pickle can run any
code when it is read. So load only models that you trust, as you would a program.
"""

import contextlib
import hashlib
import io
import json
import os
from numbers import Real
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import sklearn
from sklearn.base import BaseEstimator

from engine.files import write

MODEL_PATH = Path(__file__).resolve().parents[1] / "models" / "best_model.joblib"
CARD_TYPES = {"name": str, "sha256": str, "threshold": Real, "operating_points": list, "versions": dict}


def check_threshold(threshold: float) -> None:
    """Raise TypeError or ValueError unless the threshold is a number in [0, 1]."""
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise TypeError(f"threshold must be a number, not {type(threshold).__name__}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be between 0 and 1, not {threshold}")


def load_card(path: str | Path = MODEL_PATH) -> dict[str, Any]:
    """Read the card of a saved model.

    Args:
        path: the model's joblib file; the card lies beside it and ends in .json.

    Returns:
        What the card says, among it `name`, `sha256`, `threshold`, `operating_points` and `versions`.

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
            f"{card_path} is not JSON with a valid {', '.join(CARD_TYPES)}: run train.ipynb again, or restore it"
        )
    return card


def load_model(path: str | Path = MODEL_PATH) -> BaseEstimator:
    """Load a saved model, after checking that it is the one its card describes.

    A pickle works only in the version of scikit-learn that wrote it, so that is checked too.

    Args:
        path: the model's joblib file; the card lies beside it and ends in .json.

    Returns:
        The fitted estimator.

    Raises:
        FileNotFoundError: the model or its card is missing.
        ValueError: the file is not the one of the card, is from another version of scikit-learn, or holds no model
            that tells two classes of texts apart.
    """
    path = Path(path)
    card = load_card(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: train.ipynb writes it") from None
    if hashlib.sha256(content).hexdigest() != card["sha256"]:
        raise ValueError(f"{path} does not have the sha256 of its card: run train.ipynb again, or restore both")
    saved_with = card["versions"].get("scikit-learn")
    if saved_with != sklearn.__version__:
        raise ValueError(
            f"{path} was saved with scikit-learn {saved_with}, but {sklearn.__version__} is installed: "
            "run pip install -r requirements.txt"
        )
    try:
        model = joblib.load(io.BytesIO(content))
        two_classes = model.predict_proba([""]).shape == (1, 2)
    except Exception:  # whatever a file may hold that somebody took for a model
        two_classes = False
    if not two_classes:
        raise ValueError(f"{path} does not hold a model that tells spam from ham: run train.ipynb again, or restore it")
    return model


def save_model(model: BaseEstimator, card: dict[str, Any], path: str | Path, texts: list[str]) -> bool:
    """Save a model and its card, each whole or not at all, unless they are there already.

    Fitting is deterministic, but another processor may round the last bits. A model with the same card and
    the same propensities is the same model and stays untouched.

    Args:
        model: fitted estimator with `predict_proba`.
        card: what describes it, without the checksum.
        path: where the joblib file goes; the card goes beside it.
        texts: messages whose propensities tell whether the saved model equals this one, to 1e-6.

    Returns:
        Whether anything was written.
    """
    path = Path(path)
    with contextlib.suppress(OSError, ValueError):  # none there, or a damaged one: it is replaced
        if _identity(load_card(path)) == _identity(card) and np.allclose(
            load_model(path).predict_proba(texts), model.predict_proba(texts), rtol=0, atol=1e-6
        ):
            return False
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    joblib.dump(model, temporary, compress=3)
    card = {**card, "sha256": hashlib.sha256(temporary.read_bytes()).hexdigest()}
    os.replace(temporary, path)
    write(path.with_suffix(".json"), json.dumps(card, indent=2).encode() + b"\n")
    return True


def _identity(card: dict[str, Any]) -> dict[str, Any]:
    """Return what two cards of the same model share: all but the checksum and the other versions."""
    return {**card, "sha256": None, "versions": card.get("versions", {}).get("scikit-learn")}


def _is_card(card: Any) -> bool:
    """Tell whether a card has all that scoring needs."""
    if not isinstance(card, dict) or not all(isinstance(card.get(key), kind) for key, kind in CARD_TYPES.items()):
        return False
    try:
        for point in [card, *card["operating_points"]]:
            check_threshold(point["threshold"])
    except (KeyError, TypeError, ValueError):
        return False
    return True
