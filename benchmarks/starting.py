"""Measure how soon the service answers after its start, outside a container and in one, and how large that is.

`make bench` runs this, prints the table and keeps it in build/benchmarks-starting.md. The container is measured where
a Docker engine answers; `.ci/docker-engine build/bench/bin/python -m benchmarks.starting` brings one along.
"""

import os
import statistics
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from benchmarks.bench import ROOT, Service, describe_machine, free_port, judge_all, publish, running, say

REPORT = ROOT / "build" / "benchmarks-starting.md"
STARTS = 7
IMAGE = "sms-spam:bench"
BODY = b'{"text": "see you at 6"}'


def docker(*arguments: str | Path) -> str:
    """Run a docker command and return what it prints; OSError or subprocess.CalledProcessError if it fails."""
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def start_outside(folder: Path) -> float:
    """Return the seconds from the start of app.py to its first answer."""
    service = Service("this app", ("{python}", "app.py"), "/score", lambda text: {"text": text})
    begun = time.perf_counter()
    with running(service, "see you at 6", None, folder):
        return time.perf_counter() - begun


def start_container() -> float:
    """Return the seconds from `docker run` to the first answer of the container."""
    port = free_port()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/score", BODY, {"Content-Type": "application/json"})
    begun = time.perf_counter()
    name = docker("run", "--rm", "--detach", "--publish", f"127.0.0.1:{port}:5000", IMAGE)
    try:
        while time.perf_counter() < begun + 60:
            with suppress(OSError):
                urllib.request.urlopen(request, timeout=10).read()
                return time.perf_counter() - begun
            time.sleep(0.01)
        sys.exit("The container does not answer.")
    finally:
        docker("rm", "--force", name)


def measure(folder: Path, quick: bool) -> str:
    """Measure everything, and return the report in Markdown."""
    machine, starts = describe_machine(), 2 if quick else STARTS
    say("Starting the service")
    bars = [
        (
            f"seconds from start to first answer, median of {starts}, at most",
            statistics.median(start_outside(folder) for _ in range(starts)),
            0.8,
            ".2f",
        )
    ]
    absent = ""
    try:
        say("Building the image")
        docker("build", "--quiet", "--build-arg", "BASE", "--tag", IMAGE, ROOT)
        base = os.environ.get("BASE") or "python:3.11-slim"
        sizes = [int(docker("image", "inspect", "--format", "{{.Size}}", image)) for image in (IMAGE, base)]
        say("Starting the container")
        seconds = statistics.median(start_container() for _ in range(starts))
        bars.append((f"seconds from `docker run` to first answer, median of {starts}, at most", seconds, 1.2, ".2f"))
        bars.append(("what the image adds to its base (MB), at most", (sizes[0] - sizes[1]) / 1e6, 60, ".0f"))
    except (OSError, subprocess.CalledProcessError) as error:
        absent = f"The container was not measured: {getattr(error, 'stderr', None) or error}"
    return "\n".join([f"{machine}.", "", *judge_all(bars), absent])


if __name__ == "__main__":
    publish(__doc__, measure, REPORT)
