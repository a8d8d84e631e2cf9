"""What is deployed, against a run that is alive: every query and every rule gives data of its unit."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from monitored_run import CONFIG, DEPLOY, PACKAGES, Monitored, missing_programs, monitored, substituted
from small_shards import index_folder, samples, write_shard

from pretrain.metrics.dashboards import DASHBOARDS
from pretrain.metrics.dashboards.panels import Panel, Query

RUN = "watched"
# panels that have no data on a machine without a GPU
NEED_A_GPU = {
    "Tensor cores at work": "NVIDIA's exporter of GPU metrics runs beside GPUs only",
    "GPU utilisation": "as above",
    "GPU memory used": "as above",
    "GPU power": "as above",
    "GPU memory by torch": "torch has allocated nothing on a GPU",
}
# what a run publishes after some steps only, and rules that need two scrapes of it
COMES_LATE = (
    "pretrain_checkpoint_step > 0",
    "pretrain_eval_accuracy_ratio",
    "sum(pretrain_skipped_samples_total) == 3",
    "run:pretrain_mfu:ratio5m",
    "run:pretrain_time_left:seconds",
)
DAY_SECONDS = 86400.0
# of each of Grafana's units that is used: what a value can be
PLAUSIBLE = {
    "percentunit": (0.0, 1.0),
    "s": (0.0, 30 * DAY_SECONDS),
    "dateTimeFromNow": (-1.0, 600.0),  # seconds ago
    "bytes": (1024.0, 2.0**50),
    "short": (0.0, 1e12),
    "suffix: /s": (0.0, 1e6),
    "flops": (1.0, 1e18),
    "Bps": (0.0, 1e12),
    "watt": (0.0, 2000.0),
    "none": (-1e6, 1e6),
}
PANELS = [
    (f"{dashboard.slug}: {panel.title}", panel, query)
    for dashboard in DASHBOARDS
    for row in dashboard.rows
    for panel in row.panels
    for query in panel.queries
]
GROUPS = [
    group
    for path in sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
]
RULES = [rule for group in GROUPS for rule in group["rules"]]
SELECTOR = re.compile(r"\b((?:\w+:)?pretrain_\w+(?::\w+)?|up)\b(\{[^}]*\})?")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    missing = missing_programs()
    if missing:
        pytest.skip(f"{', '.join(missing)} not on the PATH; Debian's packages {PACKAGES} have them")
    folder = tmp_path_factory.mktemp("watched")
    shards = folder / "shards"
    shards.mkdir()
    members = samples(0, 400)
    for number in (20, 120, 220):  # images that cannot be used: more than half of what may be skipped
        members[2 * number] = (members[2 * number][0], b"no image at all")
    write_shard(shards / "train-0.tar", members[:400])
    write_shard(shards / "train-1.tar", members[400:])
    index_folder(shards)
    config = folder / "run.yaml"
    config.write_text(CONFIG)
    cache = json.dumps({"folder": str(folder / "cache"), "max_gib": 1.0})
    with monitored(folder, config, [f"data.shards={shards}", f"data.cache={cache}"], RUN) as found:
        found.wait_for("pretrain_step > 60")
        # the ranges that are asked for reach back ten seconds, in which rates need two different values
        found.wait_for("count_over_time(pretrain_step[10m]) > 14")
        found.settle(COMES_LATE, seconds=30.0)
        yield found


def test_every_query_of_every_panel_gives_data_of_its_unit(watched: Monitored) -> None:
    """In one test: spread over processes, each would start a run of its own."""
    problems = {where: told for where, panel, query in PANELS if (told := wrong_with(watched, panel, query))}
    assert problems == {}


def wrong_with(watched: Monitored, panel: Panel, query: Query) -> str | None:
    """What a panel's query gives that it should not."""
    text = substituted(query.expr, RUN)
    if panel.title in NEED_A_GPU:
        return f"has data, though {NEED_A_GPU[panel.title]}" if watched.prometheus.now(text) else None
    series = watched.prometheus.over(text, 10.0, 1.0)
    values = [float(value) for one in series for _, value in one["values"]]
    if not values:
        return f"nothing comes of {text}"
    if not all(math.isfinite(value) for value in values):
        return f"not all is finite of {text}"
    low, high = PLAUSIBLE[panel.unit]
    if panel.unit == "dateTimeFromNow":
        values = [time.time() - value / 1000 for value in values]
    if not all(low <= value <= high + 1e-9 for value in values):
        return f"{min(values)} to {max(values)} is no {panel.unit}: {text}"
    labels = sorted(set(re.findall(r"\{\{(\w+)\}\}", query.legend)))
    names = [tuple(one["metric"].get(label, "") for label in labels) for one in series]
    if not all(all(name) for name in names):
        return f"a label of the legend {query.legend} is empty: {text}"
    if len(set(names)) < len(names):
        return f"series that the legend {query.legend} does not tell apart: {text}"
    return None


def test_both_ranks_answer_under_the_labels_of_their_targets(watched: Monitored) -> None:
    found = watched.prometheus.now("pretrain_step_seconds_count")
    labels = [one["metric"] for one in found]
    assert sorted((one["run"], one["rank"]) for one in labels) == [(RUN, "0"), (RUN, "1")]
    assert all(one["node"] for one in labels)
    # what belongs to the run comes from its first rank alone
    assert [one["metric"]["rank"] for one in watched.prometheus.now("pretrain_step")] == ["0"]


def test_prometheus_finds_the_run_s_machine_once(watched: Monitored) -> None:
    (machine,) = watched.prometheus.now('up{job="node"}')
    assert machine["value"][1] == "1"
    assert machine["metric"].keys() == {"__name__", "job", "instance", "node"}


def test_every_rule_is_evaluated_without_an_error(watched: Monitored) -> None:
    groups = watched.prometheus.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(RULES)
    assert {rule["name"]: rule.get("lastError", "") for rule in rules if rule["health"] != "ok"} == {}


def test_every_recording_rule_has_data(watched: Monitored) -> None:
    for rule in RULES:
        if "record" not in rule:
            continue
        recorded, asked = watched.prometheus.now(rule["record"]), watched.prometheus.now(rule["expr"])
        assert recorded, rule["record"]
        assert len(recorded) == len(asked), rule["record"]
        values = [float(one["value"][1]) for one in recorded]
        assert all(math.isfinite(value) for value in values), rule["record"]
        if rule["record"].rpartition(":")[2].startswith(("ratio", "share")):
            assert all(0.0 <= value <= 1.0 for value in values), rule["record"]


def test_every_alert_looks_at_data_that_is_there(watched: Monitored) -> None:
    for rule in RULES:
        if "alert" not in rule:
            continue
        watched.prometheus.now(rule["expr"])  # raises if it cannot be asked
        selectors = {name + labels for name, labels in SELECTOR.findall(rule["expr"])}
        assert selectors, rule["alert"]
        for selector in selectors:
            assert watched.prometheus.now(selector), f"{rule['alert']}: there is no {selector}"


def test_an_alert_of_the_run_reaches_who_should_know(watched: Monitored) -> None:
    """Three of four samples that may be skipped are: Prometheus rings, and Alertmanager tells it on."""
    for _ in range(60):
        told = {alert["labels"]["alertname"]: alert for sent in watched.inbox for alert in sent["alerts"]}
        if "PretrainBadSampleBudget" in told:
            break
        time.sleep(0.5)
    alert = told["PretrainBadSampleBudget"]
    assert alert["labels"]["run"] == RUN
    assert alert["annotations"]["summary"].startswith(f"Run {RUN}: has skipped 3 samples")
    assert alert["annotations"]["runbook_url"] == "docs/monitoring.md#pretrainbadsamplebudget"
    # a run of a minute on a busy machine may have a rank that is slow, and nothing worse
    serious = {name for name, one in told.items() if one["labels"]["severity"] == "critical"}
    assert serious == set()


def test_a_run_that_ends_takes_its_targets_away(watched: Monitored) -> None:
    """The last of this file: it ends the run."""
    gathered = next((Path(watched.run_dir).parents[1] / "prometheus" / "targets" / "runs").glob("*.json"))
    os.killpg(watched.training.pid, signal.SIGTERM)
    assert watched.training.wait(60) == 75, watched.log.read_text()[-2000:]
    for _ in range(60):
        if not gathered.exists() and not watched.prometheus.now('up{job="pretrain"}'):
            break
        time.sleep(0.5)
    assert not gathered.exists()
    assert watched.prometheus.now('up{job="pretrain"}') == []
