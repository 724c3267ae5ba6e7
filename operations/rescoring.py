"""Batch scoring: what a model says of messages that are stored, the job /rescore."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from engine.saved import load_card, load_scorer
from operations.promotion import find_candidate, find_model, model_path
from operations.store import day_tables, days, hold_day, reader, upsert
from score import score_batch

BATCH = 2000  # messages of one transaction


def rescore(engine: sa.Engine, arguments: dict[str, Any], report: Callable[[float, str], None]) -> dict[str, Any]:
    """Score the messages whose texts are stored by a model that has not scored them; nothing is done about them.

    Args:
        engine: of the store.
        arguments: "model", its number; without one the newest candidate.
        report: is told how far the job is.

    Returns:
        "model", its number, and how many messages were "scored", and how many of them it takes for "spam".

    Raises:
        ValueError: there is no such model, or no text is stored.
    """
    model = find_candidate(engine) if arguments.get("model") is None else find_model(engine, arguments["model"])
    if model is None:
        raise ValueError("there is no candidate to score by: train one, or give the number of a model")
    path = model_path(model.sha256)
    estimator, threshold = load_scorer(path), load_card(path)["threshold"]
    with reader(engine).connect() as connection:
        open_days = connection.scalars(sa.select(days.c.day).order_by("day")).all()
    found, scored, spam = False, 0, 0
    for done, day in enumerate(open_days):
        report(done / len(open_days), f"Scoring the messages of {day}")
        for batch in _read(engine, day, model.id):
            found, new = True, [row for row in batch if not row.is_scored]
            results = score_batch([row.text for row in new], estimator, threshold)
            _write(engine, day, model.id, threshold, [row.id for row in new], results)
            scored, spam = scored + len(new), spam + sum(prediction for prediction, _ in results)
    if not found:
        raise ValueError("no texts of messages are stored: set operations.retention_days in params.yaml to store them")
    return {"model": model.id, "scored": scored, "spam": spam}


def _read(engine: sa.Engine, day: str, model: int) -> Iterator[Sequence[sa.Row]]:
    """Read the messages of a day that have a text: `id`, `text` and `is_scored`, whether the model has scored them."""
    messages, scores = day_tables(day)
    is_scored = sa.exists().where((scores.c.message == messages.c.id) & (scores.c.model == model))
    query = sa.select(messages.c.id, messages.c.text, is_scored.label("is_scored"))
    query, last = query.where(messages.c.text.is_not(None)).order_by(messages.c.id).limit(BATCH), 0
    while True:
        with reader(engine).connect() as connection:
            is_open = hold_day(connection, day, reads=True)
            batch = connection.execute(query.where(messages.c.id > last)).all() if is_open else []
        if not batch:
            return
        last = batch[-1].id
        yield batch


def _write(
    engine: sa.Engine, day: str, model: int, threshold: float, numbers: list[int], results: list[tuple[bool, float]]
) -> None:
    """Store what a model says of messages of a day, on the side; what is stored already stays."""
    of_all = {"model": model, "shadow": True, "threshold": threshold}
    rows = [
        {**of_all, "message": number, "prediction": prediction, "propensity": propensity}
        for number, (prediction, propensity) in zip(numbers, results, strict=True)
    ]
    insert = upsert(engine, day_tables(day)[1])
    with engine.begin() as connection:
        if rows and hold_day(connection, day):
            connection.execute(insert.on_conflict_do_nothing(), rows)
