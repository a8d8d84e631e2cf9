"""What dashboards show is what is published, and Grafana's own types take them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard as GrafanaDashboard

from pretrain.metrics import names
from pretrain.metrics.dashboards import DASHBOARDS
from pretrain.metrics.dashboards.grafana import to_dict
from pretrain.metrics.dashboards.panels import GRAFANA_UNITS, Dashboard, Panel
from pretrain.metrics.dashboards.reference import with_table
from pretrain.metrics.names import BY_NAME, METRICS

ROOT = Path(__file__).parents[2]
RULES = [
    rule
    for path in sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
PANELS = [panel for dashboard in DASHBOARDS for row in dashboard.rows for panel in row.panels]
OF_HISTOGRAM = ("_bucket", "_sum", "_count")
# fields that Grafana writes itself, and its types of dashboards know nothing of
UNTYPED = {"definition", "titleFormat", "textFormat", "step"}


def metrics_in(expression: str) -> set[str]:
    """The published metrics that an expression reads, those behind recording rules included."""
    found = set()
    for name in re.findall(r"\b\w+:pretrain_\w+:\w+", expression):
        found |= metrics_in(RECORDED[name])  # a KeyError: no such rule
    for name in re.findall(r"(?<![\w:])pretrain_\w+", expression):
        stem = next((name.removesuffix(end) for end in OF_HISTOGRAM if name.endswith(end)), name)
        is_histogram = stem in BY_NAME and BY_NAME[stem].kind == "histogram"
        found.add(stem if is_histogram else name)
    return found


def test_every_metric_is_on_a_dashboard() -> None:
    shown = {name for panel in PANELS for query in panel.queries for name in metrics_in(query.expr)}
    assert {metric.name for metric in METRICS} - shown == set()


def test_every_name_on_a_dashboard_and_in_a_rule_is_published() -> None:
    read = {name for panel in PANELS for query in panel.queries for name in metrics_in(query.expr)}
    read |= {name for rule in RULES for name in metrics_in(rule["expr"])}
    read |= {name for dashboard in DASHBOARDS for name in metrics_in(variables_of(dashboard))}
    assert read - BY_NAME.keys() == set()


def variables_of(dashboard: Dashboard) -> str:
    return " ".join(str(variable["query"]) for variable in to_dict(dashboard)["templating"]["list"])


def test_a_name_that_nobody_publishes_would_be_found() -> None:
    assert metrics_in("rate(pretrain_step_seconds_sum[5m]) / pretrain_stpe") == {
        "pretrain_step_seconds", "pretrain_stpe",
    }  # fmt: skip
    # of what is no histogram, a suffix is part of the name
    assert metrics_in("pretrain_loss_sum") == {"pretrain_loss_sum"}


@pytest.mark.parametrize("panel", [pytest.param(panel, id=panel.title) for panel in PANELS])
def test_a_panel_describes_what_it_shows(panel: Panel) -> None:
    assert panel.help
    for metric in METRICS:
        if any(metric.name in re.findall(r"(?<!:)\bpretrain_\w+", query.expr) for query in panel.queries):
            assert metric.help in panel.help, f"nothing is said of {metric.name}"


@pytest.mark.parametrize("panel", [pytest.param(panel, id=panel.title) for panel in PANELS])
def test_a_panel_that_shows_a_gauge_as_it_is_has_its_unit(panel: Panel) -> None:
    for query in panel.queries:
        plain = re.fullmatch(r"(pretrain_\w+)\{[^}]*\}( \* 1000)?", query.expr)
        if plain and plain[1] in BY_NAME:
            metric = BY_NAME[plain[1]]
            assert panel.unit == GRAFANA_UNITS[metric.unit]
            assert bool(plain[2]) == (metric.unit == "timestamp")  # Grafana's dates are in milliseconds


@pytest.mark.parametrize("panel", [pytest.param(panel, id=panel.title) for panel in PANELS])
def test_a_legend_names_what_tells_series_apart(panel: Panel) -> None:
    """Every label of a gauge that is shown as it is, and the rank where each has its own."""
    for query in panel.queries:
        plain = re.fullmatch(r"(pretrain_\w+)\{([^}]*)\}( \* 1000)?", query.expr)
        if not plain or plain[1] not in BY_NAME or panel.title == "Run":
            continue
        metric = BY_NAME[plain[1]]
        wanted = [label for label in metric.labels if f'{label}="' not in plain[2]]
        wanted += ["rank", "node"] if metric.scope == "rank" else []
        assert [label for label in wanted if f"{{{{{label}}}}}" not in query.legend] == []


def test_a_metric_of_a_rank_can_be_chosen_by_rank() -> None:
    for panel in PANELS:
        for query in panel.queries:
            for name, labels in re.findall(r"(?<![\w:])(pretrain_\w+)(\{[^}]*\})", query.expr):
                (stem,) = metrics_in(name)
                assert 'run="$run"' in labels
                assert ('rank=~"$rank"' in labels) == (BY_NAME[stem].scope == "rank"), query.expr


def test_the_files_are_what_the_table_makes() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pretrain.metrics.dashboards", "--check"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, f"{ran.stdout}{ran.stderr}run python -m pretrain.metrics.dashboards"
    on_disk = {path.stem for path in (ROOT / "deploy" / "grafana" / "dashboards").glob("*.json")}
    assert on_disk == {dashboard.slug for dashboard in DASHBOARDS}


def test_files_that_are_old_are_told_and_written(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "pretrain.metrics.dashboards", "--root", str(tmp_path)]
    (tmp_path / "deploy" / "grafana" / "dashboards").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "monitoring.md"
    page.write_text((ROOT / "docs" / "monitoring.md").read_text().replace(names.STEP.help, "An old text."))

    def ran(*more: str) -> tuple[int, str]:
        done = subprocess.run([*program, *more], cwd=ROOT, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout

    code, told = ran("--check")
    assert code == 1
    assert told.count("is not up to date") == len(DASHBOARDS) + 1
    assert ran()[0] == 0
    assert ran("--check") == (0, "")
    assert names.STEP.help in page.read_text()


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="the page has no"):
        with_table("# A page\n")


@pytest.mark.parametrize("slug", [dashboard.slug for dashboard in DASHBOARDS])
def test_grafana_s_own_types_read_a_dashboard_and_write_the_same(slug: str) -> None:
    plugins.register_default_plugins()
    text = (ROOT / "deploy" / "grafana" / "dashboards" / f"{slug}.json").read_text()
    built = GrafanaDashboard.from_json(json.loads(text))
    written = json.loads(JSONEncoder().encode(built))
    assert lost(json.loads(text), written) <= UNTYPED


def lost(ours: Any, theirs: Any, where: str = "") -> set[str]:
    """Names of fields that did not come back; a value that came back as another is an error."""
    if isinstance(ours, dict):
        assert isinstance(theirs, dict), where
        gone = {name for name in ours if name not in theirs}
        return gone.union(*(lost(ours[n], theirs[n], f"{where}.{n}") for n in ours if n in theirs))
    if isinstance(ours, list):
        assert len(ours) == len(theirs), where
        return set().union(*(lost(a, b, where) for a, b in zip(ours, theirs, strict=True)))
    assert ours == theirs, where
    return set()


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d["panels"][1].update(targets=5),
        lambda d: d["panels"][1].update(gridPos="wide"),
        lambda d: d["panels"][1]["fieldConfig"]["defaults"].update(thresholds=3),
        lambda d: d["templating"].update(list=3),
        lambda d: d.update(panels=[1]),
    ],
)
def test_grafana_s_own_types_refuse_what_is_malformed(damage: Any) -> None:
    plugins.register_default_plugins()
    broken = to_dict(DASHBOARDS[0])
    damage(broken)
    with pytest.raises((TypeError, ValueError, AttributeError, KeyError)):
        JSONEncoder().encode(GrafanaDashboard.from_json(broken))


@pytest.mark.parametrize("dashboard", [pytest.param(one, id=one.slug) for one in DASHBOARDS])
def test_panels_do_not_overlap_and_fill_the_width(dashboard: Dashboard) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in to_dict(dashboard)["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24
                assert (x, y) not in taken, f"{panel['title']} over {taken[x, y]}"
                taken[x, y] = panel["title"]
    for row in dashboard.rows:
        assert sum(panel.width for panel in row.panels) % 24 == 0, f"{row.title} ends in an empty corner"


def test_each_dashboard_lets_one_choose_source_run_and_rank() -> None:
    for dashboard in DASHBOARDS:
        chosen = [variable["name"] for variable in to_dict(dashboard)["templating"]["list"]]
        assert chosen[:3] == ["datasource", "run", "rank"]
        written = json.dumps(to_dict(dashboard)["panels"])
        asked = set(re.findall(r"\$\{?(\w+)", written)) - {"__rate_interval", "__range"}
        assert asked <= set(chosen)
