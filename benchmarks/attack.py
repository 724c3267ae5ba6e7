"""Attack the service with bad input, with faults, with floods of connections and with heavy clients.

`make attack` runs this, prints the tables and keeps them in build/attack.md. It attacks servers that it has started
itself on 127.0.0.1 and no others, and it ends by itself, within a quarter of an hour on two cores.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from benchmarks.bench import MESSAGES, ROOT, cpu_seconds, describe_machine, load, read_messages, say, write_bodies
from benchmarks.faults import FAULTS, FLOODS_TO_TRY, flood, largest_batch, make_slow_text, served
from benchmarks.floods import HOST, Answers, Target, request
from benchmarks.hunt import EXAMPLES, HANG, Found, hunt
from benchmarks.inputs import FORM, MAKERS
from engine.files import write

REPORT = ROOT / "build" / "attack.md"
INPUTS = 100_000
# For each operation and phase of schemathesis: a few thousand requests in all.
FROM_SCHEMA = 1000
HEAVY_CLIENTS = 4
ROUNDS = 3
SECONDS = 4  # of each measurement beside heavy clients
RATE, CONNECTIONS = 300, 16  # of the client whose time is measured: messages/s
PAUSE = 0.05  # seconds for which a heavy client waits when it was answered 503
RATIO = 10


def list_heavy(target: Target) -> dict[str, list[bytes]]:
    """Return the requests of heavy clients, by what they are."""
    rng = random.Random(0)
    part = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n'
    keys = ",".join(f'"{i:05}":1' for i in range(95_000))
    forms = ((part + b"\r\n") * 20_000, (part + b"\r\n") * 990, part + b"\r\n--y" * 200_000 + b"\r\n")
    texts = (make_slow_text(rng), "\ufdfa" * 10_000)
    return {
        "the largest batch that is taken": [largest_batch(target)],
        "JSON of 95,000 keys": [request("/score", f'{{"text":"x",{keys}}}'.encode())],
        "forms of many parts": [
            request("/score", form + b"--x--\r\n", type="multipart/form-data; boundary=x") for form in forms
        ],
        "forms of 349,000 times %ff": [request("/score", b"text=" + b"%ff" * 349_000, type=FORM)],
        "`/explain` of 10,000 characters": [request("/explain", json.dumps({"text": text}).encode()) for text in texts],
    }


@contextmanager
def heavy_clients(target: Target, contents: list[bytes]) -> Iterator[Counter]:
    """Run heavy clients, and yield the counts of what they are answered."""
    statuses, ending = Counter(), threading.Event()

    def work() -> None:
        connection, sent = None, 0
        while not ending.is_set():
            try:
                if not connection:
                    connection = target.connect(seconds=HANG)
                    answers = Answers(connection)
                with suppress(ConnectionError):  # refused before it was read to its end
                    connection.sendall(contents[sent % len(contents)])
                sent += 1
                answer = answers.read()
                statuses[str(answer.status)] += 1
                closed = answer.will_close
                if answer.status == 503:
                    ending.wait(PAUSE)
            except (OSError, HTTPException):
                statuses["none"] += 1
                closed = True
            if closed and connection:
                connection.close()
                connection = None
        if connection:
            connection.close()

    threads = [threading.Thread(target=work) for _ in range(HEAVY_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        ending.set()
        for thread in threads:
            thread.join()


def settle(process_id: int) -> None:
    """Wait until a server has done what clients left to it, for a minute at most."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        before = cpu_seconds(process_id)
        time.sleep(0.5)
        if cpu_seconds(process_id) - before < 0.05:
            break


def measure_heavy(
    target: Target, process_id: int, folder: Path, rounds: int
) -> list[tuple[str, Counter, float, float]]:
    """Measure a client of /score alone and beside heavy clients, in turn.

    Returns:
        For each kind of heavy client what these were answered, and the p99 of the other alone and beside them, in ms:
        the medians over the rounds.
    """
    bodies = write_bodies(folder / "bodies.jsonl", ({"text": text} for text in read_messages(MESSAGES)))
    url, rows = f"http://{HOST}:{target.port}/score", []
    for kind, contents in list_heavy(target).items():
        say(f"Heavy clients: {kind}")
        alone, beside, answered = [], [], Counter()
        for _ in range(rounds):
            settle(process_id)
            alone.append(load(url, bodies, SECONDS, CONNECTIONS, RATE)["p99"])
            with heavy_clients(target, contents) as statuses:
                beside.append(load(url, bodies, SECONDS, CONNECTIONS, RATE)["p99"])
            answered += statuses
        rows.append((kind, answered, statistics.median(alone), statistics.median(beside)))
    return rows


def measure(folder: Path, quick: bool) -> str:
    """Attack in all ways, and return the report in Markdown."""
    begun, machine = time.monotonic(), describe_machine()

    def new() -> Path:
        return Path(tempfile.mkdtemp(dir=folder))

    with served(new()) as (target, process_id, log):
        bodies = write_bodies(folder / "warm.jsonl", ({"text": text} for text in read_messages(MESSAGES)))
        load(f"http://{HOST}:{target.port}/score", bodies, 5)
        found = hunt(target, process_id, log, new(), INPUTS // 20 if quick else INPUTS, 20 if quick else FROM_SCHEMA)
    faults = [attempt(fault, new()) for fault in FAULTS]
    floods = [attempt(flood, new(), kind, count) for kind, count in FLOODS_TO_TRY]
    with served(new()) as (target, process_id, _):
        heavy = measure_heavy(target, process_id, new(), 1 if quick else ROUNDS)
    return render(f"{machine}; {(time.monotonic() - begun) / 60:.0f} minutes", found, faults, floods, heavy)


def attempt(attack: Callable[..., Any], *arguments: Any) -> Any:
    """Call an attack and say what it returns."""
    row = attack(*arguments)
    say("; ".join(map(str, row)))
    return row


def render(
    machine: str,
    found: Found,
    faults: list[tuple[str, str, bool]],
    floods: list[tuple[str, str, str, bool]],
    heavy: list[tuple[str, Counter, float, float]],
) -> str:
    """Return the tables in Markdown.

    Args:
        machine: where and how long it ran.
        found: what `hunt` returns.
        faults: what each of `FAULTS` returns.
        floods: what `flood` returns.
        heavy: what `measure_heavy` returns.
    """
    columns = ("2xx", "3xx", "4xx", "503", "closed", "5xx", "hang", "dropped")
    counts = {kind: found.counts.get(kind, Counter()) for kind in MAKERS}
    schema = found.counts["schemathesis"]
    counts["all"] = sum(counts.values(), Counter())
    examples = [f"- {kind}, {outcome}: `{str(content)[2:-1]}`" for kind, outcome, content in found.examples]
    return "\n".join(
        [
            f"| Bad input | inputs | {' | '.join(columns)} |",
            "| --- | ---: |" + " ---: |" * len(columns),
            *(
                f"| {kind} | {count.total():,} | {' | '.join(f'{count[column]:,}' for column in columns)} |"
                for kind, count in counts.items()
            ),
            "",
            "503: refused with Retry-After; 5xx: every other; closed: without an answer, where the request was broken; "
            f"hang: no answer within {HANG} s; dropped: no answer to a whole request. schemathesis sent "
            f"{schema.total():,} more requests, made from `/openapi.json`: {schema['failed']:,} failed. "
            f"All took {found.seconds:.0f} s. {found.ended} processes ended, {found.tracebacks} stack traces were "
            f"logged. Memory of all processes: {found.before:.0f} MB before, {found.after:.0f} MB after.",
            *(["", f"The first {EXAMPLES} of each:", *examples] if examples else []),
            "",
            "| Fault | seen by clients who ask all the time | |",
            "| --- | --- | --- |",
            *(f"| {what} | {seen} | {verdict(good)} |" for what, seen, good in faults),
            "",
            "| Flood | directly | behind nginx | |",
            "| --- | --- | --- | --- |",
            *(f"| {what} | {direct} | {behind} | {verdict(good)} |" for what, direct, behind, good in floods),
            "",
            f"| {HEAVY_CLIENTS} heavy clients | they are answered | p99 of another, quiet (ms) | beside them (ms) "
            "| ratio | |",
            "| --- | --- | ---: | ---: | ---: | --- |",
            *(
                f"| {kind} | {', '.join(f'{count:,} times {status}' for status, count in sorted(answered.items()))} "
                f"| {alone:.1f} | {beside:.1f} | {beside / alone:.1f} | {verdict(beside < RATIO * alone)} |"
                for kind, answered, alone, beside in heavy
            ),
            "",
            f"The other client sends {RATE} messages/s over {CONNECTIONS} connections from this machine; heavy ones go "
            f"on at once, but for {PAUSE * 1000:.0f} ms after a 503. Under {RATIO} times is wanted.",
            f"{machine}.",
            "",
        ]
    )


def verdict(good: bool) -> str:
    """Return what stands in the last cell of a row."""
    return "pass" if good else "fault"


def main() -> None:
    """Attack, print the report and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"send {INPUTS // 20:,} inputs, to try this out")
    arguments = parser.parse_args()
    for tool in ("wrk", "openssl"):
        if not shutil.which(tool):
            sys.exit(f"{tool} is missing: apt-get install {tool}")
    for ending in (signal.SIGTERM, signal.SIGHUP):  # end the servers too
        signal.signal(ending, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="spam-attack-") as folder:
        os.chmod(folder, 0o755)  # nginx gives its own folders to another user, who must get there
        report = measure(Path(folder), arguments.quick)
    print(report)
    REPORT.parent.mkdir(exist_ok=True)
    write(REPORT, report.encode())


if __name__ == "__main__":
    main()
