"""A publisher: `python -m operations.publish --rate 100000/min messages.csv` replays a file of messages.

Each message is published once, also where Redis goes away in the middle. Nothing unread is ever dropped: where too
much waits already, the publisher waits too.
"""

import argparse
import itertools
import math
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import redis
from tqdm import tqdm

from operations.broker import ANSWERS, Patience, connect, key, partition_of, read_params, until_ended
from operations.evaluate import read
from operations.repeat import RETRY
from operations.store import ROOT

FIELDS = ("id", "text", "sender", "recipient", "region", "language")
QUEUED = ("incoming", *ANSWERS)  # what others have still to do something about
BATCH = 500  # messages of one transaction
MOST = 10_000  # messages that wait in this process
TICK = 0.02  # seconds from one look at what is due to the next
LINE = 10  # seconds from one line about the progress to the next
REMEMBERED = 86_400  # seconds for which Redis knows how much of a publisher's has arrived
UNITS = {"s": 1, "min": 60, "h": 3600}


class Publisher:
    """Publishes messages, each once."""

    def __init__(self, client: redis.Redis, name: str, params: dict[str, int]):
        """Make a publisher.

        Args:
            client: of Redis.
            name: that no other publisher has.
            params: the section `operations.stream` of params.yaml.
        """
        self.redis, self.name = client, name
        self.room = math.ceil(params["longest_queue"] / params["partitions"])
        self.waiting: list[list[dict[str, Any]]] = [[] for _ in range(params["partitions"])]
        self.published = [0] * params["partitions"]

    def put(self, message: dict[str, Any]) -> None:
        """Take a message, which `flush` publishes."""
        name = message.get("sender") or message.get("id") or ""
        self.waiting[partition_of(name, len(self.waiting))].append(message)

    def flush(self) -> bool:
        """Publish what was taken, and return whether there was room for it; what there was none for waits."""
        partitions = [partition for partition, waiting in enumerate(self.waiting) if waiting]
        streams = [key(kind, partition) for partition in partitions for kind in QUEUED]
        with self.redis.pipeline(transaction=False) as pipe:
            for stream in streams:
                pipe.xlen(stream)
            lengths = iter(pipe.execute())
        queued = [sum(itertools.islice(lengths, len(QUEUED))) for _ in partitions]
        have_room = [self._flush(*each) for each in zip(partitions, queued, strict=True)]
        return all(have_room)

    def _flush(self, partition: int, queued: int) -> bool:
        """Publish messages of a partition with a count of them, which tells after an error what had arrived."""
        incoming, counter = key("incoming", partition), key(f"published:{self.name}", partition)
        with self.redis.pipeline(transaction=True) as pipe:
            pipe.watch(counter)
            arrived = max(self.published[partition], int(pipe.get(counter) or 0))
            del self.waiting[partition][: arrived - self.published[partition]]
            self.published[partition] = arrived
            room = max(0, self.room - queued)
            batch = self.waiting[partition][: min(BATCH, room)]
            pipe.multi()
            for message in batch:
                pipe.xadd(incoming, {**message, "publisher": self.name})
            pipe.set(counter, arrived + len(batch), ex=REMEMBERED)
            pipe.execute()
        del self.waiting[partition][: len(batch)]
        self.published[partition] += len(batch)
        return room > len(batch)


def replay(publisher: Publisher, messages: Iterator[dict[str, Any]], number: int, rate: float) -> np.ndarray:
    """Publish messages at a rate, with progress, until SIGTERM or Ctrl-C.

    Args:
        publisher: of them.
        messages: as many as are asked for.
        number: of messages.
        rate: messages per second; `math.inf` for as many as there is room for.

    Returns:
        How late each message was published, in seconds.
    """
    ended, patience, late, is_held = until_ended(), Patience(), [], False
    start = said = time.monotonic()
    taken = 0
    with tqdm(total=number, unit=" messages", disable=None) as bar:  # on a terminal
        while len(late) < number and not ended.is_set():
            due = min(number, (time.monotonic() - start) * rate)
            while taken < due and taken - len(late) < MOST:
                publisher.put(next(messages))
                taken += 1
            with patience:
                has_room = publisher.flush()
                if not has_room and not is_held:
                    print("Too many messages wait already, so publishing waits too.", file=sys.stderr, flush=True)
                is_held = not has_room
            now, published = time.monotonic(), sum(publisher.published)
            bar.update(published - len(late))
            late += [now - start - i / rate for i in range(len(late), published)]
            if bar.disable and now > said + LINE:
                said = now
                print(f"{published:,} of {number:,} messages published", file=sys.stderr, flush=True)
            ended.wait(RETRY if patience.is_away else TICK)
    return np.array(late)


def read_messages(path: Path) -> list[dict[str, str]]:
    """Read the messages of a file.

    Args:
        path: of a file of a kind that `operations.evaluate` reads, with a column `text`, and where they are known
            `id`, `sender`, `recipient`, `region` and `language`.

    Raises:
        ValueError: it cannot be read; the message is one sentence.
    """
    table = read(path)
    if table.empty or "text" not in table:
        raise ValueError(f"{path} must have a column 'text', and messages.")
    known = [column for column in FIELDS if column in table]
    rows = zip(*(table[column] for column in known), strict=True)
    return [{name: str(value) for name, value in zip(known, row, strict=True) if value is not None} for row in rows]


def name_messages(messages: list[dict[str, str]], number: int, name: str) -> Iterator[dict[str, str]]:
    """Yield messages over and over, each with an id: its own, if there is one and no message is yielded twice."""
    for i, message in enumerate(itertools.islice(itertools.cycle(messages), number)):
        made = {"id": f"{name}-{i}"}
        yield made | message if number <= len(messages) else message | made


def parse_rate(text: str) -> float:
    """Return the messages per second that a rate such as 100000/min stands for."""
    number, _, unit = text.partition("/")
    try:
        rate = float(number) / UNITS[unit]
        if 0 < rate < math.inf:
            return rate
    except (KeyError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no rate such as 100000/min: the unit is s, min or h")


def main() -> None:
    """Publish the file that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m operations.publish", description=__doc__)
    parser.add_argument(
        "file", type=Path, nargs="?", default=ROOT / "data" / "today.tsv", help="(default: %(default)s)"
    )
    parser.add_argument("--rate", type=parse_rate, default=math.inf, help="such as 100000/min (default: no limit)")
    parser.add_argument("--count", type=int, help="messages, over and over if the file has fewer (default: all, once)")
    parser.add_argument("--name", default=secrets.token_hex(4), help="that no other publisher has; ids begin with it")
    args = parser.parse_args()
    params = read_params()["stream"]
    try:
        messages = read_messages(args.file)
        publisher = Publisher(connect(params["partitions"]), args.name, params)
        number = args.count or len(messages)
        named = name_messages(messages, number, args.name)
        start = time.monotonic()
        late = replay(publisher, named, number, args.rate)
    except ValueError as error:
        sys.exit(str(error))
    print(f"{len(late):,} messages published in {time.monotonic() - start:.1f} s", end="")
    print(f", the latest {late.max() * 1000:,.0f} ms late." if args.rate < math.inf and len(late) else ".", flush=True)


if __name__ == "__main__":
    main()
