"""Profile the code: where the time and the memory of prepare, train, score and evaluate go.

`make profile` runs each step twice in a clone of the last commit, once sampled by pyinstrument and once with its
allocations traced by memray; it prints a table and keeps it, with a flame graph of each, in build/profile/.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from benchmarks.bench import ROOT, describe_machine, say

BUILD = ROOT / "build" / "profile"
SCORED = 20_000  # messages, one by one
MOST = 4  # packages that are named for a step
MEGABYTE = 2**20


# The steps, each in a process of its own


def run_notebook(name: str) -> None:
    """Execute a notebook of this folder in this process, where a profiler sees it."""
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell.instance().safe_execfile_ipy(name, raise_exceptions=True)


def score_messages() -> None:
    """Score messages one by one, as the service does."""
    from score import load_card, load_scorer, score

    model, threshold = load_scorer(), load_card()["threshold"]
    texts = pd.read_csv("data/test.csv", keep_default_na=False)["text"]
    for i in range(SCORED):
        score(texts[i % len(texts)], model, threshold)


def evaluate_file() -> None:
    """Measure the saved model on the test messages."""
    from operations.evaluate import main

    main(["data/test.csv"])


STEPS: dict[str, Callable[[], None]] = {
    "prepare.ipynb": lambda: run_notebook("prepare.ipynb"),
    "train.ipynb": lambda: run_notebook("train.ipynb"),
    f"score(), {SCORED:,} times": score_messages,
    "operations.evaluate": evaluate_file,
}


def sample(step: str, path: Path) -> None:
    """Run a step and write where its time goes: a flame graph, and shares of packages beside it as JSON."""
    from pyinstrument import Profiler
    from pyinstrument.renderers import HTMLRenderer

    profiler = Profiler(interval=0.001, use_timing_thread=True)
    with profiler:
        STEPS[step]()
    path.write_text(profiler.output(HTMLRenderer()), encoding="utf-8")
    shares, waiting = Counter(), [profiler.last_session.root_frame()]
    while waiting:
        frame = waiting.pop()
        waiting += frame.children
        if not frame.children:
            seconds = frame.time
            while frame.parent and (frame.is_synthetic or frame.file_path == "<built-in>"):
                frame = frame.parent  # who called it
            shares[package(frame.file_path or "")] += seconds
    figures = {"seconds": profiler.last_session.duration, "shares": dict(shares)}
    path.with_suffix(".json").write_text(json.dumps(figures), encoding="utf-8")


def trace(step: str, path: Path) -> None:
    """Run a step and write what it allocates."""
    import memray

    with memray.Tracker(path):
        STEPS[step]()


def package(path: str) -> str:
    """Return the name of the package that a file belongs to."""
    if found := re.search(r"site-packages/([^/.]+)", path):
        return found[1]
    if re.search(r"/lib/python3[^/]*/|^<frozen", path):
        return "Python"
    return "the notebook" if "ipykernel" in path or path.startswith("<") else "this project"


# The table


def measure(folder: Path) -> str:
    """Profile every step in a clone, and return the report in Markdown."""
    from memray import FileReader

    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    lines = ["| step | seconds | peak memory (MB) | where the time goes |", "| --- | ---: | ---: | --- |"]
    for step in STEPS:
        name = re.sub(r"\W+", "-", step).strip("-")
        time, memory = BUILD / f"{name}-time.html", folder / f"{name}.bin"
        for tool, path in (("sample", time), ("trace", memory)):
            say(f"{step}: {tool}")
            command = [sys.executable, "-m", "benchmarks.profiles", tool, step, path]
            clean = {"MPLBACKEND": "Agg", "PYTHONPATH": str(folder), "WITH_TRANSFORMER": ""}
            # Arrow's own allocator reserves a GiB at once, which would count as if it were in use.
            clean["ARROW_DEFAULT_MEMORY_POOL"] = "system"
            with open(folder / "said.txt", "w+", encoding="utf-8") as said:
                done = subprocess.run(command, cwd=folder, env={**os.environ, **clean}, stdout=said, stderr=said)
                said.seek(0)
                if done.returncode:
                    sys.exit(f"{step} failed: {said.read()[-2000:]}")
        graph = ["flamegraph", "--force", "--output", BUILD / f"{name}-memory.html", memory]
        subprocess.run([sys.executable, "-m", "memray", *graph], check=True, stdout=subprocess.DEVNULL)
        figures = json.loads(time.with_suffix(".json").read_text(encoding="utf-8"))
        peak = FileReader(memory).metadata.peak_memory / MEGABYTE
        shares, total = Counter(figures["shares"]), sum(figures["shares"].values())
        where = ", ".join(f"{of} {seconds / total:.0%}" for of, seconds in shares.most_common(MOST))
        lines.append(f"| {step} | {figures['seconds']:.1f} | {peak:.0f} | {where} |")
    return "\n".join([f"{describe_machine()}.", "", *lines, ""])


def main() -> None:
    """Profile all steps, or run one of them as the first two arguments say."""
    if len(sys.argv) > 1:
        tool, step, path = sys.argv[1:]
        {"sample": sample, "trace": trace}[tool](step, Path(path))
        return
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        report = measure(Path(folder) / "clone")
    (BUILD / "profile.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
