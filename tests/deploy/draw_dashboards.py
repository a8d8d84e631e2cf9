"""Draws every dashboard from a real run under a real Prometheus, for the docs.

    PYTHONPATH=tests python tests/deploy/draw_dashboards.py --out docs/pictures/monitoring

Each panel shows what its own queries give, at its own place; Grafana itself is not needed. Needs Debian's
packages of Prometheus, its Alertmanager and node exporter, Chromium, playwright and data_shards/sample.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from monitored_run import CONFIG, PACKAGES, ROOT, Prometheus, missing_programs, monitored, substituted
from panel_drawing import STYLE, Drawn, drawn_panel
from PIL import Image

from pretrain.data.indexing import index_folder
from pretrain.metrics.dashboards import DASHBOARDS
from pretrain.metrics.dashboards.grafana import to_dict
from pretrain.metrics.dashboards.panels import Dashboard, Panel
from pretrain.report.markup import Markup, tag

WIDTH = 1400
UNIT_PX = 30  # of Grafana's grid, downwards
RUN = "sample-vit"
SAMPLE = ROOT / "data_shards" / "sample"
NUM_DAMAGED = 4
OVERRIDES = (
    "model.img_px=48",
    "model.args={depth: 3, embed_dim: 72, num_heads: 3}",
    "batch.global_size=32",
    "optim.base_lr=4e-3",
    "schedule.warmup_steps=100",
    "schedule.steps={steps}",
    "tasks.jigsaw={ratio: 0.111}",
    "views.one.size_px=48",
    "views.two.size_px=48",
    "data.lanes=16",
    "checkpoint.every_steps=100",
    "online_knn={every_steps: 100, num_train: 400, num_test: 200, k: 10}",
    "log={every_steps: 10, health_every_steps: 20, gradients: {every_steps: 50}}",
)


def damaged_copy(out: Path) -> Path:
    """The embedded sample with a few images that cannot be decoded."""
    shutil.copytree(SAMPLE, out)
    shard = sorted(out.glob("*train*.tar"))[0]
    with tarfile.open(shard) as tar:
        images = [member for member in tar.getmembers() if not member.name.endswith((".cls", ".json"))]
    with shard.open("r+b") as file:
        for image in images[:: len(images) // NUM_DAMAGED][:NUM_DAMAGED]:
            file.seek(image.offset_data)
            file.write(b"\0" * image.size)
    index_folder(out)  # the cache takes no shard that is not what its index says
    return out


def page(dashboard: Dashboard, prometheus: Prometheus, seconds: float) -> str:
    panels = {panel.title: panel for row in dashboard.rows for panel in row.panels}
    boxes: list[Markup] = []
    bottom = 0
    for placed in to_dict(dashboard)["panels"]:
        place = placed["gridPos"]
        bottom = max(bottom, place["y"] + place["h"])
        left, width = place["x"] * WIDTH / 24, place["w"] * WIDTH / 24
        box = (
            f"left:{left:.1f}px;top:{place['y'] * UNIT_PX}px;width:{width - 8:.1f}px;"
            f"height:{place['h'] * UNIT_PX - 8}px"
        )
        if placed["type"] == "row":
            boxes.append(tag("div", placed["title"], class_="row", style=box))
            continue
        panel = panels[placed["title"]]
        inner = drawn_panel(panel, found(panel, prometheus, seconds), width - 8, place["h"] * UNIT_PX - 8)
        boxes.append(tag("div", tag("h3", panel.title), inner, class_="panel", style=box))
    body = tag("div", *boxes, class_="board", style=f"height:{bottom * UNIT_PX}px")
    return (
        f"<!doctype html><meta charset=utf-8><title>{dashboard.title}</title><style>{STYLE}</style>"
        f"<h1>pretrain: {dashboard.title}</h1>{body}"
    )


def found(panel: Panel, prometheus: Prometheus, seconds: float) -> list[Drawn]:
    """What a panel's queries give, as Grafana names it."""
    drawn: list[Drawn] = []
    for query in panel.queries:
        text = substituted(query.expr, RUN, rate="20s", whole=f"{seconds:.0f}s")
        if panel.kind == "stat":
            series = [{**one, "values": [one["value"]]} for one in prometheus.now(text)]
        else:
            series = prometheus.over(text, seconds, 2.0)
        for one in series:
            name = query.legend
            for label, value in one["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            drawn.append(Drawn(name, [(float(at), float(value)) for at, value in one["values"]]))
    return sorted(drawn, key=lambda one: one.name) if len(panel.queries) == 1 else drawn


def screenshot(html: Path, image: Path) -> None:
    from playwright.sync_api import sync_playwright

    program = next(path for name in ("chromium", "google-chrome") if (path := shutil.which(name)))
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's own rule for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        view = browser.new_page(viewport={"width": WIDTH + 32, "height": 400})
        view.goto(html.as_uri())
        view.screenshot(path=str(image), full_page=True)
        browser.close()
    with Image.open(image) as picture:  # few colours are in use: a third of the bytes
        picture.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE).save(image, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--seconds", type=float, default=240.0, help="that the run is watched")
    arguments = parser.parse_args()
    missing = missing_programs()
    if missing or not SAMPLE.is_dir():
        sys.exit(f"{missing or SAMPLE} absent; install {PACKAGES}, and run `make shards`")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = damaged_copy(folder / "shards")
        config = folder / "run.yaml"
        config.write_text(CONFIG)
        cache = json.dumps({"folder": str(folder / "cache"), "max_gib": 1.0})
        steps = int(arguments.seconds * 8)
        overrides = [text.replace("{steps}", str(steps)) for text in OVERRIDES]
        overrides += [f"data.shards={shards}", f"data.cache={cache}"]
        with monitored(folder, config, overrides, RUN, interval="2s") as watched:
            watched.wait_for("pretrain_step > 1", 300.0)
            began = time.time()
            watched.wait_for(f"vector(time()) > {began + arguments.seconds:.0f}", arguments.seconds + 60)
            told: dict[str, Any] = {"drawn": datetime.now().isoformat(timespec="seconds")}
            for dashboard in DASHBOARDS:
                html = folder / f"{dashboard.slug}.html"
                html.write_text(page(dashboard, watched.prometheus, time.time() - began))
                screenshot(html, arguments.out / f"{dashboard.slug}.png")
                told[dashboard.slug] = (arguments.out / f"{dashboard.slug}.png").stat().st_size
            sys.stdout.write(json.dumps(told) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
