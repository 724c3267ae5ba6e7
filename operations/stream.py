"""The scorer: it takes messages from their streams and publishes for each one what becomes of it.

Any number of `python -m operations.stream` may run. One of them at a time reads a partition, so the messages of a
sender are answered in their order. A batch is read in one transaction (MULTI), and answered and acknowledged in
another; each is done only while the reader has the partition. So whatever is killed, or stopped and continued, each
message is answered once.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import redis
from redis.exceptions import WatchError

from operations.broker import GROUP, MODELS, as_dict, attend, check_streams, connect, key, number_of, read_params
from operations.decide import load_decider
from operations.leases import Partitions
from operations.queue_metrics import ANSWERED, expose

PAUSE = 0.02  # seconds in which a batch gathers, where no full one waits
TEND = 1  # seconds from one look at the other scorers to the next


class Scorer:
    """Answers the messages of its partitions."""

    def __init__(self, client: redis.Redis, decide: Callable[[Sequence[dict]], list], params: dict[str, Any]):
        """Make a scorer that has no partitions yet.

        Args:
            client: of Redis.
            decide: returns for the fields of messages the kinds of streams they go to and their fields there.
            params: the section `operations.stream` of params.yaml.
        """
        self.redis, self.decide, self.params, self.tended = client, decide, params, -TEND
        self.partitions = Partitions(client, params["partitions"], params["lease"])

    def step(self) -> bool:
        """Answer a batch of each partition in which messages wait, and return whether there are more to do at once."""
        if time.monotonic() >= self.tended + TEND:
            self.tended = time.monotonic()
            self.partitions.share()
        has_more = False
        for partition in self.partitions.find_waiting():
            with suppress(WatchError):  # another has it by now, and what was in hand
                has_more |= self._answer(partition)
        return has_more

    def _answer(self, partition: int) -> bool:
        """Answer a batch of a partition, and return whether there are more to do at once."""
        entries, deliveries = self._read(partition)
        if deliveries >= self.params["attempts"]:
            reason = f"it was delivered {deliveries} times, and nobody lived to answer it"
            answers = [("dead", {**fields, "reason": reason}) for _, fields in entries]
        else:
            answers = self.decide([fields for _, fields in entries])
        if not entries:
            return False
        places, incoming = [place for place, _ in entries], key("incoming", partition)
        with self.partitions.transaction(partition) as pipe:
            check_streams(pipe, *{key(kind, partition) for kind, _ in answers})  # or they would be acknowledged alone
            pipe.multi()
            for place, (kind, fields) in zip(places, answers, strict=True):
                number = number_of(place, partition, self.params["partitions"])
                pipe.xadd(key(kind, partition), {**fields, "place": place, "number": number})
            pipe.xack(incoming, GROUP, *places)
            pipe.xdel(incoming, *places)
            pipe.execute()
        for kind, _ in answers:
            ANSWERED.labels(kind).inc()
        return deliveries > 0 or len(entries) == self.params["batch"]

    def _read(self, partition: int) -> tuple[list[tuple[bytes, dict]], int]:
        """Return messages of a partition, first those that the reader before has left, and how often they were read.

        What was left is read as a batch once, then one by one: so a message that ends its readers ends alone.
        """
        incoming, name, batch = key("incoming", partition), self.partitions.name, self.params["batch"]
        with self.partitions.transaction(partition) as pipe:
            is_new, deliveries = partition not in self.partitions.left, 0
            if not is_new:
                left = pipe.xpending_range(incoming, GROUP, "-", "+", 1)
                is_new, deliveries = not left, left[0]["times_delivered"] if left else 0
            pipe.multi()
            self.partitions.renew(pipe, partition)
            if is_new:
                pipe.xreadgroup(GROUP, name, {incoming: ">"}, batch)
            else:
                pipe.xautoclaim(incoming, GROUP, name, 0, count=batch if deliveries == 1 else 1)
            _, found = pipe.execute()
        if is_new:
            self.partitions.left.discard(partition)
            found = found[0] if found else [None, []]
        entries = [entry for entry in found[1] if entry and entry[0]]  # Redis 6.2 has a gap for what somebody deleted
        if not is_new and not entries:
            self.redis.xack(incoming, GROUP, left[0]["message_id"])
        return [(place, as_dict(fields)) for place, fields in entries], deliveries


def main() -> None:
    """Score until SIGTERM or Ctrl-C, after which what is in hand is answered."""
    params = read_params()
    try:
        decide, client = load_decider(params), connect(params["stream"]["partitions"])
        client.hset(MODELS, decide.card["sha256"], json.dumps(decide.card))
        expose(client, params["stream"]["partitions"])
        scorer = Scorer(client, decide, params["stream"])
        attend(scorer.step, PAUSE, scorer.partitions.close)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
