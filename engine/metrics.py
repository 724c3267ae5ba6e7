"""What the service counts, in the form that Prometheus reads."""

import os
from collections.abc import Callable, Collection, Iterable
from functools import cache
from time import perf_counter
from typing import Any

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Metrics:
    """Counts of requests, predictions and propensities.

    With PROMETHEUS_MULTIPROC_DIR in the environment, each process counts into files of its own in that
    folder, and any of them answers with the sum; without, each has its own counts.
    """

    def __init__(self, card: dict[str, Any]):
        """Start counting for the model of a card, which has a `name` and a `sha256`."""
        # Imported here, because the library looks for that folder when it is imported, and serve() makes it.
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
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
        model = Gauge(
            "spam_model_info",
            "The model in use.",
            ("name", "sha256"),
            multiprocess_mode="max",
            registry=self.registry,
        )
        model.labels(card["name"], card["sha256"]).set(1)
        self.requests = cache(requests.labels)
        self.seconds = cache(seconds.labels)

    def scored(self, results: list[tuple[bool, float]]) -> None:
        """Count texts by prediction and propensity."""
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

        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry), CONTENT_TYPE_LATEST


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
            self.metrics.requests(method if method in METHODS else "other", path, status[:3]).inc()
            self.metrics.seconds(path).observe(perf_counter() - started)
            return start_response(status, *args)

        return self.wsgi_app(environ, start_and_count)
