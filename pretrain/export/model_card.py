"""The README.md of an exported folder: what the weights are, where they come from, how to load them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.export.export_report import ExportReport
from pretrain.export.source import RunWeights

MAX_METRICS = 30  # rows of the table of metrics


def model_card(source: RunWeights, report: ExportReport, license: str) -> str:
    """Markdown with the header that model hubs read."""
    backbone = source.backbone
    sections = [
        f"---\nlibrary_name: timm\nlicense: {license}\ntags:\n- image-feature-extraction\n- timm\n---",
        f"# {backbone.name}, {' + '.join(source.tasks) or 'self-supervised'}",
        f"A {'Swin' if backbone.is_swin else 'Vision'} Transformer backbone without classifier, pretrained "
        "without labels by `pretrain`: "
        f"{report.num_parameters / 1e6:.1f} M parameters, {backbone.img_px} px images, "
        f"{backbone.patch_px} px patches.",
        "## Load\n\n```python\nimport timm\n"
        + (_REGISTER_T2T if backbone.name == "t2t_vit_14" else "")
        + f'model = timm.create_model("local-dir:{Path(report.folder).name}", pretrained=True).eval()'
        "  # the path of this folder\n"
        "features = model(images)  # normalised (B, 3, "
        f"{backbone.img_px}, {backbone.img_px}) -> (B, {source.embed_dim})\n```\n\n"
        "`pretrained=True` matters: without it timm builds the same model with random weights and says "
        "nothing. timm 1.0.16 or later. `num_classes=N` adds a new classifier, another `img_size` resamples "
        "the position grid, `features_only=True` gives feature maps.",
        "## Input\n\n"
        f"RGB, centre crop of {backbone.img_px} px, {source.interpolation}; "
        f"mean {list(source.mean)}, std {list(source.std)} for pixels in [0, 1]: the run's own values, "
        "which `timm.data.resolve_model_data_config(model)` returns.",
        "## Tokens\n\n" + _tokens(source),
        "## Training\n\n" + _table(_facts(source, report, license)),
    ]
    metrics = last_metrics(source.checkpoint.parent.parent, source.step)
    if metrics:
        sections.append("## Metrics\n\nLast record of the run up to this step.\n\n" + _table(metrics))
    sections.append(
        "## Proof\n\n"
        f"Stock timm {report.versions['timm']} with torch {report.versions['torch']} re-opened this folder: "
        f"{len(report.matched)} of {len(report.matched)} tensors matched, features within "
        f"{report.max_abs_difference:.2g} of the checkpoint's (limit {report.tolerance:.2g}). "
        "See `export_report.json`."
    )
    return "\n\n".join(sections) + "\n"


def last_metrics(run: Path, step: int) -> dict[str, str]:
    """Numbers of the last record of `metrics.jsonl` not later than `step`; empty without such a file."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return {}
    last: dict[str, Any] = {}
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        if isinstance(record, dict) and record.get("step", math.inf) <= step:
            last = record
    numbers = {name: value for name, value in _flat(last) if type(value) in (int, float)}
    return {name: f"{value:.6g}" for name, value in list(numbers.items())[:MAX_METRICS]}


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"loss": {"rotation": 1.4}} -> ("loss/rotation", 1.4)"""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


_REGISTER_T2T = "from pretrain.models.t2t import register_t2t\n\nregister_t2t()  # timm has no T2T-ViT\n"


def _tokens(source: RunWeights) -> str:
    side = source.backbone.img_px // source.backbone.token_px
    if source.backbone.is_swin:
        return (
            f"`model.forward_features(images)` returns the last stage's map, (B, {side}, {side}, D), after "
            "the final norm; the feature of an image is its mean over the map."
        )
    lines = ["`model.forward_features(images)` returns, in this order:", ""]
    if source.backbone.class_token:
        lines.append("- the class token; it is the contrastive token, where the run had a contrastive task")
    lines += [f"- the `{name}` token (a timm register)" for name in source.registers]
    lines.append(f"- {side * side} patch tokens, {side} x {side}, row by row")
    return "\n".join(lines)


def _facts(source: RunWeights, report: ExportReport, license: str) -> dict[str, str]:
    data = source.config.get("data") or {}
    return {
        "tasks": ", ".join(source.tasks) or "not recorded",
        "data": str(data.get("shards", "not recorded")),
        "weights": source.weights,
        "step": str(source.step),
        "checkpoint": source.checkpoint.name,
        "checkpoint sha256": report.source_sha256,
        "license": license,
    }


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
