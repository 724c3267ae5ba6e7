"""Heavy work in turn, so that light work is answered at once and no work is accepted that cannot be done.

In each process one thread does the heavy work, piece by piece; a few more pieces wait, and all others are refused at
once. What has waited or run until its deadline is refused too. That bounds the work for clients that have gone as
well: the server does not tell an application when one hangs up.
"""

import gc
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from time import monotonic
from typing import Any

from werkzeug.exceptions import ServiceUnavailable

DEADLINE = 5  # seconds from the arrival of a request
MOST_WAITING = 16  # pieces of work in each process
RETRY_AFTER = 1  # seconds
SLICE = 0.002  # seconds that heavy work keeps the interpreter once a light request wants it; below, waiting costs more
NICENESS = 10
YOUNG = (700, 10, 10**9)  # as Python has them, but the oldest generation is never collected


class Queue:
    """A bounded queue of heavy work with a deadline."""

    def __init__(self, most_waiting: int = MOST_WAITING, deadline: float = DEADLINE):
        """Make an empty queue.

        Args:
            most_waiting: how many pieces may wait besides the one that is done.
            deadline: seconds that one may wait and be done, both together.
        """
        self.places = threading.BoundedSemaphore(most_waiting + 1)
        self.deadline, self.end = deadline, 0.0
        self.thread = ThreadPoolExecutor(1, "heavy", initializer=give_way)

    def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do a piece of work when its turn comes, and return what it returns.

        Args:
            work: what is to be done; it calls `check_deadline` between its parts.
            args: its arguments.

        Raises:
            ServiceUnavailable: as many pieces as may wait do, or the deadline is over.
        """
        if not self.places.acquire(blocking=False):
            raise ServiceUnavailable("the server has too much work waiting: try again later", retry_after=RETRY_AFTER)
        end = monotonic() + self.deadline

        def begin() -> Any:
            self.end = end
            self.check_deadline()
            return work(*args)

        future = self.thread.submit(copy_context().run, begin)
        future.add_done_callback(lambda _: self.places.release())
        try:
            return future.result(self.deadline)
        except TimeoutError:
            future.cancel()
            raise self._late() from None

    def check_deadline(self) -> None:
        """Raise ServiceUnavailable if the deadline of the piece of work that is being done is over."""
        if monotonic() >= self.end:
            raise self._late()

    def _late(self) -> ServiceUnavailable:
        """Return what refuses work that is not done in time."""
        message = f"the server could not do this within {self.deadline} seconds: try again later"
        return ServiceUnavailable(message, retry_after=RETRY_AFTER)


def give_way() -> None:
    """Let the other threads of the machine go before this one, where the system knows a niceness of threads."""
    if sys.platform == "linux":
        os.nice(NICENESS)


def favour_light_work() -> None:
    """Let light requests of this process in between heavy ones; to be called by a worker when it begins.

    A full garbage collection looks at every object, remembered words too, and stops all requests for some 50 ms. So
    only young objects are collected: what requests leave behind is young.
    """
    sys.setswitchinterval(SLICE)
    gc.freeze()
    gc.set_threshold(*YOUNG)
