"""What the service counts, in the form that Prometheus reads.

Each process counts in a row of numbers of its own, in memory that all of them share; whoever is asked for the counts
adds the rows up. So a request costs a few additions, and nothing is lost with a process that dies.
"""

import mmap
import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from http import HTTPStatus
from itertools import accumulate
from time import perf_counter
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
PROPENSITIES = tuple(tenth / 10 for tenth in range(1, 11))
PREDICTIONS = ("ham", "spam")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other")
STATUSES = (*(str(status.value) for status in HTTPStatus), "other")

_rows = 1  # of all processes that count together
_row = -1  # that of this process; the last is the parent's


def count_together(processes: int) -> None:
    """Let this process and those it forks count together.

    Args:
        processes: how many others there will be at a time; each calls `count_as`.
    """
    global _rows
    _rows = processes + 1


def count_as(process: int) -> None:
    """Count in the row of a process, by its number, from now on: who takes the place of another goes on with it."""
    global _row
    _row = process


@cache
def _share(rows: int, width: int) -> memoryview:
    """Return memory that this process shares with those it forks: an application that is loaded later goes on in it."""
    return memoryview(mmap.mmap(-1, rows * width * 8)).cast("d")


class Metrics:
    """Counts of requests, predictions and propensities, of this process or those that count together."""

    def __init__(self, card: dict[str, Any]):
        """Prepare to count for the model of a card, which has a `name` and a `sha256`."""
        self.card, self.lock = card, threading.Lock()
        self.methods = {method: i for i, method in enumerate(METHODS)}
        self.statuses = {status: i for i, status in enumerate(STATUSES)}
        self.begin(())

    def begin(self, paths: Collection[str]) -> None:
        """Begin to count, from nothing unless others count together, requests to each of `paths`."""
        self.paths = {path: i for i, path in enumerate([*sorted(paths), "other"])}
        # Where in a row they begin: requests, their seconds, predictions, propensities.
        self.seconds = len(self.paths) * len(METHODS) * len(STATUSES)
        self.predictions = self.seconds + len(self.paths) * (len(SECONDS) + 2)
        self.propensities = self.predictions + len(PREDICTIONS)
        self.width, self.rows = self.propensities + len(PROPENSITIES) + 2, _rows
        alone = _rows == 1
        self.counts = memoryview(bytearray(self.width * 8)).cast("d") if alone else _share(_rows, self.width)

    def answered(self, method: str, path: str, status: str, seconds: float) -> None:
        """Count a request; methods, paths and statuses that are not known are counted together as "other"."""
        path_number = self.paths.get(path, len(self.paths) - 1)
        number = path_number * len(METHODS) + self.methods.get(method, len(METHODS) - 1)
        request = number * len(STATUSES) + self.statuses.get(status, len(STATUSES) - 1)
        took = self.seconds + path_number * (len(SECONDS) + 2)
        counts, row = self.counts, _row % self.rows * self.width
        with self.lock:
            counts[row + request] += 1
            counts[row + took + bisect_left(SECONDS, seconds)] += 1
            counts[row + took + len(SECONDS) + 1] += seconds

    def scored(self, results: list[tuple[bool, float]]) -> None:
        """Count texts by prediction and propensity."""
        counts, row = self.counts, _row % self.rows * self.width
        with self.lock:
            for prediction, propensity in results:
                counts[row + self.predictions + prediction] += 1
                counts[row + self.propensities + bisect_left(PROPENSITIES, propensity)] += 1
                counts[row + self.propensities + len(PROPENSITIES) + 1] += propensity

    def exposition(self) -> tuple[bytes, str]:
        """Return the counts and their content type."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Any]:
        """Yield the counts of all processes, and the model of the one that answers."""
        model = GaugeMetricFamily("spam_model_info", "The model in use.", labels=("name", "sha256"))
        model.add_metric((self.card["name"], self.card["sha256"]), 1)
        yield model
        rows = [self.counts[i * self.width : (i + 1) * self.width].tolist() for i in range(self.rows)]
        counts = [sum(column) for column in zip(*rows, strict=True)]

        requests = CounterMetricFamily("http_requests", "Requests answered.", labels=("method", "path", "status"))
        labels = ((method, path, status) for path in self.paths for method in METHODS for status in STATUSES)
        for labelled, count in zip(labels, counts[: self.seconds], strict=True):
            if count:
                requests.add_metric(labelled, count)
        yield requests

        what = "Time to answer a request."
        seconds = HistogramMetricFamily("http_request_duration_seconds", what, labels=("path",))
        for path, i in self.paths.items():
            took = self.seconds + i * (len(SECONDS) + 2)
            if any(counts[took : took + len(SECONDS) + 2]):
                seconds.add_metric((path,), *_buckets(counts[took : took + len(SECONDS) + 2], SECONDS))
        yield seconds

        predictions = CounterMetricFamily("spam_predictions", "Texts scored, by prediction.", labels=("prediction",))
        for i, prediction in enumerate(PREDICTIONS):
            predictions.add_metric((prediction,), counts[self.predictions + i])
        yield predictions
        propensities = HistogramMetricFamily("spam_propensity", "Propensities of the texts scored.")
        propensities.add_metric((), *_buckets(counts[self.propensities :], PROPENSITIES))
        yield propensities


def _buckets(counts: list[float], bounds: tuple[float, ...]) -> tuple[list[tuple[str, float]], float]:
    """Return what Prometheus calls buckets, each of which holds those before it too, and the sum of the values."""
    *own, total = counts
    return list(zip([*map(str, bounds), "+Inf"], accumulate(own), strict=True)), total


class CountRequests:
    """WSGI middleware that counts and times every request.

    Other paths and methods than those given, which anyone can make up, are counted together as "other".
    """

    def __init__(self, wsgi_app: Callable[..., Iterable[bytes]], metrics: Metrics, paths: Collection[str]):
        """Count what goes through `wsgi_app` into `metrics`, by each of `paths`."""
        self.wsgi_app, self.metrics = wsgi_app, metrics
        metrics.begin(paths)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request."""
        started = perf_counter()

        def start_and_count(status: str, *args: Any) -> Callable[[bytes], Any]:
            took = perf_counter() - started
            self.metrics.answered(environ["REQUEST_METHOD"], environ["PATH_INFO"], status[:3], took)
            return start_response(status, *args)

        return self.wsgi_app(environ, start_and_count)
