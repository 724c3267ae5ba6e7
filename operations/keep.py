"""From the streams of answers to the store: `python -m operations.keep`.

It reads the streams behind the last answers that the store has, and stores answers together with their places in one
transaction; so whatever is killed, an answer is stored once. What is stored, and was acknowledged by each group of
subscribers, is deleted from the streams.
"""

import json
import os
import sys
from typing import Any

import redis
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from operations.__main__ import read_secret
from operations.broker import ABOUT, ANSWERS, MODELS, Patience, connect, key, read_params, read_place
from operations.repeat import repeat
from operations.spool import DIGIT, NICENESS, clean, find_model, hash_sender, kind_of
from operations.store import STATE, insert, migrate, open_store, reader, spool, upsert

BATCH = 1000  # answers of a stream that are stored at a time
SEQUENCES = 1_000_000  # that an offset has room for in a millisecond


class Keeper:
    """Stores answers."""

    def __init__(self, client: redis.Redis, partitions: int, secret: bytes, keeps_texts: bool):
        """Make a keeper.

        Args:
            client: of Redis.
            partitions: how many there are.
            secret: the key of the hashes of senders.
            keeps_texts: whether the texts of messages are stored.
        """
        self.redis, self.secret, self.keeps_texts, self.patience = client, secret, keeps_texts, Patience()
        self.models: dict[str, int] = {}
        # Another server, or one that has lost everything, has another name, and its streams begin anew.
        name = client.hget(ABOUT, "name").decode()
        streams = [key(kind, partition) for kind in ANSWERS for partition in range(partitions)]
        self.files = {f"{stream}@{name}": stream for stream in streams}

    def step(self, engine: sa.Engine) -> int:
        """Store what the streams hold and the store does not, at most a batch of each, and return how many answers.

        Args:
            engine: of the store.

        Raises:
            sqlalchemy.exc.DBAPIError: the store cannot be written to; then the answers stay in the streams.
        """
        count = 0
        with self.patience:
            with reader(engine).connect() as connection:
                stored = sa.select(spool.c.file, spool.c.offset).where(spool.c.file.in_(self.files))
                offsets = dict(connection.execute(stored).all())
            found = {file: self._read(stream, offsets.get(file, 0)) for file, stream in self.files.items()}
            rows = [self._row(engine, fields) for entries in found.values() for _, fields in entries]
            with engine.connect() as connection:
                for file, entries in found.items():
                    if entries:
                        before, offset = offsets.get(file, 0), offset_of(entries[-1][0])
                        place = upsert(engine, spool).values(file=file, offset=offset)
                        unmoved = {"set_": {"offset": offset}, "where": spool.c.offset == before}
                        place = place.on_conflict_do_update(index_elements=["file"], **unmoved)
                        if connection.scalar(place.returning(spool.c.offset)) is None:
                            return 0  # another keeper was faster
                        offsets[file] = offset
                if rows:
                    insert(connection, rows)
                    connection.commit()
                    count = len(rows)
            for file, offset in offsets.items():
                self._trim(self.files[file], offset)
        return count

    def _read(self, stream: str, offset: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """Return answers behind an offset."""
        found = self.redis.xread({stream: place_of(offset)}, count=BATCH)
        return found[0][1] if found else []

    def _row(self, engine: sa.Engine, fields: dict[bytes, bytes]) -> dict[str, Any]:
        """Return the row for the store that an answer makes."""
        answer = {name.decode(): value.decode() for name, value in fields.items()}
        sender, text, sha256 = answer.get("sender"), answer["text"], answer["model"]
        if sha256 not in self.models:
            self.models[sha256] = find_model(engine, json.loads(self.redis.hget(MODELS, sha256)))
        return {
            "message": int(answer["number"]),
            "model": self.models[sha256],
            "shadow": False,
            "propensity": float(answer["propensity"]),
            "threshold": float(answer["threshold"]),
            "prediction": answer["prediction"] == "1",
            "action": answer["action"],
            "sender": hash_sender(sender, self.secret) if sender else None,
            "region": clean(answer.get("region")),
            "arm": answer["arm"],
            "text": clean(text) if self.keeps_texts else None,
            "language": clean(answer.get("language")),
            "sender_kind": kind_of(sender or None),
            "characters": len(text),
            "digits": len(DIGIT.findall(text)),
        }

    def _trim(self, stream: str, offset: int) -> None:
        """Delete what is stored and what each group of subscribers has acknowledged."""
        first = offset + 1
        for group in self.redis.xinfo_groups(stream) if self.redis.exists(stream) else ():
            first = min(first, offset_of(group["last-delivered-id"]) + 1)
            pending = self.redis.xpending(stream, group["name"])["min"]  # none, if all has been acknowledged meanwhile
            first = min(first, offset_of(pending)) if pending else first
        self.redis.xtrim(stream, minid=place_of(first), approximate=False)


def offset_of(place: bytes) -> int:
    """Return the number by which the store knows a place in a stream."""
    milliseconds, sequence = read_place(place)
    return milliseconds * SEQUENCES + sequence


def place_of(offset: int) -> str:
    """Return the place in a stream of a number of the store."""
    return "{}-{}".format(*divmod(offset, SEQUENCES))


def main() -> None:
    """Store answers until SIGTERM or Ctrl-C."""
    params = read_params()
    try:
        STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
        engine = open_store()
        migrate(engine)
        engine.dispose()
        secret = os.environ.get("OPERATIONS_KEY") or read_secret("key")
        partitions = params["stream"]["partitions"]
        keeper = Keeper(connect(partitions), partitions, secret.encode(), params["retention_days"] > 0)
    except DBAPIError as error:
        sys.exit(f"The store cannot be used: {str(error.orig).strip().splitlines()[0]}")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    repeat(keeper.step)


if __name__ == "__main__":
    os.nice(NICENESS)  # the scorers go first
    main()
