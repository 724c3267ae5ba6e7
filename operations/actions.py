"""Downstream of the store: what is done about a message that was scored.

`python -m operations.actions` takes spam down, has suspicious messages delivered with a warning and all others
without; who is in the arm without a filter gets everything. Each score is acted on once, whoever else runs this.
"""

from collections import Counter

import sqlalchemy as sa
import yaml

from operations.repeat import repeat
from operations.store import ROOT, day_tables, days, hold_day, reader

BATCH = 5000  # scores of one transaction


def act(engine: sa.Engine, label_from: float) -> Counter:
    """Act on what was scored and not acted on yet.

    Args:
        engine: of the store.
        label_from: the propensity from which a message that is delivered bears a warning.

    Returns:
        How many messages each action was taken on: "take down", "label", "deliver".
    """
    counts = Counter()
    with reader(engine).connect() as connection:
        open_days = connection.scalars(sa.select(days.c.day).order_by("day")).all()
    for day in open_days:
        statement = _statement(day, label_from)
        while True:
            with engine.begin() as connection:
                done = Counter(connection.scalars(statement) if hold_day(connection, day) else ())
            counts += done
            if done.total() < BATCH:
                break
    return counts


def _statement(day: str, label_from: float) -> sa.Update:
    """Return the statement that acts on some scores of a day, and returns the actions."""
    messages, scores = day_tables(day)
    to_do = scores.c.action.is_(None) & ~scores.c.shadow
    batch = sa.select(scores.c.message).where(to_do).order_by("message").limit(BATCH)
    filtered = sa.select(messages.c.arm != "unfiltered").where(messages.c.id == scores.c.message).scalar_subquery()
    action = sa.case(
        (~filtered, "deliver"),
        (scores.c.prediction, "take down"),
        (scores.c.propensity >= label_from, "label"),
        else_="deliver",
    )
    chosen = scores.c.message.in_(batch) & to_do  # another program may have acted meanwhile
    return scores.update().where(chosen).values(action=action).returning(scores.c.action)


if __name__ == "__main__":
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["operations"]
    repeat(lambda engine: act(engine, params["label_from"]))
