"""What becomes of a message of the stream: it is scored, and delivered, labelled, taken down, or dead."""

from collections.abc import Sequence
from typing import Any

from sklearn.base import BaseEstimator

from engine.experiment import assigner
from engine.fields import LONGEST_TEXT
from engine.linear import LinearModel
from engine.saved import MODEL_PATH
from operations.spool import LONGEST_ADDRESS, LONGEST_NAME
from operations.store import STATE
from score import load_card, load_scorer, score, score_batch

NEEDED = ("id", "text")
LONGEST = {"id": LONGEST_ADDRESS, "sender": LONGEST_ADDRESS, "recipient": LONGEST_ADDRESS}
LONGEST |= {"region": LONGEST_NAME, "language": LONGEST_NAME, "text": LONGEST_TEXT}


class Decider:
    """A model, and what the operator does about its scores."""

    def __init__(self, model: BaseEstimator | LinearModel, card: dict[str, Any], params: dict[str, Any]):
        """Decide with a model.

        Args:
            model: as `score.score` takes it.
            card: of the model.
            params: the section `operations` of params.yaml.
        """
        self.model, self.card, self.label_from = model, card, params["label_from"]
        self.arm_of = assigner(params["experiment"], params["shares"])

    def __call__(self, messages: Sequence[dict[bytes, bytes]]) -> list[tuple[str, dict[Any, Any]]]:
        """Return for each message the stream that it goes to, and the fields that it has there.

        Args:
            messages: the fields that somebody published: `id` and `text`, and where they are known `sender`,
                `recipient`, `region`, `language`.
        """
        read = [read_message(message) for message in messages]
        scores = iter(score_batch([m["text"] for m, wrong in read if not wrong], self.model, self.card["threshold"]))
        return [
            ("dead", {**raw, "reason": wrong}) if wrong else self._decide(message, *next(scores))
            for raw, (message, wrong) in zip(messages, read, strict=True)
        ]

    def _decide(self, message: dict[str, str], prediction: bool, propensity: float) -> tuple[str, dict[str, Any]]:
        """Return the stream and the fields of a message that was scored; see `operations.actions`."""
        arm = self.arm_of(message.get("recipient") or message["id"])
        action = "take down" if prediction else "label" if propensity >= self.label_from else "deliver"
        if arm == "unfiltered":
            action = "deliver"
        score = {"propensity": propensity, "threshold": self.card["threshold"], "prediction": int(prediction)}
        fields = {**message, **score, "arm": arm, "action": action, "model": self.card["sha256"]}
        return "taken-down" if action == "take down" else "delivered", fields


def read_message(fields: dict[bytes, bytes]) -> tuple[dict[str, str], str | None]:
    """Return a message, and what is wrong with it, in a sentence, if it cannot be scored."""
    try:
        message = {name.decode(): value.decode() for name, value in fields.items()}
    except UnicodeDecodeError:
        return {}, "it is not UTF-8"
    for name in NEEDED:
        if name not in message:
            return message, f"it has no {name}"
    if not message["id"]:
        return message, "its id is empty"
    for name, longest in LONGEST.items():
        if len(message.get(name, "")) > longest:
            return message, f"its {name} has {len(message[name]):,} characters, and at most {longest:,} are taken"
    return message, None


def load_decider(params: dict[str, Any]) -> Decider:
    """Return a decider with the model that was promoted last, or with the project's own where none was.

    Raises:
        FileNotFoundError, ValueError: the model cannot be loaded.
    """
    promoted = STATE / "models" / "serving" / MODEL_PATH.name
    path = promoted.resolve() if promoted.exists() else MODEL_PATH  # the link may change meanwhile
    model, card = load_scorer(path), load_card(path)
    score("", model, card["threshold"])  # the first score takes longer
    return Decider(model, card, params)
