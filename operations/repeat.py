"""What the programs beside the service have in common: they do a thing with the store again and again."""

import signal
import threading
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from operations.store import open_store

PAUSE = 0.2  # seconds, when there was nothing to do
RETRY = 2  # seconds until a store that was away is tried again


def repeat(step: Callable[[sa.Engine], Any], last: Callable[[sa.Engine], Any] | None = None) -> None:
    """Do a thing with the store until SIGTERM or Ctrl-C, and once more then; wait for a store that is away.

    Args:
        step: does it, and returns something true if there may be more to do at once.
        last: what is done at the end instead.
    """
    engine, ended, is_away = open_store(), threading.Event(), False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while True:
        is_last = ended.is_set()
        try:
            did, problem = (last if last and is_last else step)(engine), None
        except DBAPIError as error:
            did, problem = None, str(error.orig).strip().partition("\n")[0]
        if bool(problem) != is_away:
            is_away = bool(problem)
            print(f"The store cannot be written to: {problem}." if problem else "The store is back.", flush=True)
        if is_last:
            break
        if not did:
            ended.wait(RETRY if problem else PAUSE)
    engine.dispose()
