"""Measure what storing every score costs: the operator's service beside app.py, and ten minutes at the peak.

`make bench` runs this too, prints the tables and keeps them in build/benchmarks-storing.md. The load comes from the
same machine, on which the programs that store and act run as well.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.bench import (
    MESSAGES,
    PEAK,
    PEAK_CONNECTIONS,
    ROOT,
    ROUNDS,
    Service,
    describe_machine,
    judge_all,
    load,
    publish,
    read_messages,
    running,
    say,
    write_bodies,
)
from benchmarks.postgres import Postgres
from operations.store import day_tables, days, open_store, reader
from score import load_model, score

REPORT = ROOT / "build" / "benchmarks-storing.md"
SECONDS = 600  # at the peak
PATIENCE = 600  # seconds until all must be stored


@dataclass(frozen=True)
class Stored:
    """An operator's service and its store."""

    name: str
    service: Service
    engine: sa.Engine

    def count(self) -> tuple[int, int]:
        """Return the number of scores in the store, and of those acted on."""
        scores = acted = 0
        with reader(self.engine).connect() as connection:
            for day in connection.scalars(sa.select(days.c.day)).all():
                table = day_tables(day)[1]
                query = sa.select(sa.func.count(), sa.func.count(table.c.action)).select_from(table)
                of_day = connection.execute(query).one()
                scores, acted = scores + of_day[0], acted + of_day[1]
        return scores, acted

    def wait(self, number: int) -> float:
        """Wait until so many scores are stored and acted on, or PATIENCE is over; return the seconds it took."""
        start = time.monotonic()
        while min(self.count()) < number and time.monotonic() < start + PATIENCE:
            time.sleep(0.5)
        return time.monotonic() - start


def measure(folder: Path, quick: bool) -> str:
    """Measure everything, and return the report in Markdown."""
    machine, messages = describe_machine(), read_messages(MESSAGES)
    expected = score(messages[0], load_model(), 0.5)[1]
    bodies = write_bodies(folder / "bodies.jsonl", ({"text": message} for message in messages))
    plain = Service("app.py, which stores nothing", ("{python}", "app.py"), "/score", lambda text: {"text": text})
    with ExitStack() as stack:
        of_postgres = tempfile.TemporaryDirectory(prefix="postgres-", dir="/tmp", ignore_cleanup_errors=True)
        server = Postgres(Path(stack.enter_context(of_postgres)))
        server.start()
        stack.callback(server.kill)
        urls = {"SQLite": f"sqlite:///{folder}/store.db", "PostgreSQL": server.url("bench")}
        stores = []
        for name, url in urls.items():
            state = (f"OPERATIONS_STATE={folder}/{name}", f"DATABASE_URL={url}")
            service = Service(
                f"stored in {name}", ("env", *state, "{python}", "-m", "operations"), "/score", plain.body
            )
            engine = open_store(url)
            stack.callback(engine.dispose)
            stores.append(Stored(name, service, engine))

        def start(service: Service) -> Any:
            say(f"Starting {service.name}")
            return running(service, messages[0], expected, folder)

        rates = compare(plain, stores, start, bodies, 0.4 if quick else 4)
        peaks = {}
        for store in stores:
            with start(store.service) as (url, _):
                peaks[store.name] = hold_peak(store, url, bodies, SECONDS * (0.02 if quick else 1))
    return render(machine, rates, peaks)


def compare(
    plain: Service, stores: list[Stored], start: Callable[[Service], Any], bodies: Path, seconds: float
) -> dict[str, float]:
    """Load the services in turn, each alone, and let what it has scored be stored before the next one's turn.

    Returns:
        The median rate of each service, in requests/s.
    """
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        urls = {each.name: stack.enter_context(start(each))[0] for each in (plain, *(s.service for s in stores))}
        for i in range(ROUNDS + 1):
            # To and fro, because a database still tidies up in the turn of the next one.
            for name, url in list(urls.items())[:: 1 if i % 2 else -1]:
                result = load(url, bodies, seconds)
                for store in stores:
                    if store.service.name == name:
                        settle(store)
                if i:  # the first round warms up
                    rates.setdefault(name, []).append(result["rate"])
                    say(f"Round {i}: {name}: {result['rate']:,.0f} requests/s")
    return {name: statistics.median(of_rounds) for name, of_rounds in rates.items()}


def settle(store: Stored) -> None:
    """Wait until nothing more arrives in a store, and all that is there was acted on."""
    before, deadline = None, time.monotonic() + PATIENCE
    while before != (before := store.count()) or before[0] > before[1]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{store.name} has not acted on all scores after {PATIENCE} s: {before}")
        time.sleep(2)


def hold_peak(store: Stored, url: str, bodies: Path, seconds: float) -> dict[str, float]:
    """Send the operator's peak for a while.

    Returns:
        What `load` returns, how many scores were `stored` and `acted` on, and how long that took after the last
        answer: `behind`, in seconds.
    """
    settle(store)
    before = store.count()[0]
    say(f"Sending {PEAK:,} messages a minute, stored in {store.name}")
    result = load(url, bodies, seconds, PEAK_CONNECTIONS, PEAK / 60)
    behind = store.wait(before + int(result["requests"]))
    stored, acted = store.count()
    return {**result, "stored": stored - before, "acted": acted - before, "behind": behind}


def render(machine: str, rates: dict[str, float], peaks: dict[str, dict[str, float]]) -> str:
    """Return the tables and the bars in Markdown.

    Args:
        machine: what `describe_machine` returns.
        rates: what `compare` returns.
        peaks: what `hold_peak` returns, by store.
    """
    plain, *_ = rates.values()
    bars = [
        (f"requests/s, {name}, ÷ those of app.py", rate / plain, 0.85, ".2f") for name, rate in list(rates.items())[1:]
    ]
    for name, peak in peaks.items():
        bars += [
            (f"{name}: answers a minute when {PEAK:,} are due", peak["rate"] * 60, 0.99 * PEAK, ",.0f"),
            (f"{name}: scores answered and not stored, at most", max(0, peak["requests"] - peak["stored"]), 0, ",.0f"),
            (f"{name}: scores stored and not acted on, at most", peak["stored"] - peak["acted"], 0, ",.0f"),
            (f"{name}: errors, at most", peak["errors"], 0, ",.0f"),
        ]
    return "\n".join(
        [
            f"{machine}. The load comes from wrk on the same machine. Rates are medians of {ROUNDS} rounds, in which "
            "the services take turns; what is to be stored may wait in files until the round is over.",
            "",
            "| `POST /score` | requests/s | ÷ app.py |",
            "| --- | ---: | ---: |",
            *(f"| {name} | {rate:,.0f} | {rate / plain:.2f} |" for name, rate in rates.items()),
            "",
            f"| {PEAK:,} messages a minute | minutes | answered | stored | acted on | errors | p50 (ms) | p99 (ms) "
            "| all stored after (s) |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            *(
                f"| {name} | {peak['seconds'] / 60:.1f} | {peak['requests']:,.0f} | {peak['stored']:,.0f} "
                f"| {peak['acted']:,.0f} | {peak['errors']:.0f} | {peak['p50']:.1f} | {peak['p99']:.1f} "
                f"| {peak['behind']:.0f} |"
                for name, peak in peaks.items()
            ),
            "",
            *judge_all(bars),
        ]
    )


if __name__ == "__main__":
    publish(__doc__, measure, REPORT)
