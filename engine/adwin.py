"""Concept drift on a stream, between one look and the next."""

from collections import deque
from collections.abc import Iterable


class DriftStream:
    """Watches the mean of a stream of numbers, by ADWIN (Bifet and Gavaldà, SDM 2007).

    Its state is the last numbers since its last alarm: another one that reads them goes on where it was. (A pickle of
    the detector would be smaller, but bound to a version of the library, and a pickle can run any code.)
    """

    def __init__(self, delta: float, memory: int, state: Iterable[float] = ()):
        """Begin, or go on from a state, with ADWIN's bound on false alarms and the most numbers to remember."""
        self.delta, self.state = delta, deque(maxlen=memory)
        self._begin()
        self.update(state)

    def update(self, values: Iterable[float]) -> list[int]:
        """Read numbers, and return the positions among them at which a change was noticed; there it begins anew."""
        alarms = []
        for position, value in enumerate(values):
            self.state.append(value)
            self.adwin.update(value)
            if self.adwin.drift_detected:
                alarms.append(position)
                self._begin()
        return alarms

    def _begin(self) -> None:
        """Forget all."""
        from river.drift import ADWIN  # here, because who trains a model does without it

        self.adwin = ADWIN(delta=self.delta)
        self.state.clear()
