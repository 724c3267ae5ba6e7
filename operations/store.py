"""The store of the operator: what was scored, what was done about it, what came back, and what was learned.

It lies in SQLite, or in PostgreSQL where DATABASE_URL names a server. A day of the operator's case is 144 million
messages, so messages and their scores lie in tables by day; a day that is over goes to Parquet files, and
`read_scores` spans both. The texts of messages are kept only where params.yaml says for how many days, and senders
only as keyed hashes.

Times are whole microseconds since 1970 (UTC). The number of a message is such a time, 1,000 times as large, plus the
number of the worker that scored it: messages lie in the order of their time, and their day follows from their number.
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import alembic.command
import alembic.config
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import sqlalchemy as sa
import yaml
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

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
drift = sa.Table(
    "drift",
    metadata,
    sa.Column("id", Key, primary_key=True),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("start", sa.BigInteger, nullable=False),
    sa.Column("end", sa.BigInteger, nullable=False),
    sa.Column("model", Key, nullable=False),  # whose reference the period was compared with
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
parts = sa.Table(  # the Parquet files of closed days; a file that is not named here does not count
    "parts",
    metadata,
    sa.Column("file", sa.String(60), primary_key=True),
    sa.Column("day", sa.String(8), nullable=False, index=True),
    sa.Column("scores", sa.BigInteger, nullable=False),
)
SCHEMA = pa.schema(  # of those files, and of what `read_scores` yields
    {
        **{"message": pa.int64(), "model": pa.int64(), "shadow": pa.bool_(), "propensity": pa.float64()},
        **{"threshold": pa.float64(), "prediction": pa.bool_(), "action": pa.string(), "sender": pa.binary()},
        **{"region": pa.string(), "arm": pa.string(), "language": pa.string(), "sender_kind": pa.string()},
        **{"characters": pa.int64(), "digits": pa.int64()},
    }
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
        sa.Column("language", sa.String(40)),
        sa.Column("sender_kind", sa.String(10)),  # short code, number or name
        sa.Column("characters", sa.Integer),  # of the text, and digits among them
        sa.Column("digits", sa.Integer),
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


def lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed or its process ends; return whether no other process has it."""
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextmanager
def locked(folder: Path, how: int = 0) -> Iterator[None]:
    """Lock a folder, for as long as this process lives at most."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | how)
        yield
    finally:
        os.close(descriptor)


# Opening


def open_store(url: str | None = None, patience: int = PATIENCE) -> sa.Engine:
    """Return the engine of a store, which it connects to when it is used.

    A transaction begun by `Engine.begin` may write; one of `reader(engine)` only reads, and never waits.

    Args:
        url: of the database; if None that of DATABASE_URL in the environment, or SQLite in the state's folder.
        patience: seconds to wait for a server that does not answer, and on SQLite for those that write.

    Raises:
        ValueError: it is no address of SQLite or PostgreSQL.
    """
    url = url or os.environ.get("DATABASE_URL") or f"sqlite:///{STATE / 'store.db'}"
    try:
        address = sa.make_url(url)
        if address.get_backend_name() == "postgresql":
            arguments = {"connect_timeout": patience}
            address = address.set(drivername="postgresql+psycopg")
            return sa.create_engine(address, connect_args=arguments, pool_pre_ping=True)
        if address.get_backend_name() != "sqlite" or not address.database:
            raise ArgumentError
    except (ArgumentError, NoSuchModuleError):
        raise ValueError("DATABASE_URL must begin with postgresql:// or sqlite:/// and name a database") from None
    Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(address, connect_args={"timeout": patience})
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
    known = known_versions()[0]
    if found != known:
        raise ValueError(
            f"the tables of the store have version {found or 'none'}, not {known}: run the newest program with "
            "python -m operations, which brings them to it"
        )


def known_versions() -> list[str]:
    """Return the versions of the tables that this program knows, the newest first."""
    return [script.revision for script in ScriptDirectory.from_config(_alembic()).walk_revisions()]


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
            score of a message `arm` and what is known of the message: `sender`, `region`, `text` and so on.
    """
    by_day: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_day.setdefault(day_of(row["message"]), []).append(row)
    for day, of_day in sorted(by_day.items()):
        messages, scores = day_tables(day)
        while not hold_day(connection, day):
            begin = upsert(connection, days).values(day=day).on_conflict_do_nothing().returning(days.c.day)
            if connection.scalar(begin):
                messages.metadata.create_all(connection)
        new = [row for row in of_day if "arm" in row]
        if new:
            connection.execute(messages.insert(), [{**_of(row, messages), "id": row["message"]} for row in new])
        connection.execute(scores.insert(), [_of(row, scores) for row in of_day])


def hold_day(connection: sa.Connection, day: str, reads: bool = False) -> bool:
    """Tell whether a day is open, that is, has tables, and keep them until the transaction ends.

    Args:
        connection: of the transaction. On SQLite it has a state of the store to itself anyway.
        day: such as "20261124".
        reads: whether the tables will only be read; then they need not wait until a day that is being closed is.
    """
    query = sa.select(days.c.day).where(days.c.day == day)
    return connection.scalar(query.with_for_update(read=True, key_share=reads)) is not None


def _of(row: dict[str, Any], table: sa.Table) -> dict[str, Any]:
    """Return the values of a row for all columns of a table: the first of many rows tells which are written."""
    names = table.columns.keys()
    return {name: row.get(name) for name in names}


def upsert(on: sa.Engine | sa.Connection, table: sa.Table) -> postgresql.Insert | sqlite.Insert:
    """Return a statement that inserts into a table, and can say what to do where a row is there already.

    Args:
        on: the store, or a connection to it: each kind of database has a statement of its own.
        table: that it inserts into.
    """
    return (postgresql if on.dialect.name == "postgresql" else sqlite).insert(table)


# Reading


def read_scores(engine: sa.Engine, start: int, end: int, folder: Path | None = None) -> Iterator[pd.DataFrame]:
    """Read the scores of a period, a day or a part of one at a time.

    Args:
        engine: of the store.
        start, end: of the period, in microseconds; its end does not belong to it.
        folder: where closed days lie; if None in the state's folder.

    Yields:
        Tables with a row for each score: `message`, `model`, `shadow`, `propensity`, `threshold`, `prediction`,
        `action`, `sender`, `region`, `arm`, `language`, `sender_kind`, `characters`, `digits`.
    """
    first, last = start * WORKERS, end * WORKERS
    within = (day_of(first), day_of(last - 1))
    with reader(engine).connect() as connection:
        found = sa.union(*(sa.select(of.c.day).where(of.c.day.between(*within)) for of in (days, parts)))
        for day in connection.scalars(found.order_by("day")).all():
            is_open = hold_day(connection, day, reads=True)
            for path in closed_parts(connection, day, folder):
                rows = (ds.field("message") >= first) & (ds.field("message") < last)
                for batch in ds.dataset(path, schema=SCHEMA).to_batches(filter=rows, batch_size=CHUNK):
                    if batch.num_rows:
                        yield batch.to_pandas()
            if is_open:
                query = select_scores(day).where(day_tables(day)[1].c.message.between(first, last - 1))
                with closing(_read_day(connection, query)) as tables:  # also where the caller has enough
                    for table in tables:
                        yield table.to_pandas()


def _read_day(connection: sa.Connection, query: sa.Select) -> Iterator[pa.Table]:
    """Read what a query of `select_scores` finds, a part at a time."""
    with connection.execute(query.execution_options(yield_per=CHUNK)) as result:
        for rows in result.partitions():
            columns = zip(zip(*rows, strict=True), SCHEMA.types, strict=True)
            yield pa.Table.from_arrays([pa.array(values, of_type) for values, of_type in columns], schema=SCHEMA)


def select_scores(day: str) -> sa.Select:
    """Return the query for all scores of a day that is not closed, in the order of the messages."""
    messages, scores = day_tables(day)
    about = [messages.c[name] for name in SCHEMA.names if name in messages.c]  # none, if it was closed meanwhile
    joined = scores.outerjoin(messages, scores.c.message == messages.c.id)
    return sa.select(scores, *about).select_from(joined).order_by("message")


def closed_parts(connection: sa.Connection, day: str, folder: Path | None = None) -> list[Path]:
    """Return the Parquet files of a day, in the order they were written."""
    files = connection.scalars(sa.select(parts.c.file).where(parts.c.day == day)).all()
    return [(folder or STATE / "days") / file for file in sorted(files, key=lambda file: (len(file), file))]


def find_message(engine: sa.Engine, message: int, folder: Path | None = None) -> dict[str, Any] | None:
    """Return the score of a message by the model that was asked, with what is known of the message, or None.

    Args:
        engine: of the store.
        message: its number.
        folder: as for `read_scores`.
    """
    at = message // WORKERS
    try:
        day_of(message)
    except (ValueError, OverflowError, OSError):  # no time has such a number
        return None
    for part in read_scores(engine, at, at + 1, folder):
        found = part[(part["message"] == message) & ~part["shadow"]]
        if len(found):
            return pa.Table.from_pandas(found, SCHEMA, preserve_index=False).to_pylist()[0]
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
        first = upsert(connection, labels).values(message=message, source=source, **values).on_conflict_do_nothing()
        if connection.scalar(first.returning(labels.c.id)):
            return True
        connection.execute(labels.update().where(said).values(**values))
    return False


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
    at = now()
    values = {"name": card["name"], "sha256": card["sha256"], "card": json.dumps(card), "created": at}
    values |= {"state": state, "mlflow_version": mlflow_version, "promoted": at if state == "serving" else None}
    same = sa.select(models.c.id).where(models.c.sha256 == card["sha256"])
    with engine.begin() as connection:
        new = upsert(connection, models).values(**values).on_conflict_do_nothing()
        number = connection.scalar(new.returning(models.c.id))
        return (connection.scalar(same), False) if number is None else (number, True)


# Closing and forgetting


def close_day(engine: sa.Engine, day: str, folder: Path | None = None) -> int:
    """Move the scores of a day to a Parquet file and drop its tables; texts are not taken along.

    Until it is done nobody else writes to the day, or, on SQLite, to the store: scores wait in files of the spool.

    Args:
        engine: of the store.
        day: such as "20261124"; rows that come later open it again, and go to another file.
        folder: as for `read_scores`.

    Returns:
        The number of scores.

    Raises:
        ValueError: some of its scores have not been acted on yet.
    """
    folder = folder or STATE / "days"
    folder.mkdir(parents=True, exist_ok=True)
    _, scores = day_tables(day)
    is_open = sa.select(days.c.day).where(days.c.day == day).with_for_update(key_share=True)  # readers go on
    to_do = sa.select(sa.func.count()).where(scores.c.action.is_(None) & ~scores.c.shadow)
    count = 0
    with engine.begin() as connection:
        if not connection.scalar(is_open):
            return 0
        if waiting := connection.scalar(to_do):
            raise ValueError(
                f"{waiting} scores of the day {day} have not been acted on: close it when python -m operations.actions "
                "has done so"
            )
        # A file that an attempt before this one left is named alike, and replaced.
        path = folder / f"{day}-{len(closed_parts(connection, day))}.parquet"
        temporary = path.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
                    for table in _read_day(connection, select_scores(day)):
                        writer.write_table(table)
                        count += len(table)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(folder)
        connection.execute(parts.insert().values(file=path.name, day=day, scores=count))
        connection.execute(days.delete().where(days.c.day == day))  # waits for readers
        scores.metadata.drop_all(connection)
    return count


def _sync(folder: Path) -> None:
    """Have the disk know the names of the files in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget(engine: sa.Engine, retention_days: float, feedback_days: float, folder: Path | None = None) -> int:
    """Delete the texts of messages and of labels that are older than they may be kept.

    Args:
        engine: of the store.
        retention_days: how long those of messages may be.
        feedback_days: how long those may be that came with what somebody said of a message.
        folder: where files of scores wait for the store; if None in the state's folder.

    Returns:
        How many texts were deleted.

    Raises:
        RuntimeError: copies of some are left; the sentence says where.
    """
    limit, limit_of_labels = (now() - int(days * 86_400 * SECOND) for days in (retention_days, feedback_days))
    count = 0
    with engine.begin() as connection:
        for day in connection.scalars(sa.select(days.c.day)).all():
            if hold_day(connection, day):
                messages, _ = day_tables(day)
                old = messages.c.text.is_not(None) & (messages.c.id < limit * WORKERS)
                count += connection.execute(messages.update().where(old).values(text=None)).rowcount
        old = labels.c.text.is_not(None) & (labels.c.received < limit_of_labels)
        count += connection.execute(labels.update().where(old).values(text=None)).rowcount
    left = []
    if engine.dialect.name == "sqlite":  # the log of writes holds copies
        with engine.connect() as connection:
            is_busy, *_ = connection.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if is_busy:
            left.append("programs that read the store keep its log of writes from being emptied")
    if waiting := _forget_lines(engine, folder or STATE / "spool", limit):
        left.append(f"{waiting} wait in files for python -m operations.spool to store them")
    if left:
        raise RuntimeError(f"{count} texts were deleted, but copies are left: {'; '.join(left)}: try again later")
    return count


def _forget_lines(engine: sa.Engine, folder: Path, limit: int) -> int:
    """Blank the lines of files of `operations.spool` that are stored and hold texts older than a time.

    A worker keeps its file as long as it lives; what has been stored of it is not read again.

    Returns:
        The number of such lines that are not stored yet.
    """
    waiting = 0
    with reader(engine).connect() as connection:
        stored = dict(connection.execute(sa.select(spool.c.file, spool.c.offset)).all())
    for path in folder.glob("*.jsonl"):
        with suppress(FileNotFoundError), open(path, "r+b") as file:  # it may have gone meanwhile
            position = len(file.readline())  # the header
            for line in file:
                if line.endswith(b"\n") and not line.isspace():
                    number, _, _, _, text, *_ = json.loads(line)
                    if text is not None and number < limit * WORKERS:
                        if position < stored.get(path.name, 0):
                            os.pwrite(file.fileno(), b" " * (len(line) - 1), position)
                        else:
                            waiting += 1
                position += len(line)
    return waiting


if __name__ == "__main__":
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["operations"]
    try:
        texts = forget(open_store(), params["retention_days"], params["feedback_days"])
    except (DBAPIError, RuntimeError, ValueError) as error:
        sys.exit(str(getattr(error, "orig", error)).strip())
    print(f"{texts} texts were deleted.")
