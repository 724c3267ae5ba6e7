"""Measure the nightly look at a million stored scores, on SQLite and on PostgreSQL.

`make bench` runs this too, prints the table and keeps it in build/benchmarks-nightly.md.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import sqlalchemy as sa

from benchmarks.bench import ROOT, describe_machine, judge_all, publish, say
from benchmarks.postgres import Postgres
from operations.store import SECOND, WORKERS, day_of, insert, labels, migrate, now, open_store, register
from score import load_card, load_model, score_batch

REPORT = ROOT / "build" / "benchmarks-nightly.md"
SCORES = 1_000_000
PART = 50_000  # scores that are stored at a time
LABELLED = 0.01  # share of the messages of which somebody says something
LOOK = """
import sys
from operations.monitoring import monitor_window
from operations.store import open_store
print(len(monitor_window(open_store(), *map(int, sys.argv[1:]))["alarms"]))
"""
MEGABYTE = 2**10  # kilobytes, in which the peak is told


def fill(engine: sa.Engine, number: int, start: int) -> None:
    """Store scores of today's messages, and what was said of some.

    Args:
        engine: of the store.
        number: of scores.
        start: when the first message came, in microseconds; the others follow by one each.
    """
    migrate(engine)
    card, random = load_card(), np.random.default_rng(0)
    register(engine, card, "serving")
    messages = pd.read_csv(ROOT / "data" / "today.tsv", sep="\t", keep_default_na=False)
    results = score_batch(messages["text"].tolist(), load_model(), card["threshold"])
    spam = (messages["label"] == "spam").to_numpy()
    texts = messages["text"]
    counted = zip(texts.str.len().tolist(), texts.str.count(r"\d").tolist(), strict=True)
    known = [
        {"propensity": propensity, "prediction": bool(prediction), "characters": length, "digits": digits}
        for (prediction, propensity), (length, digits) in zip(results, counted, strict=True)
    ]
    scored = {"model": 1, "shadow": False, "threshold": card["threshold"], "language": "en", "text": None}
    for first in range(0, number, PART):
        drawn = random.integers(0, len(known), min(PART, number - first))
        regions, share = random.integers(0, 20, len(drawn)), random.random(len(drawn))
        rows, said = [], []
        for i, (which, region, of) in enumerate(zip(drawn.tolist(), regions.tolist(), share.tolist(), strict=True)):
            message, arm = (start + first + i) * WORKERS, "unfiltered" if of > 0.99 else "filtered"
            down = known[which]["prediction"] and arm == "filtered"
            about = {"sender": which.to_bytes(8), "sender_kind": "name", "region": f"region {region}", "arm": arm}
            rows.append(
                {"message": message, **scored, **known[which], **about, "action": "take down" if down else "deliver"}
            )
            if of < LABELLED or (arm == "unfiltered" and spam[which]):
                label = {"message": message, "source": "reviewer", "label": int(spam[which]), "received": start}
                said.append({**label, "sender": None, "text": None})
        with engine.begin() as connection:
            insert(connection, rows)
            if said:
                connection.execute(labels.insert(), said)


def look(state: Path, url: str, start: int, number: int) -> tuple[float, float, int]:
    """Look at all that is stored, as the job does; return seconds, the peak of memory (MB) and the number of alarms."""
    environment = {**os.environ, "OPERATIONS_STATE": str(state), "DATABASE_URL": url}
    command = [sys.executable, "-c", LOOK, str(start), str(start + number)]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - began
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / MEGABYTE, int(done.stdout)


def measure(folder: Path, quick: bool) -> str:
    """Measure both stores, and return the report in Markdown."""
    machine, number = describe_machine(), SCORES // 10 if quick else SCORES
    at = now() - 3 * 3600 * SECOND
    start = at if day_of(at * WORKERS) == day_of((at + number) * WORKERS) else at - 60 * SECOND
    with ExitStack() as stack:
        of_postgres = tempfile.TemporaryDirectory(prefix="postgres-", dir="/tmp", ignore_cleanup_errors=True)
        server = Postgres(Path(stack.enter_context(of_postgres)))
        server.start()
        stack.callback(server.kill)
        found = {}
        for name, url in {"SQLite": f"sqlite:///{folder / 'store.db'}", "PostgreSQL": server.url("nightly")}.items():
            say(f"Storing {number:,} scores in {name}")
            engine = open_store(url)
            fill(engine, number, start)
            engine.dispose()
            say("Looking at them")
            found[name] = look(folder / name, url, start, number)
    rows = [f"| {name} | {number:,} | {s:.1f} | {peak:.0f} | {alarms} |" for name, (s, peak, alarms) in found.items()]
    bars = []
    for name, (seconds, peak, _) in found.items():
        bars.append((f"{name}: seconds, at most", seconds, 60, ".1f"))
        bars.append((f"{name}: peak memory (MB), at most", peak, 1024, ".0f"))
    return "\n".join(
        [
            f"{machine}. 1 in 100 messages is labelled; the peak is the highest of all processes so far.",
            "",
            "| the nightly look | scores | seconds | peak memory (MB) | alarms |",
            "| --- | ---: | ---: | ---: | ---: |",
            *rows,
            "",
            *judge_all(bars),
        ]
    )


if __name__ == "__main__":
    publish(__doc__.split("\n")[0], measure, REPORT)
