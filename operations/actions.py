"""Downstream of the store: what is done about a message that was scored.

`python -m operations.actions` takes spam down, has suspicious messages delivered with a warning and all others
without; who is in the arm without a filter gets everything. Each score is acted on once, whoever else runs this.
"""

import signal
import threading
from collections import Counter

import sqlalchemy as sa
import yaml
from sqlalchemy.exc import DBAPIError

from operations.store import ROOT, day_tables, days, open_store, reader

BATCH = 5000  # scores of one transaction
PAUSE = 0.2  # seconds between looking for new scores
RETRY = 2  # seconds until a store that was away is tried again


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
                done = Counter(connection.scalars(statement))
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


def main() -> None:
    """Act until SIGTERM, and say once a minute on how many messages."""
    label_from = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["operations"]["label_from"]
    engine, ended, is_away = open_store(), threading.Event(), False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while not ended.is_set():
        try:
            acted, problem = act(engine, label_from), None
        except DBAPIError as error:
            acted, problem = Counter(), str(error.orig).strip().partition("\n")[0]
        if bool(problem) != is_away:
            is_away = bool(problem)
            print(f"The store cannot be written to: {problem}." if problem else "The store is back.", flush=True)
        if not acted:
            ended.wait(RETRY if problem else PAUSE)
    engine.dispose()


if __name__ == "__main__":
    main()
