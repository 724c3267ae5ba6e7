"""Measure the stream: the operator's peak for a minute, and again while a scorer is killed in the middle.

`make bench` runs this too, prints the tables and keeps them in build/benchmarks-streaming.md. Broker, publisher, two
scorers, the store and a subscriber share this machine.
"""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks.bench import PEAK, ROOT, describe_machine, end, judge_all, publish, say

REPORT = ROOT / "build" / "benchmarks-streaming.md"
SECONDS = 60
PATIENCE = 120  # seconds until the scorers must have begun
ROW = re.compile(r"^\| (?=[\d,]+ \|)(.*) \|$", re.MULTILINE)
COLUMNS = ("published", "delivered", "taken down", "dead", "not answered", "twice", "p50", "p99")
LATE = re.compile(r"in ([\d.]+) s, the latest ([\d,]+) ms late")


def measure(folder: Path, quick: bool) -> str:
    """Measure everything, and return the report in Markdown."""
    seconds, machine = SECONDS * (0.1 if quick else 1), describe_machine()
    runs = {}
    for name in ("two scorers", "one of them killed in the middle"):
        say(f"Publishing {PEAK:,} messages a minute for {seconds:.0f} s: {name}")
        runs[name] = replay(folder / name, seconds, kills=name != "two scorers")
    return render(machine, runs, round(PEAK / 60 * seconds))


def replay(state: Path, seconds: float, kills: bool) -> dict[str, float]:
    """Run `make stream` for a while.

    Args:
        state: a folder of its own.
        seconds: for how long.
        kills: whether a scorer is killed in the middle; it is started again.

    Returns:
        The figures of its table, by COLUMNS, and "seconds" and "latest", how long publishing took and how late the
        latest message was, in ms.
    """
    environment = {**os.environ, "OPERATIONS_STATE": str(state), "REDIS_URL": "", "DATABASE_URL": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "operations.replay", "--rate", f"{PEAK}/min", "--seconds", str(seconds)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        if kills:
            wait_for(process, "operations.publish")
            time.sleep(seconds / 2)
            find(process, "operations.stream")[0].kill()
        said, _ = process.communicate(timeout=2 * seconds + 2 * PATIENCE)
    finally:
        end(process)
    row, late = ROW.search(said), LATE.search(said)
    if not (row and late):
        sys.exit(f"make stream did not end as it should:\n{said[-2000:]}")
    figures = [float(figure.replace(",", "")) for figure in row[1].split(" | ")]
    return {
        **dict(zip(COLUMNS, figures, strict=True)),
        "seconds": float(late[1]),
        "latest": float(late[2].replace(",", "")),
    }


def find(process: subprocess.Popen, program: str) -> list[psutil.Process]:
    """Return the processes of a program that `make stream` has started."""
    children = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child for child in children if program in child.cmdline()]
    return []


def wait_for(process: subprocess.Popen, program: str) -> None:
    """Wait until `make stream` has started a program."""
    deadline = time.monotonic() + PATIENCE
    while not find(process, program):
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"make stream has not started {program}")
        time.sleep(0.1)


def render(machine: str, runs: dict[str, dict[str, float]], due: int) -> str:
    """Return the tables and the bars in Markdown.

    Args:
        machine: what `describe_machine` returns.
        runs: what `replay` returns, by what was done.
        due: how many messages were to be published.
    """
    bars = []
    for name, run in runs.items():
        bars += [
            (f"{name}: messages published a minute", run["published"] / run["seconds"] * 60, 0.99 * PEAK, ",.0f"),
            (f"{name}: messages not answered, at most", due - run["published"] + run["not answered"], 0, ",.0f"),
            (f"{name}: messages answered twice, at most", run["twice"], 0, ",.0f"),
        ]
    calm = next(iter(runs))
    bars.append((f"{calm}: p99 from published to answered (ms), at most", runs[calm]["p99"], 500, ",.0f"))
    return "\n".join(
        [
            f"{machine}. Redis, the publisher, the scorers, the store (SQLite) and a subscriber share the machine.",
            "",
            f"| {PEAK:,} messages a minute | published | in (s) | the latest late by (ms) | delivered | taken down "
            "| not answered | twice | p50 (ms) | p99 (ms) |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            *(
                f"| {name} | {run['published']:,.0f} | {run['seconds']:.1f} | {run['latest']:,.0f} "
                f"| {run['delivered']:,.0f} | {run['taken down']:,.0f} | {run['not answered']:,.0f} "
                f"| {run['twice']:,.0f} | {run['p50']:,.0f} | {run['p99']:,.0f} |"
                for name, run in runs.items()
            ),
            "",
            *judge_all(bars),
        ]
    )


if __name__ == "__main__":
    publish(__doc__, measure, REPORT)
