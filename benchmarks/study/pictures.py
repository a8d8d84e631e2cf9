"""Pictures of docs/study.md: what a run of the core method restores, and what its class token looks at.

`python benchmarks/study/pictures.py RUN --out benchmarks/results/study/STUDY/pictures` writes
restorations.png, attention.png, and about.json, which says of which run and images they are. The document
shows what is there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import build
from pretrain.config import RunConfig
from pretrain.data.manifest import Split
from pretrain.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from pretrain.evaluate.encoder import UNTRAINED
from pretrain.illustrate.features import attention_of, open_network
from pretrain.illustrate.head import readers_of, total_steps
from pretrain.illustrate.images import Picked, pick, split_of
from pretrain.illustrate.predictions import restorations_of
from pretrain.illustrate.run_files import RunFiles, config_of_run, open_run
from pretrain.report.attention_maps import Attention
from pretrain.report.patch_drawing import KINDS, Plan
from pretrain.report.restorations import FULL_DIFFERENCE, Restoration, TaskRestorations
from pretrain.sweep.record import portable
from pretrain.sweep.runs import write_json
from study.document import ABOUT
from study.sheet import Cell, Column, Group, Legend, Outline, draw, enlarge

TASKS = ("colorization", "inpainting")  # whose answers are pasted in
NUM_IMAGES = 4
MAX_IMAGES = 8
MAX_HEADS = 6
MAX_BYTES = 150_000  # of a picture that a repository keeps
CPU = torch.device("cpu")


def write(run: Path, out: Path, num_images: int = NUM_IMAGES, test: str | None = None) -> list[Path]:
    """The two pictures and what they are of; a UserError, before anything is computed, says what is wrong."""
    if not 1 <= num_images <= MAX_IMAGES:
        raise UserError(f"--images {num_images}: give 1 to {MAX_IMAGES}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name the folder that the pictures go to")
    config = config_of_run(run)
    readers = _readers(run, config)
    split = split_of(test or _shards(run, config), "test")
    files = open_run(run, config)
    _refuse_unfinished(files)
    assert files.saved is not None
    config = files.config
    picked = pick(split, num_images)
    trained, fresh = (
        attention_on(run, config, weights, picked, readers)
        for weights in (str(files.saved.folder), f"{UNTRAINED}{files.saved.folder}")
    )
    by_name = {task.task: task for task in restorations_of(config, files.saved, picked, num_images, CPU)}
    restored = [by_name[name] for name in TASKS]
    pictures = {
        "restorations": restorations(config, restored, picked),
        "attention": attention_maps(trained, fresh, picked),
    }
    for name, png in pictures.items():
        if len(png) > MAX_BYTES:
            raise UserError(f"{name}.png: {len(png)} bytes, more than {MAX_BYTES}; give fewer --images")
    captions = {
        "restorations": _said_of_restorations(restored),
        "attention": _said_of_attention(config, trained),
    }
    asked = ["--images", str(num_images), *(["--test", test] if test else []), "--out", str(out)]
    said = about(files, picked, split, asked) | {"captions": captions}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, png in pictures.items():
            (out / f"{name}.png").write_bytes(png)
        write_json(out / ABOUT, said)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another") from None
    return [*(out / f"{name}.png" for name in pictures), out / ABOUT]


def attention_on(
    run: Path, config: RunConfig, weights: str, picked: Picked, readers: Mapping[str, str]
) -> Attention:
    """Of the last block on these images. weights: a checkpoint, or `untrained:` and a checkpoint."""
    network = open_network(weights, config, CPU, readers)
    attention, why = attention_of(network, picked, len(picked.pixels), readers)
    if attention is None:
        raise UserError(f"{run}: {why}; take a run of a plain ViT")
    return attention


def about(files: RunFiles, picked: Picked, split: Split, asked: Sequence[str]) -> dict[str, Any]:
    """Which run, which weights of it and which images, without paths of the machine."""
    assert files.saved is not None
    run = portable(str(files.folder))
    typed = [str(word) for word in portable(list(files.command))]
    return {
        "run": run,
        "train_command": shlex.join(["pretrain", *typed[1:]]) if typed else None,
        "command": shlex.join(
            ["python", "benchmarks/study/pictures.py", run, *(str(word) for word in portable(list(asked)))]
        ),
        "commit": files.environment.get("commit"),
        "uncommitted": bool(files.environment.get("uncommitted")),
        "seed": files.config.seed,
        "step": int(files.saved.state["step"]),
        "source": picked.source,
        "shards_sha256": split.manifest.hash,
        "images": picked.sample_ids.tolist(),
        "classes": list(picked.labels),
    }


def restorations(config: RunConfig, tasks: Sequence[TaskRestorations], picked: Picked) -> bytes:
    """Original, shown, answer pasted in and difference, a row for each image."""
    first = tasks[0].rows
    # one pass shows all tasks the same view; tasks with a pass of their own get theirs beside them
    is_one_view = all(_is_same_view(task.rows, first) for task in tasks)
    groups = []
    for task in tasks:
        name = KINDS[task.task].name
        if task is tasks[0] or not is_one_view:
            groups.append(Group("image" if is_one_view else f"image of {name}", _shown(task.rows)))
        is_mean = task.task == "colorization" and config.tasks.colorization.target == "mean"
        words = "mean colours\npasted in" if is_mean else task.captions[2].replace(" pasted", "\npasted")
        against = "difference to\nthe true mean" if is_mean else "difference to\nthe original"
        answers = tuple(Cell(row.restored, _outlines(row, {task.task}, width_px=1)) for row in task.rows)
        differences = tuple(Cell(row.difference) for row in task.rows)
        groups.append(Group(name, (Column(words, answers), Column(against, differences))))
    kinds = dict.fromkeys(
        one.kind for task in tasks for row in task.rows if row.plan for one in row.plan.sets
    )
    frames = tuple((KINDS[kind].color, KINDS[kind].name) for kind in kinds)
    scale = ("difference 0", f"{FULL_DIFFERENCE:g} of the range and more; grey: not asked")
    return draw(groups, _names(picked), Legend(frames, scale))


def attention_maps(trained: Attention, fresh: Attention, picked: Picked) -> bytes:
    """The class token's weights on the patches, of every head, trained and not, a row for each image."""
    groups = [Group("image", (Column("", tuple(Cell(image.image) for image in trained.images)),))]
    num_heads = min(MAX_HEADS, len(trained.images[0].tokens[0].heads))
    for name, attention in (("trained", trained), ("fresh weights", fresh)):
        columns = [Column(f"head {head + 1}", _maps(attention, head)) for head in range(num_heads)]
        groups.append(Group(name, tuple(columns)))
    return draw(groups, _names(picked), Legend((), ("weight 0", "the largest of the map")))


def _maps(attention: Attention, head: int) -> tuple[Cell, ...]:
    cells = []
    for image in attention.images:
        weights = image.tokens[0].heads[head]
        cells.append(
            Cell(enlarge(weights, image.image.shape[:2]), note=f"largest {100 * float(weights.max()):.1f} %")
        )
    return tuple(cells)


def _shown(rows: Sequence[Restoration]) -> tuple[Column, Column]:
    return (
        Column("original", tuple(Cell(row.original) for row in rows)),
        Column(
            "shown to\nthe network",
            tuple(Cell(row.seen, _outlines(row, set(KINDS), width_px=2)) for row in rows),
        ),
    )


def _outlines(row: Restoration, kinds: set[str], width_px: int) -> tuple[Outline, ...]:
    """Frames around the patches of these tasks."""
    plan = row.plan or Plan((1, 1))
    columns = plan.grid[1]
    return tuple(
        Outline(KINDS[one.kind].color, one.patches, columns, row.seen.shape[1] // columns, width_px)
        for one in plan.sets
        if one.kind in kinds
    )


def _is_same_view(rows: Sequence[Restoration], others: Sequence[Restoration]) -> bool:
    return all(np.array_equal(row.seen, other.seen) for row, other in zip(rows, others, strict=True))


def _names(picked: Picked) -> list[str]:
    return [
        label or f"image {sample_id}"
        for label, sample_id in zip(picked.labels, picked.sample_ids.tolist(), strict=True)
    ]


def _said_of_restorations(tasks: Sequence[TaskRestorations]) -> str:
    told = [
        "Whole, upright images, their patches damaged as in training. Frames tell which task works on a "
        "patch; the network does not see what plain grey patches hide."
    ]
    for task in tasks:
        errors = [row.error for row in task.rows if row.error is not None]
        mean = f"{sum(errors) / len(errors):.3f}"
        told.append(
            f"{task.task.capitalize()}: {task.reading.strip()} Mean difference here: {mean} of the range."
        )
    return " ".join(told)


def _said_of_attention(config: RunConfig, attention: Attention) -> str:
    heads = attention.images[0].tokens[0].heads
    num_patches = heads[0].size
    few = f" (the first {MAX_HEADS} of {len(heads)})" if len(heads) > MAX_HEADS else ""
    return (
        f"Softmax weights of the class token on the {num_patches} patches in the last block, per head{few}, "
        "for the trained network and for the same architecture with fresh weights. Every map is as bright as "
        "its own largest weight, which stands below it; a class token that looks at all tokens alike gives "
        f"each {100 / build.token_layout(config).num_tokens:.1f} %."
    )


def _readers(run: Path, config: RunConfig) -> dict[str, str]:
    """The tasks that read each token; a UserError where a picture would have nothing to show."""
    lacking = [name for name in TASKS if name not in config.tasks.enabled()]
    readers = readers_of(config)
    if "class" not in readers:
        lacking.append("one that reads the class token, such as contrastive")
    if lacking:
        there = ", ".join(config.tasks.enabled())
        raise UserError(f"{run}: has no task {', '.join(lacking)} (only {there}); give a run of all tasks")
    return readers


def _shards(run: Path, config: RunConfig) -> str:
    if len(config.data.all_sources) > 1:
        raise UserError(f"{run}: trained on several sources; name the test images with --test SHARDS")
    return config.data.all_sources[0].shards


def _refuse_unfinished(files: RunFiles) -> None:
    if files.saved is None:
        raise UserError(f"{files.folder}: {files.why_not_saved}; train it to its end first")
    step, steps = int(files.saved.state["step"]), total_steps(files, None)
    if step != steps:
        raise UserError(
            f"{files.folder}: is not finished, its newest checkpoint is of step {step} of {steps}; "
            "train it to its end with --resume auto"
        )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the pictures go")
    parser.add_argument(
        "--images", type=int, default=NUM_IMAGES, metavar="N", help="rows of a picture (default: %(default)s)"
    )
    parser.add_argument(
        "--test",
        metavar="SHARDS",
        help="DIR or DIR:split of the images (default: test set of the run's data)",
    )
    arguments = parser.parse_args(words)
    try:
        written = write(arguments.run, arguments.out, arguments.images, arguments.test)
    except UserError as error:
        print(f"pictures: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    for path in written:
        print(f"{path}: {path.stat().st_size} bytes")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main())
