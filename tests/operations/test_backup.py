"""Backups: taken while everything runs, put back when everything is gone: operations/backup.py."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import sqlalchemy as sa
from helpers import ROOT, SPAM, poll, stub_card

from engine.saved import MODEL_PATH, load_model
from operations import archive, backup
from operations import restore as restoring
from operations import store as module
from operations.backup import back_up, main
from operations.dump import load_schema
from operations.promotion import first_model
from operations.restore import ARTEFACTS, restore
from operations.spool import Recorder, move
from operations.store import add_label, close_day, day_of, insert, labels, now, open_store, read_scores, reader
from score import score

PARAMS = {"experiment": "x", "shares": {"filtered": 1.0}, "spool_bytes": 1e9, "retention_days": 0, "shadow_share": 0.0}
DAY = 86_400 * 10**6
# A program that restores a backup, and is killed when it would rename for the n-th time.
KILLED = """
import os, signal, sys
from pathlib import Path
from operations import archive
from operations.restore import restore
archive.ROOT, rename, left = Path(sys.argv[2]), Path.rename, [int(sys.argv[3])]
def count(path, to):
    left[0] -= 1
    return rename(path, to) if left[0] else os.kill(os.getpid(), signal.SIGKILL)
Path.rename = count
restore(sys.argv[1])
"""


@pytest.fixture
def state(tmp_path, monkeypatch, store_url):
    """The folder of a state; DATABASE_URL names its store, and the project has an offline remote of DVC."""
    monkeypatch.setattr(module, "STATE", tmp_path / "state")
    monkeypatch.setattr(archive, "ROOT", tmp_path / "project")
    monkeypatch.setenv("DATABASE_URL", store_url)
    remote = tmp_path / "project" / ".dvc" / "storage" / "files"
    remote.mkdir(parents=True)
    (remote / "ab").write_text("data")
    shutil.copy(ROOT / ".dvc" / "config", remote.parents[1])
    (tmp_path / "state" / "spool").mkdir(parents=True)
    return tmp_path / "state"


@pytest.fixture
def filled(state, store):
    """A state in which something lies, whose store nobody has open."""
    (state / "key").write_text("a key of hashes")
    (state / "key").chmod(0o600)
    first_model(store)
    with store.begin() as connection:
        insert(connection, [row(now()), row(now() - 3 * DAY)])
    close_day(store, day_of(row(now() - 3 * DAY)["message"]), state / "days")
    add_label(store, 7, "complaint", 0)
    store.dispose()
    return state


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A state's folder with a registry of MLflow, in which a model has an alias and a file."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("registry")
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.create_experiment("x", artifact_location=(folder / "mlruns").as_uri())
    run = client.create_run(experiment)
    client.log_text(run.info.run_id, "an artefact", "model.txt")
    client.create_registered_model("model")
    version = client.create_model_version("model", f"{run.info.artifact_uri}/model.txt", run.info.run_id)
    client.set_registered_model_alias("model", "serving", version.version)
    return folder


def row(at):
    decided = {"propensity": 0.25, "threshold": 0.5, "prediction": False, "action": "deliver", "shadow": False}
    return {"message": at * 1000, "model": 1, **decided, "arm": "filtered"}


def contents(folder):
    """Return all that lies in a folder, without the locks."""
    paths = [path for path in folder.rglob("*") if "lock" not in path.name]
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in paths}


def rows(engine, folder):
    """Return the numbers of all stored messages, and how many labels there are."""
    found = [part["message"] for part in read_scores(engine, 0, now() + DAY, folder)]
    with reader(engine).connect() as connection:
        n_labels = connection.scalar(sa.select(sa.func.count()).select_from(labels))
    return pd.concat(found).tolist(), n_labels


@contextmanager
def largest_file(size):
    """Have no file become larger than some bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_was_there_when_it_was_backed_up_is_there_after_all_was_lost(
    state, store, request, tmp_path, monkeypatch, registry
):
    from mlflow import MlflowClient

    shutil.copytree(registry, state, dirs_exist_ok=True)
    restoring._move_artefacts(state / "mlflow.db", registry, state)
    (state / "token").write_text("a token of the operator")
    serving = first_model(store)
    expected = score(SPAM[0], load_model(serving), 0.5)
    with store.begin() as connection:
        insert(connection, [row(now() - 3 * DAY)])
    close_day(store, day_of(row(now() - 3 * DAY)["message"]), state / "days")
    add_label(store, 7, "complaint", 0)

    # Scores are recorded and moved while the backup is taken.
    record, names, ended = Recorder(stub_card(sha256="a" * 64), PARAMS, state / "spool"), [], threading.Event()

    def write():
        while not ended.is_set():
            names.extend(record({}, ["x"] * 20, [(False, 0.1)] * 20, 0.5))
            if len(names) % 5000 == 0:
                record.size = 2**24  # so that another file is begun, and this one can be deleted

    def store_all():
        while not ended.is_set():
            move(store, state / "spool")

    threads = [threading.Thread(target=target) for target in (write, store_all)]
    for thread in threads:
        thread.start()
    poll(lambda: len(names) > 10_000, "scores")
    before = len(names)
    made = back_up(tmp_path / "backups")
    ended.set()
    for thread in threads:
        thread.join()
    record.close()
    store.dispose()

    # All is lost.
    shutil.rmtree(state)
    shutil.rmtree(archive.ROOT / ".dvc" / "storage")
    if store.dialect.name == "sqlite":
        for path in tmp_path.glob("store.db*"):
            path.unlink()
    else:
        server = request.getfixturevalue("postgres")
        server.run("dropdb", "-h", server.folder, "-U", "postgres", store.url.database)
        server.url(store.url.database)

    moved = tmp_path / "elsewhere" / "state"
    monkeypatch.setattr(module, "STATE", moved)
    restore(made)
    about = json.loads((made / "manifest.json").read_text())
    for table, count in about["counts"].items():
        with reader(store).connect() as connection:
            assert connection.scalar(sa.text(f'SELECT count(*) FROM "{table}"')) == count
    move(store, moved / "spool")
    [old, *found], n_labels = rows(store, moved / "days")
    assert [str(number) for number in found] == names[: len(found)]  # each of them once
    assert before <= len(found) < len(names)
    assert old < found[0] - 2 * DAY * 1000
    assert n_labels == 1
    assert score(SPAM[0], load_model(moved / "models" / "serving" / MODEL_PATH.name), 0.5) == expected
    assert (moved / "models" / "serving").is_symlink()
    assert (moved / "token").read_text() == "a token of the operator"
    assert (archive.ROOT / ".dvc" / "storage" / "files" / "ab").read_text() == "data"
    version = MlflowClient(f"sqlite:///{moved / 'mlflow.db'}").get_model_version_by_alias("model", "serving")
    assert version.source.startswith(moved.as_uri())
    assert Path(version.source.removeprefix("file://")).read_text() == "an artefact"
    assert made.stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.rglob("*.restoring"))
    store.dispose()


def test_all_places_in_which_mlflow_names_artefacts_are_known(registry):
    engine = sa.create_engine(f"sqlite:///{registry / 'mlflow.db'}")
    with engine.connect() as connection:
        places = set()
        for table in sa.inspect(connection).get_table_names():
            for column in sa.inspect(connection).get_columns(table):
                holds = sa.text(f"""SELECT count(*) FROM "{table}" WHERE "{column["name"]}" LIKE '%{registry}%'""")
                places |= {(table, column["name"])} if connection.scalar(holds) else set()
    engine.dispose()
    assert places
    assert places <= set(ARTEFACTS)


def test_what_was_there_is_kept_beside_what_is_restored(filled, store, tmp_path, capsys):
    assert main(["--folder", str(tmp_path / "backups")]) == 0
    [made] = (tmp_path / "backups").glob("2*")
    assert capsys.readouterr().out == f"Backed up to {made}\n"
    old = contents(filled)
    add_label(store, 8, "complaint", 0)
    store.dispose()
    (filled / "spool" / "1-000.jsonl").write_text("later")
    assert main(["restore", str(made)]) == 0
    assert "delete it when you can" in capsys.readouterr().out
    assert rows(store, filled / "days")[1] == 1
    restored = {name: content for name, content in contents(filled).items() if "before-restore" not in name}
    assert restored == old
    [kept] = filled.glob("spool.before-restore-*/*")
    assert kept.read_text() == "later"
    if store.dialect.name == "postgresql":
        with reader(store).connect() as connection:
            [schema] = [name for name in sa.inspect(connection).get_schema_names() if name.startswith("before_restore")]
            assert connection.scalar(sa.text(f'SELECT count(*) FROM "{schema}".labels')) == 2
    add_label(store, 9, "complaint", 0)  # numbers go on from where they were
    assert rows(store, filled / "days")[1] == 2
    store.dispose()


def damage_manifest(made):
    (made / "manifest.json").write_text('{"store": "sqlite"')


def forget_manifest(made):
    (made / "manifest.json").unlink()


def flip(made):
    content = bytearray((made / "state" / "key").read_bytes())
    content[3] ^= 1
    (made / "state" / "key").write_bytes(content)


def lose(made):
    next((made / "state" / "days").iterdir()).unlink()


def add_file(made):
    (made / "state" / "spool" / "1-000.jsonl").write_text("")


def age(made):
    about = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps({**about, "version": "9999"}))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (damage_manifest, "manifest.json is damaged: take another backup"),
        (forget_manifest, "is no backup: it has no manifest.json"),
        (flip, "key is not as it was backed up"),
        (lose, r"days/.* is not as it was backed up"),
        (add_file, "1-000.jsonl is not as it was backed up"),
        (age, "has tables of version 9999, which this program does not know"),
    ],
)
@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_backup_that_is_damaged_replaces_nothing(break_it, message, filled, tmp_path):
    made = back_up(tmp_path / "backups")
    break_it(made)
    before = contents(filled)
    with pytest.raises(ValueError, match=message):
        restore(made)
    assert contents(filled) == before


@pytest.mark.parametrize("name", ["lock", "server.lock"])
@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_nothing_is_restored_under_a_program_that_runs(name, filled, tmp_path, capsys):
    made = back_up(tmp_path / "backups")
    before = contents(filled)
    with open(filled / name, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["restore", str(made)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Nothing was restored: programs use the store: stop python -m operations")
    assert said.count("\n") == 1
    assert contents(filled) == before


def test_nothing_is_restored_while_the_store_is_open(filled, store, tmp_path):
    made = back_up(tmp_path / "backups")
    with store.connect():
        pass  # and the pool keeps it
    with pytest.raises(RuntimeError, match="programs use the store"):
        restore(made)
    store.dispose()
    restore(made)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_store_that_is_damaged_can_be_replaced(filled, store, tmp_path):
    made = back_up(tmp_path / "backups")
    (tmp_path / "store.db").write_bytes(b"nothing" * 1000)
    restore(made)
    assert rows(store, filled / "days")[1] == 1
    store.dispose()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_log_that_is_left_of_a_lost_store_is_not_read_into_the_new_one(filled, store, tmp_path):
    made = back_up(tmp_path / "backups")
    add_label(store, 8, "complaint", 0)
    shutil.copy(tmp_path / "store.db-wal", tmp_path / "log")
    store.dispose()
    (tmp_path / "store.db").unlink()
    (tmp_path / "log").rename(tmp_path / "store.db-wal")
    restore(made)
    assert rows(store, filled / "days")[1] == 1
    store.dispose()


def test_a_score_that_is_moved_while_it_is_backed_up_is_neither_lost_nor_doubled(filled, store, tmp_path, monkeypatch):
    record = Recorder(stub_card(sha256="a" * 64), PARAMS, filled / "spool")
    names = record({}, ["x"] * 20, [(False, 0.1)] * 20, 0.5)
    move(store, filled / "spool")
    names += record({}, ["x"] * 20, [(False, 0.1)] * 20, 0.5)
    record.close()
    mover, hold_day = threading.Thread(target=move, args=(store, filled / "spool")), backup.hold_day

    def begin_to_move(*arguments, **options):  # when the moment has come, and before the files are found
        mover.start()
        mover.join(0.5)
        return hold_day(*arguments, **options)

    def open_and_listen():
        engine = open_store()
        # When the lock is gone, and before the files are copied, all is moved.
        sa.event.listen(engine, "checkin", lambda *_: mover.ident and mover.join())
        return engine

    with monkeypatch.context() as patch:
        patch.setattr(backup, "hold_day", begin_to_move)
        patch.setattr(backup, "open_store", open_and_listen)
        made = back_up(tmp_path / "backups")
    assert not list((filled / "spool").glob("*.jsonl"))
    store.dispose()
    restore(made)
    assert len(rows(store, filled / "days")[0]) == 22
    move(store, filled / "spool")
    assert [str(number) for number in rows(store, filled / "days")[0][2:]] == names
    store.dispose()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_backup_of_one_kind_of_store_is_not_restored_to_the_other(filled, tmp_path, monkeypatch):
    made = back_up(tmp_path / "backups")
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@/nothing")
    with pytest.raises(ValueError, match="is a backup of sqlite, but the store is postgresql: set DATABASE_URL"):
        restore(made)


def test_a_disk_that_is_full_leaves_no_half_of_a_backup(filled, tmp_path, capsys):
    with largest_file(4000):
        assert main(["--folder", str(tmp_path / "backups")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("No backup was made: ")
    assert said.count("\n") == 1
    assert [path.name for path in (tmp_path / "backups").iterdir()] == ["lock"]


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_store_without_tables_is_no_backup(state, tmp_path, capsys):
    assert main(["--folder", str(tmp_path / "backups")]) == 1
    assert "No backup was made: the tables of the store have version none" in capsys.readouterr().err
    assert not list((tmp_path / "backups").glob("2*"))


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_one_backup_is_made_at_a_time_and_what_a_killed_one_left_goes(filled, tmp_path):
    left = tmp_path / "backups" / "20261124T000000Z.part"
    left.mkdir(parents=True)
    with open(left.parent / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another backup is being made in "):
            back_up(left.parent)
    assert left.exists()
    back_up(left.parent)
    assert not left.exists()


def test_a_disk_that_is_full_leaves_what_is_there(filled, tmp_path, capsys):
    made = back_up(tmp_path / "backups")
    before = contents(filled)
    with largest_file(4000):
        assert main(["restore", str(made)]) == 1
    assert capsys.readouterr().err.startswith("Nothing was restored: ")
    assert contents(filled) == before


def test_a_restore_that_fails_half_way_puts_all_back(filled, store, tmp_path, monkeypatch):
    made = back_up(tmp_path / "backups")
    add_label(store, 8, "complaint", 0)
    store.dispose()
    before, rename, renamed = contents(filled), Path.rename, []

    def fail_at_the_sixth(path, to):
        renamed.append(path)
        if len(renamed) == 6:
            raise OSError("no")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_at_the_sixth)
    with pytest.raises(OSError, match="no"):
        restore(made)
    assert len(renamed) > 6
    assert contents(filled) == before
    assert rows(store, filled / "days")[1] == 2
    store.dispose()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_restore_that_was_killed_can_be_done_again(filled, store, store_url, tmp_path):
    made = back_up(tmp_path / "backups")
    restored = contents(filled)
    add_label(store, 8, "complaint", 0)
    store.dispose()
    environment = {**os.environ, "OPERATIONS_STATE": str(filled), "DATABASE_URL": store_url}
    for count in (3, 8):
        command = [sys.executable, "-c", KILLED, str(made), str(tmp_path / "project"), str(count)]
        assert subprocess.run(command, cwd=ROOT, env=environment).returncode == -signal.SIGKILL
    assert list(filled.glob("*.restoring"))
    restore(made)
    now_there = {name: content for name, content in contents(filled).items() if "before-restore" not in name}
    assert now_there == restored
    assert rows(store, filled / "days")[1] == 1
    store.dispose()


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_a_dump_that_ends_early_leaves_the_tables_of_the_store(filled, store, tmp_path, monkeypatch):
    made = back_up(tmp_path / "backups")
    before = contents(filled)
    content = (made / "store.dump").read_bytes()
    monkeypatch.setattr(restoring, "load_schema", lambda engine, path, kept: load_schema(engine, cut, kept))
    for size in (0, 100, len(content) // 2, len(content) - 100):
        cut = tmp_path / "cut.dump"
        cut.write_bytes(content[:size])
        with pytest.raises(RuntimeError, match=r"PostgreSQL did not take the dump: pg_restore: "):
            restore(made)
        assert contents(filled) == before
        assert rows(store, filled / "days")[1] == 1
        store.dispose()


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_programs_of_another_version_are_not_used(filled, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "pg_dump").write_text("#!/bin/sh\necho 'pg_dump (PostgreSQL) 9.6'\n")
    (folder / "pg_dump").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(Path, "glob", lambda *_: [])
    with pytest.raises(RuntimeError, match=r"pg_dump, pg_restore and psql of PostgreSQL \d+ are needed"):
        back_up(tmp_path / "backups")
