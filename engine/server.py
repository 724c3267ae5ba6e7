"""The production server: one port, and as many processes as there are cores."""

import math
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from granian import Granian
from granian.constants import Interfaces
from granian.log import LogLevels

from engine.metrics import count_together
from engine.supervisor import BACKLOG, DRAIN, THREADS, Supervisor

LINUX = sys.platform == "linux"
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of the control group of a container: microseconds, of how many


def serve(load: Callable[[], Any]) -> None:
    """Serve a WSGI application until SIGTERM or Ctrl-C; requests in flight are answered before it ends.

    HOST, PORT and WORKERS in the environment set its address, its port and its number of processes. Where it
    cannot serve, the program ends with one sentence that says why.

    Args:
        load: returns a new application. It is called before the workers fork, so that they share its memory, and
            again at SIGHUP; where that fails, the workers keep the application they have.
    """
    for early in (signal.SIGINT, signal.SIGTERM):  # until the server takes them over
        signal.signal(early, lambda *_: sys.exit())
    host = os.environ.get("HOST") or "127.0.0.1"
    try:
        port, workers = read_environment("PORT", 5000), read_environment("WORKERS", count_cores())
        if not LINUX:
            serve_alone(load, host, port)
            return
        multiprocessing.set_start_method("fork", force=True)
        count_together(2 * workers)  # each may have its successor beside it
        app = load()
        address, sockets = listen(host, port, workers)
        print(f"Serving on http://{address}:{port} with {workers} workers, Ctrl-C to stop", flush=True)
        Supervisor(sockets, load, app).serve()
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"Cannot serve on {host}: {error}")


def serve_alone(load: Callable[[], Any], host: str, port: int) -> None:
    """Serve by one process that nobody watches over: all else takes Linux, but a laptop should do to try it."""
    load()  # what is wrong is said here, and not by a process that granian starts
    print(f"Serving on http://{host}:{port} without supervision, which takes Linux; Ctrl-C to stop", flush=True)
    options = {"blocking_threads": THREADS, "workers_kill_timeout": DRAIN, "log_level": LogLevels.error}
    Granian("app", host, port, interface=Interfaces.WSGI, **options).serve(target_loader=load, wrap_loader=False)


def count_cores() -> int:
    """Return how many cores this process may use: those it is bound to, within the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if LINUX else os.cpu_count()
    with suppress(OSError, ValueError):  # no control group of version 2, or one without a quota
        quota, period = QUOTA.read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def read_switch(name: str) -> bool:
    """Return whether something is on in the environment, as it is by default.

    Raises:
        ValueError: it is neither on nor off.
    """
    value = os.environ.get(name) or "on"
    if value not in ("on", "off"):
        raise ValueError(f"{name} must be on or off, not {value!r}")
    return value == "on"


def read_environment(name: str, default: int) -> int:
    """Return a positive whole number from the environment.

    Raises:
        ValueError: it is something else.
    """
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name} must be a positive whole number, not {value!r}")
    return int(value)


def listen(host: str, port: int, number: int) -> tuple[str, list[socket.socket]]:
    """Listen to a port by several sockets, among which the kernel spreads new connections.

    Returns:
        The address, as it is written in a URL, and the sockets.

    Raises:
        OSError, OverflowError: the address cannot be had, or another program has the port.
    """
    v6 = ":" in host
    family = socket.AF_INET6 if v6 else socket.AF_INET
    # Whoever has all addresses of IPv6 has those of IPv4.
    bind = partial(socket.create_server, family=family, backlog=BACKLOG, dualstack_ipv6=v6)
    with bind((host, port)) as alone:  # sockets that share a port share it with other programs too
        address = alone.getsockname()[0]
    sockets = [bind((address, port), reuse_port=True) for _ in range(number)]
    return f"[{address}]" if v6 else address, sockets
