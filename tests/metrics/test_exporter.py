from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry

from pretrain.metrics import names
from pretrain.metrics.exporter import PORT_TRIES, Exporter, PrometheusConfig, open_exporter, serve
from pretrain.metrics.names import METRICS, Metric
from pretrain.metrics.server import Health

STEP = {
    "total": 3.5,
    "loss/rotation": 1.25,
    "loss/jigsaw": 2.0,
    "weight/rotation": 0.5,
    "rotation/accuracy": 0.75,
    "rotation/chance": 0.25,
}


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def opened(config: PrometheusConfig, closing: ExitStack, **settings: Any) -> tuple[Exporter, str]:
    exporter, serving, problem = open_exporter(config, Health(60.0), **settings)
    assert problem is None
    assert serving is not None
    closing.callback(serving.close)
    return exporter, serving.url


def scrape(url: str, path: str = "/metrics") -> str:
    with urllib.request.urlopen(url + path, timeout=10) as answer:
        return str(answer.read().decode())


def sample_of(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def test_names_follow_prometheus_conventions() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("pretrain_")
        assert metric.name == metric.name.lower()
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        # base units only, and no unit that has a base unit
        assert not set(metric.name.split("_")) & {
            "ms",
            "milliseconds",
            "minutes",
            "hours",
            "mb",
            "kb",
            "percent",
        }
        assert not set(metric.labels) & {"le", "quantile", "instance", "job"}
        assert metric.help.endswith(".")
        if metric.kind == "histogram":
            assert metric.name.endswith("_seconds")


def test_every_metric_constant_is_in_the_table_and_is_published() -> None:
    constants = {value for value in vars(names).values() if isinstance(value, Metric)}
    assert constants == set(METRICS)
    exporter = Exporter(CollectorRegistry())
    gauges = {metric.name for metric in METRICS if metric.kind == "gauge"}
    others = {metric.name.removesuffix("_total") for metric in METRICS} - gauges
    assert {family.name for family in exporter.registry.collect()} == others
    for metric in METRICS:  # a gauge is there from its first value on
        if metric.kind == "gauge":
            exporter.set(metric, 0.5, *metric.labels)
    assert {family.name for family in exporter.registry.collect()} == others | gauges


def test_a_rank_but_the_first_has_only_what_ranks_measure() -> None:
    exporter = Exporter(CollectorRegistry(), is_first=False)
    for metric in METRICS:
        if metric.kind == "gauge":
            exporter.set(metric, 0.5, *metric.labels)
        elif metric.kind == "counter":
            exporter.add(metric, 1, *metric.labels)
        else:
            exporter.observe(metric, 0.5, *metric.labels)
    found = {family.name for family in exporter.registry.collect()}
    assert found == {metric.name.removesuffix("_total") for metric in METRICS if metric.scope == "rank"}


def test_a_scrape_over_http_returns_the_loss_of_each_task(closing: ExitStack) -> None:
    exporter, url = opened(PrometheusConfig(port=0), closing)
    assert url.startswith("http://127.0.0.1:")
    exporter.publish_step(STEP)
    exporter.add(names.STEPS, 1)
    exporter.observe(names.STEP_SECONDS, 0.2)
    lines = scrape(url).splitlines()
    for line in (
        'pretrain_loss{task="total"} 3.5',
        'pretrain_loss{task="rotation"} 1.25',
        'pretrain_loss{task="jigsaw"} 2.0',
        'pretrain_loss_weight{task="rotation"} 0.5',
        'pretrain_task_metric{metric="accuracy",task="rotation"} 0.75',
        "pretrain_steps_total 1.0",
        "pretrain_step_seconds_count 1.0",
    ):
        assert line in lines
    published = {line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")}
    known = tuple(metric.name.removesuffix("_total") for metric in METRICS)
    assert all(name.startswith(known) for name in published)
    exporter.publish_step({"total": 2.5})
    assert 'pretrain_loss{task="total"} 2.5' in scrape(url).splitlines()


def test_the_address_is_loopback_unless_it_is_configured() -> None:
    assert PrometheusConfig().address == "127.0.0.1"
    assert PrometheusConfig().port == 9480


def free_range(count: int) -> int:
    """The first of `count` free neighbouring ports."""
    for first in range(20011, 60000, count):
        probes = [socket.socket() for _ in range(count)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        else:
            return first
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no free ports")


def test_a_busy_port_gives_way_to_the_next(closing: ExitStack) -> None:
    first = free_range(3)
    config = PrometheusConfig(port=first)
    for turn in range(3):
        _, url = opened(config, closing)
        assert url == f"http://127.0.0.1:{first + turn}"


def test_each_rank_of_a_node_has_a_port_of_its_own(closing: ExitStack) -> None:
    config = PrometheusConfig(port=free_range(3))
    for local_rank in (1, 2, 0):
        _, url = opened(config, closing, local_rank=local_rank, is_first=local_rank == 0)
        assert url == f"http://127.0.0.1:{config.port + local_rank}"


def test_other_ranks_are_silent_if_only_the_first_is_to_answer(closing: ExitStack) -> None:
    config = PrometheusConfig(port=0, ranks="first")
    assert open_exporter(config, Health(60.0), is_first=False, local_rank=1)[1:] == (None, None)
    opened(config, closing)


def test_a_port_is_free_again_once_a_run_has_ended(closing: ExitStack) -> None:
    first = free_range(1)
    for _ in range(2):
        serving, _ = serve(CollectorRegistry(), PrometheusConfig(port=first), Health(60.0))
        assert serving is not None
        assert serving.port == first
        serving.close()


def test_health_is_told_by_the_status(closing: ExitStack) -> None:
    health = Health(0.2)
    serving, _ = serve(CollectorRegistry(), PrometheusConfig(port=0), health)
    assert serving is not None
    closing.callback(serving.close)
    health.progressed(7)
    state = json.loads(scrape(serving.url, "/healthz"))
    assert (state["healthy"], state["step"]) == (True, 7)
    time.sleep(0.25)
    with pytest.raises(urllib.error.HTTPError, match="503") as stalled:
        scrape(serving.url, "/healthz")
    assert json.loads(stalled.value.read())["healthy"] is False
    health.progressed(8)
    assert json.loads(scrape(serving.url, "/healthz"))["step"] == 8


def test_when_no_port_is_free_the_run_is_told_why_and_goes_on() -> None:
    first = free_range(PORT_TRIES)
    holders = [socket.socket() for _ in range(PORT_TRIES)]
    try:
        for offset, holder in enumerate(holders):
            holder.bind(("127.0.0.1", first + offset))
            holder.listen()
        exporter, serving, problem = open_exporter(PrometheusConfig(port=first), Health(60.0))
    finally:
        for holder in holders:
            holder.close()
    assert serving is None
    assert problem is not None
    assert "in use" in problem
    exporter.publish_step(STEP)
    assert sample_of(exporter.registry, "pretrain_loss", task="rotation") == 1.25


REQUEST = b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n"


def connect(url: str, buffer_bytes: int = 4096) -> socket.socket:
    """A client that takes in little of an answer before it reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    client.connect(("127.0.0.1", urlsplit(url).port))
    return client


def test_clients_that_stand_still_do_not_keep_a_scrape_from_being_answered(closing: ExitStack) -> None:
    """Row 39: some send nothing, some half a request, and some never read the answer."""
    exporter, url = opened(PrometheusConfig(port=0), closing)
    exporter.publish_step(STEP)
    for number in range(80):  # more than the system takes off a server's hands
        exporter.set(names.LOSS, 1.0, f"{number}" + 100_000 * "x")
    for sent in (b"", REQUEST[:20], REQUEST) * 3:
        closing.enter_context(client := connect(url))
        client.sendall(sent)
    for value in (2.0, 3.0):
        exporter.publish_step({"loss/rotation": value})
        assert f'pretrain_loss{{task="rotation"}} {value}' in scrape(url).splitlines()


@pytest.mark.parametrize("address", ["192.0.2.1", "not a host", ""])
def test_an_address_that_is_not_ours_never_stops_a_run(address: str) -> None:
    _, serving, problem = open_exporter(PrometheusConfig(port=0, address=address), Health(60.0))
    assert (serving is None) != (problem is None)
    if serving is not None:
        serving.close()


def test_it_is_silent_when_switched_off() -> None:
    exporter, serving, problem = open_exporter(PrometheusConfig(enabled=False), Health(60.0))
    assert (serving, problem) == (None, None)
    exporter.publish_step(STEP)


def test_two_exporters_share_nothing_with_each_other_or_with_the_process() -> None:
    first, second = (Exporter(CollectorRegistry()) for _ in range(2))
    first.publish_step(STEP)
    assert sample_of(first.registry, "pretrain_loss", task="total") == 3.5
    assert sample_of(second.registry, "pretrain_loss", task="total") is None
    assert not any(name.startswith("pretrain_") for name in prometheus_client.REGISTRY._names_to_collectors)
