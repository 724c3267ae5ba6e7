"""The production server: as many processes as there are cores, one port, an end that loses no request."""

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import joblib
from granian import Granian
from granian.constants import Interfaces
from granian.log import LogLevels

THREADS = 256  # of each worker: a slow client occupies one until its request has come in


def serve(load: Callable[[], Any]) -> None:
    """Serve a WSGI application until SIGTERM or Ctrl-C; requests in flight are answered before it ends.

    HOST, PORT and WORKERS in the environment set its address, its port and its number of processes. Where it
    cannot serve, the program ends with one sentence that says why.

    Args:
        load: returns the application of a process, the same one whenever it is called again. It is called
            once before the workers fork, so that they share its memory.
    """
    for early in (signal.SIGINT, signal.SIGTERM):  # until the server takes them over
        signal.signal(early, lambda *_: sys.exit())
    host = os.environ.get("HOST") or "127.0.0.1"
    try:
        port, workers = read_environment("PORT", 5000), read_environment("WORKERS", joblib.cpu_count())
        # Each request counts into this folder, and the other folders of a container may be read-only.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix=f"spam-metrics-{os.getpid()}-", dir=memory) as counts:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = counts
            load()
            # The server shares its port with whoever else has it, so nobody else may; and it takes no names.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.create_server((host, port), family=family) as probe:
                address = probe.getsockname()[0]
            shown = f"[{address}]" if family == socket.AF_INET6 else address
            print(f"Serving on http://{shown}:{port} with {workers} workers, Ctrl-C to stop", flush=True)
            Granian(
                "app",
                address=address,
                port=port,
                interface=Interfaces.WSGI,
                workers=workers,
                blocking_threads=THREADS,
                respawn_failed_workers=True,
                # Seconds: the largest legal batch takes one, and some clients never send the rest of theirs.
                workers_kill_timeout=5,
                log_level=LogLevels.error,
            ).serve(target_loader=load, wrap_loader=False)
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"Cannot serve on {host}: {error}")


def read_environment(name: str, default: int) -> int:
    """Return a positive whole number from the environment.

    Raises:
        ValueError: it is something else.
    """
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name} must be a positive whole number, not {value!r}")
    return int(value)
