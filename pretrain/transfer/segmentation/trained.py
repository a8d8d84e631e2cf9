"""A trained segmenter on disk: its weights, and what they are for.

FOLDER/segmenter.safetensors    backbone, neck, decoder and auxiliary heads
FOLDER/segmenter.json           recipe, classes, steps, sha256 of the weights
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pretrain.errors import CheckpointError, UserError
from pretrain.export.source import sha256_of
from pretrain.transfer.segmentation.recipe import SegmentationRecipe
from pretrain.transfer.segmentation.segmenter import Segmenter

WEIGHTS, DESCRIPTION = "segmenter.safetensors", "segmenter.json"


def cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"--out {folder}: cannot be written ({error.strerror or error}); make room, or choose another folder"
    )


def write_trained(
    folder: Path, segmenter: Segmenter, recipe: SegmentationRecipe, classes: Sequence[str], num_steps: int
) -> None:
    """Called by one process."""
    try:
        temporary = folder / f"{WEIGHTS}.tmp"
        save_file({name: value.contiguous() for name, value in segmenter.state_dict().items()}, temporary)
        temporary.replace(folder / WEIGHTS)
        record = {
            "recipe": recipe.model_dump(mode="json"),
            "classes": list(classes),
            "num_steps": num_steps,
            "sha256": sha256_of(folder / WEIGHTS),
        }
        temporary = folder / f"{DESCRIPTION}.tmp"
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(folder / DESCRIPTION)
    except OSError as error:
        raise cannot_write(folder, error) from error


def read_trained(
    folder: Path, segmenter: Segmenter, recipe: SegmentationRecipe, classes: Sequence[str]
) -> dict[str, Any]:
    """Put trained weights into a segmenter of the same recipe; what their description says."""
    path = folder / DESCRIPTION
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        known, kind, sha256 = record["classes"], record["recipe"]["head"]["kind"], record["sha256"]
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found; --evaluate-only tests what a training has left in --out, so train first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); train again") from None
    if len(known) != len(classes):
        raise UserError(
            f"{folder}: its head knows {len(known)} classes, the data has {len(classes)}; test on data with "
            "the same classes, or train anew with another --out"
        )
    if known != list(classes):
        first = next(number for number, name in enumerate(classes) if known[number] != name)
        raise UserError(
            f"{folder}: class {first} of its head is '{known[first]}', of the data '{classes[first]}'; "
            "test on data with the same classes in the same order"
        )
    if kind != recipe.head.kind:
        raise UserError(
            f"{folder}: its head is '{kind}', the recipe says '{recipe.head.kind}'; use the --config and "
            "settings that it was trained with"
        )
    try:
        if sha256_of(folder / WEIGHTS) != sha256:
            raise CheckpointError(f"{folder / WEIGHTS}: damaged (sha256 differs); train again")
        weights = load_file(folder / WEIGHTS)
    except OSError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be read ({error.strerror})") from None
    own = segmenter.state_dict()
    wrong = [
        name
        for name in sorted({*own, *weights})
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {len(wrong)} tensors do not fit this network, the first is {wrong[0]}; use "
            "the WEIGHTS, --config and settings that it was trained with"
        )
    with torch.no_grad():
        segmenter.load_state_dict(weights)
    return record
