"""Do to the service what happens to services, and see whether it goes on answering."""

import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bench import ROOT, Service, end, running
from benchmarks.floods import FLOODS, PATIENCE, Target, Watch, Watched, ask, flooded, request
from benchmarks.proxy import find_nginx, proxied

GOES_ON = 20  # seconds, in which the service must be what it was before
FLOOD_SECONDS = 8
HEALTH = request("/health", b"", method="GET", type="")
Row = tuple[str, str, bool]  # the fault, what was seen, and whether that is what is wanted


@contextmanager
def served(folder: Path, *command: str) -> Iterator[tuple[Target, int, Path]]:
    """Run the service with two workers, and yield it, the process id of its parent and its log."""
    command = command or ("env", "WORKERS=2", "{python}", "app.py")
    service = Service("the service", command, "/score", lambda text: {"text": text})
    with running(service, "see you at 6", None, folder) as (url, process_id):
        target = Target.of(url, process_id)
        yield target, process_id, folder / f"{target.port}.log"


def children(process_id: int) -> list[psutil.Process]:
    """Return the workers of a server, none if it has ended."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process_id).children()
    return []


def wait(condition: Callable[[], Any], seconds: float = GOES_ON) -> Any:
    """Wait until a condition holds and return it; what it was last, where the time is up."""
    deadline = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return result


def answers(target: Target, content: bytes = FLOODS["idle"]) -> bool:
    """Tell whether a request is answered with 200."""
    with suppress(OSError, HTTPException):
        return ask(target, content).status == 200
    return False


def last_line(log: Path, root: Path = ROOT) -> str:
    """Return the last line of a log, for a cell of a table, with paths from `root`."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace(f"{root}/", "").strip().splitlines()
    return lines[-1].replace("|", "/").replace("`", "'")[:200] if lines else ""


def goes_on(seen: Watched) -> bool:
    """Tell whether clients were answered all the time, but for a few whose worker was taken from them."""
    return seen.closed < PATIENCE and len(seen.lost) <= 0.05 * (seen.answered + seen.refused)


@contextmanager
def started(port: int, log: Path, *command: str) -> Iterator[subprocess.Popen]:
    """Run the service, which need not come to answer, and yield its process."""
    environment = {**os.environ, "PORT": str(port), "WORKERS": "2"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        end(process)


def kill_parent(folder: Path) -> Row:
    """Kill the parent of the workers, and start a new server in its place."""
    log = folder / "second.log"
    with served(folder) as (target, process_id, _):
        workers = children(process_id)
        os.kill(process_id, signal.SIGKILL)
        _, left = psutil.wait_procs(workers, timeout=5)
        with started(target.port, log, sys.executable, "app.py") as second:
            wait(lambda: second.poll() is not None or "Serving" in log.read_text(encoding="utf-8"))
            serves = second.poll() is None and wait(lambda: answers(target))
            told = "a new server answers" if serves else f"a new server: `{last_line(log)}`"
    return "the parent is killed", f"{len(left)} of {len(workers)} workers left; {told}", bool(serves and not left)


def kill_workers(folder: Path) -> Row:
    """Kill a worker, and its successor as soon as there is one."""
    with served(folder) as (target, process_id, log):
        with Watch(target) as watch:
            begun, (worker, *others) = time.monotonic(), children(process_id)
            worker.kill()
            if successors := wait(lambda: [new for new in children(process_id) if new not in (worker, *others)], 4):
                successors[0].kill()
            seconds = time.monotonic() - begun
            time.sleep(5)
        went_on = bool(children(process_id)) and answers(target)
        told = "goes on" if went_on else f"the service ended: `{last_line(log)}`"
    what = f"a worker is killed, and its successor {seconds:.1f} s later" if successors else "a worker is killed"
    return what, f"{watch.seen}; {told}", went_on and goes_on(watch.seen)


def make_slow_text(rng: random.Random) -> str:
    """Return a text of the greatest length, of words that nobody knows: the slowest to score."""
    return "".join(rng.choices(string.ascii_lowercase + " " * 5, k=10_000))


def largest_batch(target: Target) -> bytes:
    """Return the request for the largest batch that the service takes, of texts that are slow to score."""
    rng = random.Random(0)
    for count in (100, 50, 20, 10, 5, 2, 1):
        texts = [make_slow_text(rng) for _ in range(count)]
        content = request("/score/batch", json.dumps({"texts": texts}).encode())
        if ask(target, content, seconds=60).status != 413:
            break
    return content


def end_with_batches(folder: Path) -> Row:
    """End the service by SIGTERM while it scores batches."""
    outcomes: list[str] = []

    def send(target: Target, content: bytes) -> None:
        try:
            outcomes.append(str(ask(target, content, seconds=60).status))
        except (OSError, HTTPException):
            outcomes.append("no answer")

    with served(folder) as (target, process_id, _):
        content = largest_batch(target)
        threads = [threading.Thread(target=send, args=(target, content)) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        os.kill(process_id, signal.SIGTERM)
        for thread in threads:
            thread.join()
    told = ", ".join(f"{outcomes.count(outcome)} times {outcome}" for outcome in sorted(set(outcomes)))
    return "SIGTERM with 4 large batches in flight", told, set(outcomes) <= {"200", "503"}


def stop_worker(folder: Path) -> Row:
    """Stop a worker by SIGSTOP."""
    with served(folder) as (target, process_id, _):
        stopped = children(process_id)[0]
        with Watch(target) as watch:
            begun = time.monotonic()
            stopped.send_signal(signal.SIGSTOP)
            replaced = wait(lambda: stopped not in children(process_id) and len(children(process_id)) >= 2)
            seconds = time.monotonic() - begun
        if stopped.is_running():
            stopped.kill()
    told = f"replaced after {seconds:.0f} s" if replaced else f"not replaced within {GOES_ON} s"
    return "a worker is stopped (SIGSTOP)", f"{told}; {watch.seen}", bool(replaced)


def reload_model(folder: Path, good: bool) -> Row:
    """Put another model in place under load, a good one or a bad one, and send SIGHUP."""
    copy = folder / "copy"
    for name in ("engine", "models", "static", "templates"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("app.py", "score.py"):
        shutil.copy2(ROOT / name, copy)
    card_path = copy / "models" / "best_model.json"
    card = json.loads(card_path.read_text(encoding="utf-8"))

    def models(target: Target) -> set[str]:
        names = set()
        for _ in range(20):
            with suppress(OSError, HTTPException, ValueError):
                names.add(json.loads(ask(target, HEALTH).content)["model"])
        return names

    with served(folder, "env", "WORKERS=2", "{python}", f"{copy}/app.py") as (target, process_id, log):
        with Watch(target) as watch:
            begun, said = time.monotonic(), len(log.read_text(encoding="utf-8"))
            changed = card_path.with_suffix(".new")
            weights = card["weights"] if good else {**card["weights"], "sha256": "0" * 64}
            changed.write_text(json.dumps({**card, "name": "another", "weights": weights}))
            changed.replace(card_path)
            os.kill(process_id, signal.SIGHUP)
            if good:
                wait(lambda: models(target) == {"another"})
            else:
                wait(lambda: len(log.read_text(encoding="utf-8")) > said, 5)
            seconds = time.monotonic() - begun
            time.sleep(2)
            names = models(target)
        refused = log.read_text(encoding="utf-8")[said:].strip()
    which = {("another",): "the new model", (card["name"],): "the old model"}.get(tuple(names), "not one model")
    told = f"{which} answers after {seconds:.1f} s"
    told += f"; it says: `{last_line(log, copy)}`" if refused else "; it says nothing"
    wanted = names == {"another"} if good else names == {card["name"]} and len(refused.splitlines()) == 1
    return (
        f"SIGHUP with a {'new' if good else 'bad'} model in place",
        f"{told}; {watch.seen}",
        wanted and not watch.seen.lost,
    )


def send_batches(folder: Path) -> Row:
    """Send as many large batches as one client can have in mind, leave, and see when others' are answered."""
    small = request("/score/batch", b'{"texts": ["see you at 6"]}')
    with served(folder) as (target, _, _):
        content = largest_batch(target)
        connections = [target.connect() for _ in range(8)]
        with Watch(target, small) as batches, Watch(target) as singles:
            for connection in connections:
                with suppress(OSError):
                    connection.sendall(content)
            time.sleep(1)
            for connection in connections:
                connection.close()
            time.sleep(GOES_ON)
    seen = f"`/score/batch`: {batches.seen}. `/score`: {singles.seen}"
    good = max(batches.seen.closed, singles.seen.closed) < PATIENCE and not batches.seen.lost and not singles.seen.lost
    return f"8 batches of {len(content) / 2**20:.1f} MiB of one client, who leaves", seen, good


FAULTS = (
    *(kill_parent, kill_workers, end_with_batches, stop_worker),
    *(partial(reload_model, good=True), partial(reload_model, good=False), send_batches),
)
FLOODS_TO_TRY = (("idle", 1100), ("stalled", 512), ("never reading", 1100))


def flood(folder: Path, kind: str, count: int) -> tuple[str, str, str, bool]:
    """Flood the service with connections, directly and through the proxy.

    Returns:
        The flood, what was seen directly, what was seen behind the proxy, and whether all was well behind it.
    """
    told = []
    for proxy in (False, True):
        if proxy and not find_nginx():
            told.append("nginx is missing: apt-get install nginx")
            continue
        place = Path(tempfile.mkdtemp(dir=folder))
        with (
            served(place) as (service, _, _),
            proxied(service, place) if proxy else nullcontext(service) as target,
            flooded(target, FLOODS[kind], count),
            Watch(target) as watch,
        ):
            time.sleep(FLOOD_SECONDS)
        told.append(str(watch.seen))
    return f"{count:,} connections, {kind}", *told, proxy and not watch.seen.lost
