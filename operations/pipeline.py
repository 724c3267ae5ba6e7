"""The jobs, a function for each kind; `python -m operations.pipeline NUMBER` is the process of one.

/prepare and /train run the notebooks of the course, for there is no second pipeline: in a clone of the last commit,
which is removed afterwards, so that no job touches the work tree and none runs what is not committed.
"""

import csv
import fcntl
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import sqlalchemy as sa
import yaml

from engine.saved import MODEL_PATH, copy_files, load_card
from operations import batch, store
from operations.evaluation import evaluate_window
from operations.jobs import find_waiting, run_job
from operations.monitoring import monitor_window
from operations.promotion import find_model, first_model, keep, model_path, promote, reload_service, roll_back
from operations.registry import add_version
from operations.rescoring import rescore
from operations.scores import plan
from operations.store import SECOND, WORKERS, day_of, day_tables, days, labels, locked, models, now, open_store, reader

Report = Callable[[float, str], None]
LONGEST = 2000  # characters of a message that prepare.ipynb takes
SPLITS = ("train", "validation", "test")


# Notebooks


@contextmanager
def scratch() -> Iterator[Path]:
    """Clone the last commit of the project to a folder, and remove it afterwards, with those of jobs that were killed.

    Raises:
        ValueError: the project is no git clone.
    """
    folder = store.STATE / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with locked(folder):  # so that nobody takes a new folder for one that was left
            for left in folder.iterdir():
                with suppress(BlockingIOError), locked(left, fcntl.LOCK_NB):
                    shutil.rmtree(left)
            mine = Path(tempfile.mkdtemp(dir=folder))
            stack.enter_context(locked(mine))
            stack.callback(shutil.rmtree, mine, ignore_errors=True)
        done = subprocess.run(["git", "clone", "--quiet", store.ROOT, mine], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{store.ROOT} cannot be cloned by git, which this job takes: {done.stderr.strip()}")
        yield mine


def run_notebook(folder: Path, name: str, report: Report, done: float, part: float, **parameters: Any) -> None:
    """Execute a notebook in a clone; what it prints goes to the log of the job.

    Args:
        folder: of the clone.
        name: of the notebook.
        report: is told which cell is being executed.
        done, part: share of the job that was done before, and that the notebook is.
        parameters: of the notebook.

    Raises:
        ValueError: it fails; the message says why.
    """
    (folder / "build").mkdir(exist_ok=True)
    cells, line = len(json.loads((folder / name).read_text(encoding="utf-8"))["cells"]), ""
    command = ["-m", "papermill", "--no-progress-bar", "--log-output", "-y", json.dumps(parameters)]
    process = subprocess.Popen(
        [sys.executable, *command, name, f"build/{name}"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    try:
        for line in filter(str.strip, process.stdout):
            print(line, end="", flush=True)
            if cell := re.match(r"Executing Cell (\d+)", line):
                report(done + part * (int(cell[1]) - 1) / cells, f"Executing {name}, cell {cell[1]} of {cells}")
        if process.wait():
            raise ValueError(f"{name} failed: {line.strip()}")
    finally:
        process.stdout.close()
        process.kill()
        process.wait()


def prepare(engine: sa.Engine, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run prepare.ipynb, to see whether the data can be made as it is committed.

    Returns:
        "splits": how many messages of "ham" and "spam" each of them has.
    """
    with scratch() as clone:
        run_notebook(clone, "prepare.ipynb", report, 0, 1, commit=False)
        counts = {}
        for split in SPLITS:
            label = pd.read_csv(clone / f"data/{split}.csv", usecols=["label"])["label"]
            counts[split] = {"ham": int((label == 0).sum()), "spam": int((label == 1).sum())}
    return {"splits": counts}


# Training on what came back


def read_feedback(engine: sa.Engine) -> tuple[pd.DataFrame, int]:
    """Return the messages that somebody labelled, as prepare.ipynb takes them.

    The last word on a message counts, that of a reviewer before that of a user. Its text is what was sent along with
    the label, or what is stored of the message.

    Returns:
        A table with `label`, `text`, `writer`, `kind` and `country`, and the number of labelled messages that cannot
        be learned from, because nobody kept their text or it is too long.
    """
    with reader(engine).connect() as connection:
        said = pd.read_sql(sa.select(labels).order_by(labels.c.received), connection)
        kept = []
        for day in set(map(day_of, said["message"])):
            if store.hold_day(connection, day, reads=True):
                messages, _ = day_tables(day)
                query = sa.select(messages.c.id, messages.c.text, messages.c.sender)
                kept += connection.execute(query.where(messages.c.id.in_(sa.select(labels.c.message)))).all()
    users_first = (said["source"] == "reviewer").sort_values(kind="stable").index
    last = said.loc[users_first].groupby("message")[["label", "text", "sender"]].last()  # of what is not missing
    known = pd.DataFrame(kept, columns=["message", "text", "sender"], dtype=object).set_index("message")
    text, sender = (last[name].fillna(known[name].reindex(last.index)) for name in ("text", "sender"))
    text = text.fillna("").astype(str)
    usable = (text.str.strip() != "") & (text.str.len() <= LONGEST)
    writer = [f"message {number}" if pd.isna(of) else f"sender {of.hex()}" for number, of in sender.items()]
    table = pd.DataFrame({"label": last["label"].map({0: "ham", 1: "spam"}), "text": text, "writer": writer})
    return table[usable].assign(kind="feedback", country=""), int((~usable).sum())


def train(engine: sa.Engine, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
    """Train a model on the data of the project and on what users and reviewers said, and make it a candidate.

    Returns:
        "model", "sha256", "state" and "mlflow_version" of what was trained, "is_new", "figures" on the test messages
        of each source, and "labels": how many were "used", were "left_out" as too near to messages that models are
        judged on, and had no text ("without_text"). A model that is known already is not new, and nothing changes.

    Raises:
        ValueError: a notebook fails; the message says why.
    """
    feedback, without_text = read_feedback(engine)
    serving = first_model(engine)
    with scratch() as clone:
        parameters = {}
        if len(feedback):
            parameters["further"] = "build/further.csv"
            (clone / "build").mkdir()
            feedback.to_csv(clone / parameters["further"], index=False, quoting=csv.QUOTE_ALL)
        keep_recipe(clone, load_card(serving))
        run_notebook(clone, "prepare.ipynb", report, 0, 0.3, commit=False, **parameters)
        used = int((pd.read_csv(clone / "data/train.csv", keep_default_na=False)["kind"] == "feedback").sum())
        path = clone / "models" / MODEL_PATH.name
        copy_files(serving, path)  # it stays as it is if the new one equals it
        run_notebook(clone, "train.ipynb", report, 0.3, 0.6, with_transformer=False)
        counts = {"used": used, "left_out": len(feedback) - used, "without_text": without_text}
        report(0.9, "Keeping the model")
        card = keep(path)
    with reader(engine).connect() as connection:
        is_new = not connection.scalar(sa.select(sa.exists().where(models.c.sha256 == card["sha256"])))
    version = add_version(model_path(card["sha256"]), card, {"labels": used}) if is_new else None
    model, is_new = store.register(engine, card, "candidate", version)
    if is_new:
        reload_service(load_card(serving)["sha256"])  # so that it scores on the side
    found = find_model(engine, model)
    result = {"model": model, "sha256": found.sha256, "state": found.state, "mlflow_version": found.mlflow_version}
    return {**result, "is_new": is_new, "figures": card["metrics"]["test"], "labels": counts}


def keep_recipe(clone: Path, card: dict[str, Any]) -> None:
    """Have the notebooks of a clone try only the strength and the weight by which the model that serves was fitted.

    What users said adds few messages, from which nobody should choose these anew: a small change of figures on
    validation would move them, and with them what becomes of all messages.

    Args:
        clone: its folder.
        card: of the model that serves.
    """
    recipe = re.search(r", C=([\d.]+), weight ([\d.]+)$", card["parameters"].get("candidate", ""))
    if recipe:
        path = clone / "params.yaml"
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
        params["train"] |= {"C": [yaml.safe_load(recipe[1])], "weight_of_today": [yaml.safe_load(recipe[2])]}
        path.write_text(yaml.safe_dump(params), encoding="utf-8")


# The others


def score_files(engine: sa.Engine, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
    """Score the files that have arrived in the folder for them, by the model that serves.

    Returns:
        "files": for the name of each its "rows", "spam" and "errors", and the "folder" of its scores.

    Raises:
        ValueError: some are bad, and each is named; the others are scored.
    """
    params = yaml.safe_load((store.ROOT / "params.yaml").read_text(encoding="utf-8"))["operations"]["batch"]
    model, done, problems = first_model(engine), {}, []
    waiting = find_waiting(params, datetime.now(UTC))
    for i, (path, folder) in enumerate(waiting):

        def tell(share: float, said: str, i: int = i, name: str = path.name) -> None:
            print(f"{name}: {said}", flush=True)
            report((i + share) / len(waiting), f"{name}: {said}")

        try:
            about = batch.score_files(str(path), plan(str(folder), params["text"], params["id"], model), tell)
            done[path.name] = {"folder": str(folder), **{name: about[name] for name in ("rows", "spam", "errors")}}
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return {"files": done}


def evaluate(engine: sa.Engine, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
    """Evaluate a period, from "start" to "end" in microseconds, as `evaluate_window` does."""
    return evaluate_window(engine, arguments.get("start"), arguments.get("end"))


def monitor(engine: sa.Engine, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
    """Look at a period, from "start" to "end" in microseconds, as `monitor_window` does."""
    result = monitor_window(engine, arguments.get("start"), arguments.get("end"))
    return {"messages": result["messages"], "alarms": result["alarms"]}


def close_days(engine: sa.Engine, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
    """Close the days before yesterday; return how many scores each of them had.

    Raises:
        ValueError: some cannot be closed yet; the others are.
    """
    yesterday = day_of((now() - 86_400 * SECOND) * WORKERS)
    with reader(engine).connect() as connection:
        old = connection.scalars(sa.select(days.c.day).where(days.c.day < yesterday).order_by("day")).all()
    counts, problems = {}, []
    for done, day in enumerate(old):
        report(done / len(old), f"Closing {day}")
        try:
            counts[day] = store.close_day(engine, day)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return {"days": counts}


def forget(engine: sa.Engine, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
    """Delete the texts that are kept for longer than params.yaml allows; return how many."""
    params = yaml.safe_load((store.ROOT / "params.yaml").read_text(encoding="utf-8"))["operations"]
    return {"texts": store.forget(engine, params["retention_days"], params["feedback_days"])}


KINDS = {
    job.__name__: job
    for job in (prepare, train, evaluate, monitor, rescore, score_files, promote, roll_back, close_days, forget)
}

if __name__ == "__main__":
    run_job(open_store(), KINDS, int(sys.argv[1]))
