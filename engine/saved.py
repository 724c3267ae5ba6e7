"""A saved model: a pipeline of scikit-learn's, the same model as weights, and the card that names both.

`best_model.joblib` is the pipeline, a pickle. `best_model.weights.json.gz` beside it is plain data, for whoever only
scores: see `engine/weights.py`; a pipeline that is no linear model has none. `best_model.json` is the card, which says
what the model is: name, versions, thresholds, metrics, and the sha256 of each file.

The checksums guard against mix-ups: a card of another run, a file cut short. They are no guard against an attacker: who
can replace the model can replace the card, and a pickle can run any code when it is read. So load only pipelines that
you trust, as you would a program.
"""

import hashlib
import io
import json
import os
import shutil
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.files import write
from engine.linear import LinearModel
from engine.weights import LARGEST, read_weights, unpack, write_weights

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

MODEL_PATH = Path(__file__).resolve().parents[1] / "models" / "best_model.joblib"
CARD, WEIGHTS = ".json", ".weights.json.gz"
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


def load_model(path: str | Path = MODEL_PATH) -> "BaseEstimator":
    """Load the pipeline of a saved model, after checking that it is the one its card describes.

    A pickle works only in the version of scikit-learn that wrote it, so that is checked too.

    Args:
        path: the model's joblib file; the card lies beside it and ends in .json.

    Returns:
        The fitted estimator.

    Raises:
        FileNotFoundError: the model or its card is missing.
        ValueError: the file is not the one of the card, is from another version of scikit-learn, or holds no model
            that tells two classes of texts apart; or scikit-learn is not installed.
    """
    try:
        import joblib
        import sklearn
    except ImportError:
        raise ValueError(f"{path} takes scikit-learn, which is missing: run pip install -r requirements.txt") from None
    path = Path(path)
    card = load_card(path)
    content = _read(path, card["sha256"])
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


def load_scorer(path: str | Path = MODEL_PATH) -> "LinearModel | BaseEstimator":
    """Load a saved model for scoring alone: its weights if it has any, or else its pipeline.

    Args:
        path: the model's joblib file, which need not be there if there are weights; the others lie beside it.

    Returns:
        What `score.score` takes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not the one of the card, or holds no model; or the model has no weights, and `load_model`
            raises it.
    """
    weights = load_card(path).get("weights")
    if weights is None:
        return load_model(path)
    path = Path(path).with_suffix(WEIGHTS)
    content = _read(path, weights["sha256"])
    try:
        return read_weights(content)
    except ValueError as error:
        raise ValueError(
            f"{path} does not hold the weights of a model, for {error}: run train.ipynb again, or restore it"
        ) from None


def copy_files(source: Path, target: Path) -> None:
    """Copy all files of a saved model, given the paths of its joblib file there and here."""
    for suffix in (source.suffix, CARD, WEIGHTS):
        if suffix != WEIGHTS or "weights" in load_card(source):
            shutil.copy2(source.with_suffix(suffix), target.with_suffix(suffix))


def save_model(model: "BaseEstimator", card: dict[str, Any], path: str | Path, texts: list[str]) -> bool:
    """Save a model as a pipeline, as weights if it is linear, and with its card, unless all is there already.

    Fitting is deterministic, but another processor may round the last bits. A model with the same card and
    the same propensities is the same model, and its pipeline stays untouched.

    Args:
        model: fitted estimator with `predict_proba`.
        card: what describes it, without the checksums.
        path: where the joblib file goes; the others go beside it.
        texts: messages whose propensities tell whether the saved model equals this one, to 1e-6.

    Returns:
        Whether anything was written.
    """
    import joblib

    path = Path(path)
    saved = _find_saved(model, card, path, texts)
    if saved is None:
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        joblib.dump(model, temporary, compress=3)
        card = {**card, "sha256": _sha256(temporary.read_bytes())}
        os.replace(temporary, path)
    else:
        model, card = saved, load_card(path)
    weights = _weights_of(model)
    if saved is not None and _has_weights(path, card, weights):
        return False
    card.pop("weights", None)
    path.with_suffix(WEIGHTS).unlink(missing_ok=True)
    if weights is not None:
        write(path.with_suffix(WEIGHTS), weights)
        card["weights"] = {"file": path.with_suffix(WEIGHTS).name, "sha256": _sha256(weights)}
    write(path.with_suffix(CARD), json.dumps(card, indent=2).encode() + b"\n")
    return True


def _find_saved(model: "BaseEstimator", card: dict[str, Any], path: Path, texts: list[str]) -> "BaseEstimator | None":
    """Return the pipeline that is saved at a path if it is the same model."""
    import numpy as np

    with suppress(OSError, ValueError):  # none there, or a damaged one: it is replaced
        if _identity(load_card(path)) == _identity(card):
            saved = load_model(path)
            if np.allclose(saved.predict_proba(texts), model.predict_proba(texts), rtol=0, atol=1e-6):
                return saved
    return None


def _weights_of(model: "BaseEstimator") -> bytes | None:
    """Return the weights of a pipeline as the content of a file, or None where it is no linear model of words."""
    from engine.folding import find_folded

    folded = find_folded(model)
    return None if folded is None or folded.whole else write_weights(folded)


def _has_weights(path: Path, card: dict[str, Any], weights: bytes | None) -> bool:
    """Tell whether a saved model has these weights, though another machine may compress them otherwise."""
    if weights is None or "weights" not in card:
        return weights is None and "weights" not in card
    with suppress(OSError, ValueError):
        return unpack(_read(path.with_suffix(WEIGHTS), card["weights"]["sha256"])) == unpack(weights)
    return False


def _read(path: Path, sha256: str) -> bytes:
    """Return the content of a file that has a checksum.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it has another checksum, or is no file, or larger than any model.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: train.ipynb writes it")
    content = b""
    if path.is_file() and path.stat().st_size <= LARGEST:  # not a pipe, in which nothing may come for ever
        content = path.read_bytes()
    if _sha256(content) != sha256:
        raise ValueError(f"{path} does not have the sha256 of its card: run train.ipynb again, or restore both")
    return content


def _sha256(content: bytes) -> str:
    """Return the checksum of a file's content."""
    return hashlib.sha256(content).hexdigest()


def _identity(card: dict[str, Any]) -> dict[str, Any]:
    """Return what two cards of the same model share: all but the checksums and the other versions."""
    versions = card.get("versions", {}).get("scikit-learn")
    return {**card, "sha256": None, "weights": None, "versions": versions}


def _is_card(card: Any) -> bool:
    """Tell whether a card has all that scoring needs."""
    if not isinstance(card, dict) or not all(isinstance(card.get(key), kind) for key, kind in CARD_TYPES.items()):
        return False
    try:
        for point in [card, *card["operating_points"]]:
            check_threshold(point["threshold"])
        return "weights" not in card or isinstance(card["weights"]["sha256"], str)
    except (KeyError, TypeError, ValueError):
        return False
