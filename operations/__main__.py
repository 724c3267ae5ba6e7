"""`python -m operations`, or `make operate`: the store, the service, the jobs and the actions on one machine.

It makes what is missing (the state's folder, the token of the operator, the key of the senders' hashes, the tables of
the store), starts the programs and starts those again that die. They end with it. It takes Linux.
"""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from typing import BinaryIO

from sqlalchemy.exc import DBAPIError

from engine.supervisor import DRAIN, NOTICE
from operations.guard import end_with
from operations.store import STATE, lock, migrate, open_store

PROGRAMS = ("jobs", "web", "spool", "actions")  # in the order of their end: what was scored is stored, then acted on
TICK = 0.5  # seconds between two looks at them
LONGEST_PAUSE = 30  # seconds before a program that dies again and again is started again
SETTLED = 60  # seconds after which it counts as one that does not
PATIENCE = NOTICE + DRAIN + 10  # seconds that a program may take to end


class Program:
    """One of the programs, which is started again when it dies."""

    def __init__(self, name: str, lock: BinaryIO, *arguments: str, **environment: str):
        """Start `python -m operations.<name>`, which holds the lock on the state as long as it lives."""
        self.name, self.lock, self.deaths = name, lock, 0
        self.arguments, self.environment = arguments, environment
        self.start()

    def start(self) -> None:
        """Start it, out of reach of Ctrl-C, which is for this process alone."""
        self.started, self.due = time.monotonic(), None
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"operations.{self.name}", *self.arguments],
            env={**os.environ, **self.environment},
            pass_fds=[self.lock.fileno()],
            process_group=0,
            preexec_fn=partial(end_with, os.getpid(), signal.SIGTERM),
        )

    def look(self) -> int | None:
        """Start it again if it has died and its pause is over; return the status of one that has just died."""
        status, now = self.process.poll(), time.monotonic()
        if status is None or (self.due and now < self.due):
            return None
        if self.due:
            self.start()
            return None
        self.deaths = 1 if now - self.started > SETTLED else self.deaths + 1
        self.due = now + min(2 ** (self.deaths - 1), LONGEST_PAUSE)
        return status

    def end(self) -> None:
        """Let it finish what it has in hand."""
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main() -> int:
    """Run the programs until SIGTERM or Ctrl-C; return the status to exit with."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        held = lock_state()
        (STATE / "server.pid").unlink(missing_ok=True)  # of one that was killed
        for name in ("token", "key"):
            variable = f"OPERATIONS_{name.upper()}"
            os.environ[variable] = os.environ.get(variable) or read_secret(name)
        engine = open_store()
        migrate(engine)
        engine.dispose()
    except DBAPIError as error:
        print(f"Cannot start: {str(error.orig).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"Cannot start: {error}", file=sys.stderr)
        return 1
    print(f"The operator's page is /operations; it asks for the token that lies in {STATE / 'token'}", flush=True)
    programs, refused = [Program(name, held) for name in PROGRAMS], False
    while not ended.wait(TICK) and not refused:
        for program in programs:
            status = program.look()
            if status is not None:
                # Whatever keeps the service from its start, such as a port that is taken, it has said in a sentence.
                refused |= program.name == "web" and status > 0 and not (STATE / "server.pid").exists()
                print(f"{program.name} has ended with status {status}.", file=sys.stderr, flush=True)
    for program in programs:
        program.end()
    held.close()
    return int(refused)


def lock_state() -> BinaryIO:
    """Lock the state's folder, which is made if there is none, for this process and its programs.

    Raises:
        OSError: it cannot be had.
        ValueError: others hold it.
    """
    STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = open(STATE / "lock", "wb")  # noqa: SIM115
    if not lock(held):
        held.close()
        raise ValueError(f"another one runs on {STATE}, or is about to end")
    return held


def read_secret(name: str) -> str:
    """Return a secret from its file in the state's folder, which nobody else may read; make one if there is none."""
    path = STATE / name
    if not path.exists():
        hidden = path.with_suffix(".new")
        hidden.touch(mode=0o600)
        hidden.write_text(secrets.token_urlsafe(24), encoding="utf-8")
        hidden.rename(path)
    return path.read_text(encoding="utf-8").strip()


if __name__ == "__main__":
    sys.exit(main())
