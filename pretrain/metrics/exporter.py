"""Publishes a run to Prometheus, on loopback unless configured otherwise.

The only file that imports prometheus_client.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from pydantic import BaseModel, ConfigDict, Field

from pretrain.metrics import names
from pretrain.metrics.names import METRICS, Metric

PORT_TRIES = 16


class PrometheusConfig(BaseModel):
    """Where rank 0 answers Prometheus."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    address: str = "127.0.0.1"  # there is no authentication: open it to a trusted network only
    port: Annotated[int, Field(ge=0, le=65535)] = 9400  # the next free one is taken if it is in use


class Exporter:
    """Metrics of the table in `names`, in a registry of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        kinds = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self._metrics = {m.name: kinds[m.kind](m.name, m.help, m.labels, registry=registry) for m in METRICS}

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        gauge = self._metrics[metric.name]
        assert isinstance(gauge, Gauge)
        (gauge.labels(*labels) if labels else gauge).set(value)

    def add(self, metric: Metric, amount: float) -> None:
        counter = self._metrics[metric.name]
        assert isinstance(counter, Counter)
        counter.inc(amount)

    def observe(self, metric: Metric, value: float) -> None:
        histogram = self._metrics[metric.name]
        assert isinstance(histogram, Histogram)
        histogram.observe(value)

    def publish_step(self, values: Mapping[str, float]) -> None:
        """Losses, weights and task metrics of a step, named as `StepOutput.values`."""
        for name, value in values.items():
            first, _, second = name.partition("/")
            if name == "total":
                self.set(names.LOSS, value, "total")
            elif first == "loss":
                self.set(names.LOSS, value, second)
            elif first == "weight":
                self.set(names.LOSS_WEIGHT, value, second)
            elif second:
                self.set(names.TASK_METRIC, value, first, second)


def open_exporter(config: PrometheusConfig) -> tuple[Exporter, str | None, str | None]:
    """An exporter, and, if it is enabled, where it answers or why it does not."""
    exporter = Exporter(CollectorRegistry())
    if not config.enabled:
        return exporter, None, None
    return exporter, *serve(exporter.registry, config)


def serve(registry: CollectorRegistry, config: PrometheusConfig) -> tuple[str | None, str | None]:
    """Start answering. Returns (url, None), or (None, why not): a busy port never stops a run."""
    problem = "no port was tried"
    for port in range(config.port, min(config.port + PORT_TRIES, 65536)):
        try:
            server, _ = start_http_server(port, addr=config.address, registry=registry)
        except OSError as error:
            problem = f"{config.address}:{port}: {error.strerror or error}"
            continue
        return f"http://{config.address}:{server.server_port}/metrics", None
    return None, problem
