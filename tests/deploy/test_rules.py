"""Prometheus' own tools on what is deployed; every alert rings where it should, and only there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DOCS = (DEPLOY.parent / "docs" / "monitoring.md").read_text()
TESTS = yaml.safe_load((PROMETHEUS / "tests" / "alerts.yml").read_text())
RULES = [
    rule
    for path in sorted((PROMETHEUS / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
HEALTHY = TESTS["tests"][-1]
METRIC = re.compile(r"\bpretrain_\w+")


def tool(*arguments: str) -> str:
    program = shutil.which(arguments[0])
    if program is None:
        pytest.skip(f"{arguments[0]} is not on the PATH; Debian's packages prometheus and "
                    "prometheus-alertmanager have it")  # fmt: skip
    ran = subprocess.run([program, *arguments[1:]], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def test_the_config_and_its_rules_are_valid() -> None:
    told = tool("promtool", "check", "config", str(PROMETHEUS / "prometheus.yml"))
    assert f"{len(RULES) - len(ALERTS)} rules found" in told
    assert f"{len(ALERTS)} rules found" in told


def test_alertmanager_takes_its_config() -> None:
    assert "SUCCESS" in tool("amtool", "check-config", str(DEPLOY / "alertmanager" / "alertmanager.yml"))


def test_alerts_ring_on_simulated_series_and_are_silent_on_a_healthy_run() -> None:
    tool("promtool", "test", "rules", str(PROMETHEUS / "tests" / "alerts.yml"))


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_every_alert_is_seen_to_ring_and_to_be_silent_before(alert: str) -> None:
    looked_at = [
        case for group in TESTS["tests"] for case in group.get("alert_rule_test", [])
        if case["alertname"] == alert
    ]  # fmt: skip
    assert any(case.get("exp_alerts") for case in looked_at)
    assert any(not case.get("exp_alerts") for case in looked_at)


def test_the_healthy_run_has_every_series_that_rules_read() -> None:
    shown = {name for series in HEALTHY["input_series"] for name in METRIC.findall(series["series"])}
    read = {name for rule in RULES for name in METRIC.findall(without_recorded(rule["expr"]))}
    assert read - shown == set()


def without_recorded(expression: str) -> str:
    return re.sub(r"\b\w+:pretrain_\w+(:\w+)?", "", expression)


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule["alert"]) for rule in ALERTS])
def test_an_alert_says_how_serious_it_is_of_what_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    summary = rule["annotations"]["summary"]
    assert summary.startswith("Run {{ $labels.run }}: ")
    assert rule["annotations"]["runbook_url"] == f"docs/monitoring.md#{rule['alert'].lower()}"
    section = re.search(rf"^### {rule['alert']}\n(.+?)(?=^##)", DOCS, re.M | re.S)
    assert section, f"docs/monitoring.md has no section on {rule['alert']}"
    assert "**What to do.**" in section[1]


def test_an_expression_that_keeps_its_rank_names_it() -> None:
    """What is summed over ranks has no rank to name; all else says where."""
    for rule in ALERTS:
        is_of_run = "by (run)" in rule["expr"] or "run:" in rule["expr"] or "on (run)" in rule["expr"]
        assert is_of_run or "{{ $labels.rank }} on {{ $labels.node }}" in rule["annotations"]["summary"]


def test_a_rule_that_is_read_is_recorded() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    read = {name for rule in RULES for name in re.findall(r"\b\w+:pretrain_\w+:\w+", rule["expr"])}
    assert read <= recorded


def test_a_rule_that_is_recorded_is_read() -> None:
    shown = " ".join(path.read_text() for path in (DEPLOY / "grafana" / "dashboards").glob("*.json"))
    read = shown + " ".join(rule["expr"] for rule in RULES)
    assert [rule["record"] for rule in RULES if "record" in rule and rule["record"] not in read] == []


def test_docs_have_no_section_on_an_alert_that_is_gone() -> None:
    assert set(re.findall(r"^### (Pretrain\w+)$", DOCS, re.M)) == {rule["alert"] for rule in ALERTS}
