"""Back up all that the operator cannot make anew, and restore it: `python -m operations.backup [restore FOLDER]`.

A backup is a folder named by its time: the store, the scores on their way to it, closed days, models, MLflow's
registry, the secrets of the state's folder and DVC's offline remote, each file with its sha256 in the manifest. It is
taken while everything runs. The store and the files of scores are caught at one moment, so that after a restore each
score is stored once. Not in it: what git holds, logs of jobs, and data that was never pushed to DVC's remote.

A backup holds the texts that the store held: those that are forgotten later stay in it until it is deleted.
"""

import argparse
import configparser
import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import sqlalchemy as sa
from alembic.migration import MigrationContext
from sqlalchemy.exc import DBAPIError

from operations import store
from operations.dump import dump_schema, load_schema
from operations.store import ROOT, day_tables, days, hold_day, known_versions, metadata, open_store, parts, reader

MANIFEST = "manifest.json"
TIME = "%Y%m%dT%H%M%SZ"
TREES = ("spool", "days", "models", "mlruns")  # of the state's folder
SECRETS = ("key", "token")
# Where MLflow's database names files of its artefacts by their absolute paths.
ARTEFACTS = (
    *(("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location")),
    *(("model_versions", "source"), ("model_versions", "storage_location")),
)


def back_up(folder: Path = ROOT / "backups") -> Path:
    """Back up the store and the state's folder while they are used.

    Args:
        folder: where the folder of the backup goes.

    Returns:
        The folder of the backup. If it cannot be made, nothing is left.

    Raises:
        OSError, RuntimeError, ValueError, sqlite3.Error, sqlalchemy.exc.DBAPIError: it cannot; the message says why.
    """
    made = datetime.now(UTC).strftime(TIME)
    final = folder / made
    target = final.with_suffix(".part")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.mkdir(mode=0o700)
    engine = open_store()
    try:
        about = {"made": made, "store": engine.dialect.name, "state": str(store.STATE.absolute())}
        about |= _copy_store(engine, target)
        state, copy = store.STATE, target / "state"
        link = state / "models" / "serving"
        about["serving"] = os.readlink(link) if link.is_symlink() else None  # before the models, which it must be among
        _copy_tree(state / "models", copy / "models")
        if (state / "mlflow.db").exists():
            _copy_sqlite(state / "mlflow.db", copy / "mlflow.db")
        _copy_tree(state / "mlruns", copy / "mlruns")  # after the database, which names them
        for name in SECRETS:
            if (state / name).exists():
                shutil.copy2(state / name, copy / name)
        if remote := _dvc_remote():
            _copy_tree(remote, target / "dvc")
        about["files"] = {str(path.relative_to(target)): _describe(path) for path in _files(target)}
        (target / MANIFEST).write_text(json.dumps(about, indent=1), encoding="utf-8")
        os.sync()  # the disk has it before it bears its name
        target.rename(final)
    except BaseException:
        shutil.rmtree(target)
        raise
    finally:
        engine.dispose()
    return final


def _copy_store(engine: sa.Engine, target: Path) -> dict[str, Any]:
    """Copy the store, the files of scores and the closed days, as they are at one moment.

    Returns:
        Of the store "version" of its tables, and "counts" of the rows of each.
    """
    is_sqlite, held = engine.dialect.name == "sqlite", []
    options = {} if is_sqlite else {"isolation_level": "REPEATABLE READ"}
    with reader(engine).execution_options(**options).connect() as connection:
        try:
            with engine.begin() as lock:  # nobody stores scores, or closes a day, until the moment is noted
                if not is_sqlite:
                    lock.execute(sa.text("LOCK TABLE days, spool IN SHARE ROW EXCLUSIVE MODE"))
                open_days = connection.scalars(sa.select(days.c.day)).all()  # the moment
                for day in open_days:
                    hold_day(connection, day, reads=True)
                name = None if is_sqlite else connection.scalar(sa.text("SELECT pg_export_snapshot()"))
                for path in sorted((store.STATE / "spool").glob("*.jsonl")):
                    with suppress(FileNotFoundError):  # it has been stored
                        file = open(path, "rb")  # noqa: SIM115
                        held.append((file, os.fstat(file.fileno()).st_size))
            copies = target / "state" / "spool"
            copies.mkdir(parents=True)
            for file, size in held:  # what has come since is not in it, and what has been deleted is
                (copies / Path(file.name).name).write_bytes(file.read(size))
        finally:
            for file, _ in held:
                file.close()
        if is_sqlite:
            with closing(sqlite3.connect(target / "store.db")) as copy:
                connection.connection.driver_connection.backup(copy, pages=-1)
        else:
            dump_schema(connection, name, target / "store.dump")
        (target / "state" / "days").mkdir()
        for file in connection.scalars(sa.select(parts.c.file)):
            shutil.copy2(store.STATE / "days" / file, target / "state" / "days" / file)
        tables = [*metadata.sorted_tables, *(table for day in open_days for table in day_tables(day))]
        counts = {of.name: connection.scalar(sa.select(sa.func.count()).select_from(of)) for of in tables}
        return {"version": MigrationContext.configure(connection).get_current_revision(), "counts": counts}


def _copy_sqlite(source: Path, target: Path) -> None:
    """Copy a database of SQLite while others write to it."""
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new, pages=-1)


def _copy_tree(source: Path, target: Path) -> None:
    """Copy the files of a folder, if there is one; links to folders are left out, as is what goes away meanwhile."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, _, names in os.walk(source, onerror=fail):
        to = target / Path(folder).relative_to(source)
        to.mkdir(parents=True)
        for name in names:
            with suppress(FileNotFoundError):
                shutil.copy2(Path(folder) / name, to / name)


def _files(folder: Path) -> list[Path]:
    """Return the files of a backup, without its manifest."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _describe(path: Path) -> dict[str, Any]:
    """Return the size of a file, in bytes, and its sha256."""
    with open(path, "rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _dvc_remote() -> Path | None:
    """Return the folder of DVC's remote "offline", if it is one."""
    config, folder = configparser.ConfigParser(interpolation=None), ROOT / ".dvc"
    config.read([folder / "config", folder / "config.local"], encoding="utf-8")
    url = config.get("'remote \"offline\"'", "url", fallback=None)
    return folder / url if url and "://" not in url else None


# Restoring


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
                new = [(target, _prepare(source, target, time, about)) for target, source in replaced.items()]
                os.sync()
                _replace(engine, path, new, time)
            finally:
                for target in replaced:
                    _remove(target.with_name(f"{target.name}.restoring-{time}"))
    finally:
        engine.dispose()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a backup, all files of which are as it says.

    Raises:
        ValueError: they are not, or the backup cannot be read by this program.
    """
    try:
        about = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, version = about["files"], about["version"]
        _ = about["store"], about["state"], about["serving"], {file["sha256"] for file in files.values()}
    except FileNotFoundError:
        raise ValueError(f"{path} is no backup: it has no {MANIFEST}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path / MANIFEST} is damaged: take another backup") from None
    found = {str(file.relative_to(path)) for file in _files(path)}
    if wrong := sorted(found ^ files.keys()) or sorted(name for name in files if _describe(path / name) != files[name]):
        raise ValueError(f"{path / wrong[0]} is not as it was backed up: take another backup")
    if version not in known_versions():
        raise ValueError(f"{path} has tables of version {version}, which this program does not know: use a newer one")
    return about


@contextmanager
def _alone(engine: sa.Engine) -> Iterator[None]:
    """Make sure that no program uses the state's folder or the store, and that none starts.

    Raises:
        RuntimeError: one does.
    """
    store.STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(store.STATE / "lock", "ab") as whole, open(store.STATE / "server.lock", "ab") as service:
        if not (_lock(whole) and _lock(service) and _is_unused(engine)):
            raise RuntimeError("programs use the store: stop python -m operations, and what else does, and try again")
        yield


def _lock(file: BinaryIO) -> bool:
    """Lock a file; return whether no other process has it."""
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


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
    remote = _dvc_remote()
    if remote and (path / "dvc").exists():
        replaced[remote] = path / "dvc"
    return replaced


def _prepare(source: Path, target: Path, time: str, about: dict[str, Any]) -> Path | None:
    """Copy a part of a backup to beside where it will go; return its path, or None where the backup lacks it."""
    new = target.with_name(f"{target.name}.restoring-{time}")
    if source.is_dir():
        _copy_tree(source, new)
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


def main(arguments: list[str] | None = None) -> int:
    """Back up, or restore what the command line names; return the exit status.

    Args:
        arguments: those of the command line if None.
    """
    parser = argparse.ArgumentParser(prog="python -m operations.backup", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "backups", help="where backups go (default: backups/)")
    commands = parser.add_subparsers(dest="command", title="instead of backing up")
    commands.add_parser("restore", help="put a backup back").add_argument("path", type=Path, help="its folder")
    args = parser.parse_args(arguments)
    try:
        if args.command == "restore":
            restore(args.path)
            print(
                f"{args.path} is restored; what was there is beside it, named before-restore: delete it when you can."
            )
        else:
            print(f"Backed up to {back_up(args.folder)}")
    except (OSError, RuntimeError, ValueError, sqlite3.Error, DBAPIError) as error:
        what = "Nothing was restored" if args.command == "restore" else "No backup was made"
        print(f"{what}: {str(getattr(error, 'orig', error)).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
