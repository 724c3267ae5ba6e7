"""What the operator's page shows of the store: the latest of everything, read in a bounded time.

A day has 144 million scores, so nothing here looks further back in a day than the latest of them.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sklearn.base import BaseEstimator

from engine.linear import LinearModel
from operations.store import (
    WORKERS,
    day_of,
    day_tables,
    days,
    drift,
    evaluations,
    find_message,
    hold_day,
    labels,
    models,
    reader,
    select_scores,
)
from score import explain

LOOKED_BACK = 100_000  # scores of a day
LATEST_DAYS = 2
MOST_MODELS = 50
MOST_SOUGHT = 50  # messages in the files of closed days
MOST_WORDS = 5  # that explain a takedown
MOST_EXPLAINED = 20_000  # characters of all texts of a list


def list_takedowns(
    engine: sa.Engine, limit: int, model: BaseEstimator | LinearModel, sha256: str
) -> list[dict[str, Any]]:
    """Return the messages that were taken down last.

    Args:
        engine: of the store.
        limit: how many at most.
        model, sha256: what is served; it explains its own takedowns.
    """
    found, left = [], MOST_EXPLAINED
    with reader(engine).connect() as connection:
        served = connection.scalar(sa.select(models.c.id).where(models.c.sha256 == sha256))
        for day, latest in _latest(connection):
            messages, _ = day_tables(day)
            columns = (latest, messages.c.region, messages.c.text)
            query = sa.select(*columns).join_from(latest, messages, messages.c.id == latest.c.message)
            query = query.where(latest.c.action == "take down").order_by(latest.c.message.desc())
            found += map(dict, connection.execute(query.limit(limit - len(found))).mappings())
    for row in found:
        row |= {"time": row["message"] // WORKERS, "why": None}
        if row["text"] is not None and row["model"] == served and (left := left - len(row["text"])) >= 0:
            row["why"] = strongest_words(row["text"], model)
    return found


def strongest_words(text: str, model: BaseEstimator | LinearModel) -> list[dict[str, Any]] | None:
    """Return the words that pushed a text most towards spam, with the log-odds they added; None of a model that
    cannot tell."""
    added = explain(text, model)
    if added is None:
        return None
    words = [{"word": word[0], "log_odds": sum(added[word.start() : word.end()])} for word in re.finditer(r"\S+", text)]
    words = [word for word in words if word["log_odds"] > 0]
    return sorted(words, key=lambda word: -word["log_odds"])[:MOST_WORDS]


def list_feedback(engine: sa.Engine, limit: int) -> list[dict[str, Any]]:
    """Return what was said of messages last, and what the filter had said; that is None of a message that is not stored
    yet, and of more than MOST_SOUGHT messages of closed days."""
    query = sa.select(labels).order_by(labels.c.received.desc()).limit(limit)
    with reader(engine).connect() as connection:
        said = [dict(row) for row in connection.execute(query).mappings()]
        scored = {}
        for day in {day_of(row["message"]) for row in said}:
            if hold_day(connection, day, reads=True):
                _, scores = day_tables(day)
                asked = scores.c.message.in_([row["message"] for row in said]) & ~scores.c.shadow
                found = connection.execute(select_scores(day).where(asked)).mappings()
                scored |= {row["message"]: dict(row) for row in found}
    for row in [row for row in said if row["message"] not in scored][:MOST_SOUGHT]:
        scored[row["message"]] = find_message(engine, row["message"])
    for row in said:
        row |= {"label": "spam" if row["label"] else "ham", "scored": scored.get(row["message"])}
    return said


def list_models(engine: sa.Engine) -> list[dict[str, Any]]:
    """Return the models, the latest first, with what their cards say."""
    query = sa.select(models).order_by(models.c.id.desc()).limit(MOST_MODELS)
    with reader(engine).connect() as connection:
        found = [dict(row) for row in connection.execute(query).mappings()]
        for row in found:
            card = json.loads(row["card"])
            row |= {"threshold": card["threshold"], "metrics": card.get("metrics", {}), "shadow": None}
            if row["state"] == "candidate":
                row["shadow"] = _count_shadow(connection, row["id"])
    return found


def list_evaluations(engine: sa.Engine, limit: int) -> list[dict[str, Any]]:
    """Return the latest evaluations."""
    query = sa.select(evaluations).order_by(evaluations.c.id.desc()).limit(limit)
    with reader(engine).connect() as connection:
        return [{**row, "result": json.loads(row["result"])} for row in connection.execute(query).mappings()]


def list_monitored(engine: sa.Engine, limit: int) -> list[dict[str, Any]]:
    """Return what was found when the latest periods were looked at, without what has no bound: streams and regions."""
    query = sa.select(drift).order_by(drift.c.id.desc()).limit(limit)
    with reader(engine).connect() as connection:
        found = [{**row, "result": json.loads(row["result"])} for row in connection.execute(query).mappings()]
    for row in found:
        del row["result"]["streams"], row["result"]["evaluation"]["regions"]
    return found


def _latest(connection: sa.Connection) -> Iterator[tuple[str, sa.Subquery]]:
    """Yield the latest days that are open, and of each the latest scores."""
    for day in connection.scalars(sa.select(days.c.day).order_by(days.c.day.desc()).limit(LATEST_DAYS)).all():
        _, scores = day_tables(day)
        yield day, sa.select(scores).order_by(scores.c.message.desc()).limit(LOOKED_BACK).subquery()


def _count_shadow(connection: sa.Connection, model: int) -> dict[str, int]:
    """Count, among the latest messages, those that a candidate scored too and those it would decide otherwise."""
    counts = {"messages": 0, "changed": 0}
    for day, latest in _latest(connection):
        _, scores = day_tables(day)
        differs = sa.cast(latest.c.prediction != scores.c.prediction, sa.Integer)
        query = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(differs), 0))
        query = query.join_from(latest, scores, (scores.c.message == latest.c.message) & ~scores.c.shadow)
        messages, changed = connection.execute(query.where(latest.c.shadow, latest.c.model == model)).one()
        counts["messages"] += messages
        counts["changed"] += int(changed)
    return counts
