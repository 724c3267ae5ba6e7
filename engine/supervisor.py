"""The workers of the production server, and the loop that watches over them.

The parent has loaded the model and listens to the port; the workers share both by fork. A worker that has died or
hangs gets a successor, and at SIGHUP each gets one with the model that lies in models/ by then. The socket of a
worker outlives it, so who waits there is served by the successor. A worker that is to end closes each connection
with its answer, so that nobody sends a request into one that is about to go.
"""

import ctypes
import gc
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from granian import Granian
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.net import SocketHolder

from engine.metrics import count_as
from engine.work import DEADLINE, favour_light_work

THREADS = 256  # of each worker: a slow client occupies one until its request has come in
CONNECTIONS = 4096  # of each worker; one that waits for its next request costs 12 KB
BACKLOG = 1024  # of each worker: connections that it has yet to accept
IDLE = 10  # seconds that a client may take to its next request, head and all, before it is hung up on
NOTICE = 1  # seconds for which a worker that is to end still takes requests
LINGER = 0.5  # seconds for what comes on connections that it has accepted, more than a TICK
DRAIN = DEADLINE + 3  # seconds for the requests in hand
PATIENCE = 10  # seconds of silence after which a worker is taken for dead
RETRY = 1  # seconds at least from one start of a worker to the next in its place
TICK = 0.25  # seconds between two looks at the workers, and between two signs of life
LEAVING, CLOSED = 1, 2  # states of a worker that is to end: it closes its connections, it accepts no more
PR_SET_PDEATHSIG = 1

# What parent and workers tell each other: whether the service is to end, then two bytes for each worker, a count
# that goes on while it lives, and its state. Memory of this process alone, unless there are workers.
_shared: bytearray | mmap.mmap = bytearray(1)


def draining() -> bool:
    """Tell whether the service is about to end."""
    return _shared[0] != 0


class Supervisor(Granian):
    """Granian's server with a loop of its own, which keeps the workers alive."""

    def __init__(self, sockets: list[socket.socket], load: Callable[[], Any], app: Any):
        """Prepare to serve `app` by one worker for each socket, and after a SIGHUP what `load` returns then."""
        import resource  # not on Windows, where this module is imported too

        global _shared
        _shared = mmap.mmap(-1, 1 + 4 * len(sockets))  # each worker may have its successor beside it
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # usually 1024, and granian spins where it ends
        super().__init__(
            "app",
            interface=Interfaces.WSGI,
            http=HTTPModes.http1,  # where it looks out for HTTP/2, it waits without end for the first byte
            http1_settings=HTTP1Settings(header_read_timeout=IDLE * 1000),
            workers=len(sockets),
            blocking_threads=THREADS,
            backpressure=CONNECTIONS,
            log_level=LogLevels.error,
        )
        self.sockets, self.load, self.app = sockets, load, app
        self.leaving, self.steps = [], []

    def _init_shared_socket(self):
        self._sso = None  # granian's own, which would go with its worker, and who waits there with it

    def signal_handler_interrupt(self, *args, **kwargs):
        _shared[0] = 1
        for worker in self.wrks:  # Ctrl-C reaches them too, and then they end as they should
            worker.interrupt_by_parent = True
        super().signal_handler_interrupt()

    def _spawn_worker(self, idx, target, callback_loader):
        taken = {worker.place for worker in [*self.wrks[:idx], *self.wrks[idx + 1 :], *self.leaving]}
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
                    self._after(NOTICE, partial(self._close, worker))
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

    def _after(self, seconds, function):
        """Let the loop call a function, a time from now."""
        self.steps.append((time.monotonic() + seconds, function))

    def _start(self, idx, target):
        """Start a worker in the place of another."""
        self.wrks[idx] = self._spawn_worker(idx, target, None)
        self.wrks[idx].start()

    def _listen_to(self, worker, passed):
        """Kill a worker that has given no sign of life for too long."""
        count = _shared[2 * worker.place + 1]
        worker.silence = worker.silence + passed if count == worker.count else 0
        worker.count = count
        if worker.silence > PATIENCE:
            _say(f"Worker {worker._id()} is replaced: it gave no sign of life for {PATIENCE} s")
            worker.kill()
            worker.silence = 0  # until it has gone

    def _replace_all(self, target):
        """Give each worker a successor with a newly loaded application, if there is one."""
        try:
            self.app = self.load()
        except Exception as error:  # whatever is wrong with it, the old one is not
            _say(f"The model in models/ is refused, the old one goes on: {error}")
            return
        gc.collect()  # the old one, which otherwise stays for long
        for idx, worker in enumerate(list(self.wrks)):
            self._dismiss(worker, CLOSED)
            self._start(idx, target)

    def _dismiss(self, worker, state):
        """Give a worker notice, then time for what it has in hand, then an end."""
        worker.interrupt_by_parent = True
        _shared[2 * worker.place + 2] = state
        self.leaving.append(worker)
        self._after(NOTICE + LINGER, worker.terminate)
        self._after(NOTICE + DRAIN, worker.kill)

    def _close(self, worker):
        """Turn away new connections to a worker."""
        self.sockets[worker.idx].close()
        _shared[2 * worker.place + 2] = CLOSED


class Worker:
    """The application of one worker, which closes the connections of a worker that is to end."""

    def __init__(self, wsgi_app: Callable[..., Iterable[bytes]], place: int):
        """Answer by `wsgi_app`, as the worker of a place in the shared memory."""
        self.wsgi_app, self.state = wsgi_app, 2 * place + 2

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request."""
        if not _shared[self.state]:
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
    favour_light_work()
    threading.Thread(target=_live, args=(place, sockets[idx].fileno()), daemon=True).start()
    return Worker(app, place)


def _live(place: int, listener: int) -> None:
    """Count on while this process can, until it is to accept no more connections."""
    while _shared[2 * place + 2] != CLOSED:
        _shared[2 * place + 1] = (_shared[2 * place + 1] + 1) % 256
        time.sleep(TICK)
    # When told to end, granian drops those that it has just accepted. So before that, nobody knocks any more.
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind("")
        nobody.listen()
        nobody.setblocking(False)
        os.dup2(nobody.fileno(), listener)


def _say(sentence: str) -> None:
    """Print a sentence as one line for the operator."""
    print(" ".join(sentence.split()), file=sys.stderr, flush=True)
