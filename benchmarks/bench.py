"""Measure the service under load, beside other ways to serve the same model.

`make bench` runs this, prints the tables and keeps them in build/benchmarks-load.md. The load comes from the
same machine, so timings can be compared within one run only.
"""

import argparse
import csv
import json
import logging
import math
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from engine.server import count_cores
from score import load_model, load_scorer, score

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "build" / "benchmarks-load.md"
CONNECTIONS = 32
PEAK = 100_000  # messages a minute
# Even if the service stalls for 150 ms, one of these is free when the next message of the peak is due.
PEAK_CONNECTIONS = 256
ROUNDS = 3
MESSAGES = 20_000
# The share of words that are spelt at random. Of the words of the test split, 14% are in no other split. This
# is more, because a word spelt at random may be a known one. With this share, score() takes as long as it
# does for the test split when it has scored the other splits before.
NEW_WORDS = 0.18
BATCH = 1000  # texts a request
MEMORY_REQUESTS = 200_000
# For a clone without data. Their lengths and words are like those of real messages.
EXAMPLES = (
    "WINNER! You have been picked for a 750 pound prize. To claim call 09050000123 by 31/12. Costs 150p/min.",
    "Free entry in our weekly draw for two cup final tickets! Text WIN to 80011 now. 18+ only, T&Cs apply",
    "URGENT your mobile number has won a 2000 bonus prize, call 08715550123 from a landline to collect",
    "Running ten minutes late, the bus never came. Order me a tea if you get there first?",
    "ok see u at 7",
    "Did you manage to talk to mum about sunday? She asked again if we bring the kids or not, let me know",
    "Lol no i left it on the kitchen table, you can have it back tomorrow after class",
    "Thanks for last night, it was really good to see everybody again. Must do it more often!",
)


@dataclass(frozen=True)
class Service:
    """A server to measure: how it is started, and what is posted where."""

    name: str
    command: tuple[str, ...]
    path: str
    body: Callable[[str], Any]


def read_messages(count: int) -> list[str]:
    """Return messages as long as real ones, with as many words that were never seen before.

    The same messages over and over would flatter a service that remembers words.
    """
    source = ROOT / "data" / "test.csv"
    examples = list(EXAMPLES)
    if source.exists():
        with source.open(encoding="utf-8", newline="") as file:
            examples = [row["text"] for row in csv.DictReader(file)]
    rng = random.Random(0)

    def respell(word: str) -> str:
        if rng.random() >= NEW_WORDS:
            return word
        return "".join(
            rng.choice(string.ascii_lowercase) if c.isalpha() else rng.choice(string.digits) if c.isdigit() else c
            for c in word
        )

    return [" ".join(respell(word) for word in examples[i % len(examples)].split(" ")) for i in range(count)]


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end(process: subprocess.Popen) -> None:
    """End a program that was started in a session of its own, and what it leaves behind."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(15)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def running(service: Service, message: str, expected: float | None, folder: Path) -> Iterator[tuple[str, int]]:
    """Start a service, yield its address and process id once it answers as expected, and end it.

    Args:
        service: what to start.
        message: a text to score.
        expected: the propensity of the message, which the answer must hold; None if it need not.
        folder: where its log goes.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}{service.path}"
    command = [part.format(port=port, python=sys.executable) for part in service.command]
    environment = {
        **os.environ,
        "PORT": str(port),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "BENTOML_HOME": str(folder / "bentoml"),
    }
    log = folder / f"{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        request = urllib.request.Request(
            url, json.dumps(service.body(message)).encode(), {"Content-Type": "application/json"}
        )
        deadline = time.monotonic() + 90
        while True:
            with suppress(OSError):
                answer = urllib.request.urlopen(request, timeout=10).read().decode()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{service.name} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.01)
        numbers = [float(number) for number in re.findall(r"\d+\.\d+(?:e-\d+)?", answer)]
        if expected is not None and not any(math.isclose(number, expected, rel_tol=1e-9) for number in numbers):
            sys.exit(f"{service.name} answers {answer[:200]}, not a propensity of {expected}")
        yield url, process.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def register(folder: Path) -> str:
    """Register the saved model in an MLflow store of its own, and return its address there."""
    import mlflow  # not before main() has set DO_NOT_TRACK, which it reads when it is imported

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("bench", f"file://{folder}/mlruns"))
    example = np.array(EXAMPLES)
    model = load_model()
    mlflow.sklearn.log_model(
        model,
        name="model",
        registered_model_name="spam",
        serialization_format="cloudpickle",
        pip_requirements=str(ROOT / "requirements.txt"),
        pyfunc_predict_fn="predict_proba",
        signature=mlflow.models.infer_signature(example, model.predict_proba(example)),
    )
    return "models:/spam/1"


def list_services(registered: str) -> list[Service]:
    """Return what is compared: the limit, this app, this app without its shortcut, and the others.

    Args:
        registered: the address of the model in the MLflow store.
    """
    workers = str(count_cores())
    serve_model = ("mlflow", "models", "serve", "--env-manager", "local", "--workers", workers)
    serve_bento = ("bentoml", "serve", "benchmarks/bentoml_service.py:SpamFilter", "--host", "127.0.0.1")

    def one(message: str) -> dict[str, str]:
        return {"text": message}

    return [
        Service(
            "(a) an empty Flask handler on the same server",
            ("{python}", "benchmarks/empty_flask.py"),
            "/score",
            one,
        ),
        Service("(b) this app", ("{python}", "app.py"), "/score", one),
        Service(
            "(c) this app without its shortcut past Flask",
            ("{python}", "benchmarks/without_shortcut.py"),
            "/score",
            one,
        ),
        Service(
            "(d) Flask's own server and `predict_proba`",
            ("{python}", "benchmarks/course_flask.py"),
            "/score",
            one,
        ),
        Service(
            f"(e) `mlflow models serve`, {workers} workers",
            (*serve_model, "--model-uri", registered, "--port", "{port}"),
            "/invocations",
            lambda message: {"inputs": [message]},
        ),
        Service(
            f"(f) BentoML with batching, {workers} workers",
            (*serve_bento, "--port", "{port}"),
            "/score",
            lambda message: {"texts": [message]},
        ),
    ]


def write_bodies(path: Path, bodies: Iterator[Any]) -> Path:
    """Write bodies to a file, as JSON, one a line."""
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies), encoding="utf-8")
    return path


def load(
    url: str, bodies: Path, seconds: float, connections: int = CONNECTIONS, rate: float | None = None
) -> dict[str, float]:
    """Post bodies with wrk.

    Args:
        url: of the endpoint.
        bodies: a file with one body a line.
        seconds: for how long.
        connections: how many; each posts as soon as it has its last answer.
        rate: in requests/s; with it, a connection also waits until the next request is due.

    Returns:
        `requests`, `errors`, the `seconds` that it took, the `rate` of answers in requests/s, the latencies
        `p50`, `p99` and `longest` in ms, and `latest`, how late a request was sent at most, in ms.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{math.ceil(seconds)}s", "--timeout", "10s"]
    script = Path(__file__).with_name("wrk.lua")
    run = subprocess.run(
        [*command, "-s", script, url, "--", bodies, *([str(rate)] if rate else [])],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(run.stdout.splitlines()[-1])
    return {**result, "rate": result["requests"] / result["seconds"]}


def family(process_id: int) -> list[psutil.Process]:
    """Return a process and its descendants."""
    parent = psutil.Process(process_id)
    return [parent, *parent.children(recursive=True)]


def resident(process_id: int) -> float:
    """Return the resident memory of a process and its descendants, in MB."""
    return sum(process.memory_info().rss for process in family(process_id)) / 1e6


def occupied(process_id: int) -> float:
    """Return the memory that a process and its descendants take, in MB; what they share is counted once."""
    return sum(process.memory_full_info().pss for process in family(process_id)) / 1e6


def cpu_seconds(process_id: int) -> float:
    """Return the processor time that a process and its descendants have taken."""
    return sum(sum(process.cpu_times()[:2]) for process in family(process_id))


def time_in_process(messages: list[str], count: int) -> tuple[float, float]:
    """Return the median times of one score() and of one predict_proba(), in µs.

    Args:
        messages: the first `count` of them are timed, after the others have been scored.
        count: how many to time.
    """
    model, pipeline = load_scorer(), load_model()
    for message in messages[count:]:
        score(message, model, 0.5)
    calls = (lambda text: score(text, model, 0.5)), (lambda text: pipeline.predict_proba([text]))
    times: tuple[list[float], ...] = [], []
    for block in np.array_split(np.array(messages[:count], dtype=object), 10):
        for call, seconds in zip(calls, times, strict=True):
            for message in block:
                start = time.perf_counter()
                call(message)
                seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]) * 1e6, statistics.median(times[1]) * 1e6


def describe_machine() -> str:
    """Return the processor, its cores, the version of Python, and how busy the machine is already."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            processor = found[1]
    return (
        f"{processor}, {count_cores()} cores, Python {platform.python_version()}, "
        f"load average {os.getloadavg()[0]:.1f} at the start"
    )


def say(text: str) -> None:
    """Tell what is going on."""
    print(text, file=sys.stderr, flush=True)


def compare(
    servers: dict[Service, tuple[str, int]], bodies: dict[Service, Path], seconds: float
) -> dict[Service, dict[str, float]]:
    """Load the services in turn, several times over, so that a busy minute does not hit only one of them.

    Returns:
        For each service, what `load` returns, and `cpu`, the processor time of a request in µs: the sums of
        requests and errors over the rounds, and the medians of the rest.
    """
    results: dict[Service, list[dict[str, float]]] = {service: [] for service in servers}
    for service, (url, _) in servers.items():
        say(f"Warming up {service.name}")
        load(url, bodies[service], seconds / 2)
    for i in range(ROUNDS):
        for service, (url, process_id) in servers.items():
            worked = cpu_seconds(process_id)
            result = load(url, bodies[service], seconds)
            worked = cpu_seconds(process_id) - worked
            results[service].append({**result, "cpu": worked / result["requests"] * 1e6})
            say(f"Round {i + 1}: {service.name}: {result['rate']:,.0f} requests/s")
    return {
        service: {
            key: (sum if key in ("requests", "errors") else statistics.median)(run[key] for run in runs)
            for key in runs[0]
        }
        for service, runs in results.items()
    }


def measure(folder: Path, quick: bool) -> str:
    """Measure everything, and return the report in Markdown."""
    scale = 0.1 if quick else 1
    machine = describe_machine()
    messages = read_messages(MESSAGES)
    say("Scoring in this process")
    times = time_in_process(messages, round(2000 * scale))
    expected = score(messages[0], load_model(), 0.5)[1]
    services = list_services(register(folder))
    bodies = {
        service: write_bodies(folder / f"{i}.jsonl", map(service.body, messages)) for i, service in enumerate(services)
    }
    batches = ({"texts": messages[i : i + BATCH]} for i in range(0, len(messages) - BATCH + 1, BATCH))
    bodies_of_batches = write_bodies(folder / "batches.jsonl", batches)

    limit, app, *others = services
    with running(app, messages[0], expected, folder) as (url, process_id):
        servers = {app: (url, process_id)}
        with ExitStack() as stack:
            for service in (limit, *others):
                say(f"Starting {service.name}")
                started = running(service, messages[0], None if service is limit else expected, folder)
                servers[service] = stack.enter_context(started)
            compared = compare({service: servers[service] for service in services}, bodies, 4 * scale)
        alone = measure_app(url, process_id, bodies[app], bodies_of_batches, scale)
    return render(machine, times, list(compared.items()), alone)


def measure_app(url: str, process_id: int, bodies: Path, batches: Path, scale: float) -> dict[str, Any]:
    """Load the app alone: at the operator's peak, then as fast as it answers, then with batches.

    Returns:
        What `load` returns for the `peak` and for the `batch`es; the resident memory `before` and `after` the
        single messages, in MB, what a worker `occupied` after them, and how many of them were `served`.
    """
    before = resident(process_id)
    say(f"Sending {PEAK:,} messages a minute")
    peak = load(url, bodies, 60 * scale, PEAK_CONNECTIONS, PEAK / 60)
    served = peak["requests"]
    while served < MEMORY_REQUESTS * scale:
        say(f"Memory: {before:.0f} MB at first, {resident(process_id):.0f} MB {served:,} requests later")
        served += load(url, bodies, 10 * scale)["requests"]
    after, each = resident(process_id), occupied(process_id) / count_cores()
    say("Sending batches")
    batch = load(f"{url}/batch", batches, 8 * scale, connections=16)
    memory = {"before": before, "after": after, "occupied": each, "served": served}
    return {"peak": peak, "batch": batch, **memory}


def render(
    machine: str,
    times: tuple[float, float],
    compared: list[tuple[Service, dict[str, float]]],
    alone: dict[str, Any],
) -> str:
    """Return the tables and the bars in Markdown.

    Args:
        machine: what `describe_machine` returns.
        times: what `time_in_process` returns.
        compared: what `compare` returns, in the order of `list_services`.
        alone: what `measure_app` returns.
    """
    (_, limit), (_, app), _, *others = compared
    peak, batch, before, after = alone["peak"], alone["batch"], alone["before"], alone["after"]
    per_minute = batch["rate"] * BATCH * 60
    bars = [
        ("requests/s of (b) ÷ those of (a); the aim is 0.9", app["rate"] / limit["rate"], 0.8, ".2f"),
        *(
            (f"requests/s of (b) ÷ those of {service.name[:3]}", app["rate"] / result["rate"], bar, ".1f")
            for (service, result), bar in zip(others, (8, 8, 20), strict=True)
        ),
        ("`predict_proba` ÷ `score()`", times[1] / times[0], 60, ".0f"),
        (f"answers a minute when {PEAK:,} are due", peak["rate"] * 60, 0.99 * PEAK, ",.0f"),
        ("p99 of these answers (ms), at most", peak["p99"], 100, ".1f"),
        ("errors of this app, at most", app["errors"] + peak["errors"] + batch["errors"], 0, ".0f"),
        ("messages a minute in batches", per_minute, 2_500_000, ",.0f"),
        ("memory after ÷ memory before, at most", after / before, 1.05, ".3f"),
        ("memory of all processes ÷ workers (MB), at most", alone["occupied"], 60, ".0f"),
    ]
    return "\n".join(
        [
            f"{machine}. The load comes from wrk on the same machine, over {CONNECTIONS} connections. Rates, "
            f"latencies and the server's CPU time per request are medians of {ROUNDS} rounds, in which the "
            "services take turns.",
            "",
            "| `POST /score` | requests/s | p50 (ms) | p99 (ms) | CPU (µs) | errors | (b) ÷ row |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
            *(
                f"| {service.name} | {result['rate']:,.0f} | {result['p50']:.1f} | {result['p99']:.1f} "
                f"| {result['cpu']:,.0f} | {result['errors']:.0f} "
                f"| {app['rate'] / result['rate']:.2f} |"
                for service, result in compared
            ),
            "",
            "| This app | |",
            "| --- | --- |",
            f"| `POST /score/batch`, {BATCH:,} texts a request | {per_minute:,.0f} messages a minute |",
            f"| one `score()` without a server | {times[0]:.0f} µs; "
            f"`predict_proba` takes {times[1]:,.0f} µs, {times[1] / times[0]:.0f} times as long |",
            f"| {PEAK:,} messages a minute for {peak['seconds']:.0f} s, over {PEAK_CONNECTIONS} connections "
            f"| {peak['rate'] * 60:,.0f} answers a minute, {peak['errors']} errors; "
            f"p50 {peak['p50']:.1f} ms, p99 {peak['p99']:.1f} ms, longest {peak['longest']:.0f} ms; "
            f"no message was sent more than {peak['latest']:.0f} ms late |",
            f"| memory of all its processes | {before:.0f} MB at first, "
            f"{after:.0f} MB {alone['served']:,} requests later; with what they share counted once, "
            f"{alone['occupied']:.0f} MB for each worker |",
            "",
            *judge_all(bars),
        ]
    )


def judge(what: str, measured: float, required: float, digits: str) -> str:
    """Return a row that says whether a bar is reached, and if not, by how much it is missed."""
    at_most = what.endswith("at most")
    if measured <= required if at_most else measured >= required:
        verdict = "pass"
    else:
        verdict = f"missed: {measured / required:.2f} times the bar" if required else "missed"
    return f"| {what} | {required:{digits}} | {measured:{digits}} | {verdict} |"


def judge_all(bars: Iterable[tuple[str, float, float, str]]) -> list[str]:
    """Return the table that says of each bar whether it is reached, the end of a report.

    Args:
        bars: of each what is measured, its figure, the figure required, and the format of both.
    """
    return ["| Bar | required | measured | |", "| --- | ---: | ---: | --- |", *(judge(*bar) for bar in bars), ""]


def publish(description: str, measure: Callable[[Path, bool], str], path: Path) -> None:
    """Measure, print the report and keep it.

    Args:
        description: of the program.
        measure: given a folder of its own, and whether to be quick, returns the report in Markdown.
        path: of the report.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick", action="store_true", help="do a tenth of everything, to try this out and not to measure"
    )
    arguments = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk, which makes the load, is missing: apt-get install wrk")
    for ending in (signal.SIGTERM, signal.SIGHUP):  # end the servers too
        signal.signal(ending, lambda *_: sys.exit(1))
    os.environ["DO_NOT_TRACK"] = os.environ["BENTOML_DO_NOT_TRACK"] = "true"
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="spam-bench-") as folder:
        report = measure(Path(folder), arguments.quick)
    print(report)
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(report, encoding="utf-8")
    unfinished.replace(path)


if __name__ == "__main__":
    publish(__doc__, measure, REPORT)
