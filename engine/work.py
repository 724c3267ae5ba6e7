"""Heavy work in turn, so that light work is answered at once and no work is promised that cannot be done.

In each process one piece of heavy work runs at a time; a few more wait, and all others are refused at once. What has
waited or run until its deadline is refused too. That bounds the work for clients that have gone as well: the
server does not tell an application when one hangs up.
"""

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from werkzeug.exceptions import ServiceUnavailable

DEADLINE = 5  # seconds from the arrival of a request
MOST_WAITING = 16  # pieces of work in each process
RETRY_AFTER = 1  # seconds
SLICE = 0.0005  # seconds that heavy work keeps the interpreter once a light request wants it


class Queue:
    """A bounded queue of heavy work with a deadline."""

    def __init__(self, most_waiting: int = MOST_WAITING, deadline: float = DEADLINE):
        """Make an empty queue.

        Args:
            most_waiting: how many may wait besides the one that runs.
            deadline: seconds that one may wait and run, both together.
        """
        self.places = threading.BoundedSemaphore(most_waiting + 1)
        self.running = threading.Lock()
        self.deadline = deadline

    @contextmanager
    def turn(self) -> Iterator[Callable[[], None]]:
        """Wait for a turn and hold it while the context lasts.

        Returns:
            A function to call between the parts of the work: it raises ServiceUnavailable once the deadline is over.

        Raises:
            ServiceUnavailable: as many as may wait do, or the deadline is over.
        """
        end = monotonic() + self.deadline

        def check() -> None:
            if monotonic() >= end:
                raise self._late()

        if not self.places.acquire(blocking=False):
            raise ServiceUnavailable("the server has too much work waiting: try again later", retry_after=RETRY_AFTER)
        try:
            if not self.running.acquire(timeout=self.deadline):
                raise self._late()
            try:
                yield check
            finally:
                self.running.release()
        finally:
            self.places.release()

    def _late(self) -> ServiceUnavailable:
        """Return what refuses work that is not done in time."""
        message = f"the server could not do this within {self.deadline} seconds: try again later"
        return ServiceUnavailable(message, retry_after=RETRY_AFTER)


def favour_light_work() -> None:
    """Let light requests of this process in between heavy ones; to be called when the model is loaded.

    What is loaded by then is left out of garbage collections, each of which would stop all requests for as long as
    it takes to look at every object of every library.
    """
    sys.setswitchinterval(SLICE)
    gc.freeze()
