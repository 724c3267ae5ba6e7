"""What the filter did to users, from what they say: operations/evaluation.py."""

import json

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa

from operations import evaluation
from operations.evaluation import estimate, evaluate_window, measure
from operations.store import WORKERS, add_label, evaluations, insert, now


def simulate(seed, n=20_000, unfiltered=0.1):
    """Return decisions on messages of which a fifth is spam, and the truth: precision, recall, share of ham blocked."""
    random = np.random.default_rng(seed)
    spam = random.random(n) < 0.2
    log_odds = random.normal(np.where(spam, 2.0, -2.0), 1.5)
    propensity = 1 / (1 + np.exp(-log_odds))
    prediction = propensity >= 0.7
    arm = np.where(random.random(n) < unfiltered, "unfiltered", "filtered")
    down = prediction & (arm == "filtered")
    said = np.where(~down & spam, 1.0, np.nan)  # who gets spam says so
    said[down & ~spam & (random.random(n) < 0.05)] = 0  # few miss what they did not get
    data = pd.DataFrame({"propensity": propensity, "prediction": prediction, "taken_down": down, "said": said})
    truth = {
        "precision": spam[prediction].mean(),
        "recall": prediction[spam].mean(),
        "ham_blocked": prediction[~spam].mean(),
        "cost": 1000 * (10 * (prediction & ~spam).sum() + (~prediction & spam).sum()) / n,
    }
    return data.assign(arm=arm, region="north"), truth


def test_estimates_are_those_of_all_messages_though_most_spam_was_never_seen(monkeypatch):
    monkeypatch.setattr(evaluation, "ROUNDS", 100)
    covered, ratios = dict.fromkeys(("precision", "recall", "ham_blocked", "cost"), 0), {}
    for seed in range(10):
        data, truth = simulate(seed)
        estimated = estimate(data, 10)
        for name in covered:
            covered[name] += estimated[name]["low"] <= truth[name] <= estimated[name]["high"]
            ratios.setdefault(name, []).append(estimated[name]["value"] / truth[name])
    assert min(covered.values()) >= 7  # of 10 intervals that hold 19 of 20 times
    assert [np.mean(values) for values in ratios.values()] == pytest.approx([1, 1, 1, 1], abs=0.06)


def test_what_was_reported_is_less_than_what_is_wrong():
    data, truth = simulate(0)
    result = measure(data, 10)
    assert result["reported"]["cost"] < truth["cost"] < result["estimated"]["cost"]["high"]
    assert 0 < result["reported"]["missed"]["value"] < 1 - truth["precision"]
    assert result["regions"]["north"] == result["reported"]
    assert result["notes"] == []


def test_too_few_unfiltered_messages_are_no_estimate():
    data, _ = simulate(0, unfiltered=0.001)
    result = measure(data, 10)
    assert result["estimated"] is None
    assert "cannot be estimated" in result["notes"][0]


def row(message, prediction, action, arm="filtered"):
    decided = {"propensity": 0.95 if prediction else 0.1, "threshold": 0.9, "prediction": prediction}
    score = {"message": message, "model": 1, "shadow": False, "action": action, **decided}
    return {**score, "sender": None, "region": None, "arm": arm, "text": None}


def test_a_window_is_evaluated_and_the_result_stored(store):
    start = now()
    first = start * WORKERS
    rows = [row(first + i * WORKERS, i < 4, "take down" if i < 4 else "deliver") for i in range(10)]
    rows += [row((start - 10) * WORKERS, True, "take down"), {**rows[4], "model": 2, "shadow": True}]
    del rows[-1]["arm"]
    with store.begin() as connection:
        insert(connection, rows)
    add_label(store, first, "complaint", 0)
    add_label(store, first + WORKERS, "complaint", 0)
    add_label(store, first + WORKERS, "reviewer", 1)  # the complaint was made in error
    add_label(store, first + 5 * WORKERS, "spam report", 1)
    add_label(store, (start - 10) * WORKERS, "complaint", 0)  # of a message before the window
    result = evaluate_window(store, start, start + 1_000_000)
    assert (result["messages"], result["taken_down"], result["delivered"]) == (10, 4, 6)
    assert result["reported"]["missed"]["count"] == 1
    assert result["reported"]["spam"]["count"] == 1
    assert result["reported"]["cost"] == pytest.approx(1000 * 11 / 10)
    with store.connect() as connection:
        [stored] = connection.execute(sa.select(evaluations)).mappings()
    assert json.loads(stored["result"]) == result
    with pytest.raises(ValueError, match="nothing was scored"):
        evaluate_window(store, 1, 2)
    with pytest.raises(ValueError, match="begin before it ends"):
        evaluate_window(store, 2, 1)
