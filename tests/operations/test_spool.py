"""From the service to its store, and what is done about each score: operations/spool.py and operations/actions.py."""

import itertools
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pandas as pd
import pytest
import sqlalchemy as sa
from helpers import ROOT, LengthModel, poll, stub_card
from sqlalchemy.exc import OperationalError
from werkzeug.exceptions import BadRequest

from app import create_app
from operations.actions import act
from operations.spool import Recorder, kind_of, move
from operations.store import day_of, day_tables, labels, models, now, open_store, read_scores, reader, spool

PARAMS = {
    "retention_days": 0,
    "experiment": "x",
    "shares": {"filtered": 1.0, "unfiltered": 0.0},
    "spool_bytes": 1e9,
    "shadow_share": 0.0,
}
CARD = stub_card(sha256="a" * 64)
# A worker that records without end, and says what it recorded.
WORKER = """
import json, sys
from pathlib import Path
from operations.spool import Recorder
params, card, folder = json.loads(sys.argv[1])
recorder = Recorder(card, params, Path(folder))
while True:
    print(*recorder({}, ["x"], [(False, 0.1)], 0.5), flush=True)
"""


@pytest.fixture
def recorder():
    """A function that makes a recorder, which is closed after the test."""
    made = []

    def make(folder, shadow=None, **options):
        made.append(Recorder(CARD, {**PARAMS, **options}, folder, b"key", shadow))
        return made[-1]

    yield make
    for each in made:
        each.close()


def stored(engine):
    """Return all scores of a store."""
    parts = list(read_scores(engine, now() - 3600 * 10**6, now() + 10**6))
    return pd.concat(parts) if parts else pd.DataFrame(columns=["message"])


def launch(*command, **environment):
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )


def read_anew(connection, query):
    connection.rollback()
    return connection.scalar(query)


def kill(process):
    process.kill()
    process.communicate()


def test_scores_reach_the_store_once_with_what_is_known_of_the_message(recorder, store, tmp_path):
    record = recorder(tmp_path / "spool")
    fields = {"sender": "+44 7700 900461", "region": "north", "language": "en"}
    names = record(fields, ["win 100", "hi"], [(True, 0.95), (False, 0.25)], 0.5)
    names += record({}, ["hello"], [(False, 0.125)], 0.5)
    assert move(store, tmp_path / "spool") == 3
    assert move(store, tmp_path / "spool") == 0
    found = stored(store)
    assert found["message"].astype(str).tolist() == names
    assert found["propensity"].tolist() == [0.95, 0.25, 0.125]
    assert found["prediction"].tolist() == [True, False, False]
    about = ["region", "language", "sender_kind", "characters", "digits"]
    known = found[about].astype(object).where(found[about].notna(), None).to_numpy().tolist()
    assert known == [
        ["north", "en", "number", 7, 3],
        ["north", "en", "number", 2, 0],
        [None, None, None, 5, 0],
    ]
    assert found["sender"][0] == found["sender"][1] != found["sender"][2]
    assert b"7700" not in found["sender"][0]
    with store.connect() as connection:
        assert connection.scalars(sa.select(models.c.sha256)).all() == [CARD["sha256"]]


def test_a_file_of_the_version_before_is_stored(recorder, store, tmp_path):
    record = recorder(tmp_path / "spool")
    record({"region": "north"}, ["hi"], [(False, 0.25)], 0.5)
    [path] = (tmp_path / "spool").glob("*.jsonl")
    record.close()
    header, line = path.read_text().splitlines()
    path.write_text(f"{header}\n{json.dumps(json.loads(line)[:9])}\n")
    assert move(store, tmp_path / "spool") == 1
    found = stored(store)
    assert found["region"].tolist() == ["north"]
    assert found["characters"].isna().tolist() == [True]


@pytest.mark.parametrize(
    ("sender", "kind"),
    [
        ("80182", "short code"),
        ("+44 (7700) 900-461", "number"),
        ("Bank", "name"),
        ("24/7", "name"),
        ("+", "name"),
        (None, None),
    ],
)
def test_senders_are_of_three_kinds(sender, kind):
    assert kind_of(sender) == kind


@pytest.mark.parametrize("days", [0, 7])
def test_texts_are_stored_only_where_they_may_be(recorder, days, store, tmp_path):
    text = "caf\u00e9 \x00 \ud800 \U0001f600"
    [name] = recorder(tmp_path / "spool", retention_days=days)({}, [text], [(False, 0.1)], 0.5)
    if not days:
        assert b"caf" not in b"".join(path.read_bytes() for path in (tmp_path / "spool").iterdir())
    move(store, tmp_path / "spool")
    messages, _ = day_tables(day_of(int(name)))
    with store.connect() as connection:
        kept = connection.scalar(sa.select(messages.c.text))
    assert kept == ("caf\u00e9 \ufffd ? \U0001f600" if days else None)


def test_a_candidate_scores_a_share_of_the_messages_on_the_side(recorder, store, tmp_path):
    candidate = stub_card(sha256="b" * 64, threshold=0.02)
    record = recorder(tmp_path / "spool", shadow_share=0.5, shadow=(LengthModel(), candidate))
    for _ in range(10):
        record({}, ["xxx"] * 100, [(False, 0.1)] * 100, 0.5)
    move(store, tmp_path / "spool")
    found = stored(store)
    beside = found[found["shadow"]]
    assert (~found["shadow"]).sum() == 1000
    assert 350 < len(beside) < 650
    assert set(beside["propensity"]) == {0.03}
    assert beside["prediction"].all()
    assert set(beside["message"]) < set(found["message"][~found["shadow"]])
    assert act(store, 0.5) == {"deliver": 1000}  # and nothing is done about what a candidate says


def test_answers_name_the_message_by_each_path(recorder, tmp_path):
    app = create_app(LengthModel(), CARD, record=recorder(tmp_path / "spool"))
    client = app.test_client()
    names = [client.post("/score", json={"text": "x"}).json["id"], client.post("/score", data={"text": "x"}).json["id"]]
    names.append(client.post("/score", json={"text": "x" * 5000}).json["id"])
    names += [result["id"] for result in client.post("/score/batch", json={"texts": ["x", "y"]}).json["results"]]
    lines = b"".join(path.read_bytes() for path in (tmp_path / "spool").glob("*.jsonl")).splitlines()[1:]
    assert [str(json.loads(line)[0]) for line in lines] == names == sorted(set(names))
    for wrong in ({"sender": 7}, {"region": "x" * 41}, {"language": 7}, {"recipient": ["x"]}):
        answer = client.post("/score", json={"text": "x", **wrong})
        assert answer.status_code == 400
        assert next(iter(wrong)) in answer.json["error"]


def test_fields_of_a_batch_that_are_wrong_record_nothing(recorder, tmp_path):
    with pytest.raises(BadRequest, match="region must be a string of at most 40"):
        recorder(tmp_path)({"region": 5}, ["x"], [(False, 0.1)], 0.5)
    assert not list(tmp_path.glob("*.jsonl"))


def test_workers_and_threads_give_each_message_a_number_of_its_own(recorder, store, tmp_path):
    arguments = json.dumps([PARAMS, CARD, str(tmp_path / "spool")])
    workers = [launch("-c", WORKER, arguments) for _ in range(2)]
    record = recorder(tmp_path / "spool")
    with ThreadPoolExecutor(4) as pool:
        names = list(itertools.chain(*pool.map(lambda _: record({}, ["x"], [(False, 0.1)], 0.5), range(500))))
    said = [[worker.stdout.readline() for _ in range(200)] for worker in workers]
    for worker in workers:
        worker.kill()
    said = [line.strip() for lines, worker in zip(said, workers, strict=True) for line in [*lines, *worker.stdout]]
    for worker in workers:
        kill(worker)
    names += [name for name in said if name]
    move(store, tmp_path / "spool")
    found = stored(store)["message"].astype(str)
    assert found.is_unique
    assert len(set(names) - set(found)) <= 2  # at most the one that a worker was about to say, cut short
    assert len(set(names) & set(found)) >= len(names) - 2


def test_a_mover_that_is_killed_again_and_again_stores_each_score_once(recorder, store, store_url, tmp_path):
    record = recorder(tmp_path / "spool")
    names, place = [], sa.select(sa.func.max(spool.c.offset))
    for _ in range(3):
        for _ in range(20):
            names += record({}, ["x"] * 1000, [(False, 0.1)] * 1000, 0.5)
        with reader(store).connect() as connection:
            begun = place.where(spool.c.offset > (connection.scalar(place) or 0))
            mover = launch("-m", "operations.spool", OPERATIONS_STATE=str(tmp_path), DATABASE_URL=store_url)
            try:
                poll(partial(read_anew, connection, begun), "the mover to begin")
            finally:
                kill(mover)
    move(store, tmp_path / "spool")
    found = stored(store)["message"].astype(str)
    assert found.is_unique
    assert set(found) == set(names)


def test_files_that_are_stored_go_away_when_their_worker_has_ended(store, tmp_path):
    worker = launch("-c", WORKER, json.dumps([PARAMS, CARD, str(tmp_path / "spool")]))
    worker.stdout.readline()
    move(store, tmp_path / "spool")
    assert len(list((tmp_path / "spool").glob("*.jsonl"))) == 1
    kill(worker)
    move(store, tmp_path / "spool")
    assert not list((tmp_path / "spool").glob("*.jsonl"))
    with store.connect() as connection:
        assert connection.scalars(sa.select(spool)).all() == []


def test_what_a_killed_worker_half_wrote_is_left_out(recorder, store, tmp_path):
    record = recorder(tmp_path / "spool")
    names = record({}, ["x"], [(False, 0.1)], 0.5)
    os.write(record.file.fileno(), b'[17955, "half')
    record.close()
    move(store, tmp_path / "spool")
    assert stored(store)["message"].astype(str).tolist() == names
    assert not list((tmp_path / "spool").glob("*.jsonl"))


def test_scores_wait_for_a_store_that_is_away(recorder, store, tmp_path):
    away = open_store("postgresql://nobody@/nothing?host=/nowhere")
    record = recorder(tmp_path / "spool")
    names = record({}, ["x"], [(False, 0.1)], 0.5)
    with pytest.raises(OperationalError):
        move(away, tmp_path / "spool")
    names += record({}, ["y"], [(False, 0.1)], 0.5)
    assert move(store, tmp_path / "spool") == 2
    assert stored(store)["message"].astype(str).tolist() == names
    away.dispose()


def test_a_mover_says_that_the_store_is_away_and_that_it_is_back(recorder, postgres, tmp_path):
    url = postgres.url("away")
    engine = open_store(url)
    from operations.store import migrate

    migrate(engine)
    record = recorder(tmp_path / "spool")
    mover = launch("-m", "operations.spool", OPERATIONS_STATE=str(tmp_path), DATABASE_URL=url)
    try:
        names = record({}, ["x"], [(False, 0.1)], 0.5)
        poll(lambda: len(stored(engine)) == 1, "the first score")
        postgres.kill()
        try:
            names += record({}, ["y"], [(False, 0.1)], 0.5)
            assert mover.stdout.readline().startswith("The store cannot be written to: ")
            names += record({}, ["z"], [(False, 0.1)], 0.5)
        finally:
            postgres.start()
        assert mover.stdout.readline() == "The store is back.\n"
        engine.dispose()
        poll(lambda: stored(engine)["message"].astype(str).tolist() == names, "all scores")
    finally:
        kill(mover)
        engine.dispose()


def test_scoring_goes_on_where_nothing_can_be_recorded(recorder, tmp_path, capsys):
    record = recorder(tmp_path / "spool", spool_bytes=5000)
    long = [["x"] * 1000, [(False, 0.123456789)] * 1000]
    record.params = {**record.params, "spool_bytes": 100}
    record({}, ["x"], [(False, 0.1)], 0.5)
    record.size = 2**24  # so that another file is begun
    assert len(record({}, *long, 0.5)) == 1000
    assert len(record({}, *long, 0.5)) == 1000
    said = capsys.readouterr().err
    assert said.count("Scores are not recorded, but the service goes on: ") == 1
    for path in (tmp_path / "spool").glob("*.jsonl"):
        path.unlink()
    record({}, ["x"], [(False, 0.1)], 0.5)
    assert "Scores are recorded again; 2000 were not." in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_of_a_line(recorder, store, tmp_path, capsys):
    record = recorder(tmp_path / "spool")
    names = record({}, ["x"], [(False, 0.1)], 0.5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (record.size + 50, limits[1]))  # the next line does not fit
    try:
        record({}, ["y"], [(False, 0.1)], 0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Scores are not recorded" in capsys.readouterr().err
    names += record({}, ["z"], [(False, 0.1)], 0.5)
    move(store, tmp_path / "spool")
    assert stored(store)["message"].astype(str).tolist() == names


# Actions


def test_each_score_is_acted_on_once_whoever_acts(recorder, store, store_url, tmp_path):
    record = recorder(tmp_path / "spool", shares={"filtered": 0.5, "unfiltered": 0.5})
    for _ in range(12):
        kinds = [(True, 0.95), (False, 0.75), (False, 0.25)] * 300
        record({}, ["x"] * 900, kinds, 0.9)
    move(store, tmp_path / "spool")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: act(store, 0.5), range(2))
    found = stored(store)
    assert first + second == Counter(found["action"])
    assert act(store, 0.5) == {}
    by_arm = found.groupby(["arm", "propensity"])["action"].unique().map(list).to_dict()
    filtered = {0.95: ["take down"], 0.75: ["label"], 0.25: ["deliver"]}
    assert by_arm == {
        **{("filtered", propensity): action for propensity, action in filtered.items()},
        **{("unfiltered", propensity): ["deliver"] for propensity in filtered},
    }


def test_one_user_is_in_one_arm(recorder, store, tmp_path):
    record = recorder(tmp_path / "spool", shares={"filtered": 0.5, "unfiltered": 0.5})
    for user in range(40):
        record({"recipient": f"user {user // 4}"}, ["x"], [(True, 0.95)], 0.9)
    move(store, tmp_path / "spool")
    arms = stored(store)["arm"].to_numpy().reshape(10, 4)
    assert all(len(set(of_user)) == 1 for of_user in arms)
    assert len(set(arms[:, 0])) == 2
    with store.connect() as connection:
        assert connection.scalars(sa.select(labels)).all() == []
