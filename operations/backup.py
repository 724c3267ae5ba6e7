"""Back up all that the operator cannot make anew, and restore it: `python -m operations.backup [restore FOLDER]`.

A backup is a folder named by its time: the store, the scores on their way to it, closed days, models, MLflow's
registry, the secrets of the state's folder and DVC's offline remote, each file with its sha256 in the manifest. It is
taken while everything runs. The store and the files of scores are caught at one moment, so that after a restore each
score is stored once. Not in it: what git holds, logs of jobs, and data that was never pushed to DVC's remote.

A backup holds the texts that the store held: those that are forgotten later stay in it until it is deleted.
"""

import argparse
import json
import os
import shutil
import sqlite3
import sys
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.migration import MigrationContext
from sqlalchemy.exc import DBAPIError

from operations import store
from operations.archive import MANIFEST, SECRETS, TIME, copy_tree, describe, dvc_remote, list_files
from operations.dump import dump_schema
from operations.restore import restore
from operations.store import ROOT, check_version, day_tables, days, hold_day, lock, metadata, open_store, parts, reader


def back_up(folder: Path = ROOT / "backups") -> Path:
    """Back up the store and the state's folder while they are used.

    Args:
        folder: where the folder of the backup goes.

    Returns:
        The folder of the backup. If it cannot be made, nothing is left.

    Raises:
        OSError, RuntimeError, ValueError, sqlite3.Error, sqlalchemy.exc.DBAPIError: it cannot; the message says why.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(folder / "lock", "ab") as alone:
        if not lock(alone):
            raise RuntimeError(f"another backup is being made in {folder}")
        for left in folder.glob("*.part"):  # of one that was killed
            shutil.rmtree(left)
        final = folder / datetime.now(UTC).strftime(TIME)
        target = final.with_suffix(".part")
        target.mkdir(mode=0o700)
        try:
            _fill(target)
            os.sync()  # the disk has it before it bears its name
            target.rename(final)
        except BaseException:
            shutil.rmtree(target)
            raise
    return final


def _fill(target: Path) -> None:
    """Write a backup to its folder, the manifest last."""
    engine, state, copy = open_store(), store.STATE, target / "state"
    try:
        check_version(engine)
        about = {"store": engine.dialect.name, "state": str(state.absolute()), **_copy_store(engine, target)}
    finally:
        engine.dispose()
    link = state / "models" / "serving"
    about["serving"] = os.readlink(link) if link.is_symlink() else None  # before the models, which it must be among
    copy_tree(state / "models", copy / "models")
    if (state / "mlflow.db").exists():
        with closing(sqlite3.connect(state / "mlflow.db")) as old, closing(sqlite3.connect(copy / "mlflow.db")) as new:
            old.backup(new, pages=-1)
    copy_tree(state / "mlruns", copy / "mlruns")  # after the database, which names them
    for name in SECRETS:
        if (state / name).exists():
            shutil.copy2(state / name, copy / name)
    if remote := dvc_remote():
        copy_tree(remote, target / "dvc")
    about["files"] = {str(path.relative_to(target)): describe(path) for path in list_files(target)}
    (target / MANIFEST).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _copy_store(engine: sa.Engine, target: Path) -> dict[str, Any]:
    """Copy the store, the files of scores and the closed days, as they are at one moment.

    Returns:
        Of the store "version" of its tables, and "counts" of the rows of each.
    """
    is_sqlite, held = engine.dialect.name == "sqlite", []
    options = {} if is_sqlite else {"isolation_level": "REPEATABLE READ"}
    with reader(engine).execution_options(**options).connect() as connection:
        try:
            with engine.begin() as alone:  # nobody stores scores, or closes a day, until the moment is noted
                if not is_sqlite:
                    alone.execute(sa.text("LOCK TABLE days, spool IN SHARE ROW EXCLUSIVE MODE"))
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
