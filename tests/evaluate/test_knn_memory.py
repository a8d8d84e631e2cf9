"""The memory of a k-NN evaluation is that of its bank in 16 bits, and little else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pretrain.evaluate.encoder import CentreCrop, Encoder
from pretrain.evaluate.features import extract
from pretrain.evaluate.knn import knn, unit_half

WIDTH = 768
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GREY = (0.5, 0.5, 0.5)
PICTURES = torch.randint(256, (64, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Projection(nn.Module):
    """Stands for a network, of which nothing is measured here."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(1))

    def forward_features(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1) @ self.weight

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        return features


def peak_bytes(num_bank: int) -> int:
    """The largest resident memory of this process while it fills a bank and asks it."""
    encoder = Encoder("sketch", Projection(), "pooled", CentreCrop(2, 2), GREY, GREY, WIDTH, {})

    def stream(count: int) -> Iterator[tuple[int, int]]:
        return ((number, number % 10) for number in range(count))

    CLEAR.write_text("5")  # the peak starts anew
    bank = extract(
        encoder, stream(num_bank), lambda n: PICTURES[n % 64], 512, num_images=num_bank, keep=unit_half
    )
    queries = extract(encoder, stream(50), lambda n: PICTURES[n % 64], num_images=50)
    knn(bank, queries, chunk=512)
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not CLEAR.exists(), reason="the kernel of Linux keeps the peak")
def test_a_larger_bank_takes_two_bytes_a_number_more_and_no_second_copy() -> None:
    peak_bytes(5_000)  # what is allocated once
    small, large = peak_bytes(5_000), peak_bytes(30_000)
    more = 25_000 * WIDTH * 2
    assert large - small < 1.6 * more, (large - small) / more  # in 32 bits, or copied once, it is twice


@pytest.mark.slow
def test_features_of_imagenet_are_asked_below_four_gib(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "evaluate.py"
    out = tmp_path / "memory.json"
    command = [sys.executable, str(script), "knn-memory", "--num-queries", "64", "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    measured = json.loads(out.read_text())
    assert (measured["num_bank"], measured["width"]) == (1_281_167, 768)
    assert measured["peak_gib"] < 4
