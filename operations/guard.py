"""A process that never outlives its owner, nor its lease, and takes all its descendants with it.

Between the owner and the command stands a guard, `python -m operations.guard DEADLINE COMMAND`. It kills the command
when the owner ends, however that happens, and when the owner has not put off the deadline. Kernels of notebooks lead
process groups of their own, so the guard adopts every descendant whose parent has died, and kills those too.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[1]
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TICK = 1  # seconds between two looks at the clock, which may jump while the machine sleeps
NUMBER = 8  # bytes of a deadline
KILLED = 128 + signal.SIGKILL  # status of a command that was


class Guarded:
    """A command that runs under a guard, as its owner sees it."""

    def __init__(self, command: Sequence[str], deadline: int, log: BinaryIO, **environment: str):
        """Start a command in the folder of the project.

        Args:
            command: the program and its arguments.
            deadline: when it is killed unless that is put off, in microseconds since 1970.
            log: file for what it prints.
            environment: variables that it gets besides those of this process.

        Raises:
            OSError: the machine has no room for another process.
        """
        self.process = subprocess.Popen(
            [sys.executable, "-m", "operations.guard", str(deadline), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            bufsize=0,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def put_off(self, deadline: int) -> None:
        """Have the command killed at a later time, in microseconds since 1970."""
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self.process.stdin.write(deadline.to_bytes(NUMBER))

    def poll(self) -> int | None:
        """Return the status the command ended with, 128 and more for a signal, or None while it runs."""
        status = self.process.poll()
        return status if status is None or status >= 0 else 128 - status

    def end(self) -> None:
        """Kill the command and all its descendants, and wait until they have gone."""
        self.process.stdin.close()
        self.process.wait()


def end_with(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Have this process ended by a signal when its parent ends; called after a fork, with the parent's number."""
    _libc.prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), by)


_libc = ctypes.CDLL(None)


def _guard(deadline: int, command: list[str]) -> int:
    """Run a command until it ends, its owner ends or its deadline is over; return its status."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(KILLED))
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=partial(end_with, os.getpid()))
        ended = os.pidfd_open(child.pid)
        while time.time_ns() // 1000 < deadline:
            ready, _, _ = select.select([0, ended], [], [], TICK)
            if ended in ready:
                status = child.wait()
                return status if status >= 0 else 128 - status
            if ready:
                message = os.read(0, NUMBER)
                if not message:
                    return KILLED
                deadline = int.from_bytes(message)
        print("Ended: its worker could not renew its lease.", flush=True)
        return KILLED
    finally:
        _end_children()


def _end_children() -> None:
    """Kill the children of this process, then those that they leave to it, until there are none."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    with contextlib.suppress(ChildProcessError):
        while True:
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
            os.wait()


if __name__ == "__main__":
    sys.exit(_guard(int(sys.argv[1]), sys.argv[2:]))
