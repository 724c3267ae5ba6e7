"""The nightly look at what passed through the filter, without labels and with those that came in: the job `monitor`.

What the model is fed and what it makes of that is compared with the reference that travels in its card; what users and
reviewers said tells its performance, and whether some are served worse than others; and a stream of propensities and
one of reviewed decisions are watched from night to night. What is new among the alarms orders an evaluation and, where
params.yaml says so, the training of a candidate; nothing is promoted. monitoring.ipynb says what each of these can see.
"""

import json
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa
import yaml

from engine.adwin import DriftStream
from engine.drift import compare, mix, segment_gaps
from engine.expected import estimate_spam_share, expected_precision
from engine.saved import load_card
from operations.evaluation import measure, period, read_decisions
from operations.jobs import enqueue
from operations.promotion import first_model
from operations.store import ROOT, drift, models, now, reader

SEGMENTS = ("region", "language", "sender_kind", "length")
LENGTHS = {"one part": 160, "some parts": 480, "many parts": np.inf}  # characters of an SMS
SAMPLED = 2000  # propensities of a night that the stream is told
MOST_VALUES = 50  # of a segment; the others are one
COLUMNS = {
    "propensity": "propensity",
    "prediction": "decision",
    "characters": "number of characters",
    "digits": "number of digits",
}


def monitor_window(engine: sa.Engine, start: int | None = None, end: int | None = None) -> dict[str, Any]:
    """Look at a period, store what was found, and order what an alarm that was not there before leads to.

    Args:
        engine: of the store.
        start, end: of the period, in microseconds; if None the day before now.

    Returns:
        "messages" that the model decided on; "drift", a row for each column that was compared, and the "least" distance
        that gives an alarm; "spam_share" and "expected_precision" as the propensities have them, and the
        "min_precision" that is asked for; "evaluation" as `evaluation.measure` returns it; "segments" that get more
        wrong decisions than others; "streams", what the next night goes on from; and "alarms", a sentence by the name
        of each.

    Raises:
        ValueError: the period is none, or the model that serves decided nothing in it.
    """
    start, end = period(start, end)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    card = load_card(first_model(engine))
    with reader(engine).connect() as connection:
        model = connection.scalar(sa.select(models.c.id).where(models.c.sha256 == card["sha256"]))
    data = read_decisions(engine, start, end)
    data = data[data["model"] == model]
    if data.empty:
        raise ValueError("the model that serves decided nothing in the period to look at: choose another one")
    last = last_result(engine, model)
    result = look(data, card, params, last.get("streams", {}))
    found = json.dumps(result, allow_nan=False)
    with engine.begin() as connection:
        values = {"created": now(), "start": start, "end": end, "model": model, "result": found}
        row = connection.scalar(drift.insert().values(**values).returning(drift.c.id))
    if result["alarms"].keys() - last.get("alarms", {}).keys():
        enqueue(engine, "evaluate", {"start": start, "end": end}, slot=f"evaluate on alarm {row}")
        if params["operations"]["train_on_alarm"]:
            enqueue(engine, "train", slot=f"train on alarm {row}")
    return result


def last_result(engine: sa.Engine, model: int | None = None) -> dict[str, Any]:
    """Return what was found last, of a model or of any; nothing if nothing was."""
    query = sa.select(drift.c.result).order_by(drift.c.id.desc()).limit(1)
    if model is not None:
        query = query.where(drift.c.model == model)
    with reader(engine).connect() as connection:
        return json.loads(connection.scalar(query) or "{}")


def look(
    data: pd.DataFrame, card: dict[str, Any], params: dict[str, Any], streams: dict[str, list[float]]
) -> dict[str, Any]:
    """Return what `monitor_window` does, of decisions of one model.

    Args:
        data: a row for each message, as `read_decisions` returns them.
        card: of the model.
        params: all of params.yaml.
        streams: what the streams remember of the nights before.
    """
    limits = params["monitoring"]
    result, alarms = {"messages": len(data)}, {}
    for found, said in (
        _compare_columns(data, card, limits),
        _judge_performance(data, card, params["action"]),
        _compare_segments(data, limits["alpha"]),
        _watch_streams(data, streams, limits),
    ):
        result, alarms = result | found, alarms | said
    return result | {"alarms": alarms}


def _compare_columns(
    data: pd.DataFrame, card: dict[str, Any], limits: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return how far each column is from the reference of the model, and the alarms."""
    if "reference" not in card:
        return {"drift": [], "least": limits["least"]}, {}
    columns = data[list(COLUMNS)].dropna(axis="columns", how="all")  # nothing is counted in rows of older versions
    table = compare(mix(card["reference"], limits["mix"]), columns, limits["alpha"], limits["least"])
    alarms = {f"drift of {name}": _say(name, row) for name, row in table[table["alarm"]].iterrows()}
    rows = table.rename_axis("column").reset_index().to_dict("records")
    return {"drift": rows, "least": limits["least"]}, alarms


def _say(name: str, row: pd.Series) -> str:
    """Return an alarm on a column as a sentence."""
    if name == "prediction":
        before, now_ = (share if row["bin"] == "above 0" else 1 - share for share in (row["before"], row["now"]))
        return (
            f"{now_:.1%} of the messages are taken down, and {before:.1%} were of those that the model was tested on."
        )
    now_, before = f"{row['now']:.1%} of the messages", f"{row['before']:.1%} of those that the model was tested on"
    return f"The {COLUMNS[name]} is {row['bin']} in {now_}, and was in {before}."


def _judge_performance(
    data: pd.DataFrame, card: dict[str, Any], bars: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the propensities promise and what was said, and the alarms."""
    propensities, least = data["propensity"].to_numpy(), bars["min_precision"]
    share = estimate_spam_share(propensities)
    expected = expected_precision(propensities, card["threshold"], share)
    evaluation, alarms = measure(data, bars["ham_cost"]), {}
    precision = (evaluation["estimated"] or {}).get("precision")
    if precision and precision["high"] < least:
        alarms["precision"] = f"Precision is at most {precision['high']:.1%}, and should be at least {least:.0%}."
    elif not precision and expected < least:
        alarms["expected precision"] = (
            f"If the propensities are calibrated, precision is {expected:.1%}, and should be at least {least:.0%}."
        )
    figures = {"spam_share": share, "expected_precision": None if np.isnan(expected) else expected}
    figures |= {"min_precision": least}
    return {**figures, "evaluation": evaluation}, alarms


def _compare_segments(data: pd.DataFrame, alpha: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the segments in which, by what was said, more decisions are wrong than elsewhere, and the alarms."""
    length = pd.cut(data["characters"], [-1, *LENGTHS.values()], labels=list(LENGTHS)).astype("str")
    segments, down, found = data.assign(length=length), data["taken_down"], []
    tests = [(segment, of) for segment in SEGMENTS for of in ("taken down", "delivered")]
    for segment, of in tests:
        part, label = (down, 0) if of == "taken down" else (~down, 1)
        wrong = data.loc[part, "said"] == label
        if wrong.any():
            values = segments.loc[part, segment].fillna("unknown")
            largest = values.value_counts().index[:MOST_VALUES]
            gaps = segment_gaps(wrong, values.where(values.isin(largest), "others"), alpha / len(tests))
            rows = gaps[gaps["alarm"]].rename_axis("value").reset_index().to_dict("records")
            found += [{"segment": segment.replace("_", " "), "of": of, **row} for row in rows]
    alarms = {
        f"{row['segment']} {row['value']}, {row['of']}": f"Of the messages {row['of']} where the {row['segment']} is "
        f"{row['value']}, at least {row['share']:.1%} were so in error, {100 * row['gap']:.1f} points more than "
        f"elsewhere ({100 * row['low']:.1f} to {100 * row['high']:.1f})."
        for row in found
    }
    return {"segments": sorted(found, key=lambda row: -row["gap"])}, alarms


def _watch_streams(
    data: pd.DataFrame, streams: dict[str, list[float]], limits: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the streams remember now, and the alarms."""
    reviewed = data[data["reviewed"].notna()]
    watched = {
        "propensities": data["propensity"].sample(min(SAMPLED, len(data)), random_state=0),
        "reviewed errors": (reviewed["prediction"] != reviewed["reviewed"].astype(bool)).astype(float),
    }
    remembered, alarms = {}, {}
    for name, values in watched.items():
        stream = DriftStream(limits["delta"], limits["memory"], streams.get(name, ()))
        if stream.update(values.sort_index().round(3)):
            alarms[f"stream of {name}"] = f"The mean of the {name} is not what it was."
        remembered[name] = list(stream.state)
    return {"streams": remembered}, alarms
