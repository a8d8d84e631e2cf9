"""Dashboards as Grafana's JSON (schema 38, Grafana 10.1 and newer)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pretrain.metrics.dashboards.panels import OF_RUN, Dashboard, Panel
from pretrain.metrics.names import STEP, STEP_SECONDS

SCHEMA = 38
COLUMNS = 24
HEIGHTS = {"timeseries": 8, "stat": 4, "heatmap": 8}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
PREFIX = "pretrain-"


def to_json(dashboard: Dashboard) -> str:
    return json.dumps(to_dict(dashboard), indent=1, ensure_ascii=False) + "\n"


def to_dict(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "uid": PREFIX + dashboard.slug,
        "title": f"pretrain: {dashboard.title}",
        "description": dashboard.help,
        "tags": ["pretrain"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,  # one crosshair through all panels
        "refresh": "15s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "links": [_link_to_others()],
        "templating": {"list": _variables(dashboard)},
        "annotations": {"list": [_alerts_that_rang()]},
        "panels": _placed(dashboard),
    }


def _placed(dashboard: Dashboard) -> list[dict[str, Any]]:
    """Rows under each other; panels from left to right, as many as fit."""
    placed: list[dict[str, Any]] = []
    y = 0
    for row in dashboard.rows:
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        placed.append(
            {
                "id": len(placed) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        y += 1
        for line in _lines(row.panels):
            x, height = 0, max(HEIGHTS[panel.kind] for panel in line)
            for panel in line:
                place = {"x": x, "y": y, "w": panel.width, "h": height}
                placed.append(_panel(panel, len(placed) + 1, place))
                x += panel.width
            y += height
    return placed


def _lines(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Panels that stand beside each other."""
    lines: list[list[Panel]] = [[]]
    for panel in panels:
        if sum(other.width for other in lines[-1]) + panel.width > COLUMNS:
            lines.append([])
        lines[-1].append(panel)
    return lines


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "editorMode": "code",
                "range": panel.kind != "stat",
                "instant": panel.kind == "stat",
                "format": "heatmap" if panel.kind == "heatmap" else "time_series",
            }
            for index, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.kind] | ({"textMode": "name"} if panel.shows_name else {}),
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    """Unit, axis and colours."""
    steps: list[dict[str, Any]] = [{"value": None, "color": panel.base}]
    steps += [{"value": value, "color": color} for value, color in panel.limits]
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.low is not None:
        defaults["min"] = panel.low
    if panel.high is not None:
        defaults["max"] = panel.high
    if panel.decimals is not None:
        defaults["decimals"] = panel.decimals
    if panel.kind == "timeseries":
        defaults["color"] = {"mode": "palette-classic"}
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 60 if panel.is_stacked else 5,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if panel.limits else "off"},
        }
    elif panel.kind == "stat":
        defaults["color"] = {"mode": "thresholds"}
    return defaults


_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {
            "displayMode": "list",
            "placement": "bottom",
            "showLegend": True,
            "calcs": ["lastNotNull"],
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "values": False, "fields": ""},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "auto",
        "justifyMode": "auto",
        "orientation": "auto",
    },
    "heatmap": {
        "calculate": False,
        "color": {
            "mode": "scheme",
            "scheme": "Viridis",
            "steps": 64,
            "exponent": 0.5,
            "fill": "dark-orange",
            "reverse": False,
        },
        "cellGap": 1,
        "yAxis": {"unit": "s", "axisPlacement": "left", "reverse": False},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"show": True, "yHistogram": False},
        "legend": {"show": True},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-9},
    },
}


def _variables(dashboard: Dashboard) -> list[dict[str, Any]]:
    """The source, one of its runs, and any of the run's ranks."""
    source: dict[str, Any] = {
        "name": "datasource",
        "label": "Source",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
        "includeAll": False,
        "multi": False,
    }
    run = _from_labels("run", "Run", f"label_values({STEP.name}, run)", is_many=False)
    rank = _from_labels(
        "rank", "Rank", f"label_values({STEP_SECONDS.name}_count{{{OF_RUN}}}, rank)", is_many=True
    )
    node = _from_labels("node", "Node", f"label_values(up{{{OF_RUN}}}, node)", is_many=True)
    return [source, run, rank, *([node] if dashboard.has_nodes else [])]


def _from_labels(name: str, label: str, query: str, is_many: bool) -> dict[str, Any]:
    variable = {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": f"{name}-values"},
        "refresh": 2,  # whenever the time range changes
        "sort": 3 if is_many else 2,  # ranks by number, runs from the last name on
        "hide": 0,
        "includeAll": is_many,
        "multi": is_many,
    }
    if is_many:
        variable |= {"allValue": ".*", "current": {"selected": True, "text": ["All"], "value": ["$__all"]}}
    return variable


def _alerts_that_rang() -> dict[str, Any]:
    """Marks in every panel the times in which an alert of the run was ringing."""
    return {
        "name": "Alerts",
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "red",
        "expr": f'ALERTS{{{OF_RUN},alertstate="firing"}}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{severity}} {{task}} {{rank}} {{node}}",
        "step": "15s",
    }


def _link_to_others() -> dict[str, Any]:
    return {
        "title": "pretrain",
        "type": "dashboards",
        "tags": ["pretrain"],
        "asDropdown": False,
        "icon": "",
        "tooltip": "",
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
        "url": "",
    }
