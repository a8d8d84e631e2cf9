"""Publishes a run to Prometheus, on loopback unless configured otherwise.

Only this file and histogram.py import prometheus_client.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
    make_wsgi_app,
)
from pydantic import BaseModel, ConfigDict, Field

from pretrain.metrics import names
from pretrain.metrics.histogram import HistogramMetric
from pretrain.metrics.names import METRICS, STEP_BUCKETS, Metric
from pretrain.metrics.server import Health, Serving, with_health

PORT_TRIES = 16


class PrometheusConfig(BaseModel):
    """Where each rank answers Prometheus: at a port of its own, one after the other on a node."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    ranks: Literal["all", "first"] = "all"  # first: rank 0 alone answers, without what each rank measures
    address: str = "127.0.0.1"  # there is no authentication: open it to a trusted network only
    port: Annotated[int, Field(ge=0, le=65535)] = 9480  # of local rank 0; the next free one where it is taken
    # a folder that Prometheus watches, such as one for all runs: the list of targets goes there as well
    targets_dir: Path | None = None
    # without a step, a checkpoint or an evaluation for so long, /healthz answers 503
    unhealthy_after_seconds: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1800.0


class Exporter:
    """Metrics of the table in `names`, in a registry of its own; of ranks but the first, only theirs.

    What a rank does not publish may be set all the same, to no effect.
    """

    def __init__(self, registry: CollectorRegistry, is_first: bool = True) -> None:
        # of a second series for each counter, which says when this process began
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry
        own = [metric for metric in METRICS if is_first or metric.scope == "rank"]
        self._absent = {metric.name: metric for metric in own if metric.kind == "gauge"}
        self._metrics = {metric.name: _made(metric, registry) for metric in own if metric.kind != "gauge"}
        self._children: dict[tuple[str, tuple[str, ...]], Any] = {}

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """A gauge is there from its first value on: a 0 that nobody measured would look like a collapse."""
        gauge = self._child(metric, labels)
        if gauge is not None:
            gauge.set(value)

    def add(self, metric: Metric, amount: float, *labels: str) -> None:
        counter = self._child(metric, labels)
        if counter is not None:
            counter.inc(amount)

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        histogram = self._child(metric, labels)
        if histogram is not None:
            histogram.observe(value)

    def _child(self, metric: Metric, labels: tuple[str, ...]) -> Any:
        """The series of a metric; looked up here, as the library checks all labels each time it is asked."""
        key = (metric.name, labels)
        child = self._children.get(key)
        if child is None:
            if metric.name in self._absent:
                self._metrics[metric.name] = _made(self._absent.pop(metric.name), self.registry)
            whole = self._metrics.get(metric.name)
            has_series = whole is not None and (labels or isinstance(whole, HistogramMetric))
            child = whole.labels(*labels) if whole is not None and has_series else whole
            self._children[key] = child
        return child

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
            elif first == "similarity":
                self.set(names.FEATURE_SIMILARITY, value, second)
            elif second:
                self.set(names.TASK_METRIC, value, first, second)
            if second == "teacher_entropy" and f"{first}/entropy_bound" in values:
                self.set(names.TEACHER_ENTROPY, value / values[f"{first}/entropy_bound"], first)


def _made(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | HistogramMetric:
    if metric.kind == "histogram":
        histogram = HistogramMetric(metric.name, metric.help, metric.labels, STEP_BUCKETS)
        registry.register(histogram)
        return histogram
    kind: type[Counter | Gauge] = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, metric.help, metric.labels, registry=registry)


def open_exporter(
    config: PrometheusConfig, health: Health, *, is_first: bool = True, local_rank: int = 0
) -> tuple[Exporter, Serving | None, str | None]:
    """An exporter, and, if this rank is to answer, what answers or why it does not."""
    exporter = Exporter(CollectorRegistry(), is_first)
    if not config.enabled or not (is_first or config.ranks == "all"):
        return exporter, None, None
    return exporter, *serve(exporter.registry, config, health, local_rank)


def serve(
    registry: CollectorRegistry, config: PrometheusConfig, health: Health, local_rank: int = 0
) -> tuple[Serving | None, str | None]:
    """Start answering. Returns (server, None), or (None, why not): a busy port never stops a run."""
    problem = "no port was tried"
    first = config.port + local_rank if config.port else 0
    app = with_health(make_wsgi_app(registry), health)
    for port in range(first, min(first + PORT_TRIES, 65536)):
        try:
            return Serving(app, config.address, port), None
        except OSError as error:
            problem = f"{config.address}:{port}: {error.strerror or error}"
    return None, problem
