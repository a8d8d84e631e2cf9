"""An export from end to end: read weights, change what was asked, write and prove each format, publish it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pretrain.errors import UserError
from pretrain.export.adapt import Adapted, adapt
from pretrain.export.export_report import CARD, REPORT, ExportReport, read_report
from pretrain.export.formats import writer
from pretrain.export.model_card import model_card
from pretrain.export.options import ExportOptions
from pretrain.export.parity import ParityError, some
from pretrain.export.proof import Proof
from pretrain.export.publish import half_made, is_same, refuse_foreign, take_place, write_whole
from pretrain.export.results import Result, results_of
from pretrain.export.run_images import images_of_run
from pretrain.export.source import RunWeights, read_weights, sha256_of

PACKAGES = ("pretrain", "timm", "torch", "safetensors")

State = Literal["written", "replaced", "up to date", "new results"]


class ImpossibleError(UserError):
    """A format that cannot hold this backbone, or whose library is not installed."""


@dataclass(frozen=True)
class Target:
    """A format and the folder that it is written to."""

    format: str
    out: Path


@dataclass(frozen=True)
class Exported:
    """What became of a target."""

    target: Target
    state: State
    report: ExportReport
    kept: Path | None = None  # where an older export is, that someone had changed


@dataclass(frozen=True)
class Impossible:
    """A target whose format cannot hold the backbone."""

    target: Target
    why: str


def export_run(
    run_or_checkpoint: Path,
    targets: Sequence[Target],
    options: ExportOptions | None = None,
    skip_impossible: bool = False,
) -> list[Exported | Impossible]:
    """Export the newest whole checkpoint of a run, or one checkpoint, to each target.

    A target that holds this export already is left as it is, but for new results in its model card; one that
    holds another of ours is replaced. UserError: a place that is not ours, an unusable checkpoint, or a
    format that cannot hold this backbone (with `skip_impossible` that is only told in the outcome).
    """
    for target in targets:
        refuse_foreign(target.out)
    source = read_weights(run_or_checkpoint.resolve(), options.weights if options else None)
    options = replace(options or ExportOptions(), weights=source.weights)
    adapted: Adapted | None = None
    done: list[Exported | Impossible] = []
    for target in targets:
        expected = {"format": target.format, "source_sha256": source.sha256, "options": options.to_json()}
        found = is_same(target.out, expected)
        if found is not None and found.results == _results(source, target.out, found.model_sha256):
            done.append(Exported(target, "up to date", found))
            continue
        adapted = adapted or adapt(source, options, images_of_run)
        if found is not None:
            done.append(_with_new_results(target, adapted, found))
            continue
        try:
            done.append(_export(target, adapted, options))
        except ImpossibleError as error:
            if not skip_impossible:
                raise UserError(str(error)) from error
            done.append(Impossible(target, str(error)))
    return done


def _export(target: Target, adapted: Adapted, options: ExportOptions) -> Exported:
    out = target.out.absolute()
    was_there = read_report(out) is not None
    with half_made(out) as folder:
        try:
            proof = writer(target.format)(folder, adapted.source, adapted.model, options)
        except UserError as error:
            raise ImpossibleError(str(error)) from error
        if proof.missing or proof.unexpected:
            raise ParityError(
                f"{proof.consumer}: {len(proof.matched)} tensors matched; missing: {some(proof.missing)}; "
                f"unexpected: {some(proof.unexpected)}"
            )
        report = _report(target, adapted, options, proof, folder)
        (folder / CARD).write_text(model_card(adapted.source, report))
        report = replace(report, files=_files(folder))
        (folder / REPORT).write_text(report.to_json())
        kept = take_place(folder, out)
    return Exported(target, "replaced" if was_there else "written", report, kept)


def _report(
    target: Target, adapted: Adapted, options: ExportOptions, proof: Proof, folder: Path
) -> ExportReport:
    source, out = adapted.source, target.out.absolute()
    is_public = target.format == "hf-hub"  # paths of this machine are nobody else's business
    heaviest = max(proof.files, key=lambda name: (folder / name).stat().st_size)
    model_sha256 = sha256_of(folder / heaviest)
    return ExportReport(
        folder=out.name if is_public else str(out),
        format=target.format,
        architecture=source.backbone.name,
        source_checkpoint=source.checkpoint.name if is_public else str(source.checkpoint),
        source_weights=source.weights,
        source_step=source.step,
        source_sha256=source.sha256,
        options=options.to_json(),
        changes=[{**change.values, "told": change.told} for change in adapted.changes],
        files={},
        model_sha256=model_sha256,
        num_parameters=sum(parameter.numel() for parameter in adapted.model.parameters()),
        registers=source.registers,
        consumer=proof.consumer,
        matched=proof.matched,
        missing=proof.missing,
        unexpected=proof.unexpected,
        left_out=proof.left_out,
        max_abs_difference=proof.max_abs_difference,
        feature_scale=proof.feature_scale,
        tolerance=proof.tolerance,
        note=proof.note,
        results=_results(source, out, model_sha256),
        versions=versions(),
    )


def _results(source: RunWeights, out: Path, model_sha256: str) -> list[Result]:
    return results_of((source.run, out), (source.sha256, model_sha256))


def _with_new_results(target: Target, adapted: Adapted, report: ExportReport) -> Exported:
    """Write the model card again; the weights and their proof stay."""
    out = target.out
    if sha256_of(out / CARD) != report.files.get(CARD):  # someone has written in it
        return Exported(target, "up to date", report)
    report = replace(report, results=_results(adapted.source, out, report.model_sha256))
    card = model_card(adapted.source, report)
    report = replace(report, files={**report.files, CARD: hashlib.sha256(card.encode()).hexdigest()})
    for name, text in ((CARD, card), (REPORT, report.to_json())):
        write_whole(out / name, text)
    return Exported(target, "new results", report)


def _files(folder: Path) -> dict[str, str]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): sha256_of(path) for path in paths}


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
