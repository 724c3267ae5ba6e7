"""Measure batches: beside a bare pool of processes that does the same, and how much memory they take.

`make bench` runs this too, prints the table and keeps it in build/benchmarks-batches.md.
"""

import csv
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.bench import ROOT, describe_machine, family, judge_all, publish, read_messages, say
from operations.scores import open_scores

REPORT = ROOT / "build" / "benchmarks-batches.md"
ROWS, FEW, MANY = 2_000_000, 1_000_000, 4_000_000
GROUP = 100_000  # rows of a group of the Parquet file
TICK = 0.5  # seconds between two looks at the memory
POOL = """
import os, sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from operations.parts import cut_all, find_sources
from operations.scores import plan, score_part

if __name__ == "__main__":
    source, out = sys.argv[1:]
    run = plan(out, id_="id")
    os.makedirs(out)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(partial(score_part, run=run), cut_all(find_sources(source), run.columns, run.rows, {})))
"""  # start-up, reading, scoring and writing are the same; there is neither order nor repair


def read_texts() -> list[str]:
    """Return messages of today, and as many of those by which the service is measured."""
    with (ROOT / "data" / "today.tsv").open(encoding="utf-8", newline="") as file:
        today = [row["text"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    return [text for pair in zip(today, read_messages(len(today)), strict=True) for text in pair]


def write(path: Path, messages: Sequence[str], rows: int) -> Path:
    """Write so many messages with ids to a Parquet file, a group at a time, and return its path."""
    with pq.ParquetWriter(path, pa.schema({"id": pa.int64(), "text": pa.string()})) as writer:
        for start in range(0, rows, GROUP):
            numbers = range(start, min(start + GROUP, rows))
            texts = [messages[number % len(messages)] for number in numbers]
            writer.write_table(pa.table({"id": list(numbers), "text": texts}))
    return path


def take(command: Sequence[str]) -> tuple[float, float]:
    """Run a command to its end; return the seconds it took, and the most memory of it and its children, in MB.

    What processes share is counted once (PSS).
    """
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None:
            with suppress(psutil.Error):
                peak = max(peak, sum(one.memory_full_info().pss for one in family(process.pid)))
            with suppress(subprocess.TimeoutExpired):
                process.wait(TICK)
    if process.returncode:
        raise RuntimeError(f"{command} ended with status {process.returncode}")
    return time.monotonic() - start, peak / 1e6


def run_batch(source: Path, out: Path, rows: int) -> tuple[float, float]:
    """Run a batch as `take` does, and see that the scores of so many rows are there."""
    taken = take([sys.executable, "-m", "operations.batch", str(source), str(out), "--id", "id"])
    if (found := open_scores(str(out)).count_rows()) != rows:
        raise RuntimeError(f"the scores of {found} rows are there, not of {rows}")
    return taken


def measure(folder: Path, quick: bool) -> str:
    """Measure everything, and return the report in Markdown."""
    machine, texts, share, results = describe_machine(), read_texts(), 0.1 if quick else 1, []
    for name, rows, is_pool in (
        ("pool", ROWS, True),
        ("Dask", ROWS, False),
        ("few", FEW, False),
        ("many", MANY, False),
    ):
        rows = int(rows * share)
        source, out = write(folder / f"{name}.parquet", texts, rows), folder / name
        say(f"Scoring {rows:,} rows: {'a bare pool' if is_pool else 'a batch'}")
        command = [sys.executable, "-c", POOL, str(source), str(out)]
        results.append((rows, *(take(command) if is_pool else run_batch(source, out, rows))))
        source.unlink()
    pool, dask, few, many = results
    names = ("a bare pool of processes", *["`python -m operations.batch`"] * 3)
    bars = [
        (f"rows/s of a batch of {dask[0]:,} rows ÷ those of a bare pool", pool[1] / dask[1], 0.8, ".2f"),
        (f"memory at {many[0]:,} rows ÷ that at {few[0]:,}, at most", many[2] / few[2], 1.1, ".2f"),
    ]
    return "\n".join(
        [
            f"{machine}. Messages of today and of the collection with an id, repeated, in one Parquet file. Memory is "
            "the most that all processes had, with what they share counted once.",
            "",
            "| | rows | seconds | rows/s | memory (MB) |",
            "| --- | ---: | ---: | ---: | ---: |",
            *(
                f"| {name} | {rows:,} | {seconds:.0f} | {rows / seconds:,.0f} | {memory:,.0f} |"
                for name, (rows, seconds, memory) in zip(names, results, strict=True)
            ),
            "",
            *judge_all(bars),
        ]
    )


if __name__ == "__main__":
    publish(__doc__, measure, REPORT)
