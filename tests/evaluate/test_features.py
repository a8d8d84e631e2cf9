"""Features come out once per image, in order, whatever the batches and the number of processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pretrain.errors import DataError
from pretrain.evaluate.encoder import CentreCrop, Encoder
from pretrain.evaluate.features import extract

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def tiny_encoder() -> Encoder:
    return Encoder("tiny", nn.Identity(), "pixels", CentreCrop(2, 2), ZERO, ONE, 12, {})


def image(number: int) -> Tensor:
    return torch.full((3, 2, 2), number, dtype=torch.uint8)


def stream(count: int) -> list[tuple[int, int]]:
    return [(number, number * 10) for number in range(count)]


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (8, 4), (11, 4), (3, 100)])
def test_each_image_is_encoded_once_and_in_order(count: int, batch_size: int) -> None:
    found = extract(tiny_encoder(), stream(count), image, batch_size)
    assert (found.features[:, 0] * 255).round().int().tolist() == list(range(count))
    assert found.labels.tolist() == [number * 10 for number in range(count)]
    assert found.features.dtype == torch.float32


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        extract(tiny_encoder(), [], image)


def test_a_failure_to_prepare_an_image_is_not_swallowed() -> None:
    def prepare(number: int) -> Tensor:
        if number == 5:
            raise DataError("image 5 is damaged")
        return image(number)

    with pytest.raises(DataError, match="image 5"):
        extract(tiny_encoder(), stream(8), prepare, batch_size=2)


@pytest.mark.distributed
@pytest.mark.parametrize("count", [1, 8, 11])
def test_two_processes_get_exactly_what_one_gets(count: int, tmp_path: Path) -> None:
    """Also where the last round leaves one process short, or without any image."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (
        "import sys, torch\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]\n"
        "from accelerate import Accelerator\n"
        "from test_features import extract, image, stream, tiny_encoder\n"
        "accelerator = Accelerator(cpu=True)\n"
        f"found = extract(tiny_encoder(), stream({count}), image, 3, accelerator=accelerator)\n"
        "torch.save((found.features, found.labels), f'rank{accelerator.process_index}.pt')\n"
        "accelerator.end_training()\n"
    )
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    expected = extract(tiny_encoder(), stream(count), image)
    for rank in range(2):
        features, labels = torch.load(tmp_path / f"rank{rank}.pt")
        assert torch.equal(features, expected.features)
        assert torch.equal(labels, expected.labels)
