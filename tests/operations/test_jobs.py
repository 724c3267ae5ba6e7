"""The queue of jobs, its workers and its schedule: operations/jobs.py and operations/guard.py."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier

import pytest
import sqlalchemy as sa
from helpers import ROOT, poll
from sqlalchemy.exc import OperationalError

import operations.jobs
from operations.claims import TWICE, WAITING, Claim, take
from operations.jobs import AWAY, Worker, cancel, enqueue, enqueue_due, find_job, list_jobs, read_log, run_job, work
from operations.store import SECOND, add_label, jobs, labels, migrate, now, open_store

LEASE, HEARTBEAT = 4, 0.4  # seconds
# What stands for operations.pipeline.
PIPELINE = """
import os, subprocess, sys, time
from pathlib import Path
from operations.jobs import run_job
from operations.store import open_store

def add(engine, arguments, report):
    print("adding")
    return {"sum": arguments["a"] + arguments["b"]}

def leave(engine, arguments, report):
    print("cannot go on", flush=True)
    os._exit(3)

def wait(engine, arguments, report):
    far = subprocess.Popen(["sleep", "600"], start_new_session=True)
    report(0.5, "half of it is done")
    folder = Path(arguments["folder"])
    with open(folder / "starts", "a") as file:
        file.write(f"{os.getpid()} {far.pid}\\n")
    while not (folder / "go").exists():
        time.sleep(0.02)
    return {"starts": len((folder / "starts").read_text().splitlines())}

run_job(open_store(), {"add": add, "leave": leave, "wait": wait}, int(sys.argv[1]))
"""
WORKER = "import json, sys; from operations.jobs import work; work(**json.loads(sys.argv[1]))"


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """A function that starts a worker; it and its processes are ended after the test."""
    monkeypatch.setattr(operations.jobs, "STATE", tmp_path)
    started = []

    def start(engine, lease=LEASE):
        command = [sys.executable, "-c", PIPELINE]
        options = {"schedule": {}, "train_after": 10**6, "command": command, "lease": lease, "heartbeat": HEARTBEAT}
        environment = {**os.environ, "DATABASE_URL": str(engine.url), "OPERATIONS_STATE": str(tmp_path)}
        arguments = [sys.executable, "-c", WORKER, json.dumps(options)]
        pipe = subprocess.PIPE
        worker = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=pipe, text=True, start_new_session=True)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(20)
        worker.kill()
        worker.communicate()
    try:
        poll(lambda: not alive(tmp_path), "the jobs' processes to end")
    finally:
        for process in alive(tmp_path):
            os.kill(process, signal.SIGKILL)


def starts(folder):
    """Return the processes of each start of a job that waits, and of its distant child."""
    with contextlib.suppress(FileNotFoundError):
        return [[int(pid) for pid in line.split()] for line in (folder / "starts").read_text().splitlines()]
    return []


def alive(folder):
    """Return those of them that run."""

    def runs(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        return False

    return [pid for start in starts(folder) for pid in start if runs(pid)]


def await_state(engine, job, *states, seconds=60):
    """Wait for a state of a job, and return the job."""

    def look():
        with contextlib.suppress(OperationalError):
            found = find_job(engine, job)
            return found["state"] in states and found

    return poll(look, f"job {job} to be {states}", seconds)


def await_starts(folder, count):
    return poll(lambda: len(starts(folder)) == count and starts(folder), f"start {count} of the job", 60)


def enqueue_waiting(engine, folder):
    """Enqueue a job that waits for a file named go."""
    return enqueue(engine, "wait", {"folder": str(folder)})


def test_jobs_are_run_and_say_how_they_went(store, launch):
    add, leave = (enqueue(store, kind, {"a": 2, "b": 3}) for kind in ("add", "leave"))
    launch(store)
    left = await_state(store, leave, "failed")
    assert (left["message"], left["result"], left["lease"]) == ("cannot go on", None, None)
    done = find_job(store, add)
    assert (done["state"], done["result"], done["arguments"]) == ("done", {"sum": 5}, {"a": 2, "b": 3})
    assert (done["progress"], done["attempt"], done["lease"]) == (1, 1, None)
    assert done["created"] < done["started"] < done["finished"]
    assert read_log(add) == "adding\n"
    assert [job["id"] for job in list_jobs(store)] == [leave, add]
    assert [job["id"] for job in list_jobs(store, 1)] == [leave]


def refuse(engine, arguments, report):
    raise ValueError("there are too few messages to train on")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("refuse", "there are too few messages to train on"),
        ("divide", "ZeroDivisionError: division by zero"),
        ("nan", "Out of range float values are not JSON compliant"),
        ("unknown", "There are no jobs of the kind 'unknown'; there are refuse, divide, nan."),
    ],
)
def test_a_job_that_goes_wrong_fails_with_a_sentence(kind, message, store, monkeypatch, capfd):
    job = enqueue(store, kind)
    take(store, "first", now() + SECOND)
    monkeypatch.setenv("OPERATIONS_CLAIM", "1 first")
    run_job(store, {"refuse": refuse, "divide": lambda *_: 1 / 0, "nan": lambda *_: {"x": float("nan")}}, job)
    found = find_job(store, job)
    assert (found["state"], found["attempt"], found["result"], found["lease"]) == ("failed", 1, None, None)
    assert found["message"].startswith(message)
    assert message in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.fault
def test_a_job_that_is_killed_runs_once_more(store, launch, tmp_path):
    job = enqueue_waiting(store, tmp_path)
    launch(store)
    for count in (1, 2):
        process, _ = await_starts(tmp_path, count)[-1]
        assert find_job(store, job)["message"] == "half of it is done"
        os.kill(process, signal.SIGKILL)
    failed = await_state(store, job, "failed")
    assert (failed["message"], failed["attempt"]) == (TWICE, 2)
    assert not alive(tmp_path)


@pytest.mark.fault
def test_a_job_outlives_its_worker_and_its_processes_do_not(store, launch, tmp_path):
    job = enqueue_waiting(store, tmp_path)
    worker = launch(store)
    await_starts(tmp_path, 1)
    os.killpg(worker.pid, signal.SIGKILL)
    poll(lambda: not alive(tmp_path), "the job's processes to end with their worker", 3)
    launch(store)
    await_starts(tmp_path, 2)
    (tmp_path / "go").touch()
    done = await_state(store, job, "done", "failed")
    assert (done["result"], done["attempt"]) == ({"starts": 2}, 2)
    assert len(list_jobs(store)) == 1


@pytest.mark.fault
def test_a_worker_that_slept_past_its_lease_has_lost_its_job(store, launch, tmp_path):
    job = enqueue_waiting(store, tmp_path)
    sleeper = launch(store, lease=2)
    [first] = await_starts(tmp_path, 1)
    sleeper.send_signal(signal.SIGSTOP)
    other = launch(store)
    second = await_starts(tmp_path, 2)[1]
    assert set(alive(tmp_path)) == set(second)  # of the first, nothing ran any more
    taken = find_job(store, job)
    sleeper.send_signal(signal.SIGCONT)
    sleeper.terminate()
    assert sleeper.wait(10) == 0
    assert find_job(store, job)["worker"] == taken["worker"]
    assert set(alive(tmp_path)) == set(second)
    (tmp_path / "go").touch()
    assert await_state(store, job, "done")["result"] == {"starts": 2}
    assert first != second
    assert other.poll() is None


def test_a_worker_that_is_told_to_end_gives_its_job_back(store, launch, tmp_path):
    job = enqueue_waiting(store, tmp_path)
    worker = launch(store)
    await_starts(tmp_path, 1)
    worker.terminate()
    assert worker.wait(5) == 0
    assert not alive(tmp_path)
    given = find_job(store, job)
    assert (given["state"], given["attempt"], given["worker"], given["progress"]) == ("waiting", 0, None, 0)


def test_cancelling_ends_all_processes_of_a_job(store, launch, tmp_path):
    job, waiting = (enqueue_waiting(store, tmp_path) for _ in range(2))
    assert cancel(store, waiting)
    assert find_job(store, waiting)["state"] == "cancelled"
    launch(store)
    await_starts(tmp_path, 1)
    assert cancel(store, job)
    poll(lambda: not alive(tmp_path), "the job's processes to end", 3)
    poll(lambda: find_job(store, job)["lease"] is None, "the worker to let go of the job")
    assert find_job(store, job)["state"] == "cancelled"
    assert not cancel(store, job)
    assert not cancel(store, 999)
    assert find_job(store, 999) is None


@pytest.mark.fault
@pytest.mark.parametrize("lease", [60, 2])
def test_a_job_outlives_a_store_that_is_killed(lease, postgres, launch, tmp_path):
    engine = open_store(postgres.url(f"killed_{lease}"))
    migrate(engine)
    job = enqueue_waiting(engine, tmp_path)
    worker = launch(engine, lease)
    await_starts(tmp_path, 1)
    postgres.kill()
    try:
        assert worker.stdout.readline().startswith("The store cannot be written to: ")
        if lease == 2:
            poll(lambda: not alive(tmp_path), "the processes to end with their lease")
        else:
            (tmp_path / "go").touch()  # the job is done while the store is away
            poll(lambda: "The store cannot be written to: " in read_log(job), "the job to notice")
    finally:
        postgres.start()
    assert worker.stdout.readline() == "The store is back.\n"
    if lease == 2:
        await_starts(tmp_path, 2)
        (tmp_path / "go").touch()
    assert await_state(engine, job, "done", "failed")["result"] == {"starts": 2 if lease == 2 else 1}
    engine.dispose()


# What one statement decides


def test_each_job_is_taken_once_however_many_workers_take(store):
    numbers = [enqueue(store, "evaluate") for _ in range(30)]

    def take_all(name):
        return [claim.job for claim in iter(lambda: take(store, name, now() + 60 * SECOND), None)]

    with ThreadPoolExecutor(3) as pool:
        taken = list(pool.map(take_all, ["first", "second", "third"]))
    assert sorted(itertools.chain(*taken)) == numbers
    assert [sorted(part) for part in taken] == taken


def test_jobs_that_change_the_same_thing_run_one_after_the_other(store):
    first, second, train, retrain, other = (
        enqueue(store, kind) for kind in ("promote", "roll_back", "train", "train", "evaluate")
    )
    lease = now() + 60 * SECOND
    claims = [take(store, "a", lease) for _ in range(4)]
    assert [claim and claim.job for claim in claims] == [first, train, other, None]
    cancel(store, first)
    assert take(store, "b", lease) is None  # until its worker has ended it
    claims[1].update(store, state="done", lease=None)
    assert take(store, "b", lease).job == retrain
    with store.begin() as connection:
        connection.execute(jobs.update().where(jobs.c.id == first).values(lease=now() - 1))
    assert take(store, "b", lease).job == second


def test_workers_that_take_at_the_same_time_take_one_of_such_jobs(store):
    numbers = [enqueue(store, kind) for kind in ("promote", "roll_back") * 8]
    begin = Barrier(4)

    def take_together(name):
        begin.wait()
        return take(store, name, now() + 60 * SECOND)

    with ThreadPoolExecutor(4) as pool:
        for number in numbers:
            [claim] = filter(None, pool.map(take_together, "abcd"))
            assert claim.job == number
            claim.update(store, state="done", lease=None)


def test_a_claim_is_of_one_worker_in_one_attempt(store):
    job = enqueue(store, "x")
    first = take(store, "a", now() - 1)
    again = take(store, "a", now() - 1)
    assert not first.update(store, progress=0.5)
    assert again.update(store, **WAITING, attempt=0)  # it gives the job back
    other = take(store, "b", now() + SECOND)
    assert other.attempt == first.attempt
    assert not first.update(store, progress=0.5)
    assert other.update(store, progress=0.7)
    assert find_job(store, job)["progress"] == 0.7


def test_a_lease_that_is_renewed_at_the_last_moment_holds(postgres):
    engine, other = (open_store(url) for url in [postgres.url("renewed")] * 2)
    migrate(engine)
    enqueue(engine, "x")
    claim = take(engine, "a", now() - 1)

    def renew(connection, cursor, statement, *_):
        if statement.startswith("UPDATE jobs"):
            assert claim.update(other, lease=now() + 60 * SECOND)

    sa.event.listen(engine, "before_cursor_execute", renew)
    assert take(engine, "b", now() + 60 * SECOND) is None
    assert claim.update(other, progress=0.5)
    engine.dispose()
    other.dispose()


def test_what_an_abandoned_job_does_is_not_stored(store, monkeypatch, capfd):
    job = enqueue(store, "x")
    take(store, "first", now() - 1)
    assert take(store, "second", now() - 1).attempt == 2
    monkeypatch.setenv("OPERATIONS_CLAIM", "1 first")
    with pytest.raises(SystemExit, match="no longer"):
        run_job(store, {"x": lambda *_: {"result": "wrong"}}, job)
    assert take(store, "third", now() + SECOND) is None  # it was abandoned twice
    assert find_job(store, job)["state"] == "failed"
    assert find_job(store, job)["result"] is None


def test_a_job_that_loses_its_claim_ends_with_its_next_report(store, monkeypatch):
    job = enqueue(store, "x")
    take(store, "first", now() + SECOND)
    monkeypatch.setenv("OPERATIONS_CLAIM", "1 first")

    def report_late(engine, arguments, report):
        report(0.1, "it has begun")
        assert find_job(store, job)["progress"] == 0.1
        cancel(store, job)
        report(0.2, "it goes on")

    with pytest.raises(SystemExit, match="no longer"):
        run_job(store, {"x": report_late}, job)
    assert find_job(store, job)["message"] == "It was cancelled."


def test_a_job_that_loses_the_store_is_run_again_by_its_worker(store, monkeypatch, capfd):
    job = enqueue(store, "x")
    take(store, "first", now() + SECOND)
    monkeypatch.setenv("OPERATIONS_CLAIM", "1 first")
    away = open_store("postgresql://nobody@/nothing?host=/nowhere")
    with pytest.raises(SystemExit) as ended:
        run_job(store, {"x": lambda *_: find_job(away, 1)}, job)
    assert ended.value.code == AWAY
    assert find_job(store, job)["state"] == "running"
    away.dispose()


def test_a_job_goes_on_where_its_reports_cannot_be_stored(store, monkeypatch):
    job = enqueue(store, "x")
    take(store, "first", now() + SECOND)
    monkeypatch.setenv("OPERATIONS_CLAIM", "1 first")

    def fail(*_, **__):
        raise OperationalError("UPDATE jobs", {}, OSError("the store is away"))

    def report_in_vain(engine, arguments, report):
        with monkeypatch.context() as patch:
            patch.setattr(Claim, "update", fail)
            report(0.5, "half of it is done")
        return {"sum": 5}

    run_job(store, {"x": report_in_vain}, job)
    assert find_job(store, job)["result"] == {"sum": 5}


def test_jobs_are_not_run_by_hand(store):
    with pytest.raises(SystemExit, match=r"python -m operations\.jobs"):
        run_job(store, {}, enqueue(store, "x"))


def test_a_job_whose_process_cannot_be_started_fails(store, tmp_path, monkeypatch):
    monkeypatch.setattr(operations.jobs, "STATE", tmp_path)
    (tmp_path / "jobs").touch()  # where the folder of logs should be
    job = enqueue(store, "x")
    assert Worker(lambda *_, **__: None, ["true"]).step(store)
    failed = find_job(store, job)
    assert failed["state"] == "failed"
    assert failed["message"].startswith("Its process cannot be started: ")


def test_the_end_of_a_long_log_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(operations.jobs, "STATE", tmp_path)
    assert read_log(7) == ""
    (tmp_path / "jobs").mkdir()
    with open(tmp_path / "jobs" / "7.log", "wb") as file:
        file.truncate(2**40)  # a hole, which takes no room
        file.seek(0, os.SEEK_END)
        file.write("\n".join(["", "first", "caf\u00e9", "last"]).encode())
    assert read_log(7, 2) == "caf\u00e9\nlast"
    assert len(read_log(7)) <= 2**17


# What is due

NIGHT = datetime(2026, 11, 26, 2, 0, 30, 5, tzinfo=UTC)
SCHEDULE = {"evaluate": "0 2 * * *", "train": "0 3 * * 0"}


def test_a_time_fires_once_whoever_looks_and_is_made_up_for_an_hour(store):
    with ThreadPoolExecutor(3) as pool:
        fired = list(pool.map(lambda _: enqueue_due(store, SCHEDULE, 200, NIGHT), range(3)))
    assert sorted(map(len, fired)) == [0, 0, 1]
    assert list_jobs(store)[0]["slot"] == "evaluate 2026-11-26T02:00"
    assert enqueue_due(store, SCHEDULE, 200, NIGHT.replace(minute=30)) == []
    assert enqueue_due(store, SCHEDULE, 200, NIGHT.replace(day=27, hour=1, minute=59, second=59)) == []
    assert enqueue_due(store, SCHEDULE, 200, NIGHT.replace(day=27, hour=3, minute=1)) == []  # too late
    assert len(enqueue_due(store, SCHEDULE, 200, NIGHT.replace(day=28, hour=2, minute=59))) == 1
    sunday = datetime(2026, 11, 29, 3, tzinfo=UTC)
    enqueue_due(store, SCHEDULE, 200, sunday)
    assert {job["slot"] for job in list_jobs(store, 2)} == {"evaluate 2026-11-29T02:00", "train 2026-11-29T03:00"}


def test_enough_new_labels_start_one_training(store):
    def label(count):
        first = len(list_labels(store))
        for message in range(first, first + count):
            add_label(store, message, "complaint", 0)

    label(4)
    assert enqueue_due(store, {}, 5, NIGHT) == []
    label(1)
    [job] = enqueue_due(store, {}, 5, NIGHT)
    assert enqueue_due(store, {}, 5, NIGHT) == []
    assert find_job(store, job)["kind"] == "train"
    label(4)
    assert enqueue_due(store, {}, 5, NIGHT) == []
    cancel(store, job)
    label(1)
    assert len(enqueue_due(store, {}, 5, NIGHT)) == 1


def list_labels(engine):
    with engine.connect() as connection:
        return connection.scalars(sa.select(labels.c.id)).all()


def test_the_program_runs_until_it_is_told_to_end(store, tmp_path):
    environment = {**os.environ, "DATABASE_URL": str(store.url), "OPERATIONS_STATE": str(tmp_path)}
    job = enqueue(store, "unheard of")
    with subprocess.Popen([sys.executable, "-m", "operations.jobs"], cwd=ROOT, env=environment) as worker:
        try:
            await_state(store, job, "failed")
        finally:
            worker.terminate()
    assert worker.returncode == 0


def test_a_schedule_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match=r"operations.schedule of params.yaml .*evaluate: '0 25 \* \* \*': Bad hour"):
        work({"evaluate": "0 25 * * *"}, 200)
