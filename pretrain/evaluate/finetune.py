"""Full fine-tuning: a backbone and a fresh linear head learn a labelled set, tested after every epoch."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pretrain.errors import TrainingError
from pretrain.evaluate.augment import (
    STEP_STREAM,
    ChainedImages,
    epoch_views,
    make_augmenter,
    normalised,
    padded_crops,
    seeded,
)
from pretrain.evaluate.classifier import learning_groups
from pretrain.evaluate.encoder import Encoder
from pretrain.evaluate.finetune_state import read_state, restore, write_state
from pretrain.evaluate.image_set import ImageSet, Prepared, prepare_images
from pretrain.evaluate.recipes import FinetuneRecipe
from pretrain.optim import AdamW

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a fine-tuning keeps its state; `resume` continues what is there."""

    folder: Path | None = None
    resume: bool = False


@dataclass(frozen=True)
class Finetuned:
    """The end of a fine-tuning."""

    encoder: Encoder  # its model with the weights of the last epoch, in eval mode and frozen
    history: list[dict[str, Any]]  # per epoch: loss, learning rate, seconds, test accuracy


@dataclass(frozen=True)
class Share:
    """This process's part of a global batch; padded, so that all processes have as many images."""

    views: Tensor  # int64 (B,): `image * repeats + repeat`
    weights: Tensor  # float32 (B,): 1 for an image of the batch, 0 for padding


def finetune(
    classifier: Encoder,
    train: ImageSet,
    test: ImageSet,
    classes: Tensor,
    recipe: FinetuneRecipe,
    seed: int,
    accelerator: Accelerator,
    place: Place | None = None,
    identity: Mapping[str, Any] | None = None,
    num_workers: int | None = None,
) -> Finetuned:
    """Train what `build_classifier` made. classes: the labels in the order of the head's outputs.

    identity: what a state has to agree on to be continued. num_workers: processes of this process that
    augment image by image, where a recipe asks for that; None takes the cores there are.
    """
    place, device = place or Place(), accelerator.device
    batch_size = min(recipe.batch_size, len(train))
    steps_per_epoch = math.ceil(len(train) / batch_size)
    lr = recipe.lr_schedule(batch_size, steps_per_epoch)
    model = classifier.model.to(device)
    optimizer = AdamW(learning_groups(model, recipe), betas=recipe.betas, fused=device.type == "cuda" or None)
    identity = {"seed": seed, "recipe": recipe.model_dump(mode="json"), **(identity or {})}
    state = read_state(place.folder, identity, place.resume) if place.folder is not None else None
    history: list[dict[str, Any]] = []
    if state is not None:
        restore(state, model, optimizer, state.epoch * steps_per_epoch)
        history = list(state.history)
    accelerator.wait_for_everyone()  # none writes a state before all have looked for one

    targets = torch.searchsorted(classes, train.labels).to(device)
    tests = prepare_images(test, classifier.crop, device)
    augmenter = make_augmenter(classifier, recipe, len(classes), device)
    batches = _batches(classifier, train, recipe, seed, accelerator, len(history), batch_size, num_workers)
    parallel = accelerator.prepare_model(model)
    for epoch in range(len(history), recipe.num_epochs):
        began = time.perf_counter()
        model.train()
        total = torch.zeros((), device=device)
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            share, images = next(batches)
            num_images = min(batch_size, len(train) - step % steps_per_epoch * batch_size)
            for group in optimizer.param_groups:
                group["lr"] = lr(step) * group["lr_scale"]
            # one seed a step and process: erasing, mixing, drop path and dropout draw from it
            with seeded(seed, step, accelerator.process_index, STEP_STREAM):
                pixels, soft = augmenter(images, targets[share.views.to(device) // recipe.repeats])
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = parallel(pixels)
                losses = F.cross_entropy(logits.float(), soft, reduction="none")  # (B,)
                loss = (losses * share.weights.to(device)).sum() / num_images
                # the processes' gradients are averaged; their sum is wanted
                (loss * accelerator.num_processes).backward()
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach() * num_images
        train_loss = float(accelerator.reduce(total, "sum")) / len(train)
        if not math.isfinite(train_loss):
            raise TrainingError(f"fine-tuning: the loss of epoch {epoch + 1} is {train_loss}; lower --lr")
        num_correct = count_correct(classifier, tests, classes, accelerator)
        history.append(
            {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "lr": lr((epoch + 1) * steps_per_epoch - 1),
                "test_top1_ratio": num_correct / len(test),
                "num_correct": num_correct,
                "seconds": time.perf_counter() - began,
            }
        )
        logger.log(
            logging.INFO if accelerator.is_main_process else logging.DEBUG,
            "epoch %d of %d: loss %.4f, test %.2f %%, %.1f s",
            epoch + 1,
            recipe.num_epochs,
            train_loss,
            100 * num_correct / len(test),
            history[-1]["seconds"],
        )
        if place.folder is not None and accelerator.is_main_process:
            write_state(place.folder, epoch + 1, history, identity, model, optimizer)
    accelerator.wait_for_everyone()
    model.eval().requires_grad_(False)
    return Finetuned(replace(classifier, model=model), history)


def _batches(
    classifier: Encoder,
    train: ImageSet,
    recipe: FinetuneRecipe,
    seed: int,
    accelerator: Accelerator,
    first_epoch: int,
    batch_size: int,
    num_workers: int | None,
) -> Iterator[tuple[Share, Tensor]]:
    """Every batch from an epoch on: this process's share, its images as uint8 (B, 3, S, S) on the device."""
    device = accelerator.device
    even = bool(recipe.mixup_alpha or recipe.cutmix_alpha)

    def shares() -> Iterator[tuple[int, Share]]:
        for epoch in range(first_epoch, recipe.num_epochs):
            for batch in torch.split(epoch_views(len(train), epoch, seed, recipe.repeats), batch_size):
                yield epoch, share_of(batch, accelerator.process_index, accelerator.num_processes, even)

    if recipe.crops_padded(classifier.crop.size_px) and recipe.rand_augment is None:
        prepared = prepare_images(train, classifier.crop, device)
        for epoch, share in shares():
            images = prepared.take(share.views // recipe.repeats, device)
            yield share, padded_crops(images, share.views, epoch, seed, recipe)
        return
    if num_workers is None:
        num_workers = min(16, max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    loader = DataLoader(
        ChainedImages(train, classifier, recipe, seed),
        batch_sampler=_Places(shares),
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,  # the encoded images are not copied
        pin_memory=device.type == "cuda",
    )
    for (_, share), images in zip(shares(), loader, strict=True):
        yield share, images.to(device, non_blocking=True)


class _Places:
    """What a DataLoader asks its dataset for: (epoch, view) of every image of every batch."""

    def __init__(self, shares: Callable[[], Iterator[tuple[int, Share]]]) -> None:
        self.shares = shares

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, share in self.shares():
            yield [(epoch, view) for view in share.views.tolist()]


def share_of(batch: Tensor, rank: int, world_size: int, even: bool) -> Share:
    """Every world-size-th view of a batch; all processes get as many, an even number if images mix in pairs.

    Padding repeats the batch's first view and weighs nothing.
    """
    size = math.ceil(len(batch) / world_size)
    size += size % 2 if even else 0
    own = batch[rank::world_size]
    padding = batch[:1].expand(size - len(own))
    weights = torch.cat([torch.ones(len(own)), torch.zeros(len(padding))])
    return Share(torch.cat([own, padding]), weights)


@torch.inference_mode()
def count_correct(
    classifier: Encoder, tests: Prepared, classes: Tensor, accelerator: Accelerator, batch_size: int = 512
) -> int:
    """Images of the test set that are classified correctly, each counted by one process; the same in all.

    A label that the train set lacks is never predicted, so it counts as wrong.
    """
    device = accelerator.device
    classifier.model.eval()
    own = torch.arange(accelerator.process_index, len(tests.images), accelerator.num_processes)
    counts = torch.zeros(2, dtype=torch.int64, device=device)  # correct, seen
    for indices in torch.split(own, batch_size):
        pixels = normalised(tests.take(indices, device), classifier.mean, classifier.std)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = classifier.model(pixels)
        predicted = classes[logits.float().argmax(dim=1).cpu()]
        counts[0] += (predicted == tests.images.labels[indices]).sum()
        counts[1] += len(indices)
    num_correct, num_seen = accelerator.reduce(counts, "sum").tolist()
    assert num_seen == len(tests.images), (num_seen, len(tests.images))
    return int(num_correct)
