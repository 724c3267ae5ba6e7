"""What the filter did to users in a period, from what it decided and from what users said: the job /evaluate.

Users see what is delivered and miss what is taken down, so what they say is no sample of all messages. Two views
are given. *Reported* counts what was said: of the messages taken down those that somebody missed, of those delivered
the spam that somebody reported; both are lower bounds of the errors. *Estimated* rests on a random share of users who
get everything, whatever the filter says: there, spam and ham are told apart by the reports alone, and each message
that the filter would have taken down stands for all those it did take down. That assumes that spam that is delivered
is reported; where a reviewer has labelled a message, the reviewer is right.
"""

import json
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa
import yaml
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from operations.store import ROOT, SECOND, WORKERS, evaluations, labels, now, read_scores, reader

DAY = 86_400 * SECOND
ABOUT = ("region", "arm", "language", "sender_kind", "characters", "digits")  # what is known of a message
ROUNDS = 500  # of the bootstrap
ENOUGH = 30  # messages that would have been taken down, among those of the users without a filter
LARGEST_SAMPLE = 100_000  # messages of which AUCPR, calibration and intervals are computed


def evaluate_window(engine: sa.Engine, start: int | None = None, end: int | None = None) -> dict[str, Any]:
    """Evaluate the decisions of a period and store the result.

    Args:
        engine: of the store.
        start, end: of the period, in microseconds; if None the day before now.

    Returns:
        "messages", "taken_down", "delivered"; "reported", "estimated" (None where it cannot be told), "regions" and
        "notes" in words. Shares have "value", "low" and "high", their 95% interval.

    Raises:
        ValueError: the period is none, or nothing was scored in it.
    """
    start, end = period(start, end)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    data = read_decisions(engine, start, end)
    if data.empty:
        raise ValueError("nothing was scored in the period to evaluate: choose another one")
    result = measure(data, params["action"]["ham_cost"])
    with engine.begin() as connection:
        values = {"created": now(), "start": start, "end": end, "result": json.dumps(result)}
        connection.execute(evaluations.insert().values(**values))
    return result


def period(start: int | None, end: int | None) -> tuple[int, int]:
    """Return the start and the end of a period, in microseconds; where they are None, of the day before now.

    Raises:
        ValueError: it is none.
    """
    end = now() if end is None else end
    start = end - DAY if start is None else start
    if start >= end:
        raise ValueError("the period must begin before it ends")
    return start, end


def read_decisions(engine: sa.Engine, start: int, end: int) -> pd.DataFrame:
    """Return the decisions of a period with what was said of them.

    Returns:
        A row for each message: `model`, `propensity`, `prediction`, `taken_down`, what is known of the message
        (`region`, `arm`, `language`, `sender_kind`, `characters`, `digits`), and `said`: 1 for spam, 0 for ham, missing
        where nobody said anything. A reviewer is believed before a user, a later word before an earlier. `reviewed` is
        what a reviewer said.
    """
    kept = ["message", "model", "propensity", "prediction", "action", *ABOUT]
    parts = [part.loc[~part["shadow"], kept] for part in read_scores(engine, start, end)]
    data = pd.concat(parts or [pd.DataFrame(columns=kept)]).set_index("message")
    query = sa.select(labels.c.message, labels.c.source, labels.c.label, labels.c.received)
    query = query.where(labels.c.message.between(start * WORKERS, end * WORKERS - 1))
    with reader(engine).connect() as connection:
        said = pd.read_sql(query, connection)
    said = said.assign(is_reviewer=said["source"] == "reviewer").sort_values(["is_reviewer", "received"])
    data["said"] = said.groupby("message")["label"].last().reindex(data.index)
    data["reviewed"] = said[said["is_reviewer"]].groupby("message")["label"].last().reindex(data.index)
    data["taken_down"] = data.pop("action") == "take down"
    return data


def measure(data: pd.DataFrame, ham_cost: float) -> dict[str, Any]:
    """Return what `evaluate_window` does, of decisions as `read_decisions` returns them."""
    down, notes = data["taken_down"], []
    result = {"messages": len(data), "taken_down": int(down.sum()), "delivered": int((~down).sum())}
    result["reported"] = report(data, ham_cost)
    random_share = data["arm"] == "unfiltered"
    would = int((random_share & data["prediction"]).sum())
    if would >= ENOUGH:
        result["estimated"] = estimate(data, ham_cost)
    else:
        result["estimated"] = None
        notes.append(
            f"Of the messages of users without a filter, it would have taken {would} down; with fewer than {ENOUGH}, "
            "precision and recall cannot be estimated: wait, or leave a larger share unfiltered."
        )
    if not data["said"].notna().any():
        notes.append("Nobody has said anything of these messages yet.")
    regions = data.groupby(data["region"].fillna("unknown"))
    result["regions"] = {region: report(part, ham_cost) for region, part in regions}
    return result | {"notes": notes}


def report(data: pd.DataFrame, ham_cost: float) -> dict[str, Any]:
    """Count what was said of decisions: lower bounds of the errors.

    Returns:
        "missed" (genuine messages among those taken down), "spam" (among those delivered), and "cost" of 1,000
        messages.
    """
    down = data["taken_down"]
    missed, spam = (down & (data["said"] == 0)).sum(), (~down & (data["said"] == 1)).sum()
    cost = 1000 * (ham_cost * missed + spam) / len(data)
    return {"missed": share(missed, down.sum()), "spam": share(spam, (~down).sum()), "cost": float(cost)}


def share(count: int, total: int) -> dict[str, Any] | None:
    """Return a share with its 95% Wilson interval and its count, or None of nothing."""
    if not total:
        return None
    low, high = binomtest(int(count), int(total)).proportion_ci(method="wilson")
    return {"value": float(count / total), "low": float(low), "high": float(high), "count": int(count)}


def estimate(data: pd.DataFrame, ham_cost: float) -> dict[str, Any]:
    """Estimate the figures of all messages from those that were delivered.

    A message that was not taken down is spam where somebody says so. The messages taken down are represented by those
    that would have been, of the users without a filter (inverse probability weights: Horvitz and Thompson 1952).

    Returns:
        "precision", "recall", "ham_blocked", "aucpr", "cost" of 1,000 messages, and "calibration": slope and intercept
        of a logistic regression of the labels on the log-odds, 1 and 0 where propensities are probabilities. Intervals
        are quantiles of a bootstrap.
    """
    seen = data[~data["taken_down"]]
    spam = seen["said"].eq(1).to_numpy()
    acted = seen["prediction"].to_numpy(bool)
    weights = np.where(acted, data["prediction"].sum() / acted.sum(), (~data["prediction"]).sum() / (~acted).sum())
    propensities, random = seen["propensity"].to_numpy(), np.random.default_rng(0)
    if len(seen) > LARGEST_SAMPLE:
        chosen = random.choice(len(seen), LARGEST_SAMPLE, replace=False)
        spam, acted, weights, propensities = spam[chosen], acted[chosen], weights[chosen], propensities[chosen]
    value = figures(spam, acted, weights, propensities, ham_cost)
    draws = []
    for _ in range(ROUNDS):
        drawn = random.integers(0, len(spam), len(spam))
        draws.append(figures(spam[drawn], acted[drawn], weights[drawn], propensities[drawn], ham_cost))
    result = {}
    for name, of_all in value.items():
        low, high = np.nanquantile([draw[name] for draw in draws], [0.025, 0.975])
        result[name] = None if np.isnan(of_all) else {"value": of_all, "low": float(low), "high": float(high)}
    return result | {"calibration": calibration(spam, weights, propensities)}


def figures(
    spam: np.ndarray, acted: np.ndarray, weights: np.ndarray, propensities: np.ndarray, ham_cost: float
) -> dict[str, float]:
    """Return weighted figures of messages; NaN where there is nothing to tell one from.

    Args:
        spam, acted: whether each message is spam, and whether the filter takes it down.
        weights: how many messages each stands for.
        propensities: of each.
        ham_cost: of a ham taken down, where a spam let through costs 1.
    """
    right, wrong = weights[acted & spam].sum(), weights[acted & ~spam].sum()
    missed, passed = weights[~acted & spam].sum(), weights[~acted & ~spam].sum()

    def ratio(part: float, rest: float) -> float:
        return float(part / (part + rest)) if part + rest else np.nan

    both = spam.any() and not spam.all()
    return {
        "precision": ratio(right, wrong),
        "recall": ratio(right, missed),
        "ham_blocked": ratio(wrong, passed),
        "aucpr": float(average_precision_score(spam, propensities, sample_weight=weights)) if both else np.nan,
        "cost": float(1000 * (ham_cost * wrong + missed) / weights.sum()),
    }


def calibration(spam: np.ndarray, weights: np.ndarray, propensities: np.ndarray) -> dict[str, float] | None:
    """Return slope and intercept of the calibration of propensities (Cox 1958), or None where all labels are alike."""
    if spam.all() or not spam.any():
        return None
    propensities = np.clip(propensities, 1e-9, 1 - 1e-9)
    log_odds = np.log(propensities / (1 - propensities))[:, None]
    fitted = LogisticRegression(C=1e6).fit(log_odds, spam, sample_weight=weights)
    return {"slope": float(fitted.coef_[0, 0]), "intercept": float(fitted.intercept_[0])}
