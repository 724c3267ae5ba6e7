"""The queue of jobs, a table of the store: what is to be done, by whom it is done, and how it went.

`python -m operations.jobs` runs one job after the other, and enqueues those that are due; any number of it may run.
A worker holds its job by a lease that it renews: where worker or job are killed, the job runs once more, under the
same number. Whatever a worker or its job writes, it writes only while the job is theirs, so a result appears once.
Clocks of machines that share a store must agree within a few seconds.
"""

import hashlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import yaml
from cronsim import CronSim, CronSimError
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from operations.archive import MANIFEST, TIME
from operations.claims import ATTEMPTS, TWICE, WAITING, Claim, failed, take
from operations.guard import Guarded
from operations.repeat import RETRY, repeat
from operations.store import ROOT, SECOND, STATE, jobs, labels, now, reader, upsert

COMMAND = (sys.executable, "-m", "operations.pipeline")  # that runs the job whose number it is given
LEASE = 60  # seconds for which a worker has a job
HEARTBEAT = 5  # seconds from one renewal to the next
SETTLED = 60  # seconds without a change, after which a file has arrived
MISSED = timedelta(hours=1)  # a time that has passed for longer is not made up
LONGEST_TAIL = 2**17  # bytes of a log
LONGEST_SENTENCE = 500  # characters
CLAIM = "OPERATIONS_CLAIM"  # tells a job's process whose it is
AWAY = os.EX_TEMPFAIL  # status of a process that has lost the store


# What everybody may do


def enqueue(
    engine: sa.Engine, kind: str, arguments: dict[str, Any] | None = None, slot: str | None = None
) -> int | None:
    """Store a job, which a worker will run.

    Args:
        engine: of the store.
        kind: of `operations.pipeline.KINDS`.
        arguments: for its function, as JSON has them.
        slot: a name that one job can have, such as a time of a schedule.

    Returns:
        Its number, or None if another job has the slot.
    """
    taken = sa.select(sa.exists().where(jobs.c.slot == slot))
    with reader(engine).connect() as connection:
        if slot and connection.scalar(taken):
            return None
    values = {"kind": kind, "slot": slot, "arguments": json.dumps(arguments or {}), "attempt": 0, "created": now()}
    insert = upsert(engine, jobs).values(**values, **WAITING)
    with engine.begin() as connection:
        return connection.scalar(insert.on_conflict_do_nothing(index_elements=["slot"]).returning(jobs.c.id))


def cancel(engine: sa.Engine, job: int) -> bool:
    """Cancel a job; where it runs, its worker ends it within a heartbeat.

    Returns:
        Whether it was waiting or running.
    """
    values = {"state": "cancelled", "finished": now(), "message": "It was cancelled."}
    mine = (jobs.c.id == job) & jobs.c.state.in_(["waiting", "running"])
    with engine.begin() as connection:
        return bool(connection.execute(jobs.update().where(mine).values(**values)).rowcount)


def find_job(engine: sa.Engine, job: int) -> dict[str, Any] | None:
    """Return the columns of a job, with `arguments` and `result` as objects, or None."""
    with reader(engine).connect() as connection:
        row = connection.execute(sa.select(jobs).where(jobs.c.id == job)).first()
    return row and _decode(row)


def list_jobs(engine: sa.Engine, limit: int = 50) -> list[dict[str, Any]]:
    """Return the latest jobs, the last one first, as `find_job` does."""
    with reader(engine).connect() as connection:
        return [_decode(row) for row in connection.execute(sa.select(jobs).order_by(jobs.c.id.desc()).limit(limit))]


def read_log(job: int, lines: int = 100) -> str:
    """Return the last lines of what a job has printed, at most 128 KB; nothing if it has not begun."""
    try:
        with open(STATE / "jobs" / f"{job}.log", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST_TAIL))
            text = file.read(LONGEST_TAIL).decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "".join(text.splitlines(keepends=True)[-lines:])


def _decode(row: sa.Row) -> dict[str, Any]:
    """Return a job as an object."""
    found = row._asdict()
    result = found["result"] and json.loads(found["result"])
    return found | {"arguments": json.loads(found["arguments"]), "result": result}


# What is due


def find_waiting(batch: Mapping[str, Any], at: datetime) -> list[tuple[Path, Path]]:
    """Find the files that have arrived and are not scored, each with the folder for its scores.

    Args:
        batch: the section `operations.batch` of params.yaml.
        at: the time. A file that has changed in the minute before may still be on its way.
    """
    waiting = []
    for path in sorted((STATE / batch["inbox"]).glob("[!._]*")):
        with suppress(FileNotFoundError):  # it has gone again
            about = path.stat()
            modified = datetime.fromtimestamp(about.st_mtime, UTC)
            folder = STATE / batch["out"] / f"{path.name}-{modified:{TIME}}"
            is_whole = path.is_file() and about.st_ctime <= at.timestamp() - SETTLED
            if is_whole and not (folder / MANIFEST).exists():
                waiting.append((path, folder))
    return waiting


def enqueue_due(
    engine: sa.Engine,
    schedule: Mapping[str, str],
    train_after: int,
    at: datetime,
    batch: Mapping[str, Any] | None = None,
) -> list[int]:
    """Enqueue what a schedule, new labels and new files ask for, once, however many programs do so.

    Args:
        engine: of the store.
        schedule: for each kind of job when it is due, as cron writes it, in UTC.
        train_after: how many labels since the last training was begun are enough for another one.
        at: the time.
        batch: says where files arrive, as for `find_waiting`; by default nowhere.

    Returns:
        The numbers of the jobs.
    """
    slots = []
    for kind, line in schedule.items():
        due = next(CronSim(line, at.replace(microsecond=0) + timedelta(seconds=1), reverse=True))  # now or before
        if at - due <= MISSED:
            slots.append((kind, f"{kind} {due:%Y-%m-%dT%H:%M}"))
    begun = sa.select(sa.func.max(sa.func.coalesce(jobs.c.started, jobs.c.created))).where(jobs.c.kind == "train")
    with reader(engine).connect() as connection:
        new = sa.select(labels.c.id).where(labels.c.received > (connection.scalar(begun) or 0))
        enough = connection.scalar(new.order_by("received", "id").offset(train_after - 1).limit(1))
    if enough:
        slots.append(("train", f"train on label {enough}"))
    if files := find_waiting(batch, at) if batch else ():
        names = "/".join(folder.name for _, folder in files)
        slots.append(("score_files", f"score_files {hashlib.blake2b(names.encode(), digest_size=8).hexdigest()}"))
    numbers = [enqueue(engine, kind, slot=slot) for kind, slot in slots]
    return [number for number in numbers if number]


# The worker


class Worker:
    """Runs one job at a time, each as a process of its own, and enqueues what is due."""

    def __init__(
        self, due: Callable[..., Any], command: Sequence[str], lease: float = LEASE, heartbeat: float = HEARTBEAT
    ):
        """Make a worker that has no job.

        Args:
            due: called each minute, with the engine and the time as `at`.
            command: that runs the job whose number it is given.
            lease: seconds for which it takes a job.
            heartbeat: seconds after which it renews the lease.
        """
        self.name = f"{socket.gethostname()[:30]} {os.getpid()} {now()}"
        self.due, self.command = due, command
        self.lease, self.heartbeat = int(lease * SECOND), int(heartbeat * SECOND)
        self.claim = self.process = self.minute = None
        self.renewed = 0

    def step(self, engine: sa.Engine) -> bool:
        """Do what is to be done now, and return whether there may be more at once."""
        at = datetime.now(UTC)
        if self.minute != at.minute:
            self.due(engine, at=at)
            self.minute = at.minute
        if self.process is None:
            return self._take(engine)
        status = self.process.poll()
        if status is not None:
            self._settle(engine, status)
            return True
        if now() >= self.renewed + self.heartbeat:
            self._renew(engine)
        return False

    def give_back(self, engine: sa.Engine) -> None:
        """End the job in hand and leave it to others, as if it had not been begun."""
        if self.process:
            self._end(engine, **WAITING, attempt=self.claim.attempt - 1)

    def _take(self, engine: sa.Engine) -> bool:
        """Start the process of a job, if there is one."""
        self.renewed = now()
        self.claim = take(engine, self.name, self.renewed + self.lease)
        if not self.claim:
            return False
        job, attempt = str(self.claim.job), self.claim.attempt
        try:
            path = STATE / "jobs" / f"{job}.log"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as log:
                mine = {CLAIM: f"{attempt} {self.name}"}
                self.process = Guarded([*self.command, job], self._deadline(), log, **mine)
        except OSError as error:
            self.claim.update(engine, **failed(f"Its process cannot be started: {error}."))
        return True

    def _deadline(self) -> int:
        """Return when the process is to be killed: in time, before others may take its job."""
        return self.renewed + self.lease - self.heartbeat

    def _renew(self, engine: sa.Engine) -> None:
        """Renew the lease; end the process if the job was cancelled or taken by another worker."""
        at = now()
        if self.claim.update(engine, lease=at + self.lease):
            self.renewed = at
            self.process.put_off(self._deadline())
        else:
            self._end(engine)

    def _settle(self, engine: sa.Engine, status: int) -> None:
        """Store how a process ended that may have stored no result."""
        if status < 128 and status != AWAY:
            said = read_log(self.claim.job, 1).strip() or "Its process ended without a result."
            self._end(engine, **failed(said[-LONGEST_SENTENCE:]))
        elif self.claim.attempt < ATTEMPTS:
            self._end(engine, **WAITING | {"message": "It was ended in the middle and waits to be run again."})
        else:
            self._end(engine, **failed(TWICE))

    def _end(self, engine: sa.Engine, **values: Any) -> None:
        """End the process, and have done with its job."""
        self.process.end()
        running = self.claim.holds() & (jobs.c.state == "running")
        with engine.begin() as connection:
            connection.execute(jobs.update().where(self.claim.holds(), ~running).values(lease=None))
            if values:
                connection.execute(jobs.update().where(running).values(**values))
        self.process = None


def work(
    schedule: Mapping[str, str],
    train_after: int,
    command: Sequence[str] = COMMAND,
    lease: float = LEASE,
    heartbeat: float = HEARTBEAT,
    batch: Mapping[str, Any] | None = None,
) -> None:
    """Run jobs and enqueue those that are due until SIGTERM or Ctrl-C; then give back the one in hand.

    Args:
        schedule, train_after, batch: as for `enqueue_due`.
        command, lease, heartbeat: as for `Worker`.

    Raises:
        ValueError: the schedule is none.
    """
    for kind, line in schedule.items():
        try:
            CronSim(line, datetime.now(UTC))
        except CronSimError as error:
            raise ValueError(f"operations.schedule of params.yaml cannot be read: {kind}: {line!r}: {error}") from None
    due = partial(enqueue_due, schedule=schedule, train_after=train_after, batch=batch)
    worker = Worker(due, command, lease, heartbeat)
    repeat(worker.step, worker.give_back)


# The process of a job


def run_job(engine: sa.Engine, kinds: Mapping[str, Callable[..., dict[str, Any]]], job: int) -> None:
    """Run a job in this process, which a worker has started, and store how it went if it is still that worker's.

    Args:
        engine: of the store.
        kinds: functions by kind; each is called with the engine, the job's arguments and `report(progress, message)`,
            which says how far it is, from 0 to 1 and in a sentence, and returns the result, which must fit in JSON.
        job: its number.
    """
    attempt, _, worker = os.environ.get(CLAIM, "").partition(" ")
    if not worker:
        sys.exit("Jobs are run by python -m operations.jobs, and not by hand.")
    claim = Claim(job, worker, int(attempt))
    try:
        if not claim.update(engine, message="It is running."):
            sys.exit("The job is no longer this worker's.")
        found = find_job(engine, job)
        if found["kind"] not in kinds:
            raise ValueError(f"There are no jobs of the kind {found['kind']!r}; there are {', '.join(kinds)}.")
        result = kinds[found["kind"]](engine, found["arguments"], partial(_report, engine, claim))
        done = {"result": json.dumps(result, allow_nan=False), "progress": 1, "message": "It is done."}
        values = {**done, "state": "done", "lease": None, "finished": now()}
    except (OperationalError, InterfaceError):
        traceback.print_exc()
        sys.exit(AWAY)
    except Exception as error:  # whatever it is, it is the job's
        traceback.print_exc()
        values = failed(_sentence(error))
    while True:
        try:
            claim.update(engine, **values)
            break
        except OperationalError as error:  # until the store is back, or the lease is over
            print(f"The store cannot be written to: {_sentence(error.orig)}", file=sys.stderr, flush=True)
            time.sleep(RETRY)
    engine.dispose()


def _report(engine: sa.Engine, claim: Claim, progress: float, message: str) -> None:
    """Store how far a job is; end this process if the job is no longer its own."""
    try:
        is_mine = claim.update(engine, progress=progress, message=message)
    except DBAPIError:  # the job goes on without
        return
    if not is_mine:
        sys.exit("The job is no longer this worker's.")


def _sentence(error: BaseException) -> str:
    """Return what an error says, on one line."""
    said = str(error) if isinstance(error, ValueError | OSError) else traceback.format_exception_only(error)[-1]
    return (said.strip().splitlines() or [type(error).__name__])[-1][:LONGEST_SENTENCE]


if __name__ == "__main__":
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["operations"]
    try:
        work(params["schedule"], params["train_after"], batch=params["batch"])
    except ValueError as error:
        sys.exit(str(error))
