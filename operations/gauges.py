"""What the store has to say to Prometheus: how the last night looked, and how jobs fare. alerts.yaml reads it."""

import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from operations.store import SECOND, drift, jobs, reader

FIGURES = ("precision", "recall", "ham_blocked", "aucpr", "cost")


def exposition(engine: sa.Engine) -> tuple[bytes, str]:
    """Return the gauges of a store, and their content type.

    Args:
        engine: of the store.

    Raises:
        sqlalchemy.exc.DBAPIError: it is away.
    """
    registry = CollectorRegistry()
    registry.register(Gauges(engine))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class Gauges(Collector):
    """Collects the gauges of a store."""

    def __init__(self, engine: sa.Engine):
        """Collect from the store of an engine."""
        self.engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield each gauge."""
        with reader(self.engine).connect() as connection:
            states = connection.execute(sa.select(jobs.c.kind, jobs.c.state, sa.func.count()).group_by("kind", "state"))
            counts = states.all()
            last = connection.execute(sa.select(drift).order_by(drift.c.id.desc()).limit(1)).mappings().first()
        yield _family("spam_jobs", "Jobs.", ("kind", "state"), {(kind, state): n for kind, state, n in counts})
        if last:
            yield _family("spam_monitored", "When a period was last looked at.", (), {(): last["created"] / SECOND})
            yield from _of_result(json.loads(last["result"]))


def _of_result(result: dict[str, Any]) -> Iterator[GaugeMetricFamily]:
    """Yield the gauges of what `monitor_window` found."""
    yield _family("spam_alarm", "Alarms.", ("alarm",), {(name,): 1 for name in result["alarms"]})
    distances = {(row["column"],): row["distance"] for row in result["drift"]}
    yield _family("spam_drift_distance", "Share of messages that lie elsewhere than before.", ("column",), distances)
    expected = {(): result["expected_precision"]}
    yield _family("spam_expected_precision", "Precision, if the propensities are calibrated.", (), expected)
    estimated = result["evaluation"]["estimated"] or {}
    figures = {
        (name, bound): estimated[name][bound]
        for name in FIGURES
        if estimated.get(name)
        for bound in ("value", "low", "high")
    }
    yield _family("spam_estimated", "Figures from users without a filter.", ("figure", "bound"), figures)
    reported = result["evaluation"]["reported"]
    shares = {(name,): (reported[name] or {}).get("value") for name in ("missed", "spam")}
    yield _family("spam_reported_share", "Missed of those taken down, spam of those delivered.", ("what",), shares)
    gaps = {(row["segment"], str(row["value"]), row["of"]): row["gap"] for row in result["segments"]}
    yield _family("spam_segment_gap", "Errors more than elsewhere.", ("segment", "value", "of"), gaps)


def _family(name: str, says: str, labels: tuple[str, ...], values: dict[tuple[str, ...], Any]) -> GaugeMetricFamily:
    """Return a gauge with its values, but for those that are missing."""
    family = GaugeMetricFamily(name, says, labels=labels)
    for key, value in values.items():
        if value is not None:
            family.add_metric(key, value)
    return family
