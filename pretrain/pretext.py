"""How well a run solves its pretext tasks on images it has not seen, shown without augmentation."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pretrain import build, checkpoint
from pretrain.config import RunConfig, load_config
from pretrain.data.batch import DataConfig
from pretrain.data.loader import mixture_of, open_batches, open_splits
from pretrain.errors import CheckpointError, UserError
from pretrain.peers import ALONE
from pretrain.train import load_weights
from pretrain.views.plan import BlurConfig, JitterConfig, ViewConfig, in_places
from pretrain.views.prepare import prepare, with_labels

# tasks whose answer is the identity of an image of the training set
OF_TRAINING_IMAGES = ("exemplar", "cluster_labels")
_NO_AUGMENTATION: dict[str, Any] = {
    "scale": (1.0, 1.0),
    "aspect": (1.0, 1.0),
    "shift_px": 0,
    "flip_prob": 0.0,
    "jitter": JitterConfig(prob=0.0),
    "gray_prob": 0.0,
    "blur": BlurConfig(prob=0.0),
    "solarize_prob": 0.0,
    "patch_augment": False,
}


@dataclass(frozen=True)
class PretextResult:
    """Means over the images; metrics are named `<task>/<metric>`, losses `loss/<task>`."""

    run: str
    step: int
    shards: str
    num_images: int
    values: dict[str, float]
    headlines: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.run}, step {self.step}: {self.num_images} images of {self.shards}, no augmentation"]
        for task, metric in self.headlines.items():
            chance = self.values.get(f"{task}/chance")
            told = "" if chance is None else f"  chance {chance:.4f}"
            lines.append(f"{task:<20} {metric:<12} {self.values[f'{task}/{metric}']:.4f}{told}")
        return "\n".join(lines)

    def save(self, folder: Path) -> Path:
        """Write all values as `eval/pretext.json` below a folder."""
        path = folder / "eval" / "pretext.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(vars(self), indent=1) + "\n")
        return path


def plain(view: ViewConfig) -> ViewConfig:
    """The view without what only varies images; what a task asks about (turns, masks, ...) stays."""
    return view.model_copy(update=_NO_AUGMENTATION)


@torch.no_grad()
def run_pretext(run: Path, shards: str, batch_size: int = 100, device: str | None = None) -> PretextResult:
    """Evaluate the newest valid checkpoint of a run, or a checkpoint, on `DIR` or `DIR:split` (test).

    Whole batches only: up to `batch_size` - 1 images at the end are left out. Two views of one image show
    the same picture, so comparisons of views say little here.
    """
    saved = _open(run)
    config = load_config(saved.folder / checkpoint.CONFIG)
    tasks = [name for name in config.tasks.enabled() if name not in OF_TRAINING_IMAGES]
    if not tasks:
        raise UserError(f"{run}: its tasks ask about the training images themselves; nothing to evaluate")
    views = {name: plain(view) for name, view in config.views.items()}
    config = _with(config, views, tasks)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    module = build.module(config, ALONE, where)
    wanted = module.state_dict().keys()
    weights = {name: value for name, value in saved.student.items() if name in wanted}
    load_weights(module, replace(saved, student=weights))
    module.eval()
    teacher = None
    if saved.teacher is not None and build.teacher_views(config):
        teacher = module.make_teacher()
        teacher.load_state_dict({k: v for k, v in saved.teacher.items() if k in teacher.state_dict()})
    folder, _, split = shards.partition(":") if not Path(shards).exists() else (shards, "", "")
    data = DataConfig(shards=folder, split=split or "test", lanes=1, decode_threads=0)
    splits = open_splits(data)
    mixture = mixture_of(data, splits, config.seed, batch_size)
    num_batches = mixture.num_samples // batch_size
    if not num_batches:
        raise UserError(f"{shards}: has {mixture.num_samples} images, fewer than a batch of {batch_size}")
    sums: dict[str, float] = defaultdict(float)
    batches = open_batches(data, splits, in_places(views), seed=config.seed, batch_size=batch_size)
    trained_on = int(saved.state.get("num_samples", mixture.num_samples))
    moment = build.timetable(config, trained_on).moment(int(saved.state["step"]))
    try:
        for micro_step in range(num_batches):
            batch = next(batches)
            crops = [crops.to(where) for crops in batch.crops]
            epochs, ids = batch.epochs.to(where), batch.sample_ids.to(where)
            inputs = prepare(build.recipe(config), config.seed, crops, epochs, ids, micro_step)
            inputs = with_labels(inputs, batch.labels.to(where), moment)
            if teacher is not None:
                inputs = module.consult(teacher, inputs)
            for name, value in module(inputs).items():
                sums[name] += float(value) / num_batches
    finally:
        batches.close()
    return PretextResult(
        str(run),
        int(saved.state["step"]),
        shards,
        num_batches * batch_size,
        dict(sums),
        build.headlines(config),
    )


def _open(run: Path) -> checkpoint.Checkpoint:
    if (run / checkpoint.MANIFEST).is_file():
        problems = checkpoint.verify(run)
        if problems:
            raise CheckpointError(f"{run}: {'; '.join(problems)}; choose another checkpoint")
        return checkpoint.read_checkpoint(run)
    found, _ = checkpoint.newest_valid(run)
    if found is None:
        raise CheckpointError(f"{run}: holds no whole checkpoint; give a run folder")
    return checkpoint.read_checkpoint(found)


def _with(config: RunConfig, views: dict[str, ViewConfig], tasks: list[str]) -> RunConfig:
    others = {name: None for name in config.tasks.enabled() if name not in tasks}
    return config.model_copy(update={"views": views, "tasks": config.tasks.model_copy(update=others)})
