"""Put back what `operations.backup` saved, whole or not at all."""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from operations import store
from operations.archive import SECRETS, TIME, TREES, copy_tree, dvc_remote, read_manifest
from operations.dump import load_schema
from operations.store import lock, open_store

# Where MLflow's database names files of its artefacts by their absolute paths.
ARTEFACTS = (
    *(("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location")),
    *(("model_versions", "source"), ("model_versions", "storage_location")),
)


def restore(path: str | Path) -> None:
    """Put back what a backup holds; what is there is kept beside it, as `*.before-restore-<time>`.

    All is copied before anything is replaced. If it fails, what is there stays; if it is killed while it replaces,
    restore again.

    Args:
        path: the folder of the backup.

    Raises:
        OSError, RuntimeError, ValueError, sqlite3.Error, sqlalchemy.exc.DBAPIError: it cannot; the message says why.
    """
    path = Path(path)
    about = read_manifest(path)
    engine = open_store()
    try:
        if about["store"] != engine.dialect.name:
            raise ValueError(
                f"{path} is a backup of {about['store']}, but the store is {engine.dialect.name}: set DATABASE_URL"
            )
        with _alone(engine):
            time = datetime.now(UTC).strftime(TIME)
            replaced = _replaced(engine, path)
            try:
                new = [(target, _prepare(source, target, about)) for target, source in replaced.items()]
                os.sync()
                _replace(engine, path, new, time)
            finally:
                for target in replaced:
                    _remove(_beside(target))
    finally:
        engine.dispose()


@contextmanager
def _alone(engine: sa.Engine) -> Iterator[None]:
    """Make sure that no program uses the state's folder or the store, and that none starts.

    Raises:
        RuntimeError: one does.
    """
    store.STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(store.STATE / "lock", "ab") as whole, open(store.STATE / "server.lock", "ab") as service:
        if not (lock(whole) and lock(service) and _is_unused(engine)):
            raise RuntimeError("programs use the store: stop python -m operations, and what else does, and try again")
        yield


def _is_unused(engine: sa.Engine) -> bool:
    """Tell whether no other connection to the store is open."""
    if engine.dialect.name == "postgresql":
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        with engine.connect() as connection:
            return not connection.scalar(sa.text(f"{others} AND backend_type = 'client backend'"))
    if not Path(engine.url.database).exists():
        return True
    with closing(sqlite3.connect(engine.url.database, timeout=0)) as connection:
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("SELECT count(*) FROM sqlite_master")
        except sqlite3.OperationalError as error:
            return error.sqlite_errorcode != sqlite3.SQLITE_BUSY
        except sqlite3.DatabaseError:  # it is damaged, which may be why another is restored
            return True
    return True


def _replaced(engine: sa.Engine, path: Path) -> dict[Path, Path]:
    """Return what a restore replaces, each with what takes its place, which need not be there."""
    state = store.STATE
    replaced = {state / name: path / "state" / name for name in TREES}
    databases = {state / "mlflow.db": path / "state" / "mlflow.db"}
    if engine.dialect.name == "sqlite":
        databases[Path(engine.url.database)] = path / "store.db"
    for target, source in databases.items():  # a log that is left of the old one would be read into the new one
        for suffix in ("", "-wal", "-shm", "-journal"):
            replaced[target.with_name(target.name + suffix)] = source.with_name(source.name + suffix)
    replaced |= {state / name: path / "state" / name for name in SECRETS if (path / "state" / name).exists()}
    remote = dvc_remote()
    if remote and (path / "dvc").exists():
        replaced[remote] = path / "dvc"
    return replaced


def _beside(target: Path) -> Path:
    """Return where a part of a backup is copied before it takes its place."""
    return target.with_name(f"{target.name}.restoring")


def _prepare(source: Path, target: Path, about: dict[str, Any]) -> Path | None:
    """Copy a part of a backup to beside where it will go; return its path, or None where the backup lacks it."""
    new = _beside(target)
    _remove(new)  # of a restore that was killed
    if source.is_dir():
        copy_tree(source, new)
    elif source.exists():
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, new)
    else:
        return None
    if target == store.STATE / "models" and about["serving"]:
        (new / "serving").symlink_to(about["serving"])
    if target == store.STATE / "mlflow.db":
        _move_artefacts(new, Path(about["state"]), store.STATE.absolute())
    return new


def _move_artefacts(database: Path, old: Path, new: Path) -> None:
    """Have MLflow's database name the artefacts where they are now."""
    with closing(sqlite3.connect(database)) as connection, connection:
        for before, after in ((f"{old.as_uri()}/", f"{new.as_uri()}/"), (f"{old}/", f"{new}/")):
            for table, column in ARTEFACTS:
                rest = f"substr({column}, {len(before) + 1})"
                here = f"substr({column}, 1, {len(before)}) = ?"
                connection.execute(f"UPDATE {table} SET {column} = ? || {rest} WHERE {here}", (after, before))


def _replace(engine: sa.Engine, path: Path, new: list[tuple[Path, Path | None]], time: str) -> None:
    """Put new files and folders in the place of old ones, which are kept, or put all back as it was."""
    done = []
    try:
        for target, prepared in new:
            kept = target.with_name(f"{target.name}.before-restore-{time}")
            for source, to in ((target, kept), (prepared, target)):
                if source and os.path.lexists(source):
                    source.rename(to)
                    done.append((source, to))
        if engine.dialect.name == "postgresql":
            load_schema(engine, path / "store.dump", f"before_restore_{time}")
    except BaseException:
        for source, to in reversed(done):
            to.rename(source)
        raise


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
