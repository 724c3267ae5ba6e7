"""Who reads which partition: a scorer has it by a lease, which it renews with whatever it does there."""

import math
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import redis
from redis.exceptions import WatchError

from operations.broker import ERRORS, GROUP, join, key

SCORERS = "sms:scorers"  # who is there, and when each was last seen


class Partitions:
    """The partitions that a scorer has, as many as the others have. Clocks must agree within a second."""

    def __init__(self, client: redis.Redis, number: int, lease: float):
        """Have none yet.

        Args:
            client: of Redis.
            number: of all partitions.
            lease: seconds for which a partition is held without a sign of life.
        """
        self.redis, self.number, self.lease = client, number, lease
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.held: set[int] = set()
        self.left: set[int] = set()  # of those held: where the one before may have left messages unanswered

    def share(self) -> None:
        """Take partitions that nobody has, or give some back, so that all scorers have about as many."""
        now = time.time()
        self.redis.zadd(SCORERS, {self.name: now})
        self.redis.zremrangebyscore(SCORERS, "-inf", now - self.lease)
        fair = math.ceil(self.number / self.redis.zcard(SCORERS))
        for partition in sorted(self.held)[fair:]:
            self._give_back(partition)
        for partition in list(self.held):
            with suppress(WatchError), self.transaction(partition) as pipe:
                pipe.multi()
                self.renew(pipe, partition)
                pipe.execute()
        for partition in range(self.number):
            if partition not in self.held and len(self.held) < fair:
                self._take(partition)

    def find_waiting(self) -> list[int]:
        """Return those of the partitions that it has in which messages wait."""
        held = sorted(self.held)
        with self.redis.pipeline(transaction=False) as pipe:
            for partition in held:
                pipe.xlen(key("incoming", partition))  # what is answered is deleted
            return [partition for partition, length in zip(held, pipe.execute(), strict=True) if length]

    def close(self) -> None:
        """Give all back, so that others need not wait until the leases are over."""
        for partition in list(self.held):
            self._give_back(partition)
        self.redis.zrem(SCORERS, self.name)

    @contextmanager
    def transaction(self, partition: int) -> Iterator[redis.client.Pipeline]:
        """Give a pipeline whose transaction is done only if the lease of a partition is held to its end.

        Raises:
            redis.exceptions.WatchError: another has the partition by now, or the connection broke, so that it cannot
                be known whether the transaction was done.
        """
        lease = key("lease", partition)
        try:
            with self.redis.pipeline(transaction=True) as pipe:
                pipe.watch(lease)
                if pipe.get(lease) != self.name.encode():
                    raise WatchError(f"the lease of partition {partition} is over")
                yield pipe
        except ERRORS:
            self.held.discard(partition)
            raise

    def renew(self, pipe: redis.client.Pipeline, partition: int) -> None:
        """Have a transaction renew the lease."""
        pipe.pexpire(key("lease", partition), int(self.lease * 1000))

    def _take(self, partition: int) -> None:
        """Take a partition, unless another has it."""
        lease = key("lease", partition)
        is_free = self.redis.set(lease, self.name, nx=True, px=int(self.lease * 1000))
        if is_free or self.redis.get(lease) == self.name.encode():
            join(self.redis, key("incoming", partition), GROUP)
            self.held.add(partition)
            self.left.add(partition)

    def _give_back(self, partition: int) -> None:
        """Let others take a partition."""
        with suppress(WatchError), self.transaction(partition) as pipe:
            pipe.multi()
            pipe.delete(key("lease", partition))
            pipe.execute()
        self.held.discard(partition)
