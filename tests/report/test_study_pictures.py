"""Pictures of the study are of a finished run of all tasks, small, and the same every time."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from study.document import Document
from study.pictures import MAX_BYTES, attention_on, main
from study.records import read
from study.sheet import WIDTH_PX, Cell, Column, Group, Legend, Outline, draw

from pretrain.evaluate.encoder import UNTRAINED
from pretrain.illustrate.head import readers_of
from pretrain.illustrate.images import pick, split_of
from pretrain.illustrate.predictions import restorations_of
from pretrain.illustrate.run_files import config_of_run, open_run

STORED = Path(__file__).parents[1] / "benchmarks" / "study_results"
NAMES = ("restorations.png", "attention.png")


@pytest.fixture(scope="module")
def drawn(multitask_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's results with pictures of two images beside them."""
    results = tmp_path_factory.mktemp("results")
    shutil.copytree(STORED / "core_cpu", results / "core_cpu")
    folder = results / "core_cpu" / "pictures"
    assert main([str(multitask_run), "--images", "2", "--out", str(folder)]) == 0
    return folder


def test_pictures_are_small_and_the_same_every_time(drawn: Path, multitask_run: Path, tmp_path: Path) -> None:
    assert main([str(multitask_run), "--images", "2", "--out", str(tmp_path)]) == 0
    for name in NAMES:
        assert (drawn / name).read_bytes() == (tmp_path / name).read_bytes()
        assert (drawn / name).stat().st_size < MAX_BYTES
        with Image.open(drawn / name) as image:
            assert WIDTH_PX / 2 < image.width <= WIDTH_PX


def test_what_is_said_of_them_is_of_the_run_and_its_images(
    drawn: Path, multitask_run: Path, photographs: Path
) -> None:
    about = json.loads((drawn / "about.json").read_text())
    files = open_run(multitask_run, config_of_run(multitask_run))
    assert files.saved is not None
    picked = pick(split_of(str(photographs), "test"), 2)
    assert about["images"] == picked.sample_ids.tolist()
    assert about["source"].endswith(":test")
    assert (about["step"], about["seed"]) == (8, 5)
    assert about["commit"] == files.environment["commit"]
    assert str(multitask_run.parent) not in json.dumps(about)
    tasks = restorations_of(files.config, files.saved, picked, 2, torch.device("cpu"))
    means = {task.task: np.mean([row.error for row in task.rows]) for task in tasks}
    told = re.findall(r"Mean difference here: ([\d.]+)", about["captions"]["restorations"])
    assert told == [f"{means[name]:.3f}" for name in ("colorization", "inpainting")]
    assert "gives each 1.5 %" in about["captions"]["attention"]  # of 64 patches, class and rotation token


def test_fresh_weights_are_the_same_whatever_was_trained(multitask_run: Path, photographs: Path) -> None:
    config = config_of_run(multitask_run)
    picked = pick(split_of(str(photographs), "test"), 1)

    def maps(weights: str) -> NDArray[np.float32]:
        return (
            attention_on(multitask_run, config, weights, picked, readers_of(config)).images[0].tokens[0].heads
        )

    first, *_, last = sorted(map(str, (multitask_run / "checkpoints").glob("step-*")))
    assert not np.array_equal(maps(first), maps(last))
    assert np.array_equal(maps(UNTRAINED + first), maps(UNTRAINED + last))
    assert not np.array_equal(maps(UNTRAINED + last), maps(last))


def test_the_document_shows_them_with_their_captions(drawn: Path, tmp_path: Path) -> None:
    about = json.loads((drawn / "about.json").read_text())
    told = Document(read(drawn.parents[1]), tmp_path / "study").pictures()
    for name in NAMES:
        link = told.index(f"core_cpu/pictures/{name})")
        assert told[link:].split("\n\n")[1] == about["captions"][Path(name).stem]
    assert f"Run `{about['run']}`: step 8, seed 5, commit `{about['commit'][:12]}`" in told
    assert told.endswith(f"{about['train_command']}\n{about['command']}\n```")


def test_a_pixel_becomes_a_square_and_a_patch_gets_a_frame_around_it() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[5, 6] = (255, 0, 255)
    frame = Outline("#00ff00", (9,), 8, 4)  # second row and column
    columns = (Column("plain", (Cell(pixels),)), Column("framed", (Cell(pixels, (frame,)),)))
    png = draw([Group("all", columns)], ["one"], Legend((), ("0", "1")))
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    times = 14  # 32 px twice, the name and the gaps fit into the width that many times
    dots = (sheet == (255, 0, 255)).all(axis=2)
    green = (sheet == (0, 255, 0)).all(axis=2)
    rows, columns_of_dots = dots.nonzero()
    assert rows.max() - rows.min() + 1 == times
    assert dots.sum() == 2 * times**2
    framed = columns_of_dots.max() - times + 1  # where the second dot begins
    tops, lefts = green.nonzero()
    assert (tops.min(), lefts.min()) == (rows.min() - times, framed - 2 * times)
    assert (tops.max() - tops.min() + 1, lefts.max() - lefts.min() + 1) == (4 * times, 4 * times)


def _lacking(run: Path, folder: Path, *tasks: str) -> Path:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["tasks"] = {name: one for name, one in config["tasks"].items() if name not in tasks}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_run_that_cannot_be_drawn_is_told_in_one_line(
    multitask_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halfway = tmp_path / "halfway"
    shutil.copytree(multitask_run, halfway)
    shutil.rmtree(max((halfway / "checkpoints").glob("step-*")))
    file = tmp_path / "file"
    file.write_text("")
    out = str(tmp_path / "out")
    wrong = {
        "is not finished, its newest checkpoint is of step 6 of 8": [str(halfway), "--out", out],
        "has no task inpainting (only": [str(_lacking(multitask_run, tmp_path, "inpainting")), "--out", out],
        "there is no such folder": [str(tmp_path / "nowhere"), "--out", out],
        "--images 0: give 1 to": [str(multitask_run), "--images", "0", "--out", out],
        "name the folder that the pictures go to": [str(multitask_run), "--out", str(file)],
    }
    for told, words in wrong.items():
        assert main(words) == 2
        err = capsys.readouterr().err
        assert told in err
        assert err.count("\n") == 1
    assert main([str(_lacking(multitask_run, tmp_path, "contrastive")), "--out", out]) == 2
    assert "one that reads the class token" in capsys.readouterr().err
    assert not Path(out).exists()
