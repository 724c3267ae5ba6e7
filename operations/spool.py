"""From the service to its store: files of scores that the workers append to and one program moves.

A request waits for no database. A worker appends a line for each score to a file of its own, which outlives the
worker; `python -m operations.spool` moves the lines to the store, in batches, each in one transaction with the place
in the file up to which it is stored. So whatever is killed, a score is stored once; while the store is away, the
files grow, to a limit. They are not forced to the disk: a machine that loses its power may lose the last seconds.
"""

import hashlib
import json
import os
import random
import re
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from flask import abort

from engine.experiment import assigner
from operations.repeat import repeat
from operations.store import STATE, WORKERS, insert, lock, models, now, reader, register, spool, upsert
from score import score

LARGEST_FILE = 2**23  # bytes; then another one is begun
LARGEST_PART = 2**19  # bytes that are stored at a time, about 2,500 scores
LONGEST_NAME = 40  # characters, of a region or a language
LONGEST_CODE = 6  # digits
LONGEST_ADDRESS = 100  # characters, of a sender or a recipient
NICENESS = 10
DIGIT = re.compile(r"\d")


class Recorder:
    """Records the scores of a worker; what `create_app` takes as `record`."""

    def __init__(
        self,
        card: dict[str, Any],
        params: dict[str, Any],
        folder: Path = STATE / "spool",
        key: bytes = b"",
        shadow: tuple[Any, dict[str, Any]] | None = None,
    ):
        """Make a recorder, which opens its file in the process that first uses it.

        Args:
            card: of the model that is served.
            params: the section `operations` of params.yaml.
            folder: where the files go.
            key: of the hashes of senders.
            shadow: a candidate and its card: it scores a share of the messages too.
        """
        if shadow and shadow[1]["sha256"] == card["sha256"]:
            shadow = None  # it has been promoted
        self.header = {"card": card, "shadow": shadow and shadow[1]}
        self.params, self.folder, self.key, self.shadow = params, folder, key, shadow
        self.arm_of = assigner(params["experiment"], params["shares"])
        self.lock, self.process = threading.Lock(), None
        self.slot = self.file = self.slot_file = None
        self.last = self.size = self.lost = 0
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(
        self, fields: dict[str, Any], texts: Sequence[str], results: Sequence[tuple[bool, float]], threshold: float
    ) -> list[str]:
        """Record the scores of a request and return the names of its messages.

        Args:
            fields: of the request; `sender`, `recipient`, `region` and `language` may say more about its
                messages.
            texts: the messages.
            results: the prediction and the propensity of each.
            threshold: that the predictions were made at.
        """
        sender, recipient = (_read(fields, name, LONGEST_ADDRESS) for name in ("sender", "recipient"))
        region, language = (_read(fields, name, LONGEST_NAME) for name in ("region", "language"))
        kind, keeps = kind_of(sender), self.params["retention_days"] > 0
        sender = sender and hash_sender(sender, self.key).hex()
        beside = [self._score_beside(text) for text in texts]
        with self.lock:
            if self.process != os.getpid():
                self._begin()
            numbers, lines = [], []
            for text, (prediction, propensity), other in zip(texts, results, beside, strict=True):
                self.last = number = max(now() * WORKERS + self.slot, self.last + WORKERS)
                name = str(number)
                arm, kept = self.arm_of(recipient or name), text if keeps else None
                numbers.append(name)
                line = [number, sender, region, arm, kept, propensity, threshold, prediction, other]
                lines.append(json.dumps([*line, language, kind, len(text), len(DIGIT.findall(text))]))
            self._append("\n".join([*lines, ""]).encode(), len(lines))
        return numbers

    def close(self) -> None:
        """Have done: nothing more will be recorded."""
        for file in (self.file, self.slot_file):
            if file:
                file.close()
        self.process = self.file = self.slot_file = None

    def _score_beside(self, text: str) -> float | None:
        """Return the propensity that the candidate gives to a message, if it is among those that it scores."""
        if not self.shadow or random.random() >= self.params["shadow_share"]:
            return None
        return score(text, self.shadow[0], self.shadow[1]["threshold"])[1]

    def _begin(self) -> None:
        """Take a number that no other process has; it is free again when this one ends."""
        self.process, self.file = os.getpid(), None
        for slot in range(WORKERS):
            self.slot_file = open(self.folder / f"{slot:03}.lock", "wb")  # noqa: SIM115
            if lock(self.slot_file):
                self.slot = slot
                return
            self.slot_file.close()
        raise OSError(f"more than {WORKERS} processes record scores in {self.folder}")

    def _append(self, lines: bytes, count: int) -> None:
        """Append lines to the file, all or none; scores that cannot be recorded are counted, and scoring goes on."""
        try:
            if self.file is None or self.size > LARGEST_FILE:
                self._open()
            if os.write(self.file.fileno(), lines) < len(lines):
                os.ftruncate(self.file.fileno(), self.size)
                raise OSError("the disk is full")
            self.size += len(lines)
            if self.lost:
                print(f"Scores are recorded again; {self.lost} were not.", file=sys.stderr, flush=True)
                self.lost = 0
        except OSError as error:
            if not self.lost:
                print(f"Scores are not recorded, but the service goes on: {error}.", file=sys.stderr, flush=True)
            self.lost += count

    def _open(self) -> None:
        """Begin another file, unless there is too much on its way to the store already."""
        if self.file:
            self.file.close()
            self.file = None
        waiting = sum(path.stat().st_size for path in self.folder.glob("*.jsonl"))
        if waiting >= self.params["spool_bytes"]:
            raise OSError(f"{waiting} bytes wait for the store, which must have been away for long")
        hidden = self.folder / f"{self.slot:03}.new"  # until it has a lock and a header
        header = json.dumps(self.header).encode() + b"\n"
        file = open(hidden, "ab", buffering=0)  # noqa: SIM115
        file.truncate(0)
        if not lock(file) or file.write(header) < len(header):
            file.close()
            raise OSError("the disk is full")
        hidden.rename(self.folder / f"{now()}-{self.slot:03}.jsonl")
        self.file, self.size = file, len(header)


def _read(fields: dict[str, Any], name: str, longest: int) -> str | None:
    """Return a field that says more about a message; 400 if it is no short string."""
    value = fields.get(name)
    if value is not None and not (isinstance(value, str) and len(value) <= longest):
        abort(400, f"{name} must be a string of at most {longest} characters")
    return value or None


def hash_sender(sender: str, key: bytes) -> bytes:
    """Return the keyed hash that stands for a sender in the store."""
    return hashlib.blake2b(_bytes(sender), key=key, digest_size=8).digest()


def kind_of(sender: str | None) -> str | None:
    """Return what kind of address a sender has: a "short code" of at most six digits, a "number" or a "name"."""
    if sender is None:
        return None
    digits = re.sub(r"[\s()+.-]", "", sender)
    if not digits.isdecimal():
        return "name"
    return "short code" if len(digits) <= LONGEST_CODE else "number"


def _bytes(text: str) -> bytes:
    """Return a text in UTF-8; halves of surrogate pairs become question marks."""
    return text.encode("utf-8", "replace")


# The other end


def move(engine: sa.Engine, folder: Path = STATE / "spool") -> int:
    """Store what the files hold and the store does not, and delete those that nothing will be added to.

    Args:
        engine: of the store.
        folder: where the files are.

    Returns:
        How many lines were read.

    Raises:
        sqlalchemy.exc.DBAPIError: the store cannot be written to; then the files stay.
    """
    return sum(_move_file(engine, path) for path in sorted(folder.glob("*.jsonl")))


def _move_file(engine: sa.Engine, path: Path) -> int:
    """Store what a file holds, and delete it if nothing will be added."""
    count, here = 0, spool.c.file == path.name
    with open(path, "rb") as file:
        is_whole = lock(file)
        header = file.readline()
        ids = _model_ids(engine, header)
        with reader(engine).connect() as connection:
            offset = connection.scalar(sa.select(spool.c.offset).where(here)) or len(header)
        while True:
            file.seek(offset)
            part = file.read(LARGEST_PART)
            part = part[: part.rfind(b"\n") + 1]
            if not part:
                break
            rows = [row for line in part.splitlines() for row in _rows(line, ids, header)]
            offset += len(part)
            with engine.begin() as connection:
                insert(connection, rows)
                place = upsert(engine, spool).values(file=path.name, offset=offset)
                connection.execute(place.on_conflict_do_update(index_elements=["file"], set_={"offset": offset}))
            count += part.count(b"\n")
        if is_whole:  # the file goes before its place does, or what it holds might be stored again
            path.unlink()
            with engine.begin() as connection:
                connection.execute(spool.delete().where(here))
    return count


@lru_cache
def _model_ids(engine: sa.Engine, header: bytes) -> tuple[int, int | None]:
    """Return the numbers of the model and of the candidate that a file's header names."""
    named = json.loads(header)
    model = find_model(engine, named["card"])
    return model, register(engine, named["shadow"], "candidate")[0] if named["shadow"] else None


def find_model(engine: sa.Engine, card: dict[str, Any]) -> int:
    """Return the number of the model of a card; a store that knows none yet takes it for the one that serves."""
    with reader(engine).connect() as connection:
        serves = connection.scalar(sa.select(sa.exists().where(models.c.state == "serving")))
    return register(engine, card, "retired" if serves else "serving")[0]


@lru_cache
def _shadow_threshold(header: bytes) -> float:
    """Return the threshold of the candidate that a file's header names."""
    return json.loads(header)["shadow"]["threshold"]


def _rows(line: bytes, ids: tuple[int, int | None], header: bytes) -> list[dict[str, Any]]:
    """Return the rows for the store that a line holds: the score, and that of the candidate."""
    number, sender, region, arm, text, propensity, threshold, prediction, other, *more = json.loads(line)
    language, kind, characters, digits = more or [None] * 4  # none in a file of the version before
    about = {"sender": sender and bytes.fromhex(sender), "region": clean(region), "arm": arm, "text": clean(text)}
    about |= {"language": clean(language), "sender_kind": kind, "characters": characters, "digits": digits}
    score_ = {"message": number, "model": ids[0], "shadow": False, "propensity": propensity, "threshold": threshold}
    rows = [{**about, **score_, "prediction": prediction}]
    if other is not None:
        threshold = _shadow_threshold(header)
        decided = {"threshold": threshold, "prediction": threshold <= other and threshold < 1}
        rows.append({"message": number, "model": ids[1], "shadow": True, "propensity": other, **decided})
    return rows


def clean(text: str | None) -> str | None:
    """Return a text without what PostgreSQL cannot hold: NUL, and halves of surrogate pairs."""
    return text and _bytes(text).decode().replace("\0", "\ufffd")


if __name__ == "__main__":
    os.nice(NICENESS)  # the service goes first
    repeat(move)
