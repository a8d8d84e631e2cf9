"""One pretraining on CIFAR-10 and its whole protocol: k-NN, linear, few labels, fine-tuning. In slices.

    python benchmarks/cifar10_protocol.py --config configs/methods/sit_vits4_cifar10.yaml --max-minutes 8

Each stage is a command of `pretrain` and is done once; the same line again goes on where the time was used up
(exit code 75), also in the middle of a training or of a fine-tuning. The table is written when all is done.
Settings of the pretraining may follow as key=value; those of fine-tuning come after --recipe-settings. On a
processor the same line runs with a small budget, such as

    python benchmarks/cifar10_protocol.py --config configs/cifar10_cpu_sit.yaml schedule.steps=20 \\
        --fractions 0.01 1 --seeds 0 --recipe-settings num_epochs=1 warmup_epochs=0 --linear-epochs 5
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from result import tell

from pretrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR
from pretrain.evaluate.fewshot import format_fewshot
from pretrain.evaluate.table import table
from pretrain.sweep.processes import CommandError, Processes, StoppedError

ASKED = "protocol.json"  # what the folder was begun with


def commands(arguments: argparse.Namespace) -> dict[str, tuple[Path, list[str]]]:
    """Stage -> what it leaves, and its command, in their order."""
    run, shards = arguments.folder, str(arguments.shards)
    exported, results = run / "exported", run / "protocol"
    sets = ["--train", shards, "--test", shards, "--out", str(results)]
    seeds = ["--seeds", *map(str, arguments.seeds)]
    train = ["train", str(arguments.config), *arguments.overrides, f"data.shards={shards}"]
    train += ["--resume", "auto", "--output-dir", str(run)]
    train += ["--nproc", str(arguments.nproc)] if arguments.nproc else []
    linear = ["evaluate", "linear", str(exported), *sets, *seeds]
    fewshot = ["evaluate", "fewshot", str(exported), *sets, *seeds]
    fewshot += ["--fractions", *map(str, arguments.fractions)]
    if arguments.linear_epochs:
        linear += ["--epochs", str(arguments.linear_epochs)]
        fewshot += ["--linear-epochs", str(arguments.linear_epochs)]
    fewshot += ["--recipe", arguments.recipe] if arguments.recipe else []
    fewshot += arguments.recipe_settings
    return {
        "train": (exported, train),  # an export shows that the training came to its end
        "export": (exported, ["export", str(run), "--out", str(exported)]),
        "knn": (results / "eval" / "knn.json", ["evaluate", "knn", str(exported), *sets]),
        "linear": (results / "eval" / "linear.json", linear),
        "fewshot": (results / "eval" / "fewshot.json", fewshot),
    }


def refuse_changed(folder: Path, asked: dict[str, Any]) -> None:
    """A folder that was begun with other settings is not gone on with."""
    path = folder.with_name(f"{folder.name}.{ASKED}")  # beside it: the run must find its folder empty
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asked, indent=1) + "\n")
        return
    begun = json.loads(path.read_text())
    changed = [key for key in asked if begun.get(key) != asked[key]]
    if changed:
        raise SystemExit(f"{folder}: was begun with another {changed[0]}; choose another --folder")


def run_stages(
    stages: dict[str, tuple[Path, list[str]]], processes: Processes, folder: Path
) -> dict[str, float]:
    """Seconds of the stages that were not done yet, in this slice."""
    seconds = {}
    for name, (product, command) in stages.items():
        if product.exists():
            continue
        print(f"{name}: pretrain {' '.join(command)}", flush=True)
        log = folder.with_name(f"{folder.name}.{name}.log")
        seconds[name] = processes.call([sys.executable, "-m", "pretrain", *command], log)
    return seconds


def measured(stages: dict[str, tuple[Path, list[str]]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything the table says, from the stages' own files."""
    knn, linear, fewshot = (json.loads(stages[name][0].read_text()) for name in ("knn", "linear", "fewshot"))
    print(table([knn, linear]))
    print()
    print(format_fewshot(fewshot))
    records = (arguments.folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(records[-1])
    kept = ("top1_ratio", "top1_ratio_std", "top1_ratio_95", "interval")
    return {
        "config": str(arguments.config),
        "overrides": arguments.overrides,
        "pretraining": {name: last[name] for name in ("step", "epoch", "images_per_second")},
        "knn": {key: knn[key] for key in (*kept, "best_top1_ratio", "best_k")},
        "linear": {
            "protocol": linear["protocol"],
            "augmentation": linear["augmentation"],
            **{key: linear[key] for key in kept},
        },
        "few_labels": fewshot["rows"],
        "fine_tuned": fewshot["rows"].get("100pct", {}).get("finetuned"),
        "recipe": fewshot["recipe"],
        "recipe_name": fewshot["recipe_name"],
        "seconds_of_cells": {
            f"{cell['fraction_ratio']:g}/seed-{cell['seed']}": round(cell["seconds"], 1)
            for cell in fewshot["cells"]
            if "seconds" in cell
        },
        "seeds": fewshot["seeds"],
        "hardware": fewshot["hardware"],
        "versions": fewshot["versions"],
    }


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the pretraining")
    parser.add_argument("--config", type=Path, default=Path("configs/methods/sit_vits4_cifar10.yaml"))
    parser.add_argument("--shards", type=Path, default=Path("data_shards/cifar10"))
    parser.add_argument(
        "--folder", type=Path, help="of the run (default: runs/protocol/<name of the config>)"
    )
    parser.add_argument("--nproc", type=int, help="ranks of the pretraining on this machine")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.1, 0.25, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", help="of fine-tuning (default: that of the method)")
    parser.add_argument("--recipe-settings", nargs="+", default=[], metavar="key=value")
    parser.add_argument("--linear-epochs", type=int, help="of all probes (default: those of the method)")
    parser.add_argument("--max-minutes", type=float, help="of this slice")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_intermixed_args(given)
    name = arguments.config.stem
    arguments.folder = arguments.folder or Path("runs/protocol") / name
    arguments.out = arguments.out or Path(__file__).parent / "results" / f"cifar10-protocol-{name}.json"
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    stages = commands(arguments)
    asked = {name: command for name, (_, command) in stages.items()}
    refuse_changed(arguments.folder, asked)
    processes = Processes(None if arguments.max_minutes is None else 60 * arguments.max_minutes)
    with processes.listening():
        try:
            run_stages(stages, processes, arguments.folder)
        except StoppedError:
            print("not finished: the same line goes on", flush=True)
            return EXIT_PREEMPTED
        except CommandError as error:
            print("\n".join(error.last_lines), file=sys.stderr)
            return EXIT_USER_ERROR if error.exit_code == EXIT_USER_ERROR else EXIT_FAILED
    tell(measured(stages, arguments), arguments.out)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
