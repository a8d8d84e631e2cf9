"""Full fine-tuning: a backbone and a fresh linear head learn a labelled set, tested after every epoch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from pretrain.errors import TrainingError
from pretrain.evaluate.augment import STEP_STREAM, make_augmenter, normalised, seeded
from pretrain.evaluate.batches import augmented_batches
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
    # between two states: with few labels an epoch is shorter than writing one. The last epoch always is
    every_seconds: float = 30.0


@dataclass(frozen=True)
class Finetuned:
    """The end of a fine-tuning."""

    encoder: Encoder  # its model with the weights of the last epoch, in eval mode and frozen
    # per epoch: loss, learning rate, seconds, and test accuracy, None where it was not tested
    history: list[dict[str, Any]]


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
    test_every_epochs: int = 1,
) -> Finetuned:
    """Train what `build_classifier` made. classes: the labels in the order of the head's outputs.

    identity: what a state has to agree on to be continued. num_workers: processes of this process that
    augment image by image, where a recipe asks for that; None takes the cores there are. test_every_epochs:
    0 tests after the last epoch only, which all others do as well.
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
    batches = augmented_batches(
        classifier, train, recipe, seed, accelerator, len(history), batch_size, num_workers
    )
    parallel = accelerator.prepare_model(model)
    written_at = time.monotonic()
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
                losses = cross_entropy(logits.float(), soft)
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
        is_last = epoch + 1 == recipe.num_epochs
        num_correct = None
        if is_last or (test_every_epochs and (epoch + 1) % test_every_epochs == 0):
            num_correct = count_correct(classifier, tests, classes, accelerator)
        history.append(
            {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "lr": lr((epoch + 1) * steps_per_epoch - 1),
                "test_top1_ratio": None if num_correct is None else num_correct / len(test),
                "num_correct": num_correct,
                "seconds": time.perf_counter() - began,
            }
        )
        logger.log(
            logging.INFO if accelerator.is_main_process else logging.DEBUG,
            "epoch %d of %d: loss %.4f,%s %.1f s",
            epoch + 1,
            recipe.num_epochs,
            train_loss,
            "" if num_correct is None else f" test {100 * num_correct / len(test):.2f} %,",
            history[-1]["seconds"],
        )
        is_due = is_last or time.monotonic() - written_at >= place.every_seconds
        if place.folder is not None and accelerator.is_main_process and is_due:
            write_state(place.folder, epoch + 1, history, identity, model, optimizer)
            written_at = time.monotonic()
    accelerator.wait_for_everyone()
    model.eval().requires_grad_(False)
    return Finetuned(replace(classifier, model=model), history)


def cross_entropy(logits: Tensor, soft: Tensor) -> Tensor:
    """(B, K) or, of several heads, (B, H, K), whose losses add up; soft targets (B, K) -> (B,)"""
    if logits.ndim == 2:
        return F.cross_entropy(logits, soft, reduction="none")
    return torch.stack([F.cross_entropy(one, soft, reduction="none") for one in logits.unbind(1)]).sum(0)


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
            logits = classifier.model(pixels).float()
        if logits.ndim == 3:  # of several heads the mean decides
            logits = logits.mean(dim=1)
        predicted = classes[logits.argmax(dim=1).cpu()]
        counts[0] += (predicted == tests.images.labels[indices]).sum()
        counts[1] += len(indices)
    num_correct, num_seen = accelerator.reduce(counts, "sum").tolist()
    assert num_seen == len(tests.images), (num_seen, len(tests.images))
    return int(num_correct)
