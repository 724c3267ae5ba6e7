"""The store: what is kept of each message, what is closed, what is forgotten: operations/store.py."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from threading import Barrier

import pandas as pd
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from helpers import ROOT, poll, stub_card

from operations import store as module
from operations.spool import Recorder, move
from operations.store import (
    SCHEMA,
    SECOND,
    WORKERS,
    add_label,
    check_version,
    close_day,
    count_shadow,
    day_of,
    day_tables,
    days,
    find_message,
    forget,
    insert,
    labels,
    metadata,
    migrate,
    models,
    now,
    open_store,
    parts,
    read_scores,
    reader,
    register,
)

DAY = 86_400 * SECOND
MIDNIGHT = int(datetime(2026, 11, 24, tzinfo=UTC).timestamp()) * SECOND
# A program that closes a day, and is killed before what it did holds.
CLOSER = """
import os, signal, sys
from pathlib import Path
import sqlalchemy as sa
from operations.store import close_day, open_store
engine = open_store(sys.argv[1])
sa.event.listen(engine, "commit", lambda _: os.kill(os.getpid(), signal.SIGKILL))
close_day(engine, "20261124", Path(sys.argv[2]))
"""


def row(at, action="deliver", **values):
    """Return a row of a message of a time, in microseconds."""
    decided = {"propensity": 0.25, "threshold": 0.5, "prediction": False, "action": action}
    about = {"sender": b"12345678", "region": "north", "arm": "filtered", "text": None}
    about |= {"language": "en", "sender_kind": "name", "characters": 7, "digits": 1}
    return {"message": at * WORKERS, "model": 1, "shadow": False, **decided, **about, **values}


def add(engine, *rows):
    with engine.begin() as connection:
        insert(connection, rows)


def read(engine, start, end, folder):
    """Return the times, in microseconds from midnight, of the scores of a period."""
    tables = list(read_scores(engine, start, end, folder))
    assert all(list(table) == SCHEMA.names for table in tables)
    return [int(message) // WORKERS - MIDNIGHT for table in tables for message in table["message"]]


def in_parallel(function, n=4):
    """Return what calls of a function in threads that begin together return."""
    barrier = Barrier(n)
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(lambda i: (barrier.wait(), function(i))[1], range(n)))


# Versions


def test_the_migrations_make_the_tables_that_the_programs_know(store):
    migrate(store)
    check_version(store)
    with reader(store).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_store_of_an_older_version_is_brought_to_the_newest_with_its_days(store, tmp_path):
    new = {"language", "sender_kind", "characters", "digits"}
    add(store, row(MIDNIGHT), row(MIDNIGHT + DAY))
    with store.begin() as connection:
        for day in ("20261124", "20261125"):
            for name in new:
                connection.execute(sa.text(f"ALTER TABLE messages_{day} DROP COLUMN {name}"))
        metadata.tables["drift"].drop(connection)
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0002'"))
    with pytest.raises(ValueError, match="have version 0002"):
        check_version(store)
    migrate(store)
    add(store, row(MIDNIGHT + 1))
    close_day(store, "20261124", tmp_path)
    found = find_message(store, MIDNIGHT * WORKERS, tmp_path)
    assert {name for name, value in found.items() if value is None} == new
    assert find_message(store, (MIDNIGHT + 1) * WORKERS, tmp_path)["characters"] == 7
    path = tmp_path / "20261124-0.parquet"  # such a file may be of that version too
    pq.write_table(pq.read_table(path).drop_columns(sorted(new)), path)
    assert find_message(store, (MIDNIGHT + 1) * WORKERS, tmp_path)["characters"] is None


def test_a_store_of_another_version_is_refused(store_url):
    engine = open_store(store_url)
    with pytest.raises(ValueError, match=r"have version none, not .* python -m operations"):
        check_version(engine)
    engine.dispose()


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite://", "nonsense"])
def test_only_two_kinds_of_stores_are_opened(url):
    with pytest.raises(ValueError, match="DATABASE_URL must begin with postgresql:// or sqlite:///"):
        open_store(url)


# Writing


def test_a_row_that_has_more_than_the_first_loses_nothing(store, tmp_path):
    first, second = row(MIDNIGHT), row(MIDNIGHT + 1)
    del first["action"], first["sender"], first["region"], first["text"]
    add(store, first, {**second, "text": "hello"})
    found = find_message(store, second["message"], tmp_path)
    assert found == {name: second[name] for name in SCHEMA.names}
    assert find_message(store, first["message"], tmp_path)["action"] is None
    messages, _ = day_tables("20261124")
    with reader(store).connect() as connection:
        assert connection.scalars(sa.select(messages.c.text).order_by("id")).all() == [None, "hello"]


def test_two_programs_may_begin_a_day_at_once(store, tmp_path):
    in_parallel(lambda i: add(store, row(MIDNIGHT + i), row(MIDNIGHT + DAY * (i % 2) + 10 + i)))
    assert len(read(store, MIDNIGHT, MIDNIGHT + 2 * DAY, tmp_path)) == 8


def test_two_programs_may_label_a_message_at_once(store):
    assert sorted(in_parallel(lambda i: add_label(store, 7, "complaint", i % 2))) == [False, False, False, True]
    assert add_label(store, 7, "reviewer", 1, "text", b"12345678")
    assert not add_label(store, 7, "reviewer", 0)
    with reader(store).connect() as connection:
        found = connection.execute(sa.select(labels).where(labels.c.source == "reviewer")).mappings().one()
    assert (found["label"], found["text"], found["sender"]) == (0, None, None)


def test_two_programs_may_register_a_model_at_once(store):
    found = in_parallel(lambda _: register(store, stub_card(), "serving"))
    assert sorted(is_new for _, is_new in found) == [False, False, False, True]
    assert len({number for number, _ in found}) == 1
    other, is_new = register(store, stub_card(sha256="1"), "candidate", 3)
    assert is_new
    with reader(store).connect() as connection:
        served, candidate = connection.execute(sa.select(models).order_by("id")).mappings()
    assert (candidate["id"], candidate["mlflow_version"], candidate["promoted"]) == (other, 3, None)
    assert json.loads(served["card"]) == stub_card()
    assert served["promoted"] == served["created"]


# Reading


def test_a_period_is_read_across_days_closed_and_open(store, tmp_path):
    times = [-1, 0, DAY - 1, DAY, DAY + 5, 3 * DAY]
    add(store, *(row(MIDNIGHT + at) for at in times))
    for closed in ([], [0], [1], [-1, 3]):
        for number in closed:
            assert close_day(store, day_of((MIDNIGHT + number * DAY) * WORKERS), tmp_path)
        for start in (-1, 0, 1, DAY, DAY + 1, 4 * DAY):
            for end in (-1, 0, 1, DAY, DAY + 6, 3 * DAY, 3 * DAY + 1):
                expected = [at for at in times if start <= at < end]
                assert read(store, MIDNIGHT + start, MIDNIGHT + end, tmp_path) == expected
    assert len(read(store, 0, now() + 1000 * DAY, tmp_path)) == len(times)


def test_no_more_than_a_chunk_is_read_at_a_time(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 10)
    add(store, *(row(MIDNIGHT + at) for at in range(35)))
    sizes = [list(map(len, read_scores(store, MIDNIGHT, MIDNIGHT + 32, tmp_path)))]
    close_day(store, "20261124", tmp_path)
    sizes.append(list(map(len, read_scores(store, MIDNIGHT, MIDNIGHT + 32, tmp_path))))
    assert [sum(each) for each in sizes] == [32, 32]
    assert max(map(max, sizes)) == 10


def test_tables_are_alike_whether_a_day_is_closed_or_open(store, tmp_path):
    add(store, row(MIDNIGHT), row(MIDNIGHT + 1, region=None, sender=None, prediction=True, shadow=True, action=None))
    [before] = read_scores(store, MIDNIGHT, MIDNIGHT + DAY, tmp_path)
    close_day(store, "20261124", tmp_path)
    [after] = read_scores(store, MIDNIGHT, MIDNIGHT + DAY, tmp_path)
    pd.testing.assert_frame_equal(before, after)


def test_a_message_is_found_with_the_score_that_was_acted_on(store, tmp_path):
    beside = {"message": MIDNIGHT * WORKERS, "model": 2, "shadow": True, "propensity": 0.75, "threshold": 0.5}
    add(store, row(MIDNIGHT, model=3), {**beside, "prediction": True})
    add(store, row(MIDNIGHT + 1, region=None))
    for _ in range(2):
        found = find_message(store, MIDNIGHT * WORKERS, tmp_path)
        assert (found["model"], found["shadow"], found["propensity"]) == (3, False, 0.25)
        assert {type(value) for value in found.values()} == {int, bool, float, str, bytes}
        assert find_message(store, (MIDNIGHT + 1) * WORKERS, tmp_path)["region"] is None
        assert json.dumps({**found, "sender": None})
        for nobody in (MIDNIGHT * WORKERS + 1, (MIDNIGHT - DAY) * WORKERS, 0, -1, 2**63, 10**30):
            assert find_message(store, nobody, tmp_path) is None
        close_day(store, "20261124", tmp_path)


def test_decisions_of_a_candidate_are_counted_beside_those_of_the_model(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STATE", tmp_path)
    start = now() - 1000
    add(store, *(row(start + i) for i in range(10)))
    beside = [{**row(start + i, None, model=2, shadow=True), "prediction": i < 2} for i in range(6)]
    for each in beside:
        del each["arm"]
    add(store, *beside)
    assert count_shadow(store, 2, start) == {"messages": 6, "changed": 2}
    assert count_shadow(store, 2, start + 1) == {"messages": 5, "changed": 1}
    assert count_shadow(store, 3, start) == {"messages": 0, "changed": 0}


# Closing


def test_a_day_that_is_closed_again_goes_to_another_file(store, tmp_path):
    for i in range(3):
        add(store, row(MIDNIGHT + i), row(MIDNIGHT + 10 + i))
        assert close_day(store, "20261124", tmp_path) == 2
    assert close_day(store, "20261124", tmp_path) == 0
    assert sorted(read(store, MIDNIGHT, MIDNIGHT + DAY, tmp_path)) == [0, 1, 2, 10, 11, 12]
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == [f"20261124-{i}.parquet" for i in range(3)]
    with reader(store).connect() as connection:
        assert set(sa.inspect(connection).get_table_names()) == {*metadata.tables, "alembic_version"}


def test_a_score_that_comes_when_its_message_is_closed_is_kept(store, tmp_path):
    add(store, row(MIDNIGHT))
    close_day(store, "20261124", tmp_path)
    late = row(MIDNIGHT, None, model=2, shadow=True)
    del late["arm"]
    add(store, late)
    for _ in range(2):
        assert read(store, MIDNIGHT, MIDNIGHT + 1, tmp_path) == [0, 0]
        close_day(store, "20261124", tmp_path)


def test_a_day_that_was_not_acted_on_stays_open(store, tmp_path):
    add(store, row(MIDNIGHT), row(MIDNIGHT + 1, None), row(MIDNIGHT + 2, None, shadow=True))
    with pytest.raises(ValueError, match="1 scores of the day 20261124 have not been acted on: close it when"):
        close_day(store, "20261124", tmp_path)
    assert read(store, MIDNIGHT, MIDNIGHT + DAY, tmp_path) == [0, 1, 2]
    assert not list(tmp_path.glob("2026*"))


def test_a_program_that_is_killed_while_closing_loses_and_doubles_nothing(store, store_url, tmp_path):
    folder = tmp_path / "days"
    add(store, row(MIDNIGHT), row(MIDNIGHT + 1))
    done = subprocess.run([sys.executable, "-c", CLOSER, store_url, str(folder)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in folder.iterdir()] == ["20261124-0.parquet"]  # which does not count
    assert read(store, MIDNIGHT, MIDNIGHT + DAY, folder) == [0, 1]
    add(store, row(MIDNIGHT + 2))
    assert close_day(store, "20261124", folder) == 3
    assert read(store, MIDNIGHT, MIDNIGHT + DAY, folder) == [0, 1, 2]
    with reader(store).connect() as connection:
        assert connection.execute(sa.select(parts)).all() == [("20261124-0.parquet", "20261124", 3)]


def test_a_disk_that_is_full_leaves_the_day_open(store, tmp_path, monkeypatch):
    add(store, row(MIDNIGHT))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        close_day(store, "20261124", tmp_path)
    assert not list(tmp_path.glob("2026*"))
    assert read(store, MIDNIGHT, MIDNIGHT + DAY, tmp_path) == [0]


def test_days_are_closed_while_others_write_and_read(store, tmp_path):
    def act(i):
        if i == 0:
            return [close_day(store, "20261124", tmp_path) for _ in range(10)]
        if i == 1:
            counts = [len(read(store, MIDNIGHT, MIDNIGHT + DAY, tmp_path)) for _ in range(20)]
            assert counts == sorted(counts)
        else:
            for k in range(20):
                add(store, row(MIDNIGHT + i * 1000 + k), row(MIDNIGHT + i * 1000 + k + 100))
        return []

    closed = sum(in_parallel(act)[0])
    assert closed + close_day(store, "20261124", tmp_path) == 80
    found = read(store, MIDNIGHT, MIDNIGHT + DAY, tmp_path)
    assert sorted(found) == [i * 1000 + k for i in (2, 3) for k in [*range(20), *range(100, 120)]]


def is_waiting(engine):
    """Tell whether somebody waits for a lock; on SQLite nobody can tell."""
    if engine.dialect.name == "sqlite":
        return True
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with reader(engine).connect() as connection:
        return connection.scalar(sa.text(waiting)) > 0


def test_a_day_is_not_closed_before_rows_that_are_being_written_are_there(store, tmp_path):
    add(store, row(MIDNIGHT))
    with ThreadPoolExecutor(1) as pool:
        with store.begin() as connection:
            insert(connection, [row(MIDNIGHT + 1)])
            closing = pool.submit(close_day, store, "20261124", tmp_path)
            poll(lambda: is_waiting(store), "the other to wait")
        assert closing.result() == 2
    assert read(store, MIDNIGHT, MIDNIGHT + DAY, tmp_path) == [0, 1]


def test_a_day_that_is_about_to_be_read_is_not_dropped(store, tmp_path, monkeypatch):
    add(store, row(MIDNIGHT))
    closed_parts = module.closed_parts
    with ThreadPoolExecutor(1) as pool:

        def close_before(*arguments):
            monkeypatch.undo()
            closing.append(pool.submit(close_day, store, "20261124", tmp_path))
            poll(lambda: closing[0].done() or is_waiting(store), "the other to wait")
            return closed_parts(*arguments)

        closing = []
        monkeypatch.setattr(module, "closed_parts", close_before)
        assert read(store, MIDNIGHT, MIDNIGHT + DAY, tmp_path) == [0]
        assert closing[0].result() == 1
    assert read(store, MIDNIGHT, MIDNIGHT + DAY, tmp_path) == [0]


# Forgetting


def texts(engine):
    """Return the texts that a store holds."""
    with reader(engine).connect() as connection:
        found = connection.scalars(sa.select(labels.c.text)).all()
        for day in connection.scalars(sa.select(days.c.day).order_by("day")).all():
            found += connection.scalars(sa.select(day_tables(day)[0].c.text)).all()
    return sorted(text for text in found if text)


def test_texts_are_forgotten_when_their_time_is_over(store, tmp_path):
    at = now() - 3 * DAY
    add(store, row(at, text="an old secret"), row(at + 2 * DAY, text="a new one"), row(at + 1))
    add_label(store, 7, "complaint", 0, "a label's secret")
    with store.begin() as connection:
        connection.execute(labels.update().values(received=at))
    add_label(store, 8, "complaint", 0, "another one")
    assert forget(store, 2, 4, tmp_path) == 1
    assert forget(store, 4, 2, tmp_path) == 1
    assert texts(store) == ["a new one", "another one"]
    assert forget(store, 2, 2, tmp_path) == 0
    assert forget(store, 0, 0, tmp_path) == 2
    if store.dialect.name == "sqlite":
        store.dispose()
        assert all(b"secret" not in path.read_bytes() for path in tmp_path.iterdir())


def test_texts_that_a_reader_keeps_in_the_log_of_writes_are_not_said_to_be_gone(tmp_path):
    engine = open_store(f"sqlite:///{tmp_path / 'store.db'}", patience=0)
    migrate(engine)
    add(engine, row(now() - DAY, text="a secret"))
    with reader(engine).connect() as connection:
        connection.execute(sa.select(days)).all()
        with pytest.raises(RuntimeError, match=r"^1 texts were deleted, but copies are left: programs that read"):
            forget(engine, 0, 0, tmp_path)
    assert forget(engine, 0, 0, tmp_path) == 0
    engine.dispose()


def test_texts_are_forgotten_in_the_file_of_a_worker_that_lives(store, tmp_path):
    params = {"experiment": "x", "shares": {"filtered": 1.0}, "spool_bytes": 1e9, "retention_days": 7}
    record = Recorder(stub_card(), {**params, "shadow_share": 0.0}, tmp_path / "spool")
    names = record({}, ["a secret", "another secret"], [(False, 0.1)] * 2, 0.5)
    move(store, tmp_path / "spool")
    names += record({}, ["a third secret"], [(False, 0.1)], 0.5)
    [file] = (tmp_path / "spool").glob("*.jsonl")
    assert forget(store, 1, 1, tmp_path / "spool") == 0
    assert file.read_bytes().count(b"secret") == 3
    with pytest.raises(RuntimeError, match=r"^2 texts were deleted, but copies are left: 1 wait in files for python"):
        forget(store, 0, 0, tmp_path / "spool")
    assert file.read_bytes().count(b"secret") == 1
    move(store, tmp_path / "spool")
    assert forget(store, 0, 0, tmp_path / "spool") == 1
    assert b"secret" not in file.read_bytes()
    names += record({}, ["a fourth secret"], [(False, 0.1)], 0.5)
    record.close()
    move(store, tmp_path / "spool")
    assert texts(store) == ["a fourth secret"]
    found = pd.concat(read_scores(store, now() - 3600 * SECOND, now() + SECOND, tmp_path))
    assert found["message"].astype(str).tolist() == names
