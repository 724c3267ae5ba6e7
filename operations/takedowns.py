"""An example of what lies downstream: `python -m operations.takedowns` prints the messages that were taken down.

It is a group of subscribers of its own. It acknowledges a message when it has printed it, so a message is printed at
least once, and after a kill perhaps twice.
"""

import argparse
import sys
from typing import Any

import redis

from operations.broker import ERRORS, attend, connect, join, key, read_params

GROUP = "take-downs"
BATCH = 100  # messages
PAUSE = 0.1  # seconds, when none was taken down
SHOWN = 70  # characters


class TakeDowns:
    """Prints what was taken down, and counts it."""

    def __init__(self, client: redis.Redis, partitions: int, name: str, every: int):
        """Subscribe.

        Args:
            client: of Redis.
            partitions: how many there are.
            name: of this subscriber; whoever has it next begins with what this one has left.
            every: how many messages stand for one that is printed.
        """
        self.redis, self.name, self.every, self.count = client, name, every, 0
        self.streams = [key("taken-down", partition) for partition in range(partitions)]
        self.begun: set[str] = set()  # of these, from which is read what this subscriber had not left

    def step(self) -> int:
        """Print some messages of each partition, and return how many there were."""
        before = self.count
        try:
            for stream in self.streams:
                self._print(stream)
        except ERRORS:
            self.begun.clear()  # what was not acknowledged is read again
            raise
        return self.count - before

    def _print(self, stream: str) -> None:
        """Print and acknowledge some messages of a stream."""
        if stream not in self.begun:
            join(self.redis, stream, GROUP)
        found = self.redis.xreadgroup(GROUP, self.name, {stream: ">" if stream in self.begun else "0"}, BATCH)
        entries = found[0][1] if found else []
        for _, fields in entries:
            if self.count % self.every == 0:
                self._show({name.decode(): value.decode() for name, value in fields.items()})
            self.count += 1
        if entries:
            self.redis.xack(stream, GROUP, *(place for place, _ in entries))
        else:
            self.begun.add(stream)

    def _show(self, message: dict[str, Any]) -> None:
        """Print a message in one line."""
        text = " ".join(message["text"].split())
        text = text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
        print(f"taken down  {float(message['propensity']):.3f}  {text}", flush=True)

    def close(self) -> None:
        """Print the count."""
        print(f"{self.count:,} messages were taken down.", flush=True)


def main() -> None:
    """Print what is taken down until SIGTERM or Ctrl-C, and then how many messages it was."""
    parser = argparse.ArgumentParser(prog="python -m operations.takedowns", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="print one of so many messages (default: each)")
    parser.add_argument("--name", default="example", help="of this subscriber, if there are several")
    args = parser.parse_args()
    if args.every < 1:
        parser.error("--every must be 1 or more")
    try:
        partitions = read_params()["stream"]["partitions"]
        subscriber = TakeDowns(connect(partitions), partitions, args.name, args.every)
        attend(subscriber.step, PAUSE, subscriber.close)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
