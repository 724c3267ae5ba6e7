"""Attack a server of this machine with connections, and watch it meanwhile.

Every connection goes to a `Target`: a port of 127.0.0.1 on which a process listens that this program has started.
"""

import http.client
import io
import json
import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.bench import family

HOST = "127.0.0.1"
STRANGER = "127.0.0.2"  # the address of an attacker, who is no gateway to the proxy
PATIENCE = 3  # seconds, in which the operator wants an answer
MESSAGE = json.dumps({"text": "Running ten minutes late, see you at the station"}).encode()


def request(path: str, body: bytes, *headers: str, method: str = "POST", type: str = "application/json") -> bytes:
    """Return an HTTP request of stated length."""
    lines = [f"{method} {path} HTTP/1.1", "Host: spam", f"Content-Length: {len(body)}", *headers]
    if type:
        lines.append(f"Content-Type: {type}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


FLOODS = {
    "idle": request("/score", MESSAGE),
    "stalled": request("/score", MESSAGE)[:-10],
    # Answers of some megabytes, more than the kernel takes off the server's hands.
    "never reading": request("/openapi.json", b"", method="GET", type="") * 400,
}


@cache
def trusting(certificate: Path) -> ssl.SSLContext:
    """Return what takes a certificate for true."""
    return ssl.create_default_context(cafile=certificate)


@dataclass(frozen=True)
class Target:
    """A server that may be attacked: its port, and its certificate where it speaks TLS."""

    port: int
    certificate: Path | None = None

    @classmethod
    def of(cls, url: str, process_id: int, certificate: Path | None = None) -> "Target":
        """Return the target at an address.

        Args:
            url: of the server.
            process_id: of the process, a child of this one, that listens there, or whose children do.
            certificate: what the server identifies itself with.

        Raises:
            ValueError: the address is not one of 127.0.0.1, or another process listens there.
        """
        address = urlsplit(url)
        if address.hostname != HOST:
            raise ValueError(f"only a server on {HOST} may be attacked, not {url}")
        own = psutil.Process().children(recursive=True)
        listening = {
            connection.laddr.port
            for process in family(process_id)
            if process in own
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        if address.port not in listening:
            raise ValueError(f"only a server that this program has started may be attacked, not {url}")
        return cls(address.port, certificate)

    def connect(self, source: str = HOST, seconds: float = PATIENCE, buffer: int = 0) -> socket.socket:
        """Connect.

        Args:
            source: the address of this machine to connect from.
            seconds: how long each wait on the connection may take.
            buffer: of what was received, in bytes; the kernel's choice if 0.

        Raises:
            OSError: there is no connection in that time.
        """
        connection = socket.socket()
        try:
            connection.settimeout(seconds)
            if buffer:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            connection.bind((source, 0))
            connection.connect((HOST, self.port))
            if self.certificate:
                return trusting(self.certificate).wrap_socket(connection, server_hostname=HOST)
        except BaseException:
            connection.close()
            raise
        return connection


class Answers:
    """The answers that come over a connection, one after the other."""

    class Kept(io.BufferedReader):
        """What http.client reads an answer from, and does not close after it."""

        def close(self) -> None:
            """Leave it open: the next answer may be in it already."""

    def __init__(self, connection: socket.socket):
        """Read from a connection."""
        self.stream = self.Kept(socket.SocketIO(connection, "r"), 65536)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return the stream: http.client takes this object for a socket."""
        return self.stream

    def read(self, method: str = "POST") -> http.client.HTTPResponse:
        """Return the next answer, read to its end.

        Raises:
            OSError: it does not come in time, or the connection was reset.
            http.client.HTTPException: the connection is closed, or it is no answer.
        """
        answer = http.client.HTTPResponse(self, method=method)
        answer.begin()
        answer.content = answer.read()
        return answer


def judge(answer: http.client.HTTPResponse) -> str:
    """Return what an answer is: its status, which is "5xx" where it tells of a fault."""
    if answer.status == 503 and answer.getheader("Retry-After"):
        return "503"
    return "5xx" if answer.status >= 500 else f"{answer.status // 100}xx"


def ask(target: Target, content: bytes, source: str = HOST, seconds: float = PATIENCE) -> http.client.HTTPResponse:
    """Send a request over a new connection and return the answer; raise as `Answers.read` does."""
    with target.connect(source, seconds) as connection:
        connection.sendall(content)
        return Answers(connection).read()


@dataclass(frozen=True)
class Watched:
    """What clients saw who asked all the time: how many were answered, refused in words, and neither of it.

    `closed` is the longest time in which nobody was answered or refused, in seconds; `lost` what the others got.
    """

    answered: int
    refused: int
    lost: list[str]
    closed: float

    def __str__(self) -> str:
        """Tell it in a cell of a table."""
        asked = self.answered + self.refused + len(self.lost)
        told = f"{self.answered} of {asked} answered"
        told += f", {self.refused} refused in words" if self.refused else ""
        return f"{told}, {len(self.lost)} lost; closed for {self.closed:.1f} s at most" if self.lost else told


class Watch:
    """Clients beside an attack, who ask one after the other, each time over a new connection."""

    def __init__(self, target: Target, content: bytes = FLOODS["idle"], clients: int = 4, pause: float = 0.05):
        """Ask `target` with the request `content`, over and over again with a pause of so many seconds."""
        self.target, self.content, self.pause = target, content, pause
        self.good, self.lost, self.refused = [], [], 0
        self.ending = threading.Event()
        self.threads = [threading.Thread(target=self.keep_asking) for _ in range(clients)]

    def keep_asking(self) -> None:
        """Ask until the watch ends."""
        while not self.ending.is_set():
            try:
                answer = ask(self.target, self.content)
                if answer.status == 200 or (answer.status in (429, 503) and answer.getheader("Retry-After")):
                    self.refused += answer.status != 200
                    self.good.append(time.monotonic())
                else:
                    self.lost.append(f"status {answer.status}")
            except (OSError, http.client.HTTPException) as error:
                self.lost.append(repr(error))
            self.ending.wait(self.pause)

    def __enter__(self) -> "Watch":
        """Begin."""
        self.begun = time.monotonic()
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """End, and sum up in `seen`."""
        ended = time.monotonic()
        self.ending.set()
        for thread in self.threads:
            thread.join()
        moments = [self.begun, *sorted(moment for moment in self.good if moment < ended), ended]
        closed = max(later - earlier for earlier, later in pairwise(moments))
        self.seen = Watched(len(self.good) - self.refused, self.refused, self.lost, closed)


@contextmanager
def flooded(target: Target, content: bytes, count: int, source: str = STRANGER) -> Iterator[int]:
    """Open connections, send the same over each and read nothing; yield how many got that far, and close them.

    Whoever waits for a connection for a second, or has been at it for 30, gives up.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count + 200 <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count + 200, hard))
    connections, failures, deadline = [], 0, time.monotonic() + 30
    try:
        while len(connections) + failures < count and time.monotonic() < deadline:
            try:
                connection = target.connect(source, 1, buffer=4096)
            except OSError:
                failures += 1
                continue
            connections.append(connection)
            connection.setblocking(False)
            with suppress(OSError):  # it takes no more, or has refused
                connection.send(content)
        yield len(connections)
    finally:
        for connection in connections:
            connection.close()
