"""How far the features of every exported format are from those of the checkpoint.

    python benchmarks/export_parity.py --out benchmarks/results/export-parity.json

Real checkpoints: a few steps of four methods on CIFAR-10 and on a sample of ImageNet, by `pretrain train`.
Each is exported as every format, which has the format's own library read it. A library that is not installed
is not asked, and the table says so; what is on PYTHONPATH counts as installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from result import tell

from pretrain.export.exporting import Exported, Impossible, Target, export_run
from pretrain.export.formats import FORMATS
from pretrain.export.options import ExportOptions

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "export"))  # what OpenMMLab lacks beside a newer torch is made up there

from open_mmlab import fill_gaps  # noqa: E402

METHODS = ROOT / "configs" / "methods"
SHORT = [
    "engine.kind=local",
    "engine.precision=fp32",
    "optim.clip=global",
    "data.lanes=4",
    "data.resident=false",
    "log.every_steps=5",
    "log.prometheus.enabled=false",
    "export.at_end=false",
]


@dataclass(frozen=True)
class Checkpoint:
    """A short training, and what is asked of the export of its weights."""

    name: str
    method: str
    shards: str
    split: str
    steps: int
    batch: int
    drop_registers: bool = False


CHECKPOINTS = (
    Checkpoint("ViT-S/4 with a register (SiT)", "sit_vits4_cifar10", "cifar10", "train", 6, 8),
    Checkpoint("the same, register dropped", "sit_vits4_cifar10", "cifar10", "train", 6, 8, True),
    Checkpoint("ViT-S/4 (MoCo v3 and RePre)", "repre_moco_v3_vits4_cifar10", "cifar10", "train", 6, 8),
    Checkpoint("ViT-S/4, no class token (I-JEPA)", "ijepa_vits4_cifar10", "cifar10", "train", 6, 8),
    Checkpoint("Swin-T (MoBY)", "moby_swin_t", "imagenet-sample", "train", 3, 4),
)


def train(checkpoint: Checkpoint, data: Path, work: Path) -> Path:
    """The run of a method, trained unless it is there."""
    run = work / checkpoint.method
    if not (run / "checkpoints").is_dir():
        settings = [
            f"data.shards={data / checkpoint.shards}",
            f"data.split={checkpoint.split}",
            f"batch={{global_size: {checkpoint.batch}}}",
            f"schedule={{kind: constant, steps: {checkpoint.steps}}}",
            f"checkpoint.every_steps={checkpoint.steps}",
            *SHORT,
        ]
        config = METHODS / f"{checkpoint.method}.yaml"
        command = ["-m", "pretrain", "train", config, "--output-dir", run, *settings]
        subprocess.run([sys.executable, *map(str, command)], check=True)
    return run


def measure(checkpoint: Checkpoint, data: Path, work: Path) -> dict[str, Any]:
    """Each format: the proof of its export, or why there is none."""
    run = train(checkpoint, data, work)
    out = work / f"exported-{checkpoint.method}{'-dropped' if checkpoint.drop_registers else ''}"
    targets = [Target(name, out / name) for name in FORMATS]
    options = ExportOptions(drop_registers=checkpoint.drop_registers)
    done = export_run(run, targets, options, skip_impossible=True)
    reports = [each.report for each in done if isinstance(each, Exported)]
    return {
        **asdict(checkpoint),
        "num_parameters": reports[0].num_parameters,
        "changes": [change["told"] for change in reports[0].changes],
        "formats": {each.target.format: _row(each) for each in done},
    }


def _row(done: Exported | Impossible) -> dict[str, Any]:
    if isinstance(done, Impossible):
        return {"impossible": done.why}
    report = done.report
    return {
        "consumer": report.consumer,
        "tensors": len(report.matched),
        "left_out": report.left_out,
        "max_abs_difference": report.max_abs_difference,
        "feature_scale": report.feature_scale,
        "tolerance": report.tolerance,
        "note": report.note,
    }


def markdown(measured: list[dict[str, Any]]) -> str:
    """A row for each format, a column for each checkpoint: largest difference / largest feature."""
    names = [column["name"] for column in measured]
    lines = [f"| format | {' | '.join(names)} |", "| --- " * (1 + len(names)) + "|"]
    for name in FORMATS:
        cells = (_cell(column["formats"][name]) for column in measured)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if "impossible" in row:
        return "no"
    if row["max_abs_difference"] is None:
        return "not compared"
    return f"{row['max_abs_difference'] / max(1.0, row['feature_scale']):.1g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=ROOT / "data_shards", help="has cifar10, imagenet-sample"
    )
    parser.add_argument("--work", type=Path, help="keeps runs and exports; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    fill_gaps()
    with TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        measured = [measure(checkpoint, arguments.data, work) for checkpoint in CHECKPOINTS]
    tell({"checkpoints": measured}, arguments.out)
    print(markdown(measured))


if __name__ == "__main__":
    main()
