"""What became of the messages of a publisher: a subscriber to all streams of answers, which counts."""

from collections import Counter

import numpy as np
import redis

from operations.broker import ANSWERS, join, key, read_place

GROUP = "tally"
KINDS = (*ANSWERS, "dead")
BATCH = 1000  # answers


class Tally:
    """Counts the answers to the messages of a publisher, and how long they took."""

    def __init__(self, client: redis.Redis, partitions: int, publisher: str):
        """Subscribe, so that no answer is deleted that has not been counted.

        Args:
            client: of Redis.
            partitions: how many there are.
            publisher: its name.
        """
        self.redis, self.publisher = client, publisher
        self.counters = [key(f"published:{publisher}", partition) for partition in range(partitions)]
        self.streams = {key(kind, partition): kind for kind in KINDS for partition in range(partitions)}
        self.kinds, self.ids, self.times = Counter(), Counter(), []
        for stream in self.streams:
            join(client, stream, GROUP)

    def step(self) -> int:
        """Count the answers that have come, and return how many there were."""
        before = len(self.times)
        for stream, kind in self.streams.items():
            found = self.redis.xreadgroup(GROUP, "tally", {stream: ">"}, BATCH, noack=True)
            for place, fields in found[0][1] if found else ():
                if fields.get(b"publisher") == self.publisher.encode():
                    self.kinds[kind] += 1
                    self.ids[fields[b"id"]] += 1
                    self.times.append(read_place(place)[0] - read_place(fields[b"place"])[0])
        return len(self.times) - before

    def is_complete(self) -> bool:
        """Tell whether all that has been published was answered."""
        return len(self.times) >= self.count_published()

    def count_published(self) -> int:
        """Return how many messages have been published."""
        return sum(int(self.redis.get(counter) or 0) for counter in self.counters)

    def count_waiting(self) -> int:
        """Return how many answers wait to be stored, or to be acknowledged by another subscriber."""
        return sum(self.redis.xlen(stream) for stream, kind in self.streams.items() if kind != "dead")

    def close(self) -> None:
        """Have done: answers are deleted without having been counted."""
        for stream in self.streams:
            self.redis.xgroup_destroy(stream, GROUP)

    def render(self) -> str:
        """Return a table in Markdown."""
        published, twice = self.count_published(), sum(count - 1 for count in self.ids.values())
        p50, p99 = np.percentile(self.times, [50, 99]) if self.times else (0, 0)
        return "\n".join(
            [
                "| published | delivered | taken down | dead | not answered | twice | p50 (ms) | p99 (ms) |",
                "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
                f"| {published:,} | " + " | ".join(f"{self.kinds[kind]:,}" for kind in KINDS) + f" | "
                f"{published - len(self.ids):,} | {twice:,} | {p50:,.0f} | {p99:,.0f} |",
            ]
        )
