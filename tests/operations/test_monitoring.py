"""The nightly look at what passed through the filter: operations/monitoring.py, its gauges and alerts.yaml."""

import json
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
import yaml
from helpers import ROOT, missing, stub_card
from prometheus_client.parser import text_string_to_metric_families

from engine.drift import segment_gaps, summarise
from operations import gauges, monitoring
from operations.monitoring import look, monitor_window
from operations.store import WORKERS, add_label, drift, insert, jobs, now, register

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
REGIONS = ("north", "south", "isles")


def decide(seed, n=4000, spam_share=0.2, shift=0.0):
    """Return decisions on messages, and which of them are spam; propensities are calibrated at even odds."""
    random = np.random.default_rng(seed)
    spam = random.random(n) < spam_share
    propensity = 1 / (1 + np.exp(-random.normal(np.where(spam, 6, -6), np.sqrt(12)) - shift))
    data = pd.DataFrame({"model": 1, "propensity": propensity, "prediction": propensity >= 0.9})
    about = {"region": random.choice(REGIONS, n), "language": "en", "sender_kind": "name"}
    counted = {"characters": random.integers(20, 200, n), "digits": random.poisson(np.where(spam, 8, 1))}
    data = data.assign(**about, **counted, arm="filtered", said=np.nan, reviewed=np.nan)
    return data.assign(taken_down=data["prediction"]), spam


@pytest.fixture(scope="module")
def card():
    """The card of a model, with the reference of many messages."""
    data, spam = decide(0, 40_000, 0.5)
    groups = np.where(spam, "today spam", "today ham")
    reference = summarise(data[list(monitoring.COLUMNS)], groups)
    return stub_card(sha256="a" * 64, threshold=0.9, reference=json.loads(json.dumps(reference)))


def find(card, data, streams=()):
    result = look(data, card, PARAMS, dict(streams))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    return result


# What is found


def test_nothing_is_found_where_nothing_has_changed(card):
    streams, alarms = {}, {}
    for night in range(1, 21):
        result = find(card, decide(night)[0], streams)
        streams, alarms = result["streams"], alarms | result["alarms"]
    assert alarms == {}
    assert {row["column"] for row in result["drift"]} == set(monitoring.COLUMNS)
    assert result["spam_share"] == pytest.approx(0.2, abs=0.02)
    assert result["expected_precision"] > 0.95


def test_more_spam_is_a_drift_in_words(card):
    found = find(card, decide(1, spam_share=0.4)[0])
    assert set(found["alarms"]) >= {"drift of propensity", "drift of prediction", "drift of digits"}
    assert "drift of characters" not in found["alarms"]
    [row] = [row for row in found["drift"] if row["column"] == "prediction"]
    shares = sorted([row["now"], 1 - row["now"]])
    assert found["alarms"]["drift of prediction"].startswith(f"{shares[0]:.1%} of the messages are taken down, and ")
    assert found["alarms"]["drift of digits"].startswith("The number of digits is ")
    assert found["spam_share"] == pytest.approx(0.4, abs=0.03)


def test_columns_that_nobody_counted_are_left_out(card):
    data = decide(1)[0].assign(characters=np.nan, digits=np.nan)
    found = find(card, data)
    assert {row["column"] for row in found["drift"]} == {"propensity", "prediction"}
    assert found["alarms"] == {}
    old = {name: value for name, value in card.items() if name != "reference"}
    assert find(old, data)["drift"] == []


def test_a_precision_that_is_too_low_is_an_alarm(card):
    data, spam = decide(1, 20_000)
    doubtful = data.assign(propensity=np.where(data["prediction"], 0.905, 0.3))
    assert "expected precision" in find(card, doubtful)["alarms"]
    everybody = np.arange(len(data)) % 2 == 0
    data = data.assign(arm=np.where(everybody, "unfiltered", "filtered"))
    data["taken_down"] = data["prediction"] & ~everybody
    data.loc[everybody, "said"] = np.where(spam[everybody], 1.0, np.nan)
    assert "precision" not in find(card, data)["alarms"]
    data.loc[everybody & (np.arange(len(data)) % 4 == 0), "said"] = np.nan
    found = find(card, data)
    assert found["alarms"]["precision"].startswith("Precision is at most ")
    assert found["evaluation"]["estimated"]["precision"]["high"] < 0.9


def test_a_region_that_is_served_worse_is_named(card):
    data, _ = decide(1, 20_000)
    random = np.random.default_rng(1)
    down = data["taken_down"]
    data.loc[down & (random.random(len(data)) < 0.02), "said"] = 0
    assert find(card, data)["segments"] == []
    data.loc[down & (data["region"] == "isles") & (random.random(len(data)) < 0.1), "said"] = 0
    found = find(card, data)
    [row] = found["segments"]
    assert (row["segment"], row["value"], row["of"]) == ("region", "isles", "taken down")
    assert 0 < row["low"] < 0.1 < row["high"] < 0.2
    assert "where the region is isles" in found["alarms"]["region isles, taken down"]


def test_many_segments_are_compared_as_fifty_and_the_others(card, monkeypatch):
    compared = []

    def record(wrong, segments, alpha):
        compared.append(segments.nunique())
        return segment_gaps(wrong, segments, alpha)

    monkeypatch.setattr(monitoring, "segment_gaps", record)
    data, _ = decide(1, 20_000)
    data["region"] = [f"region {min(i % 300, 260)}" for i in range(len(data))]
    data.loc[~data["taken_down"] & (data["region"] == "region 260"), "said"] = 1
    [row] = find(card, data)["segments"]
    assert (row["value"], row["of"], row["share"]) == ("region 260", "delivered", 1)
    assert max(compared) == 51


def test_a_stream_is_watched_from_night_to_night(card):
    streams = find(card, decide(1)[0])["streams"]
    assert len(streams["propensities"]) == monitoring.SAMPLED
    assert "stream of propensities" not in find(card, decide(2)[0], streams)["alarms"]
    assert "stream of propensities" in find(card, decide(2, spam_share=0.5)[0], streams)["alarms"]


def test_errors_that_reviewers_find_are_watched(card):
    streams = {"reviewed errors": [0.0] * 500}
    data, _ = decide(1)
    data.loc[data.index[:300], "reviewed"] = data["prediction"][:300].astype(float)
    assert "stream of reviewed errors" not in find(card, data, streams)["alarms"]
    data.loc[data.index[:200], "reviewed"] = (~data["prediction"][:200]).astype(float)
    assert "stream of reviewed errors" in find(card, data, streams)["alarms"]


# What becomes of it


@pytest.fixture
def night(store, tmp_path, monkeypatch, card):
    """A function that stores decisions of a night and looks at them."""
    register(store, card, "serving")
    start = now() - 10**9
    monkeypatch.setattr(monitoring, "first_model", lambda _: tmp_path)
    monkeypatch.setattr(monitoring, "load_card", lambda _: card)
    # What another model decided, or scored on the side, is none of the night's.
    other = {"model": 2, "propensity": 0.99, "threshold": 0.9, "prediction": True}
    before = {**other, "shadow": False, "action": "take down", "arm": "filtered"}

    def look_at(data):
        nonlocal start
        start += 10**7
        decided = {"shadow": False, "threshold": 0.9, "sender": None, "text": None}
        rows = data.drop(columns=["said", "reviewed", "taken_down"]).assign(**decided).to_dict("records")
        for i, row in enumerate(rows):
            row |= {"message": (start + i) * WORKERS, "action": "take down" if row["prediction"] else "deliver"}
        with store.begin() as connection:
            insert(connection, rows)
            insert(connection, [{**other, "shadow": True, "message": rows[0]["message"]}])
            insert(connection, [{**before, "message": rows[0]["message"] + 1}])
        return start, monitor_window(store, start, start + len(rows))

    return look_at


def ordered(engine):
    with engine.connect() as connection:
        return connection.execute(sa.select(jobs.c.kind, jobs.c.arguments)).all()


def test_a_new_alarm_orders_an_evaluation_and_an_old_one_nothing(store, night):
    _, found = night(decide(1, 1500)[0])
    assert (found["messages"], found["alarms"]) == (1500, {})
    assert ordered(store) == []
    start, found = night(decide(2, 1500, spam_share=0.5)[0])
    assert found["alarms"]
    [(kind, arguments)] = ordered(store)
    assert (kind, json.loads(arguments)) == ("evaluate", {"start": start, "end": start + 1500})
    night(decide(3, 1500, spam_share=0.5)[0])
    assert len(ordered(store)) == 1
    with store.connect() as connection:
        rows = connection.execute(sa.select(drift).order_by("id")).mappings().all()
    assert [row["model"] for row in rows] == [1, 1, 1]
    assert json.loads(rows[1]["result"]) == found


def test_a_candidate_is_trained_where_params_say_so_and_none_is_promoted(store, night, monkeypatch):
    params = {**PARAMS, "operations": {**PARAMS["operations"], "train_on_alarm": True}}
    monkeypatch.setattr(monitoring.yaml, "safe_load", lambda _: params)
    night(decide(2, 1500, spam_share=0.5)[0])
    assert sorted(kind for kind, _ in ordered(store)) == ["evaluate", "train"]


def test_a_period_without_decisions_of_the_model_is_refused(store, night):
    start, _ = night(decide(1, 100)[0])
    with pytest.raises(ValueError, match="decided nothing in the period"):
        monitor_window(store, start - 10**8, start)
    with pytest.raises(ValueError, match="must begin before it ends"):
        monitor_window(store, start, start)


# What Prometheus is told


def read_gauges(engine):
    """Return the gauges of a store: values by name and labels."""
    families = text_string_to_metric_families(gauges.exposition(engine)[0].decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_prometheus_is_told_what_was_found(store, night):
    assert read_gauges(store) == {}
    data = decide(2, 3000, spam_share=0.5)[0]
    start, found = night(data)
    for i in np.flatnonzero(data["taken_down"])[:20]:
        add_label(store, int(start + i) * WORKERS, "complaint", 0)
    found = monitor_window(store, start, start + 3000)
    told = read_gauges(store)
    assert told[("spam_jobs", "evaluate", "waiting")] == 1
    assert told[("spam_alarm", "drift of propensity")] == 1
    assert told[("spam_expected_precision",)] == found["expected_precision"]
    assert told[("spam_reported_share", "missed")] == pytest.approx(20 / found["evaluation"]["taken_down"])
    assert told[("spam_monitored",)] == pytest.approx(now() / 1e6, abs=60)
    distances = {row["column"]: row["distance"] for row in found["drift"]}
    assert {key[1]: value for key, value in told.items() if key[0] == "spam_drift_distance"} == distances


@pytest.fixture(scope="module")
def promtool():
    """A function that runs Prometheus' own tool."""
    path = shutil.which("promtool") or missing("no promtool on this machine: apt-get install prometheus")

    def run(*arguments):
        done = subprocess.run([path, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_alerts_fire_when_they_should_and_only_then(promtool, tmp_path):
    alerts = ROOT / "operations/alerts.yaml"
    promtool("check", "rules", str(alerts))
    rules = {rule["alert"]: rule for group in yaml.safe_load(alerts.read_text())["groups"] for rule in group["rules"]}
    well = {
        'up{job="spam-filter"}': "1x100",
        'http_request_duration_seconds_bucket{path="/score",le="1"}': "0+600x100",
        'http_request_duration_seconds_bucket{path="/score",le="5"}': "0+600x100",
        'http_request_duration_seconds_bucket{path="/score",le="+Inf"}': "0+600x100",
        'http_requests_total{status="200"}': "0+600x100",
        'http_requests_total{status="500"}': "0+1x100",
        'spam_predictions_total{prediction="ham"}': "0+600x100",
        'spam_reported_share{what="missed"}': "0.005x100",
        "spam_monitored": "0x100",
        'spam_jobs{kind="train",state="failed"}': "1x100",
        'spam_jobs{kind="train",state="waiting"}': "1x100",
        'spam_jobs{kind="train",state="running"}': "1x100",
        'sms_lag_seconds{partition="0"}': "0.2x100",
        'sms_dead{partition="0"}': "3x100",
    }
    ill = {
        "ScoringIsDown": {'up{job="spam-filter"}': "0x100"},
        "AnswersAreSlow": {'http_request_duration_seconds_bucket{path="/score",le="1"}': "0+10x100"},
        "AnswersFail": {'http_requests_total{status="500"}': "0+10x100"},
        "NothingIsScored": {'spam_predictions_total{prediction="ham"}': "7x100"},
        "FilterHasChanged": {'spam_alarm{alarm="drift of digits"}': "1x100"},
        "GenuineMessagesAreMissed": {'spam_reported_share{what="missed"}': "0.02x100"},
        "NobodyLooks": {"spam_monitored": "-200000x100"},
        "JobsFail": {'spam_jobs{kind="train",state="failed"}': "1x80 2x20"},
        "JobsWait": {'spam_jobs{kind="train",state="running"}': "0x100"},
        "StreamLags": {'sms_lag_seconds{partition="0"}': "9x100"},
        "MessagesAreDead": {'sms_dead{partition="0"}': "3x80 4x20"},
    }
    assert set(ill) == set(rules)
    for sick, series in {"nothing": {}, **ill}.items():
        fires = [
            {
                "expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}}) or vector(0)',
                "eval_time": "95m",
                "exp_samples": [{"labels": "{}", "value": int(name == sick)}],
            }
            for name in rules
        ]
        values = [{"series": name, "values": of} for name, of in {**well, **series}.items()]
        test = {"interval": "1m", "input_series": values, "promql_expr_test": fires}
        path = tmp_path / f"{sick}.yaml"
        path.write_text(yaml.safe_dump({"rule_files": [str(alerts)], "tests": [test]}), encoding="utf-8")
        promtool("test", "rules", str(path))
