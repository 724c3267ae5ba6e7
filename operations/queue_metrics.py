"""What Prometheus can ask a scorer about the streams: rate, lag, and what is pending or dead."""

import os
import time
from collections.abc import Iterator

import redis
from prometheus_client import REGISTRY, Counter, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from engine.server import read_environment
from operations.broker import ERRORS, GROUP, key, read_place

ANSWERED = Counter("sms_answered", "Messages that this scorer has answered, by the stream they went to", ["stream"])


class Streams(Collector):
    """Looks at the streams when it is asked."""

    def __init__(self, client: redis.Redis, partitions: int):
        """Look at the streams of so many partitions."""
        self.redis, self.partitions = client, partitions

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield what is true of all streams by now; nothing while Redis is away."""
        gauges = {
            "waiting": "Messages that are not answered yet",
            "lag_seconds": "Age of the oldest message that is not answered yet",
            "pending": "Messages that a scorer has read and not answered yet",
            "dead": "Messages that cannot be scored",
        }
        try:
            values = [self._look(partition) for partition in range(self.partitions)]
        except ERRORS:
            return
        for name, description in gauges.items():
            family = GaugeMetricFamily(f"sms_{name}", description, labels=["partition"])
            for partition, found in enumerate(values):
                family.add_metric([str(partition)], found[name])
            yield family

    def _look(self, partition: int) -> dict[str, float]:
        """Return the values of a partition."""
        incoming = key("incoming", partition)
        oldest = self.redis.xrange(incoming, count=1)  # what is answered is deleted
        groups = self.redis.xinfo_groups(incoming) if oldest else []
        return {
            "waiting": self.redis.xlen(incoming),
            "lag_seconds": max(0.0, time.time() - read_place(oldest[0][0])[0] / 1000) if oldest else 0.0,
            "pending": sum(group["pending"] for group in groups if group["name"] == GROUP.encode()),
            "dead": self.redis.xlen(key("dead", partition)),
        }


def expose(client: redis.Redis, partitions: int) -> None:
    """Answer Prometheus on the port of this machine that METRICS_PORT in the environment names, if it names one.

    Raises:
        ValueError: it is no port, or another program has it.
    """
    if not os.environ.get("METRICS_PORT"):
        return
    port = read_environment("METRICS_PORT", 0)
    try:
        start_http_server(port, addr="127.0.0.1")
    except (OSError, OverflowError) as error:
        raise ValueError(f"METRICS_PORT cannot be {port}: {error}.") from None
    REGISTRY.register(Streams(client, partitions))
