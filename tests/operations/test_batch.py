"""Scores of files: operations/batch.py, parts.py and scores.py, and the job that scores the files that arrive."""

import contextlib
import fcntl
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from helpers import BUCKET, HAM, ROOT, SPAM, free_port, poll
from sklearn import __version__ as version
from sklearn.dummy import DummyClassifier

import operations.batch
import operations.store
from engine.saved import MODEL_PATH, load_card, load_model, save_model
from operations import jobs, pipeline, scores
from operations.jobs import enqueue_due, find_job, find_waiting
from operations.parts import cut, cut_all, find_sources, read
from operations.pipeline import KINDS
from operations.scores import finish, open_scores, plan, score_part, taken
from operations.store import migrate, open_store
from score import score_batch

HERE = Path(__file__).parent
BATCH = "from operations import batch; batch.TICK = 0.2; batch.main()"  # python -m operations.batch, more talkative
ROWS = 100  # of a part


def save(path, threshold=0.5, of=None):
    """Save a model, by default that of gated.py, and return its path."""
    from gated import Gated

    card = {"name": "stub", "threshold": threshold, "operating_points": [], "versions": {"scikit-learn": version}}
    save_model(of or Gated(), card, path, ["x"])
    return path


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The path of a model that waits for the file `gate`."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{HERE}")
    monkeypatch.setenv("GATE", str(tmp_path / "gate"))
    return save(tmp_path / "model" / "gated.joblib")


@pytest.fixture
def messages(tmp_path):
    """A folder of messages: three parts that are scored at once, and three that wait for the file `gate`."""
    texts = ["x" * (i % 100) for i in range(3 * ROWS)] + (["wait"] + ["y"] * (ROWS - 1)) * 3
    folder = tmp_path / "messages"
    folder.mkdir()
    pd.DataFrame({"id": range(len(texts)), "text": texts}).to_parquet(folder / "all.parquet", row_group_size=70)
    return folder


def session(leader):
    """Return the processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, of, *_ = path.read_text().rpartition(")")[2].split()
            found += [int(path.parent.name)] if int(of) == leader and state not in "ZX" else []
    return found


@contextlib.contextmanager
def started(*command, folder=ROOT, **options):
    """Start a program in a session of its own, and leave nothing of it behind."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, **options)
    try:
        yield process
    finally:
        for pid in session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


def batch(source, out, model, *options, **started_with):
    """Start a batch in a folder of its own, where the model leaves a file for each process that waits."""
    started_with = {"folder": model.parent, **started_with}
    arguments = [str(source), str(out), "--model", str(model), "--rows", str(ROWS), *options]
    return started(sys.executable, "-c", BATCH, *arguments, **started_with)


def run_batch(source, out, model, *options):
    """Run a batch, and return its status and what it says."""
    with batch(source, out, model, *options) as process:
        said, _ = process.communicate(timeout=120)
        poll(lambda: not session(process.pid), "the processes of the batch to end")
    return process.returncode, said


def waiting(folder):
    """Return the processes that have waited in a folder."""
    return [int(path.name.split()[1]) for path in folder.glob("waits *")]


def await_parts(folder, count):
    """Wait until so many parts are scored."""
    poll(lambda: len(list(folder.glob("*.parquet"))) == count, f"{count} scored parts", 60)


def assert_each_once(out, count=6 * ROWS):
    """Check that the scores of all messages are there, and of none twice."""
    table = open_scores(str(out)).to_table().to_pandas()
    assert Counter(table["id"]) == Counter(map(str, range(count)))
    assert table["error"].isna().all()
    return table


# Whole runs


def test_files_of_all_kinds_are_scored_and_what_is_bad_is_named(tmp_path, model):
    folder, out = tmp_path / "all kinds", tmp_path / "the scores"
    (folder / "more").mkdir(parents=True)
    (folder / "_SUCCESS").touch()
    rows = [{"number": f"{i}", "body": "z" * i} for i in range(250)]
    pd.DataFrame(rows).to_csv(folder / "a.csv", index=False)
    pd.DataFrame(rows).to_parquet(folder / "more" / "b.parquet")
    lines = [*rows, {"number": "null", "body": None}, {"number": "5", "body": 5}, {"number": "x", "body": "x" * 10_001}]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (folder / "d.csv").write_text("number,text\n1,hello\n", encoding="utf-8")
    options = ("--text", "body", "--id", "number")
    status, said = run_batch(folder, out, model, *options)
    assert status == 1
    counts, problem = said.splitlines()[-2:]
    assert re.fullmatch(r"753 rows, 80\.0% spam, 3 errors; 753 rows were scored in \d+ s, [\d,]+ rows/s", counts)
    assert problem == "d.csv: it must have one column 'body', or another must be named; it has number, text"
    with pytest.raises(ValueError, match=r"has no manifest\.json, so scores are missing: repeat the batch"):
        open_scores(str(out))

    (folder / "d.csv").unlink()
    status, said = run_batch(folder, out, model, *options)
    assert (status, "753 rows" in said, "; 0 rows were scored" in said) == (0, True, True), said
    table = open_scores(str(out)).to_table()
    assert table.schema == scores.SCHEMA
    table = table.to_pandas()
    assert len(table) == 753
    good = table[table["error"].isna()]
    assert np.allclose(good["propensity"], np.minimum(good["id"].astype(int) / 100, 1))
    assert (good["prediction"] == (good["propensity"] >= 0.5)).all()
    assert set(table["sha256"]) == {plan(str(out), model=model).sha256}
    assert table[table["error"].notna()].set_index("id")["error"].to_dict() == {
        "null": "body must be a string, not null",
        "5": "body must be a string, not int",
        "x": "body has at most 10000 characters, not 10001",
    }
    about = json.loads((out / "manifest.json").read_text())
    assert [about[name] for name in ("rows", "errors", "threshold")] == [753, 3, 0.5]
    assert about["spam"] == good["prediction"].sum()
    assert {path.name for path in out.iterdir()} == {"manifest.json", *(part["file"] for part in about["parts"])}


@pytest.mark.fault
def test_a_batch_outlives_a_worker_and_listens_to_this_machine_alone(tmp_path, model, messages):
    out = tmp_path / "out"
    with batch(messages, out, model, "--id", "id") as process:
        await_parts(out, 3)
        killed, *_ = poll(lambda: waiting(model.parent), "a worker to wait", 60)
        connections = [c for pid in session(process.pid) for c in psutil.Process(pid).net_connections("inet")]
        assert {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        os.kill(killed, signal.SIGKILL)
        poll(lambda: set(waiting(model.parent)) - {killed}, "another worker to wait", 60)
        (tmp_path / "gate").touch()
        said, _ = process.communicate(timeout=120)
        poll(lambda: not session(process.pid), "the processes of the batch to end")
    assert process.returncode == 0, said
    *told, summary = said.splitlines()
    assert all(re.fullmatch(r"\d+%: [\d,]+ rows, \d workers", line) for line in told)
    assert told
    assert summary.startswith("600 rows, ")
    assert_each_once(out)


@pytest.mark.fault
def test_a_batch_that_is_killed_leaves_no_process_and_goes_on_when_repeated(tmp_path, model, messages):
    out = tmp_path / "out"
    with batch(messages, out, model, "--id", "id") as process:
        await_parts(out, 3)
        process.kill()
        process.wait()
        poll(lambda: not session(process.pid), "the workers to end with the batch")
    (out / f"{next(out.glob('*.parquet')).name}.{'0' * 32}").touch()  # half of what a worker was writing
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    (tmp_path / "gate").touch()
    status, said = run_batch(messages, out, model, "--id", "id")
    assert (status, "; 300 rows were scored" in said) == (0, True), said
    assert_each_once(out)
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert len(after) == 6 + 1
    assert before.items() <= after.items()


@pytest.mark.fault
def test_a_terminal_has_a_bar_and_ctrl_c_ends_a_batch_with_a_sentence(tmp_path, model, messages):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))

    def take_terminal():
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    said = ""

    def has_said(pattern):
        nonlocal said
        if select.select([ours], [], [], 0)[0]:
            with contextlib.suppress(OSError):  # its end
                said += os.read(ours, 4096).decode()
        return re.search(pattern, said)

    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "preexec_fn": take_terminal}
    with batch(messages, tmp_path / "out", model, "--id", "id", **terminal) as process:
        os.close(theirs)
        poll(lambda: has_said(r" \d+%\|.*300 rows, 2 workers") and waiting(model.parent), "a bar", 60)
        os.write(ours, b"\x03")
        poll(lambda: has_said("Interrupted; the same command goes on from here.\r\n$"), "the end", 60)
        assert process.wait(60) == 1
        poll(lambda: not session(process.pid), "the workers to end with the batch")
    os.close(ours)
    assert "Traceback" not in said


@pytest.fixture
def cluster(tmp_path, model, monkeypatch):
    """A function that starts a scheduler and two workers, each with a folder of its own, and returns the processes."""
    port, stack = free_port(), contextlib.ExitStack()
    address = f"tcp://127.0.0.1:{port}"
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", address)

    def start():
        command = (sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--no-dashboard")
        output = {"stdout": subprocess.DEVNULL}
        processes = [stack.enter_context(started(*command, "--port", str(port), folder=tmp_path, **output))]
        for host in ("first", "second"):
            folder = tmp_path / host
            folder.mkdir(exist_ok=True)
            command = (
                sys.executable,
                "-m",
                "distributed.cli.dask_worker",
                address,
                "--no-dashboard",
                "--nthreads",
                "1",
            )
            where = ("--host", "127.0.0.1", "--local-directory", str(folder))
            processes.append(stack.enter_context(started(*command, *where, folder=folder, **output)))
        return processes

    with stack:
        yield start


@pytest.mark.fault
def test_two_machines_share_a_batch_which_outlives_them_and_their_scheduler(tmp_path, model, messages, cluster):
    out, hosts = tmp_path / "out", [tmp_path / "first", tmp_path / "second"]
    scheduler, *_ = cluster()
    with batch(messages, out, model, "--id", "id") as process:
        poll(lambda: all(map(waiting, hosts)), "both machines to wait", 60)
        scheduler.kill()
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.splitlines()[-1] == "the scheduler of Dask has gone: start it, and repeat this to go on"
    assert "Traceback" not in said

    before = set(itertools.chain(*map(waiting, hosts)))
    _, first, _ = cluster()
    with batch(messages, out, model, "--id", "id") as process:
        poll(lambda: all(set(waiting(host)) - before for host in hosts), "both machines to wait again", 60)
        os.killpg(first.pid, signal.SIGKILL)
        (tmp_path / "gate").touch()
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert_each_once(out)


@pytest.mark.fault
def test_a_part_that_kills_its_workers_is_named(tmp_path, model, monkeypatch):
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "1")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "deadly.csv").write_text("text\n" + "x\n" * ROWS + "die\n")
    (folder / "good.csv").write_text("text\n" + "x\n" * ROWS)
    status, said = run_batch(folder, tmp_path / "out", model)
    assert status == 1
    assert said.splitlines()[-1] == "deadly.csv: rows 102 to 102: each worker that scored them was killed"
    assert "\n200 rows, " in f"\n{said}"


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow")  # within moto
def test_from_and_to_an_object_store(tmp_path, model, bucket, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket)
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    store.pipe_file(f"{BUCKET}/in/a.jsonl", b'{"text": "x"}\n' * 150)
    store.pipe_file(f"{BUCKET}/in/b.csv", b"text\n" + b'"two\nlines"\n' * 150)
    source, out = f"s3://{BUCKET}/in/*", f"s3://{BUCKET}/out"
    status, said = run_batch(source, out, model)
    assert (status, "300 rows, 0.0% spam, 0 errors" in said) == (0, True), said
    names = [path.rpartition("/")[2] for path in store.ls(f"{BUCKET}/out")]
    assert len(names) == 4 + 1
    table = open_scores(out).to_table().to_pandas()
    assert table["id"].tolist() == [f"a.jsonl:{i + 1}" for i in range(150)] + [f"b.csv:{i + 2}" for i in range(150)]
    assert table["propensity"].tolist() == [0.01] * 150 + [0.09] * 150


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("nowhere", "out"), "there are no files to score at nowhere"),
        (("gopher://x/y", "out"), "Protocol not known: gopher"),
        ((".", "out", "--model", "none.joblib"), "none.json is missing: train.ipynb writes it with the model"),
        ((".", "out", "--rows", "0"), "a part must have at least one row, not 0"),
        ((".", "sub"), "some of the input lies in "),
        ((".", "a.csv"), "File exists"),
    ],
)
def test_what_cannot_begin_ends_with_a_sentence(arguments, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for path in ("a.csv", "sub/b.csv"):
        (tmp_path / path).write_text("text\nhello\n")
    monkeypatch.setattr(sys, "argv", ["batch", *arguments])
    with pytest.raises(SystemExit) as ended:
        operations.batch.main()
    assert problem in ended.value.code
    assert "\n" not in ended.value.code


# Files in parts

TEXTS = [
    "plain",
    "two\nlines",
    "",
    'a "quoted" word',
    "comma, semicolon;",
    "caf\u00e9 \U0001f600",
    " blank ",
    "\u2028",
] * 9


def write_all(folder, texts):
    """Write texts to files of all kinds, and return their paths."""
    table = pd.DataFrame({"more": 1, "text": texts})
    paths = [folder / name for name in ("a.csv", "b.csv", "c.jsonl", "d.parquet", "e.parquet")]
    table.to_csv(paths[0], index=False, lineterminator="\r\n")
    paths[1].write_bytes(b"\xef\xbb\xbf" + table.to_csv(index=False).encode())
    paths[2].write_text("".join(json.dumps(row) + "\n" for row in table.to_dict("records")), encoding="utf-8")
    table.to_parquet(paths[3], row_group_size=7)
    table.to_parquet(paths[4])
    return paths


@pytest.mark.parametrize("rows", [1, 5, 7, 36, 72, 1000])
def test_parts_are_all_rows_in_order_and_each_once(rows, tmp_path):
    for path in write_all(tmp_path, TEXTS):
        [source] = find_sources(str(path))
        parts = list(cut(source, ["text"], rows))
        assert all(part.rows <= rows for part in parts)
        assert len(parts) == -(-len(TEXTS) // rows)
        assert [row["text"] for part in parts for row in read(part, ["text"]) if row is not None] == TEXTS, path
        first = 2 if path.suffix == ".csv" else 1
        assert [part.first for part in parts] == list(range(first, first + len(TEXTS), rows))
        assert sum(part.size for part in parts) <= source.size


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.xlsx", b"", "its name must end in .csv, .jsonl, .json, .parquet"),
        ("a.parquet", b"text\nhello\n", "Parquet magic bytes not found"),
        ("a.csv", b"", "it must have one column 'text'"),
        ("a.csv", b"id,body\n1,x\n", "it must have one column 'text', or another must be named; it has id, body"),
        ("a.csv", b"text,text\n1,x\n", "it must have one column 'text'"),
        ("a.csv", b'text\n"x"y\n', "',' expected after '\"'"),
        ("a.csv", b'text\n"x\n', "unexpected end of data"),
        ("a.csv", b"text\nx\n\xff\n", "byte 8 is not UTF-8"),
        ("a.csv", "text\nx\n".encode("utf-16"), "byte 1 is not UTF-8"),
        ("a.jsonl", b'[{"text": "x"}]\n', "a line must hold a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', "it must have one column 'text', or another must be named; it has body"),
        ("a.jsonl", b'{"text": "\xff"}\n', "byte 11 is not UTF-8"),
    ],
)
def test_a_bad_file_is_named(name, content, problem, tmp_path):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.csv").write_text("text\nx\n")
    bad, rows = {}, []
    for part in cut_all(find_sources(str(tmp_path)), ["text"], 10, bad):
        try:
            rows += [row["text"] for row in read(part, ["text"])]
        except ValueError as error:
            bad[part.source.name] = str(error)
    assert list(bad) == [name]
    assert problem in bad[name]
    assert rows == ["x"]


def test_no_more_is_cut_of_a_file_that_was_found_bad(tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("text\nx\ny\nz\n")
    bad = {}
    parts = cut_all(find_sources(str(tmp_path)), ["text"], 1, bad)
    assert next(parts).source.name == "a.csv"
    bad["a.csv"] = "byte 8 is not UTF-8"
    assert [part.source.name for part in parts] == ["b.csv"] * 3


def test_an_empty_file_has_no_parts(tmp_path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.csv").write_text("text\n")
    pd.DataFrame({"text": []}).to_parquet(tmp_path / "c.parquet")
    bad = {}
    assert list(cut_all(find_sources(str(tmp_path)), ["text"], 10, bad)) == []
    assert bad == {}


def test_which_files_an_address_names(tmp_path):
    for name in ("a.csv", "b [1].csv", "sub/c.csv", "sub/_temporary/d.csv", ".hidden", "_SUCCESS"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link.csv").symlink_to("a.csv")

    def names(address):
        return [source.name for source in find_sources(f"{tmp_path}{address}")]

    assert names("") == names("/") == ["a.csv", "b [1].csv", "link.csv", "sub/c.csv"]
    assert names("/b [1].csv") == ["b [1].csv"]
    assert names("/*.csv") == ["a.csv", "b [1].csv", "link.csv"]
    assert names("/*/c.csv") == names("/**/c.csv") == ["sub/c.csv"]
    before = find_sources(f"{tmp_path}/link.csv")
    (tmp_path / "a.csv").write_text("text\n")
    assert find_sources(f"{tmp_path}/link.csv") != before


# Folders of scores


@pytest.fixture
def score_all(tmp_path, model):
    """A function that scores files as a batch does, without Dask, and returns the folder of the scores."""

    def score(source, out="out", by=model, id_=None, ends=True):
        run = plan(str(tmp_path / out), id_=id_, model=by, rows=2)
        with taken(run, str(source), lambda _, said: print(said)) as sources:
            done = [score_part(part, run) for part in cut_all(sources, run.columns, run.rows, {})]
            if ends:
                finish(run, str(source), sources, done)
        return tmp_path / out

    return score


@pytest.mark.parametrize(
    ("row", "id_", "error"),
    [
        ('{"id": "a", "text": "x"}', "a", None),
        ('{"id": 7, "text": ""}', "7", None),
        ('{"id": "a", "text": "\\ud83d"}', "a", None),
        ('{"id": "a", "text": null}', "a", "text must be a string, not null"),
        ('{"id": "a"}', "a", "text must be a string, not null"),
        ('{"id": "a", "text": 1.5}', "a", "text must be a string, not float"),
        ('{"id": "a", "text": ["x"]}', "a", "text must be a string, not list"),
        ('{"text": "x"}', "file.jsonl:2", "id must be a string or a whole number, for it is the id"),
        ('{"id": true, "text": "x"}', "file.jsonl:2", "id must be a string or a whole number, for it is the id"),
        ('{"id": "", "text": "x"}', "file.jsonl:2", "id must be a string or a whole number, for it is the id"),
        ('{"id": "\\ud83d", "text": "x"}', "file.jsonl:2", "id must be a string or a whole number, for it is the id"),
        ('["x"]', "file.jsonl:2", "a line must hold a JSON object"),
        ("{", "file.jsonl:2", "a line must hold a JSON object"),
        ("[" * 100_000, "file.jsonl:2", "a line must hold a JSON object"),
        ('{"id": ' + "9" * 5000 + "}", "file.jsonl:2", "a line must hold a JSON object"),
    ],
)
def test_a_bad_row_is_a_row_with_an_error(row, id_, error, tmp_path, score_all):
    good = '{"id": "good", "text": "x"}'
    (tmp_path / "file.jsonl").write_text(f"{good}\n{row}\n\n{good}\n")
    table = open_scores(str(score_all(tmp_path / "file.jsonl", id_="id"))).to_table().to_pandas()
    assert table["id"].tolist() == ["good", id_, "good"]
    assert table["error"].fillna("").tolist() == ["", error or "", ""]
    assert table["propensity"].isna().tolist() == table["prediction"].isna().tolist() == [False, bool(error), False]


def test_a_row_of_another_length_than_the_header_is_bad(tmp_path, score_all):
    (tmp_path / "file.csv").write_text("id,text\n1,x\n\n2,x,y\n3\n")
    table = open_scores(str(score_all(tmp_path / "file.csv"))).to_table().to_pandas()
    assert table["id"].tolist() == ["file.csv:2", "file.csv:4", "file.csv:5"]
    assert table["error"].tolist()[1:] == [f"the row has {n} fields, and the header 2" for n in (3, 1)]


def test_scores_are_those_of_the_model(tmp_path, score_all):
    pd.DataFrame({"text": SPAM + HAM}).to_parquet(tmp_path / "file.parquet")
    table = open_scores(str(score_all(tmp_path / "file.parquet", by=MODEL_PATH))).to_table()
    expected = score_batch(SPAM + HAM, load_model(), load_card()["threshold"])
    assert list(zip(table["prediction"].to_pylist(), table["propensity"].to_pylist(), strict=True)) == expected
    assert set(table["sha256"].to_pylist()) == {load_card()["sha256"]}


def test_finished_scores_of_something_else_are_never_replaced_and_unfinished_ones_never_mixed(
    tmp_path, score_all, capsys
):
    source = tmp_path / "file.csv"
    source.write_text("text\nx\ny\nz\n")
    other = save(tmp_path / "other" / "gated.joblib", 0.4)
    out = score_all(source)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="holds the scores of another state of the input, or by another model"):
        score_all(source, by=other)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert score_all(source) == out
    assert {path: path.read_bytes() for path in out.iterdir()} == before

    out = score_all(source, "unfinished", ends=False)
    source.write_text("text\nx\n")
    assert "removed" not in capsys.readouterr().out
    assert score_all(source, "unfinished", by=other) == out
    assert capsys.readouterr().out == (
        "The scores of another state of the input, or by another model, are removed: 2 files\n"
    )
    assert len(list(out.iterdir())) == 1 + 1
    assert open_scores(str(out)).count_rows() == 1


def test_an_input_that_grows_is_scored_to_the_same_folder(tmp_path, score_all):
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate(("b.csv", "a.csv"), 1):
        (folder / name).write_text("text\nx\n")
        assert open_scores(str(score_all(folder))).count_rows() == number


def test_a_folder_has_one_run_at_a_time(tmp_path, score_all, model):
    source = tmp_path / "file.csv"
    source.write_text("text\nx\n")
    with (
        taken(plan(str(tmp_path / "out"), model=model), str(source), print),
        pytest.raises(ValueError, match=r"another run writes to .*out: wait until it has ended"),
    ):
        score_all(source)


def test_an_input_that_changes_meanwhile_makes_no_manifest(tmp_path, model):
    source = tmp_path / "file.csv"
    source.write_text("text\nx\n")
    run = plan(str(tmp_path / "out"), model=model)
    with taken(run, str(source), print) as sources:
        source.write_text("text\nx\ny\n")
        with pytest.raises(ValueError, match=r"file\.csv has changed in the meantime: repeat the run"):
            finish(run, str(source), sources, [])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"parts": [{"file": "a"}]}', "\xff", '{"parts": [{"file": 5, "sha256": 1}]}']
)
def test_a_folder_with_another_manifest_is_left_alone(content, tmp_path, score_all):
    (tmp_path / "file.csv").write_text("text\nx\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="is no manifest of scores: name another folder"):
        score_all(tmp_path / "file.csv")
    assert (tmp_path / "out" / "manifest.json").read_text() == content


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_damaged_scores_are_not_trusted_and_a_repeated_run_mends_them(damage, tmp_path, score_all):
    (tmp_path / "file.csv").write_text("text\nx\ny\nz\n")
    out = score_all(tmp_path / "file.csv")
    before = {path: path.read_bytes() for path in out.iterdir()}
    damage(min(out.glob("*.parquet")))
    with pytest.raises(ValueError, match="is not as the batch wrote it: repeat the batch"):
        open_scores(str(out))
    score_all(tmp_path / "file.csv")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_machine_with_another_model_scores_nothing(tmp_path, model):
    (tmp_path / "file.csv").write_text("text\nx\n")
    run = plan(str(tmp_path / "out"), model=model)
    save(model, of=DummyClassifier(strategy="prior").fit(["x", "y"], [0, 1]))
    [part] = cut(*find_sources(str(tmp_path / "file.csv")), ["text"], 10)
    with pytest.raises(ValueError, match="is not the model of this run: copy that one there"):
        score_part(part, run)
    assert not (tmp_path / "out").exists()


def test_the_model_of_the_project_is_found_wherever_the_project_lies(tmp_path):
    assert plan(str(tmp_path)).model == "models/best_model.joblib"


# The job


INBOX = {"inbox": "inbox", "out": "scored", "text": "text", "id": None}


@pytest.fixture
def inbox(tmp_path, monkeypatch):
    """The folder in which files arrive, and an empty store."""
    monkeypatch.setattr(jobs, "STATE", tmp_path)
    monkeypatch.setenv("OPERATIONS_STATE", str(tmp_path))
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'store.db'}")
    store = open_store()
    migrate(store)
    yield tmp_path / "inbox", store
    store.dispose()


def test_files_that_have_arrived_are_scored_once(inbox):
    folder, store = inbox
    soon, later = (datetime.now(UTC) + timedelta(seconds=seconds) for seconds in (30, 90))
    assert enqueue_due(store, {}, 200, later, INBOX) == []  # there is no such folder
    (folder / "sub").mkdir(parents=True)
    for name in (".a.csv.part", "a.csv"):
        (folder / name).write_text("text\nx\n")
    assert enqueue_due(store, {}, 200, soon, INBOX) == []  # it may still be on its way
    assert enqueue_due(store, {}, 200, later) == []
    [job] = enqueue_due(store, {}, 200, later, INBOX)
    assert enqueue_due(store, {}, 200, later, INBOX) == []
    assert (find_job(store, job)["kind"], find_job(store, job)["arguments"]) == ("score_files", {})
    [(path, out)] = find_waiting(INBOX, later)
    assert path == folder / "a.csv"
    out.mkdir(parents=True)
    (out / "manifest.json").touch()
    assert find_waiting(INBOX, later) == []
    path.write_text("text\nx\ny\n")
    assert len(enqueue_due(store, {}, 200, later, INBOX)) == 1


def test_the_job_scores_what_has_arrived_by_the_model_that_serves(inbox, monkeypatch):
    folder, store = inbox
    folder.mkdir()
    for name, column in (("a.csv", "body"), ("b.csv", "text")):
        pd.DataFrame({column: [SPAM[0], HAM[0]]}).to_csv(folder / name, index=False)
    monkeypatch.setattr(pipeline, "find_waiting", lambda params, at: find_waiting(params, at + timedelta(minutes=2)))
    monkeypatch.setattr(operations.store, "STATE", folder.parent)
    report = lambda share, said: told.append((share, said))  # noqa: E731
    told = []
    with pytest.raises(ValueError, match=r"^a\.csv: it must have one column 'text'"):
        KINDS["score_files"](store, {}, report)
    assert told[-1][0] == 1
    assert re.fullmatch(r"b\.csv: 2 rows, 50\.0% spam, 0 errors; .*", told[-1][1])
    (folder / "a.csv").unlink()
    assert KINDS["score_files"](store, {}, report) == {"files": {}}
    [out] = (folder.parent / "scored").glob("b.csv-*")
    table = open_scores(str(out)).to_table().to_pandas()
    assert table["prediction"].tolist() == [True, False]
    assert set(table["sha256"]) == {load_card()["sha256"]}
