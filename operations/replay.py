"""`make stream`: messages are replayed through a broker, two scorers, the store and a subscriber on this machine.

The broker is the server that REDIS_URL names, or else one that runs as long as this does. The programs are those that
run on their own, on one machine or many: `operations.publish`, `stream`, `keep` and `takedowns`.
"""

import argparse
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from engine.server import read_environment
from operations.__main__ import Program
from operations.broker import Patience, connect, key, read_params, until_ended
from operations.guard import end_with
from operations.own_redis import own_server
from operations.publish import parse_rate
from operations.store import ROOT, STATE, lock
from operations.tally import Tally

SCORERS = 2
EVERY = 200  # messages taken down, for one that is printed
TICK = 0.1  # seconds from one look to the next
START = 90  # seconds in which the scorers must share the partitions
BEHIND = 30  # seconds without an answer after which no more is expected


def replay(file: Path, rate: str, count: int, held: BinaryIO, server: subprocess.Popen | None) -> str:
    """Replay messages until all are answered, or until SIGTERM or Ctrl-C.

    Args:
        file: of the messages.
        rate: at which they are published, as `operations.publish` takes it.
        count: of messages.
        held: the lock on the state.
        server: of Redis, if it is one of its own.

    Returns:
        The table of what became of them.

    Raises:
        ValueError: it cannot go on; the message is one sentence.
    """
    ended, patience, programs = until_ended(), Patience(), []
    name, partitions = secrets.token_hex(4), read_params()["stream"]["partitions"]
    client = connect(partitions)
    leases = [key("lease", partition) for partition in range(partitions)]

    def wait(condition: Callable[[], Any], seconds: float = math.inf) -> None:
        """Wait until a condition holds, there has been no answer for some time, or somebody has seen enough."""
        last = time.monotonic()
        while not ended.wait(TICK) and time.monotonic() < last + seconds:
            with patience:
                if tally.step():
                    last = time.monotonic()
                if condition():
                    break
            for program in programs:
                status = program.look()
                if status and status > 0:
                    raise ValueError(f"{program.name} cannot run, so the stream ends.")
            if server and server.poll() is not None:
                raise ValueError("Redis has been ended: what is in its streams waits for the next make stream.")

    with ExitStack() as stack:
        tally = Tally(client, partitions, name)
        stack.callback(tally.close)
        programs += [Program("takedowns", held, "--every", str(EVERY)), Program("keep", held)]
        first = read_environment("METRICS_PORT", 1) if os.environ.get("METRICS_PORT") else None
        ports = [{"METRICS_PORT": str(first + i)} if first else {} for i in range(SCORERS)]
        programs += [Program("stream", held, **port) for port in ports]
        for program in programs:
            stack.callback(program.end)
        print(f"{SCORERS} scorers, the store and a subscriber start.", flush=True)
        wait(lambda: None not in (have := {client.get(lease) for lease in leases}) and len(have) >= SCORERS, START)
        publisher = subprocess.Popen(
            [sys.executable, "-m", "operations.publish", file, "--rate", rate, "--count", str(count), "--name", name],
            process_group=0,  # Ctrl-C is for this process, which ends it
            preexec_fn=partial(end_with, os.getpid(), signal.SIGTERM),
        )
        stack.callback(publisher.wait)
        stack.callback(publisher.terminate)
        wait(lambda: publisher.poll() is not None)
        publisher.terminate()
        if publisher.wait() > 0:
            raise ValueError("The publisher cannot run, so the stream ends.")
        ended.clear()
        wait(lambda: tally.is_complete() and not tally.count_waiting(), BEHIND)
        return tally.render()


def main() -> None:
    """Replay the file that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m operations.replay", description=__doc__)
    parser.add_argument(
        "file", type=Path, nargs="?", default=ROOT / "data" / "today.tsv", help="(default: %(default)s)"
    )
    parser.add_argument("--rate", default="100000/min", help="at which it is published (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="for how long, over and over (default: 60)")
    args = parser.parse_args()
    try:
        count = max(1, round(parse_rate(args.rate) * args.seconds))
        STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(STATE / "stream.lock", "wb") as held, ExitStack() as stack:
            if not lock(held):
                raise ValueError(f"Another make stream runs on {STATE}, or is about to end.")
            server = None if os.environ.get("REDIS_URL") else stack.enter_context(own_server(held))
            print(replay(args.file, args.rate, count, held, server))
            print(
                "The scores are in the store: make operate shows them. For more: make stream RATE=200000/min SECONDS=20"
            )
    except (argparse.ArgumentTypeError, OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
