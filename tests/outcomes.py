"""What a run has left in its folder, as tests compare it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pretrain import checkpoint


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that is being written is left out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def digests(run: Path) -> dict[int, float]:
    """Of each step, a number that depends on every sample and its place in the global batch."""
    return {record["step"]: record["samples"] for record in records(run)}


def last_step(run: Path) -> int:
    return max((record["step"] for record in records(run)), default=0)


def assert_same_tensors(one: Path, other: Path, *names: str) -> None:
    """Two checkpoints hold the same bits: in student, teacher and optimizer, or in the named files."""
    for name in names or (checkpoint.STUDENT, checkpoint.TEACHER, checkpoint.OPTIMIZER):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert torch.equal(value, second[key]), f"{name}: {key}"
