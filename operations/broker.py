"""Where messages queue: streams of Redis, on the server that REDIS_URL names or that of `make stream`.

A message waits in `sms:incoming:{p}`; its answer goes to `sms:delivered:{p}`, `sms:taken-down:{p}` or `sms:dead:{p}`.
The partition p follows from the sender, and the braces keep what belongs to a partition on one node of a cluster, so
that a transaction can span it.
"""

import os
import secrets
import signal
import sys
import threading
import zlib
from collections.abc import Callable
from typing import Any

import redis
import yaml
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from redis.retry import Retry

from operations.repeat import RETRY
from operations.store import ROOT, STATE, WORKERS

GROUP = "scorers"
ANSWERS = ("delivered", "taken-down")  # which the store has too
KINDS = ("incoming", *ANSWERS, "dead")
ABOUT = "sms:about"  # the name of what the server holds, and how many partitions
MODELS = "sms:models"  # the cards of the models that answer
SOCKET = STATE / "redis" / "socket"  # of the server of make stream
SCHEMES = ("redis://", "rediss://", "unix://")
ERRORS = (redis.RedisError, redis.RedisClusterException)
# A client that tried again by itself would publish twice what had arrived when only the reply was lost.
OPTIONS = {"retry": Retry(NoBackoff(), 0), "encoding_errors": "replace", "protocol": 2}


def read_params() -> dict[str, Any]:
    """Return the section `operations` of params.yaml."""
    return yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["operations"]


def key(kind: str, partition: int) -> str:
    """Return the name of what belongs to a partition: a stream of one of KINDS, or its "lease"."""
    return f"sms:{kind}:{{{partition}}}"


def partition_of(name: str, partitions: int) -> int:
    """Return the partition of a sender, or by its id that of a message that has none."""
    return zlib.crc32(name.encode("utf-8", "replace")) % partitions


def read_place(place: bytes | str) -> tuple[int, int]:
    """Return what the id of an entry of a stream consists of: milliseconds since 1970, and a sequence."""
    milliseconds, _, sequence = (place.decode() if isinstance(place, bytes) else place).partition("-")
    return int(milliseconds), int(sequence)


def as_dict(fields: dict[bytes, bytes] | list[bytes]) -> dict[bytes, bytes]:
    """Return the fields of an entry, which redis-py leaves as they came where a cluster's transaction read them."""
    return fields if isinstance(fields, dict) else dict(zip(fields[::2], fields[1::2], strict=True))


def number_of(place: bytes | str, partition: int, partitions: int) -> int:
    """Return the number that a message has in the store, by its place in `sms:incoming`.

    The sequence stands for microseconds and the partition for a worker, counted down from the last one, because the
    service counts up from 0. After a thousand messages in a millisecond other workers' numbers are taken.
    """
    milliseconds, sequence = read_place(place)
    thousands, microseconds = divmod(sequence, 1000)
    return (milliseconds * 1000 + microseconds) * WORKERS + WORKERS - 1 - (thousands * partitions + partition)


def connect(partitions: int) -> redis.Redis | redis.RedisCluster:
    """Return a client of the server, which takes the names of its streams and their number from this.

    Raises:
        ValueError: it cannot be used; the message is one sentence that says why.
    """
    url = os.environ.get("REDIS_URL")
    if url and not url.startswith(SCHEMES):
        raise ValueError(f"REDIS_URL must begin with {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}.")
    try:
        client = redis.Redis.from_url(url, **OPTIONS) if url else redis.Redis(unix_socket_path=socket(), **OPTIONS)
    except ValueError as error:
        raise ValueError(f"REDIS_URL cannot be read: {error}.") from None
    try:
        if client.info("cluster")["cluster_enabled"]:
            client = redis.RedisCluster.from_url(url, **OPTIONS)
        check_streams(client, *(key(kind, partition) for kind in KINDS for partition in range(partitions)))
        client.hsetnx(ABOUT, "name", secrets.token_hex(4))
        client.hsetnx(ABOUT, "partitions", partitions)
        known = int(client.hget(ABOUT, "partitions"))
    except (*ERRORS, OSError) as error:
        why = "The server of REDIS_URL cannot be used" if url else "REDIS_URL is not set, and no make stream runs"
        raise ValueError(f"{why}: {str(error).rstrip('.')}.") from None
    if known != partitions:
        raise ValueError(
            f"The streams have {known} partitions, not {partitions}: put that in operations.stream of params.yaml, or "
            f"delete the key {ABOUT} when they are empty."
        )
    return client


def socket() -> str:
    """Return the path of the socket of `make stream`, in the shorter way: a socket's must be short."""
    return min(str(SOCKET), os.path.relpath(SOCKET), key=len)


def check_streams(client: Any, *keys: str) -> None:
    """Raise ValueError if a key holds something else than a stream."""
    for name in keys:
        found = client.type(name).decode()
        if found not in ("stream", "none"):
            raise ValueError(f"{name} holds a {found}, not a stream: rename it or delete it.")


def join(client: redis.Redis, stream: str, group: str) -> None:
    """Make a group of those who read a stream, unless there is one, and the stream if there is none.

    Raises:
        ValueError: its name holds something else.
    """
    check_streams(client, stream)
    try:
        client.xgroup_create(stream, group, id="0", mkstream=True)  # from the first message on
    except ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise


class Patience:
    """A context in which Redis may be away: it says so once, and once that Redis is back."""

    def __init__(self):
        """Begin with a Redis that was there a moment ago."""
        self.is_away = False

    def __enter__(self) -> "Patience":
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> bool:
        """Let a program go on after an error of Redis, and after no other."""
        is_away = isinstance(error, ERRORS)
        if is_away and not self.is_away:
            print(f"Redis is away: {str(error).rstrip('.')}.", file=sys.stderr, flush=True)
        if self.is_away and not error:
            print("Redis is back.", file=sys.stderr, flush=True)
        self.is_away = is_away or (self.is_away and bool(error))
        return is_away


def attend(step: Callable[[], Any], pause: float, last: Callable[[], Any]) -> None:
    """Do a thing with Redis until SIGTERM or Ctrl-C, and wait for a server that is away.

    Args:
        step: does it, and returns something true if there may be more to do at once.
        pause: seconds, when there was nothing to do.
        last: is done at the end.
    """
    ended, patience = until_ended(), Patience()
    while not ended.is_set():
        did = False
        with patience:
            did = step()
        if not did:
            ended.wait(RETRY if patience.is_away else pause)
    with patience:
        last()


def until_ended() -> threading.Event:
    """Return an event that SIGTERM and Ctrl-C set."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    return ended
