"""The probe on augmented images is trained on other crops in every epoch, and chosen as honestly."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.data.indexing import index_folder
from pretrain.evaluate.frozen import run_linear, take_features
from pretrain.evaluate.report import EvaluateConfig

CONFIG = EvaluateConfig(device="cpu", batch_size=32)
QUICK = {"num_epochs": 30, "batch_size": 32}


HALVES = (slice(None), slice(0, 8)), (slice(None), slice(8, 16)), (slice(0, 8),), (slice(8, 16),)


def write_sides(folder: Path) -> Path:
    """Grey pictures with a bright half: left or right (label 0 or 1), or upper or lower (2 or 3)."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 160), ("test", 80)):
        with tarfile.open(folder / f"set-{split}-0000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(count):
                pixels = rng.integers(60, 120, (16, 16, 3), dtype=np.uint8)
                label = number % 4
                half = (
                    (slice(None), slice(0, 8)),
                    (slice(None), slice(8, 16)),
                    (slice(0, 8),),
                    (slice(8, 16),),
                )
                pixels[half[label]] += 60
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                for name, data in (("png", buffer.getvalue()), ("cls", str(label).encode())):
                    entry = tarfile.TarInfo(f"{number:06d}.{name}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    index_folder(folder)
    return folder


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sides(tmp_path_factory.mktemp("sides") / "data")


def test_flips_hide_which_side_is_bright_but_not_whether_it_is_above(sides: Path) -> None:
    """On cached features all four are told apart; with flips left and right are one, a guess of half."""
    sets = take_features("pixels", sides, sides, CONFIG)
    cached = run_linear("pixels", sides, sides, CONFIG, changes=QUICK, sets=sets)
    assert cached["top1_ratio"] == 1.0
    assert cached["augmentation"].startswith("none")
    augmented = run_linear("pixels", sides, sides, CONFIG, changes=QUICK, augment=True, sets=sets)
    assert augmented["augmentation"] == "random crops of the image padded by 4 px, flips"
    assert augmented["top1_ratio"] == pytest.approx(0.75, abs=0.15)
    (run,) = augmented["runs"]
    assert (run["num_train"], run["num_held_out"], run["num_test"]) == (160, 16, 80)
    again = run_linear("pixels", sides, sides, CONFIG, changes=QUICK, augment=True, sets=sets)
    assert again["runs"] == augmented["runs"]


def test_several_seeds_give_an_interval(sides: Path) -> None:
    result = run_linear("pixels", sides, sides, CONFIG, changes={"num_epochs": 1}, seeds=(0, 1, 2))
    ratios = [run["top1_ratio"] for run in result["runs"]]
    assert [run["seed"] for run in result["runs"]] == [0, 1, 2]
    assert result["top1_ratio"] == pytest.approx(sum(ratios) / 3)
    assert result["interval"] == "Student, over 3 seeds"
