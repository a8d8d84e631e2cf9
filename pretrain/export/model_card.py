"""The README.md of an exported folder: what the weights are, where they come from, how to load them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.export.export_report import ExportReport, left_out_of
from pretrain.export.loading import library_of, loading
from pretrain.export.results import Result
from pretrain.export.source import RunWeights

MAX_METRICS = 30  # rows of the table of metrics


def model_card(source: RunWeights, report: ExportReport) -> str:
    """Markdown with the header that model hubs read. source: as it was exported, changes included."""
    backbone, license = source.backbone, report.options["license"]
    height, width = source.image_size
    is_timm = report.format in ("timm", "hf-hub")
    sections = [
        _header(report.format, license),
        f"# {backbone.name}, {' + '.join(source.tasks) or 'self-supervised'}",
        f"A {'Swin' if backbone.is_swin else 'Vision'} Transformer backbone without classifier, pretrained "
        "without labels by `pretrain`: "
        f"{report.num_parameters / 1e6:.1f} M parameters, images of {height} x {width} px, "
        f"{backbone.patch_px} px patches.",
        "## Load\n\n" + loading(source, report),
        "## Input\n\n"
        f"RGB, centre crop of {height} x {width} px, {source.interpolation}; "
        f"mean {list(source.mean)}, std {list(source.std)} for pixels in [0, 1]: the run's own values"
        + (", which `timm.data.resolve_model_data_config(model)` returns." if is_timm else "."),
    ]
    if is_timm:
        sections.append("## Tokens\n\n" + _tokens(source))
    if report.changes:
        lines = [f"- {change['told']}" for change in report.changes]
        sections.append("## Changes to the run's backbone\n\n" + "\n".join(lines))
    sections.append("## Training\n\n" + _table(_facts(source, report, license)))
    metrics = last_metrics(source.run, source.step)
    if metrics:
        sections.append("## Metrics\n\nLast record of the run up to this step.\n\n" + _table(metrics))
    if report.results:
        sections.append("## Results\n\nEvaluations of these weights.\n\n" + _results(report.results))
    sections.append("## Proof\n\n" + _proof(report))
    return "\n\n".join(sections) + "\n"


def _header(format: str, license: str) -> str:
    library = library_of(format)
    first, last = ([f"library_name: {library}"], [f"- {library}"]) if library else ([], [])
    lines = [*first, f"license: {license}", "tags:", "- image-feature-extraction", *last]
    return "\n".join(["---", *lines, "---"])


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


def _tokens(source: RunWeights) -> str:
    rows, columns = source.grid
    if source.backbone.is_swin:
        return (
            f"`model.forward_features(images)` returns the map of the last stage, (B, {rows}, {columns}, D), "
            "after the final norm; the feature of an image is its mean over the map."
        )
    lines = ["`model.forward_features(images)` returns, in this order:", ""]
    if source.backbone.class_token:
        lines.append("- the class token; it is the contrastive token, where the run had a contrastive task")
    lines += [f"- the `{name}` token (a timm register)" for name in source.registers]
    lines.append(f"- {rows * columns} patch tokens, {rows} x {columns}, row by row")
    return "\n".join(lines)


def _facts(source: RunWeights, report: ExportReport, license: str) -> dict[str, str]:
    return {
        "method": ", ".join(source.tasks) or "not recorded",
        "data": _data(source),
        "weights": source.weights,
        "step": str(source.step),
        "checkpoint": source.checkpoint.name,
        "checkpoint sha256": report.source_sha256,
        "format": report.format,
        "license": license,
    }


def _data(source: RunWeights) -> str:
    """The folders of shards by name, for their paths mean nothing elsewhere, and what tells them for sure."""
    data = source.config.get("data") or {}
    places = data.get("sources") or [data]
    names = [f"{Path(str(place['shards'])).name}" for place in places if place.get("shards")]
    hashes = [*source.manifest_hashes, *[""] * len(names)]
    told = [f"{name} (manifest {sha})" if sha else name for name, sha in zip(names, hashes, strict=False)]
    return ", ".join(told) or "not recorded"


def _results(results: Sequence[Result]) -> str:
    rows = [
        f"| {result.method} | {result.feature} | {result.data}, {result.num_samples} images | "
        f"{100 * result.top1_ratio:.2f} |"
        for result in results
    ]
    return "\n".join(["| evaluation | feature | test set | top-1 % |", "| --- | --- | --- | --- |", *rows])


def _proof(report: ExportReport) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    read = "" if report.max_abs_difference is None else " read this folder"
    of = "" if report.max_abs_difference is None else " of those of the checkpoint"
    left_out = f" Left out: {left_out_of(report.left_out)}." if report.left_out else ""
    return (
        f"{report.consumer}{read}: {report.mapping}; {report.agreement}{of}.{left_out} Written with "
        f"{versions}. `export_report.json` has the details."
    )


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
