"""Who has a job: the states of a row of the table `jobs`, and what leads from one to the next.

A row that waits has no worker and no lease. One that runs has both; when the lease is over, another worker may take
it. One that was cancelled while it ran keeps its lease until its worker has ended it.
"""

from typing import Any, NamedTuple

import sqlalchemy as sa

from operations.store import jobs, now, reader

ATTEMPTS = 2
EXCLUSIVE = ({"train"}, {"promote", "roll_back"}, {"score_files"})  # of each set one job runs at a time
WAITING = {
    **{"state": "waiting", "worker": None, "lease": None, "started": None, "progress": 0},
    "message": "It waits for a worker.",
}
TWICE = "It was ended in the middle twice; see its log."


def failed(message: str) -> dict[str, Any]:
    """Return the columns of a job that has failed, for a reason."""
    return {"state": "failed", "lease": None, "finished": now(), "message": message}


class Claim(NamedTuple):
    """A job that a worker has, for one attempt."""

    job: int
    worker: str
    attempt: int

    def holds(self) -> sa.ColumnElement[bool]:
        """Return the condition that the job is this worker's, in this attempt."""
        return (jobs.c.id == self.job) & (jobs.c.worker == self.worker) & (jobs.c.attempt == self.attempt)

    def update(self, engine: sa.Engine, **values: Any) -> bool:
        """Change the job if it runs by this claim, and return whether it does."""
        statement = jobs.update().where(self.holds(), jobs.c.state == "running").values(**values)
        with engine.begin() as connection:
            return bool(connection.execute(statement).rowcount)


def take(engine: sa.Engine, worker: str, lease: int) -> Claim | None:
    """Take the first job that nobody has, or whose worker has not renewed its lease.

    Args:
        engine: of the store.
        worker: the name of who takes it.
        lease: until when, in microseconds since 1970.

    Returns:
        The claim, or None where there is nothing to do. A job that was abandoned twice is failed.
    """
    with reader(engine).connect() as connection:
        if not _first(connection):
            return None
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(20261126)"))  # one worker takes at a time
        row = _first(connection)
        if not row:
            return None
        values = {"state": "running", "worker": worker, "attempt": row.attempt + 1, "lease": lease, "started": now()}
        values |= {"progress": 0, "message": "Its process is being started."}
        if row.attempt == ATTEMPTS:
            values = failed(TWICE)
        unchanged = Claim(row.id, row.worker, row.attempt).holds()  # its worker may renew the lease meanwhile
        unchanged &= (jobs.c.state == row.state) & (jobs.c.lease == row.lease)
        done = connection.execute(jobs.update().where(unchanged).values(**values)).rowcount
    return Claim(row.id, worker, row.attempt + 1) if done and row.attempt < ATTEMPTS else None


def _first(connection: sa.Connection) -> sa.Row | None:
    """Return the job that is to be run next."""
    at = now()
    busy = jobs.c.lease.is_not(None) & jobs.c.state.in_(["running", "cancelled"])
    busy &= (jobs.c.state == "running") | (jobs.c.lease >= at)  # its worker has yet to end what was cancelled
    kinds = set(connection.scalars(sa.select(jobs.c.kind).where(busy)))
    excluded = [kind for group in EXCLUSIVE if group & kinds for kind in group]
    ready = (jobs.c.state == "waiting") & jobs.c.kind.not_in(excluded)
    abandoned = (jobs.c.state == "running") & (jobs.c.lease < at)
    return connection.execute(sa.select(jobs).where(ready | abandoned).order_by("id").limit(1)).first()
