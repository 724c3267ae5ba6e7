"""The production server: one port, as many processes as there are cores, watched over while it serves.

The parent binds the port, loads the model and forks the workers, which share both. Then it only watches: a worker
that has died or hangs gets a successor, and at SIGHUP each gets one with the model that lies in models/ by then. A
worker that is to end takes requests for another moment, but each answer closes its connection, so that nobody
sends a request into one that is about to go.
"""

import ctypes
import mmap
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import joblib
from granian import Granian
from granian.constants import HTTPModes, Interfaces
from granian.log import LogLevels
from granian.net import SocketHolder

from engine.metrics import count_as, count_together

THREADS = 256  # of each worker: a slow client occupies one until its request has come in
BACKLOG = 1024  # connections that wait for a worker, whichever it will be
NOTICE = 1  # seconds for which a worker that is to end still takes requests
LINGER = 0.5  # seconds for what comes on connections that it has accepted, more than a TICK
DRAIN = 8  # seconds for the requests in hand: more than the deadline of any
PATIENCE = 10  # seconds of silence after which a worker is taken for dead
RETRY = 1  # seconds at least from one start of a worker to the next in its place
TICK = 0.25  # seconds between two looks at the workers, and between two signs of life
LEAVING, CLOSED = 1, 2  # states of a worker that is to end: it closes its connections, it accepts no more
PR_SET_PDEATHSIG = 1

# What parent and workers tell each other: whether the service is to end, then for each process a count that goes on
# while it lives, and its state. Memory of this process alone, until serve() shares it.
_shared: bytearray | mmap.mmap = bytearray(1)


def serve(load: Callable[[], Any]) -> None:
    """Serve a WSGI application until SIGTERM or Ctrl-C; requests in flight are answered before it ends.

    HOST, PORT and WORKERS in the environment set its address, its port and its number of processes. Where it
    cannot serve, the program ends with one sentence that says why.

    Args:
        load: returns a new application. It is called before the workers fork, so that they share its memory, and
            again at SIGHUP; where that fails, the workers keep the application they have.
    """
    global _shared
    for early in (signal.SIGINT, signal.SIGTERM):  # until the server takes them over
        signal.signal(early, lambda *_: sys.exit())
    host = os.environ.get("HOST") or "127.0.0.1"
    try:
        port, workers = read_environment("PORT", 5000), read_environment("WORKERS", joblib.cpu_count())
        processes = 2 * workers  # each may have its successor beside it
        multiprocessing.set_start_method("fork", force=True)
        with count_together(processes):
            app = load()
            v6 = ":" in host
            listen = partial(
                socket.create_server,
                (host, port),
                family=socket.AF_INET6 if v6 else socket.AF_INET,
                backlog=BACKLOG,
                dualstack_ipv6=v6,  # whoever has all addresses of IPv6 has those of IPv4
            )
            with listen() as probe:  # the workers share the port among them, but with nobody else
                address = probe.getsockname()[0]
            # One for each, so that the kernel spreads the load. They stay open here: who waits there when a worker
            # ends is served by its successor.
            sockets = [listen(reuse_port=True) for _ in range(workers)]
            shown = f"[{address}]" if v6 else address
            print(f"Serving on http://{shown}:{port} with {workers} workers, Ctrl-C to stop", flush=True)
            _shared = mmap.mmap(-1, 1 + 2 * processes)
            Supervisor(sockets, load, app).serve()
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


def draining() -> bool:
    """Tell whether the service is about to end."""
    return _shared[0] != 0


class Supervisor(Granian):
    """Granian's server with a loop of its own, which keeps its workers alive, and sockets that outlive them."""

    def __init__(self, sockets: list[socket.socket], load: Callable[[], Any], app: Any):
        """Prepare to serve `app` by one worker for each socket, and after a SIGHUP what `load` returns then."""
        super().__init__(
            "app",
            interface=Interfaces.WSGI,
            http=HTTPModes.http1,  # where it tells HTTP/2 apart, it drops connections that it has just accepted
            workers=len(sockets),
            blocking_threads=THREADS,
            log_level=LogLevels.error,
        )
        self.sockets, self.load, self.app = sockets, load, app
        self.leaving, self.steps = [], []

    def _init_shared_socket(self):
        self._sso = None  # granian's own, which it closes with the worker that it is for

    def signal_handler_interrupt(self, *args, **kwargs):
        _shared[0] = 1
        for worker in self.wrks:  # Ctrl-C reaches them too, and then they end as they should
            worker.interrupt_by_parent = True
        super().signal_handler_interrupt()

    def _spawn_worker(self, idx, target, callback_loader):
        taken = {worker.place for worker in [*self.wrks, *self.leaving] if worker.is_alive()}
        place = next(place for place in range(2 * self.workers) if place not in taken)
        self._shd = SocketHolder(self.sockets[idx].fileno(), False, BACKLOG)
        begin = partial(_begin, place, os.getpid(), self.sockets, idx, self.app)
        worker = super()._spawn_worker(idx, target, begin)
        worker.place, worker.count, worker.silence = place, None, 0
        _shared[2 * place + 2] = 0
        return worker

    def _serve_loop(self, spawn_target, target_loader):
        looked = time.monotonic()
        while self.wrks or self.leaving:
            self.main_loop_interrupt.wait(TICK)
            self.main_loop_interrupt.clear()
            now = time.monotonic()
            # Where more has passed, this process was stopped, and perhaps the workers with it.
            passed, looked = min(now - looked, 2 * TICK), now
            if self.interrupt_signal:
                for worker in self.wrks:
                    self._dismiss(worker, LEAVING)
                    self._take_steps((NOTICE, partial(self._close, worker)))
                self.wrks = []
            elif self.reload_signal and not self.leaving:
                self.reload_signal = False
                self._replace_all(spawn_target)
            for idx, worker in enumerate(self.wrks):
                if worker.is_alive():
                    self._listen_to(worker, passed)
                elif now > worker.birth + RETRY:
                    self._start(idx, spawn_target)
            for step in [step for step in self.steps if step[0] <= now]:
                self.steps.remove(step)
                step[1]()
            self.leaving = [worker for worker in self.leaving if worker.is_alive()]
        self.interrupt_children.clear()  # or the program would end with status 1 for each that died

    def _start(self, idx, target):
        """Start a worker in the place of another."""
        self.wrks[idx] = self._spawn_worker(idx, target, None)
        self.wrks[idx].start()

    def _dismiss(self, worker, state):
        """Give a worker notice, then time for what it has in hand, then an end."""
        worker.interrupt_by_parent = True
        _shared[2 * worker.place + 2] = state
        self.leaving.append(worker)
        self._take_steps((NOTICE + LINGER, worker.terminate), (NOTICE + DRAIN, worker.kill))

    def _close(self, worker):
        """Turn away new connections to a worker."""
        self.sockets[worker.idx].close()
        _shared[2 * worker.place + 2] = CLOSED

    def _take_steps(self, *steps):
        """Let the loop call functions, each after its number of seconds."""
        now = time.monotonic()
        self.steps += [(now + seconds, function) for seconds, function in steps]

    def _replace_all(self, target):
        """Give each worker a successor with a newly loaded application, if there is one."""
        try:
            self.app = self.load()
        except Exception as error:  # whatever is wrong with it, the old one is not
            _say(f"The model in models/ is refused, the old one goes on: {error}")
            return
        for idx, worker in enumerate(list(self.wrks)):
            self._start(idx, target)
            self._dismiss(worker, CLOSED)

    def _listen_to(self, worker, passed):
        """Kill a worker that has given no sign of life for too long."""
        count = _shared[2 * worker.place + 1]
        worker.silence = worker.silence + passed if count == worker.count else 0
        worker.count = count
        if worker.silence > PATIENCE:
            _say(f"Worker {worker._id()} is replaced: it gave no sign of life for {PATIENCE} s")
            worker.kill()


class Worker:
    """The application of one worker; it closes the connections of a worker that is to end."""

    def __init__(self, wsgi_app: Callable[..., Iterable[bytes]], place: int):
        """Answer by `wsgi_app`, as the process of a place in the shared memory."""
        self.wsgi_app, self.flag = wsgi_app, 2 * place + 2

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request."""
        if not _shared[self.flag]:
            return self.wsgi_app(environ, start_response)

        def start_and_close(status: str, headers: list[tuple[str, str]], *args: Any) -> Callable[[bytes], Any]:
            return start_response(status, [*headers, ("Connection", "close")], *args)

        return self.wsgi_app(environ, start_and_close)


def _begin(place: int, parent: int, sockets: list[socket.socket], idx: int, app: Any) -> Worker:
    """Make this process the worker of a place in the shared memory, and return its application."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could take this one with it
        os.kill(os.getpid(), signal.SIGKILL)
    for other in sockets[:idx] + sockets[idx + 1 :]:  # they would stay open for as long as this process has them
        other.close()
    count_as(place)
    threading.Thread(target=_live, args=(place, sockets[idx].fileno()), daemon=True).start()
    return Worker(app, place)


def _live(place: int, listener: int) -> None:
    """Count on while this process can, until it is to accept no more connections."""
    while _shared[2 * place + 2] != CLOSED:
        _shared[2 * place + 1] = (_shared[2 * place + 1] + 1) % 256
        time.sleep(TICK)
    # Granian would drop those that it has just accepted. So nobody comes any more before it is told to end.
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind("")
        nobody.listen()
        nobody.setblocking(False)
        os.dup2(nobody.fileno(), listener)


def _say(sentence: str) -> None:
    """Print a sentence as one line for the operator."""
    print(" ".join(sentence.split()), file=sys.stderr, flush=True)
