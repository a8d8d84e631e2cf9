"""Audit a folder of shards: everything that is wrong is listed at once, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pretrain.data.audit.compare import (
    Layout,
    copies,
    image_summary,
    label_findings,
    label_summaries,
    layout_findings,
    sizes_findings,
)
from pretrain.data.audit.finding import Audit, ShardSummary, format_audit
from pretrain.data.audit.folder import indexed_shards, open_folder, stored_bytes
from pretrain.data.audit.shard import AuditTask, ShardAudit, audit_shard
from pretrain.data.decode import MAX_PIXELS
from pretrain.data.side_by_side import side_by_side
from pretrain.data.storage import Location, parse_location

__all__ = ["Audit", "Layout", "format_audit", "verify_folder"]

ReportProgress = Callable[[int, int], None]  # shards done, shards in all


def verify_folder(
    folder: Location | Path | str,
    *,
    layout: Layout | None = None,
    decode_images: bool = True,
    max_pixels: int = MAX_PIXELS,
    num_workers: int | None = None,
    report_progress: ReportProgress | None = None,
) -> Audit:
    """Read every shard from end to end, decode every image, compare all with the index if there is one."""
    location = folder if isinstance(folder, Location) else parse_location(folder)
    opened = open_folder(location)
    tasks = (
        AuditTask(
            name=name,
            location=opened.root.join(name),
            split=opened.splits[name],
            indexed=indexed,
            num_classes=len(opened.class_names) or None,
            decode_images=decode_images,
            max_pixels=max_pixels,
        )
        for name, indexed in zip(opened.names, indexed_shards(opened), strict=True)
    )
    audits: list[ShardAudit] = []
    for audit in side_by_side(audit_shard, tasks, len(opened.names), stored_bytes(opened), num_workers):
        audits.append(audit)
        if report_progress is not None:
            report_progress(len(audits), len(opened.names))
    findings = [
        *opened.findings,
        *(finding for audit in audits for finding in audit.findings),
        *sizes_findings(opened, audits),
        *copies(audits),
        *label_findings(opened, audits),
        *(layout_findings(layout, audits) if layout is not None else ()),
    ]
    order = {name: place for place, name in enumerate(["", *opened.names])}
    findings.sort(key=lambda finding: (order.get(finding.shard, len(order)), finding.shard))
    return Audit(
        folder=str(location),
        has_index=opened.manifest is not None,
        shards=tuple(ShardSummary(a.name, a.split, a.num_bytes, a.sha256, a.num_samples) for a in audits),
        images=image_summary(audits),
        labels=label_summaries(audits),
        findings=tuple(findings),
    )
