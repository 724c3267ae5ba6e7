"""Send bad input to the service, and count what comes of it."""

import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import psutil

from benchmarks.bench import family, resident, say
from benchmarks.floods import HOST, Answers, Target, judge
from benchmarks.inputs import Input, make_input

HANG = 10  # seconds without an answer
CLIENTS = 6
EXAMPLES = 5  # of each kind of fault, which are kept
# What the interface promises not to do: a fault inside, no answer in time, a request of good form left unanswered.
FAULTS = ("5xx", "hang", "dropped")


class Client:
    """Sends inputs, the well-framed ones over one connection."""

    def __init__(self, target: Target):
        """Send to a target."""
        self.target, self.connection = target, None

    def open(self) -> None:
        """Open the connection anew."""
        self.close()
        self.connection = self.target.connect(seconds=HANG)
        self.answers = Answers(self.connection)

    def close(self) -> None:
        """Close the connection."""
        if self.connection:
            self.connection.close()
        self.connection = None

    def send(self, item: Input) -> str:
        """Send an input and return what came of it: a class of statuses, "closed", or one of `FAULTS`."""
        # A server may close a connection that is idle between two requests: once more over another one.
        for _ in range(2):
            try:
                return self.send_whole(item) if item.answers else self.send_broken(item)
            except TimeoutError:
                self.close()
                return "hang"
            except (OSError, HTTPException):
                self.close()
        return "dropped"

    def send_whole(self, item: Input) -> str:
        """Send requests of good form; raise where they are not all answered."""
        if not self.connection:
            self.open()
        with suppress(ConnectionError):  # refused before it was read to its end: the answer says so
            self.connection.sendall(item.content)
        outcomes = []
        for _ in range(item.answers):
            answer = self.answers.read()
            outcomes.append(judge(answer))
            if answer.will_close:
                self.close()
                break
        return max(outcomes, key=FAULTS.__contains__)

    def send_broken(self, item: Input) -> str:
        """Send anything over a connection of its own, and say that no more will come; or just leave."""
        outcomes = []
        with self.target.connect(seconds=HANG) as connection:
            with suppress(ConnectionError):
                connection.sendall(item.content)
            if item.leaves:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return "closed"
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_WR)
            answers = Answers(connection)
            try:
                while True:
                    outcomes.append(judge(answers.read()))
            except TimeoutError:
                return "hang"
            except (OSError, HTTPException):
                return max(outcomes, key=FAULTS.__contains__, default="closed")


@dataclass
class Found:
    """What a hunt found: outcomes by kind of input, examples of faults, and what became of the server."""

    counts: dict[str, Counter] = field(default_factory=dict)
    examples: list[tuple[str, str, bytes]] = field(default_factory=list)
    seconds: float = 0
    ended: int = 0
    tracebacks: int = 0
    before: float = 0
    after: float = 0

    def add(self, item: Input, outcome: str) -> None:
        """Count an input."""
        self.counts.setdefault(item.kind, Counter())[outcome] += 1
        if outcome in FAULTS and sum(kept[:2] == (item.kind, outcome) for kept in self.examples) < EXAMPLES:
            self.examples.append((item.kind, outcome, item.content[:300]))


def send_all(target: Target, count: int, seconds: float) -> Found:
    """Send so many inputs from several clients side by side, but for no more than so many seconds."""
    found, lock, deadline = Found(), threading.Lock(), time.monotonic() + seconds

    def work(seed: int) -> None:
        rng, client = random.Random(seed), Client(target)
        for _ in range(count // CLIENTS + (seed < count % CLIENTS)):
            if time.monotonic() > deadline:
                break
            item = make_input(rng)
            outcome = client.send(item)
            with lock:
                found.add(item, outcome)
        client.close()

    with ThreadPoolExecutor(CLIENTS) as pool:
        working = [pool.submit(work, seed) for seed in range(CLIENTS)]
        while wait(working, 20).not_done:
            say(f"{sum(map(Counter.total, found.counts.values())):,} inputs of {count:,}")
        for client in working:
            client.result()
    return found


def run_schemathesis(target: Target, folder: Path, examples: int, found: Found) -> None:
    """Have schemathesis derive requests from /openapi.json, and count them and what it found."""
    report = folder / "schemathesis.json"
    (folder / "schemathesis.toml").write_text(
        '[checks.negative_data_rejection]\nexpected-statuses = ["400", "405", "413", "415"]\n'
    )
    subprocess.run(
        [
            *(Path(sys.executable).with_name("schemathesis"), "run", f"http://{HOST}:{target.port}/openapi.json"),
            *("--seed", "1", "--max-examples", str(examples), "--phases", "examples,coverage,fuzzing"),
            *("--continue-on-failure", "--no-shrink", "--request-timeout", str(HANG), "--report-json-path", report),
        ],
        cwd=folder,
        capture_output=True,
        timeout=300,
    )
    results = json.loads(report.read_text(encoding="utf-8"))
    failed = results["test_cases"]["with_failures"] + results["test_cases"]["errored"]
    found.counts["schemathesis"] = Counter(passed=results["test_cases"]["generated"] - failed, failed=failed)
    for failure in [*results["failures"], *results["errors"]][:EXAMPLES]:
        found.examples.append(("schemathesis", "failed", json.dumps(failure).encode()[:300]))


def hunt(target: Target, process_id: int, log: Path, folder: Path, count: int, examples: int) -> Found:
    """Hunt for faults.

    Args:
        target: the service.
        process_id: of its parent process.
        log: what it writes.
        folder: for files that are not kept.
        count: of inputs, besides those of schemathesis.
        examples: for each operation and phase of schemathesis.
    """
    begun, workers, before, left = time.monotonic(), set(family(process_id)), resident(process_id), set()
    found = send_all(target, count, 600)
    run_schemathesis(target, folder, examples, found)
    found.seconds = time.monotonic() - begun
    with suppress(psutil.Error):  # none is left
        left, found.after = set(family(process_id)), resident(process_id)
    found.ended = len(workers - left)
    written = log.read_text(encoding="utf-8", errors="replace")
    found.tracebacks = written.count("Traceback") + written.count("panicked")
    found.before = before
    return found
