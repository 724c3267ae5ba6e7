"""What the service counts, in the form that Prometheus reads."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
FOLDER = "spam-metrics-"  # in /dev/shm; then the process id of the server, and something random
SIZES = {"counter": 1 << 19, "histogram": 1 << 17}  # bytes of files, more than all that can be counted takes

_process = "parent"  # whose files this process counts into
_stopped = False


@contextmanager
def count_together(processes: int) -> Iterator[None]:
    """Let this process and those it forks count into files of one folder, so that each can answer with the sum.

    The folder lies in memory, in /dev/shm where that can be; PROMETHEUS_MULTIPROC_DIR in the environment names
    another place. It goes at the end, and those of servers that were killed go at the beginning. Where it cannot be
    made or filled, nothing is counted, and one line says so.

    Args:
        processes: how many others there will be at a time; each calls `count_as`.
    """
    # Each request counts, and the other folders of a container may be read-only.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    place = os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None) or memory
    with ExitStack() as stack:
        try:
            _sweep(Path(place))
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{FOLDER}{os.getpid()}-", dir=place))
            stack.callback(os.close, _lock(folder))
            for process in (_process, *range(processes)):
                _reserve(folder, process)
        except OSError as error:
            stack.close()
            _stop(error)
        else:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            from prometheus_client import values

            # By place, not by process id: who takes the place of another goes on with its counts.
            values.ValueClass = values.MultiProcessValue(lambda: _process)
        yield


def count_as(process: int) -> None:
    """Count into the files of a process, by its number, from now on; or, where that cannot be, not at all."""
    global _process
    _process = process
    if not _stopped:
        try:
            _reserve(os.environ["PROMETHEUS_MULTIPROC_DIR"], process)
        except OSError as error:
            _stop(error)


def _reserve(folder: str, process: int | str) -> None:
    """Take the space for the counts of a process: to write to a file without it would be the end of the process.

    Raises:
        OSError: there is none.
    """
    for kind, size in SIZES.items():
        with open(Path(folder, f"{kind}_{process}.db"), "ab") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def _stop(error: OSError) -> None:
    """Stop counting, with one line that says why."""
    global _stopped
    _stopped = True
    print(f"Nothing is counted for /metrics, only scored: {error}", file=sys.stderr, flush=True)


def _lock(folder: str | Path) -> int:
    """Lock a folder for this process and those it forks, until it closes the file descriptor that is returned.

    Raises:
        OSError: another has it.
    """
    import fcntl  # not on Windows, where this module is imported too

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(place: Path) -> None:
    """Remove the folders of servers that were killed: nobody has them locked."""
    for folder in place.glob(f"{FOLDER}*"):
        with suppress(OSError):
            os.close(_lock(folder))
            shutil.rmtree(folder)


class Metrics:
    """Counts of requests, predictions and propensities, of this process or those that count together."""

    def __init__(self, card: dict[str, Any]):
        """Start counting for the model of a card, which has a `name` and a `sha256`."""
        # Imported here, because the library looks for the folder when it is imported.
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.card, self.registry = card, CollectorRegistry()
        requests = Counter("http_requests", "Requests answered.", ("method", "path", "status"), registry=self.registry)
        seconds = Histogram(
            "http_request_duration_seconds",
            "Time to answer a request.",
            ("path",),
            buckets=SECONDS,
            registry=self.registry,
        )
        predictions = Counter(
            "spam_predictions", "Texts scored, by prediction.", ("prediction",), registry=self.registry
        )
        self.predictions = {True: predictions.labels("spam"), False: predictions.labels("ham")}
        self.propensity = Histogram(
            "spam_propensity",
            "Propensities of the texts scored.",
            buckets=[tenth / 10 for tenth in range(1, 11)],
            registry=self.registry,
        )
        self.requests = cache(requests.labels)
        self.seconds = cache(seconds.labels)

    def scored(self, results: list[tuple[bool, float]]) -> None:
        """Count texts by prediction and propensity."""
        if _stopped:
            return
        spam = sum([prediction for prediction, _ in results])
        for prediction, texts in ((True, spam), (False, len(results) - spam)):
            if texts:
                self.predictions[prediction].inc(texts)
        for _, propensity in results:
            self.propensity.observe(propensity)

    def exposition(self) -> tuple[bytes, str]:
        """Return the counts and their content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = CollectorRegistry()
        registry.register(self)
        if not _stopped:
            together = "PROMETHEUS_MULTIPROC_DIR" in os.environ
            registry.register(MultiProcessCollector(None) if together else self.registry)
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Any]:
        """Yield what holds for the process that answers."""
        from prometheus_client.core import GaugeMetricFamily

        model = GaugeMetricFamily("spam_model_info", "The model in use.", labels=("name", "sha256"))
        model.add_metric((self.card["name"], self.card["sha256"]), 1)
        yield model
        yield GaugeMetricFamily("spam_metrics_stopped", "Whether nothing is counted, for want of space.", int(_stopped))


class CountRequests:
    """WSGI middleware that counts and times every request.

    Other paths and methods than those given, which anyone can make up, are counted together as "other".
    """

    def __init__(self, wsgi_app: Callable[..., Iterable[bytes]], metrics: Metrics, paths: Collection[str]):
        """Count what goes through `wsgi_app` into `metrics`, by each of `paths`."""
        self.wsgi_app, self.metrics, self.paths = wsgi_app, metrics, paths

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request."""
        started = perf_counter()

        def start_and_count(status: str, *args: Any) -> Callable[[bytes], Any]:
            path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
            path = path if path in self.paths else "other"
            if not _stopped:
                self.metrics.requests(method if method in METHODS else "other", path, status[:3]).inc()
                self.metrics.seconds(path).observe(perf_counter() - started)
            return start_response(status, *args)

        return self.wsgi_app(environ, start_and_count)
