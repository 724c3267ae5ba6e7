"""The store of the operator: what was scored, what was done about it, what came back, and what was learned.

It lies in SQLite, or in PostgreSQL where DATABASE_URL names a server. A day of the operator's case is 144 million
messages, so messages and their scores lie in tables by day; a day that is over goes to Parquet files, and
`read_scores` spans both. The texts of messages are kept only where params.yaml says for how many days, and senders
only as keyed hashes.

Times are whole microseconds since 1970 (UTC). The number of a message is such a time, 1,000 times as large, plus the
number of the worker that scored it: messages lie in the order of their time, and their day follows from their number.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

ROOT = Path(__file__).resolve().parents[1]
STATE = Path(os.environ.get("OPERATIONS_STATE") or ROOT / "state")
SECOND = 1_000_000  # of time
WORKERS = 1_000  # numbers of a microsecond
CHUNK = 100_000  # rows that are read at a time
PATIENCE = 30  # seconds that a transaction waits for others
SOURCES = ("complaint", "spam report", "reviewer")  # of labels

# SQLite counts up a key of this type only.
Key = sa.BigInteger().with_variant(sa.Integer, "sqlite")
metadata = sa.MetaData()

models = sa.Table(
    "models",
    metadata,
    sa.Column("id", Key, primary_key=True),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False, unique=True),
    sa.Column("card", sa.Text, nullable=False),
    sa.Column("mlflow_version", sa.Integer),
    sa.Column("state", sa.String(10), nullable=False),  # candidate, serving or retired
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("promoted", sa.BigInteger),  # the last time
)
labels = sa.Table(
    "labels",
    metadata,
    sa.Column("id", Key, primary_key=True),
    sa.Column("message", sa.BigInteger, nullable=False, index=True),
    sa.Column("source", sa.String(11), nullable=False),
    sa.Column("label", sa.SmallInteger, nullable=False),  # 1 for spam
    sa.Column("received", sa.BigInteger, nullable=False, index=True),
    sa.Column("sender", sa.LargeBinary(8)),  # of the message
    sa.Column("text", sa.Text),  # as whoever labels the message sends it along
    sa.UniqueConstraint("message", "source"),
)
evaluations = sa.Table(
    "evaluations",
    metadata,
    sa.Column("id", Key, primary_key=True),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("start", sa.BigInteger, nullable=False),
    sa.Column("end", sa.BigInteger, nullable=False),
    sa.Column("result", sa.Text, nullable=False),
)
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", Key, primary_key=True),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("slot", sa.String(60), unique=True),  # of a schedule, which fires once
    sa.Column("arguments", sa.Text, nullable=False),
    sa.Column("state", sa.String(9), nullable=False, index=True),  # waiting, running, done, failed or cancelled
    sa.Column("worker", sa.String(60)),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("lease", sa.BigInteger),  # until when the worker has it
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("started", sa.BigInteger),
    sa.Column("finished", sa.BigInteger),
    sa.Column("progress", sa.Float, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("result", sa.Text),
)
days = sa.Table("days", metadata, sa.Column("day", sa.String(8), primary_key=True))  # that have tables
spool = sa.Table(
    "spool",
    metadata,
    sa.Column("file", sa.String(60), primary_key=True),
    sa.Column("offset", sa.BigInteger, nullable=False),  # bytes of the file that are stored
)


def now() -> int:
    """Return the time, in microseconds."""
    return time.time_ns() // 1000


def day_of(message: int) -> str:
    """Return the day of a message, such as "20261124", by its number."""
    return datetime.fromtimestamp(message // WORKERS // SECOND, UTC).strftime("%Y%m%d")


@cache
def day_tables(day: str) -> tuple[sa.Table, sa.Table]:
    """Return the tables of the messages and of the scores of a day, such as "20261124"."""
    of_day = sa.MetaData()
    messages = sa.Table(
        f"messages_{day}",
        of_day,
        sa.Column("id", Key, primary_key=True, autoincrement=False),
        sa.Column("sender", sa.LargeBinary(8)),
        sa.Column("region", sa.String(40)),
        sa.Column("arm", sa.String(40), nullable=False),
        sa.Column("text", sa.Text),
    )
    scores = sa.Table(
        f"scores_{day}",
        of_day,
        sa.Column("message", Key, primary_key=True, autoincrement=False),
        sa.Column("model", Key, primary_key=True, autoincrement=False),
        sa.Column("shadow", sa.Boolean, nullable=False),  # scored on the side, and never acted on
        sa.Column("propensity", sa.Float, nullable=False),
        sa.Column("threshold", sa.Float, nullable=False),
        sa.Column("prediction", sa.Boolean, nullable=False),
        sa.Column("action", sa.String(10)),  # deliver, label or take down; none yet
        sqlite_with_rowid=False,
    )
    to_do = scores.c.action.is_(None) & ~scores.c.shadow
    sa.Index(f"to_do_{day}", scores.c.message, sqlite_where=to_do, postgresql_where=to_do)
    return messages, scores


# Opening


def open_store(url: str | None = None) -> sa.Engine:
    """Return the engine of a store, which it connects to when it is used.

    A transaction begun by `Engine.begin` may write; one of `reader(engine)` only reads, and never waits.

    Args:
        url: of the database; if None that of DATABASE_URL in the environment, or SQLite in the state's folder.

    Raises:
        ValueError: it is no address of SQLite or PostgreSQL.
    """
    url = url or os.environ.get("DATABASE_URL") or f"sqlite:///{STATE / 'store.db'}"
    try:
        address = sa.make_url(url)
        if address.get_backend_name() == "postgresql":
            return sa.create_engine(address.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
        if address.get_backend_name() != "sqlite" or not address.database:
            raise ArgumentError
    except (ArgumentError, NoSuchModuleError):
        raise ValueError("DATABASE_URL must begin with postgresql:// or sqlite:/// and name a database") from None
    Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(address, connect_args={"timeout": PATIENCE})
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def reader(engine: sa.Engine) -> sa.Engine:
    """Return an engine whose transactions read a store and do not wait for those that write."""
    return engine.execution_options(reads=True)


def _prepare_sqlite(connection: Any, _: Any) -> None:
    """Set what holds for a connection: readers beside a writer, checked keys, nothing left of what is deleted."""
    connection.isolation_level = None  # transactions are begun by SQLAlchemy alone
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    """Have a transaction that may write wait for its turn now: later, it could only fail."""
    reads = connection.get_execution_options().get("reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def migrate(engine: sa.Engine) -> None:
    """Bring the tables of a store to the newest version, from none or any version before it."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(20261124)"))  # one program at a time
        config = _alembic()
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")


def check_version(engine: sa.Engine) -> None:
    """Raise ValueError unless the tables of a store have the version that this program knows."""
    with reader(engine).connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    known = ScriptDirectory.from_config(_alembic()).get_current_head()
    if found != known:
        raise ValueError(
            f"the store has version {found}, not {known}: run python -m operations.store with the newest program"
        )


def _alembic() -> alembic.config.Config:
    """Return the configuration of the migrations."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


# Writing


def insert(connection: sa.Connection, rows: Iterable[dict[str, Any]]) -> None:
    """Store messages with their scores.

    Args:
        connection: of a transaction that may write.
        rows: of each score the columns of `day_tables`: `message`, `model`, `shadow` and so on, and with the first
            score of a message `sender`, `region`, `arm` and `text`.
    """
    by_day: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_day.setdefault(day_of(row["message"]), []).append(row)
    for day, of_day in by_day.items():
        messages, scores = day_tables(day)
        if not connection.scalar(sa.select(sa.exists().where(days.c.day == day))):
            messages.metadata.create_all(connection)
            connection.execute(days.insert().values(day=day))
        new = [row for row in of_day if "arm" in row]
        if new:
            connection.execute(messages.insert(), [{"id": row["message"], **_of(row, messages)} for row in new])
        connection.execute(scores.insert(), [_of(row, scores) for row in of_day])


def _of(row: dict[str, Any], table: sa.Table) -> dict[str, Any]:
    """Return those values of a row that a table has columns for."""
    return {name: row[name] for name in table.columns.keys() & row.keys()}


# Reading


def read_scores(engine: sa.Engine, start: int, end: int, folder: Path | None = None) -> Iterator[pd.DataFrame]:
    """Read the scores of a period, a day or a part of one at a time.

    Args:
        engine: of the store.
        start, end: of the period, in microseconds; its end does not belong to it.
        folder: where closed days lie; if None in the state's folder.

    Yields:
        Tables with a row for each score: `message`, `model`, `shadow`, `propensity`, `threshold`, `prediction`,
        `action`, `sender`, `region`, `arm`.
    """
    first, last = start * WORKERS, end * WORKERS
    days_within = [day_of(at * WORKERS) for at in range(start - start % (86_400 * SECOND), end, 86_400 * SECOND)]
    with reader(engine).connect() as connection:
        open_days = set(connection.scalars(sa.select(days.c.day).where(days.c.day.in_(days_within))))
        for day in days_within:
            for path in closed_parts(day, folder):
                part = pd.read_parquet(path, filters=[("message", ">=", first), ("message", "<", last)])
                if len(part):
                    yield part
            if day in open_days:
                query = select_scores(day).where(day_tables(day)[1].c.message.between(first, last - 1))
                yield from _read_day(connection, query)


def _read_day(connection: sa.Connection, query: sa.Select) -> Iterator[pd.DataFrame]:
    """Read what a query of `select_scores` finds, a part at a time."""
    for part in pd.read_sql(query.execution_options(yield_per=CHUNK), connection, chunksize=CHUNK):
        yield part.astype({"shadow": bool, "prediction": bool})


def select_scores(day: str) -> sa.Select:
    """Return the query for all scores of a day that is not closed, in the order of the messages."""
    messages, scores = day_tables(day)
    about = (messages.c.sender, messages.c.region, messages.c.arm)
    return sa.select(scores, *about).join_from(scores, messages, scores.c.message == messages.c.id).order_by("message")


def closed_parts(day: str, folder: Path | None = None) -> list[Path]:
    """Return the Parquet files of a day, in the order they were written."""
    return sorted((folder or STATE / "days").glob(f"{day}-*.parquet"))


def find_message(engine: sa.Engine, message: int, folder: Path | None = None) -> dict[str, Any] | None:
    """Return the score of a message by the model that was asked, with what is known of the message, or None.

    Args:
        engine: of the store.
        message: its number.
        folder: as for `read_scores`.
    """
    with suppress(ValueError, OverflowError, OSError):  # no time has such a number
        at = message // WORKERS
        for part in read_scores(engine, at, at + 1, folder):
            found = part[(part["message"] == message) & ~part["shadow"]]
            if len(found):
                return found.iloc[0].to_dict()
    return None


def add_label(
    engine: sa.Engine, message: int, source: str, label: int, text: str | None = None, sender: bytes | None = None
) -> bool:
    """Store what somebody says of a message; the same source may correct itself.

    Args:
        engine: of the store.
        message: its number.
        source: one of SOURCES.
        label: 1 for spam, 0 for ham.
        text: of the message, where it was sent along.
        sender: of the message, hashed.

    Returns:
        Whether this source had said nothing of it before.
    """
    said = (labels.c.message == message) & (labels.c.source == source)
    values = {"label": label, "received": now(), "text": text, "sender": sender}
    with engine.begin() as connection:
        if connection.execute(labels.update().where(said).values(**values)).rowcount:
            return False
        connection.execute(labels.insert().values(message=message, source=source, **values))
    return True


def count_shadow(engine: sa.Engine, model: int, since: int) -> dict[str, int]:
    """Count the messages that a model scored in shadow since a time, and those it would have decided otherwise.

    Returns:
        "messages" and "changed".
    """
    counts = {"messages": 0, "changed": 0}
    for part in read_scores(engine, since, now()):
        served = part[~part["shadow"]].set_index("message")["prediction"]
        beside = part[part["shadow"] & (part["model"] == model)].set_index("message")["prediction"]
        both = beside.index.intersection(served.index)
        counts["messages"] += len(both)
        counts["changed"] += int((beside[both] != served[both]).sum())
    return counts


def register(
    engine: sa.Engine, card: dict[str, Any], state: str, mlflow_version: int | None = None
) -> tuple[int, bool]:
    """Return the number of the model of a card, and whether it is new to the store.

    Args:
        engine: of the store.
        card: of the model.
        state: "candidate" or "serving", if it is new.
        mlflow_version: of the model in the registry.
    """
    with engine.begin() as connection:
        known = connection.scalar(sa.select(models.c.id).where(models.c.sha256 == card["sha256"]))
        if known:
            return known, False
        at = now()
        values = {"name": card["name"], "sha256": card["sha256"], "card": json.dumps(card), "created": at}
        values |= {"state": state, "mlflow_version": mlflow_version, "promoted": at if state == "serving" else None}
        return connection.execute(models.insert().values(**values)).inserted_primary_key[0], True


# Closing and forgetting


def close_day(engine: sa.Engine, day: str, folder: Path | None = None) -> int:
    """Move the scores of a day to a Parquet file and drop its tables; texts are not taken along.

    Args:
        engine: of the store.
        day: such as "20261124"; rows that come later open it again, and go to another file.
        folder: as for `read_scores`.

    Returns:
        The number of scores.
    """
    folder = folder or STATE / "days"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{day}-{len(closed_parts(day, folder))}.parquet"
    temporary, count = path.with_suffix(".tmp"), 0
    schema = pa.schema(
        {
            **{"message": pa.int64(), "model": pa.int64(), "shadow": pa.bool_(), "propensity": pa.float64()},
            **{"threshold": pa.float64(), "prediction": pa.bool_(), "action": pa.string(), "sender": pa.binary()},
            **{"region": pa.string(), "arm": pa.string()},
        }
    )
    with engine.begin() as connection:  # nobody adds to the day until it is dropped
        if not connection.scalar(sa.select(days.c.day).where(days.c.day == day).with_for_update()):
            return 0
        with pq.ParquetWriter(temporary, schema, compression="zstd") as file:
            for part in _read_day(connection, select_scores(day)):
                file.write_table(pa.Table.from_pandas(part, schema, preserve_index=False))
                count += len(part)
        connection.execute(days.delete().where(days.c.day == day))
        day_tables(day)[0].metadata.drop_all(connection)
        os.replace(temporary, path)
    return count


def forget(engine: sa.Engine, retention_days: float) -> int:
    """Delete the texts of messages and of labels that are older than they may be kept.

    Args:
        engine: of the store.
        retention_days: how long they may be.

    Returns:
        How many texts were deleted.
    """
    limit, count = now() - int(retention_days * 86_400 * SECOND), 0
    with engine.begin() as connection:
        for day in connection.scalars(sa.select(days.c.day)).all():
            messages, _ = day_tables(day)
            old = messages.c.text.is_not(None) & (messages.c.id < limit * WORKERS)
            count += connection.execute(messages.update().where(old).values(text=None)).rowcount
        old = labels.c.text.is_not(None) & (labels.c.received < limit)
        count += connection.execute(labels.update().where(old).values(text=None)).rowcount
    if engine.dialect.name == "sqlite":  # the log of writes holds copies
        with engine.connect() as connection:
            connection.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return count
