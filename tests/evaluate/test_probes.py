"""All read-outs on one encoding give the numbers of each alone, and further sets beside the main one."""

from __future__ import annotations

import io
import json
import statistics
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from run_folder import TINY, tiny_config, write_checkpoint
from small_shards import real_data
from torch import Tensor

from pretrain.cli import main
from pretrain.data.indexing import index_folder
from pretrain.errors import UserError
from pretrain.evaluate.encoder import Encoder
from pretrain.evaluate.frozen import run_knn, run_linear
from pretrain.evaluate.probes import ProbesRequest, run_probes
from pretrain.evaluate.probes_table import format_probes
from pretrain.evaluate.report import EvaluateConfig

CPU = EvaluateConfig(device="cpu", batch_size=16)
QUICK = {"num_epochs": 30, "base_lr": 0.003}
REQUEST = ProbesRequest(("mean_patch", "class_last4"), (0.2, 1.0), linear_changes=QUICK, ks=(5, 20))


def write_images(path: Path, numbers: Sequence[int], classes_on: int = 0) -> None:
    """Noise with a tint of three colours, too faint to be always told; an image follows from its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in numbers:
            rng = np.random.default_rng(number)
            pixels = rng.normal(128, 40, (32, 32, 3)) + rng.normal(0, 12, 3)
            pixels[:, :, number % 3] += 22
            buffer = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
            label = str((number + classes_on) % 3).encode()
            for extension, data in (("png", buffer.getvalue()), ("cls", label)):
                entry = tarfile.TarInfo(f"{number:06d}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four blocks; 120 train and 60 test images; sets that overlap with the latter."""
    folder = tmp_path_factory.mktemp("probes")
    write_checkpoint(folder / "run", tiny_config(args={**TINY, "depth": 4}))
    write_images(folder / "data" / "a-train-0.tar", range(1000, 1120))
    write_images(folder / "data" / "a-test-0.tar", range(60))
    write_images(folder / "partly" / "b-test-0.tar", range(50, 80))
    write_images(folder / "alike" / "c-test-0.tar", range(30), classes_on=1)
    for name in ("data", "partly", "alike"):
        index_folder(folder / name)
    return folder


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images every call of the encoder was given."""
    counts: list[int] = []
    encode = Encoder.encode

    def counting(self: Encoder, images: Tensor) -> Tensor:
        counts.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Encoder, "encode", counting)
    return counts


def run(place: Path, request: ProbesRequest = REQUEST) -> dict[str, Any]:
    return run_probes(place / "run", place / "data", place / "data", request, CPU)


def test_the_numbers_are_those_of_each_read_out_alone_and_every_image_is_encoded_once(
    place: Path, encoded: list[int]
) -> None:
    seeds = replace(REQUEST, seeds=(3,))
    result = run(place, seeds)
    assert sum(encoded) == 120 + 60
    for feature in REQUEST.features:
        config = replace(CPU, feature=feature)
        nearest = run_knn(place / "run", place / "data", place / "data", config, ks=(5, 20))
        linear = run_linear(place / "run", place / "data", place / "data", config, changes=QUICK, seeds=(3,))
        found = result[feature]
        assert found["knn"].items() <= nearest.items()
        for key in ("top1_ratio", "top1_ratio_95", "runs"):
            assert found["linear"]["100pct"][key] == linear[key]
        assert 0.4 < found["knn"]["top1_ratio"] < 0.95  # neither is trivial
        assert 0.4 < linear["top1_ratio"] < 0.95
    assert [result[key] for key in ("top1_ratio", "reported")] == [
        result["mean_patch"]["linear"]["100pct"]["top1_ratio"],
        "mean_patch.linear.100pct",
    ]
    assert without_seconds(run(place, seeds)) == without_seconds(result)  # the same bits


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if not key.endswith("_seconds")}


def test_the_protocol_names_the_features_and_its_own_comes_first(place: Path) -> None:
    one_epoch = ProbesRequest(fractions=(1.0,), linear_changes={"num_epochs": 1}, ks=(5,))
    plain = run(place, one_epoch)
    assert plain["protocol"] == "sit"  # without a token of the rotation task it reads the class token alone
    assert plain["features"] == ["class"]
    assert run(place, replace(one_epoch, features=("pooled", "class")))["features"] == ["class", "pooled"]


def test_several_seeds_have_a_mean_and_a_deviation_and_shares_of_their_own(place: Path) -> None:
    result = run(place, replace(REQUEST, features=("class",), seeds=(0, 1, 2)))
    for name, num_train in (("20pct", 24), ("100pct", 120)):
        found = result["class"]["linear"][name]
        ratios = [one["top1_ratio"] for one in found["runs"]]
        assert found["num_train"] == num_train
        assert found["top1_ratio"] == pytest.approx(statistics.fmean(ratios))
        assert found["top1_ratio_std"] == pytest.approx(statistics.stdev(ratios))
    few, whole = (result["class"]["linear"][name]["runs"][0] for name in ("20pct", "100pct"))
    assert (few["num_folds"], few["num_held_out"]) == (8, 24)  # 8 labels of a class: each is held out once
    assert (whole["num_folds"], whole["num_held_out"]) == (1, 12)
    assert "+- deviation of 3 seeds" in format_probes(result)


def test_a_further_set_is_compared_image_by_image_where_its_keys_are_those_of_the_test_set(
    place: Path, encoded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    where = f"{place / 'partly'}:test", f"renamed={place / 'partly'}", str(place / "alike")
    request = replace(REQUEST, features=("class",), also_test=where)
    result = run(place, request)
    assert sum(encoded) == 120 + 60 + 30 + 30 + 30
    assert without_seconds(result)["class"] == run(place, replace(request, also_test=()))["class"]
    also = result["also"]
    assert list(also) == ["partly-test", "renamed", "alike"]
    assert also["renamed"] == also["partly-test"]
    alone = run_knn(place / "run", place / "data", place / "partly", replace(CPU, feature="class"), ks=(20,))
    for read_out in ("knn", "linear"):
        found = also["renamed"]["class"][read_out]
        # ten of the thirty images are of the test set as well, pixel by pixel
        assert (found["num_test"], found["num_same_keys"]) == (30, 10)
        assert found["agreement_ratio"] == 1.0
        assert found["own_same_keys_top1_ratio"] == found["same_keys_top1_ratio"]
        assert found["same_keys_top1_ratio"] * 10 == pytest.approx(round(found["same_keys_top1_ratio"] * 10))
    assert also["renamed"]["class"]["knn"]["top1_ratio"] == alone["top1_ratio"]
    # the same numbers for images of other classes: not the same images
    assert also["alike"]["num_same_keys"] == 0
    assert also["alike"]["class"]["linear"]["agreement_ratio"] is None
    assert "30 keys in common, but other classes" in caplog.text
    assert "renamed" in format_probes(result)


def test_the_heads_that_read_further_sets_are_those_that_were_tested(place: Path) -> None:
    """The whole test set once more, in another order, under another name."""
    write_images(place / "again" / "d-test-0.tar", range(59, -1, -1))
    index_folder(place / "again")
    result = run(place, replace(REQUEST, seeds=(0, 1), also_test=(str(place / "again"),)))
    for feature in REQUEST.features:
        found, main = result["also"]["again"][feature], result[feature]
        assert found["linear"]["top1_ratio"] == main["linear"]["100pct"]["top1_ratio"]
        assert found["linear"]["same_keys_top1_ratio"] == pytest.approx(found["linear"]["top1_ratio"])
        assert found["linear"]["top1_ratio_std"] == main["linear"]["100pct"]["top1_ratio_std"]
        assert found["knn"]["top1_ratio"] == main["knn"]["top1_ratio"]
        assert found["knn"]["agreement_ratio"] == found["linear"]["agreement_ratio"] == 1.0


def test_a_small_budget_takes_as_many_images_of_each_class_and_says_so(
    place: Path, encoded: list[int]
) -> None:
    request = replace(REQUEST, features=("class",), num_train=60, num_test=30, fractions=(0.5, 1.0))
    result = run(place, replace(request, also_test=(str(place / "partly"),)))
    assert sum(encoded) == 60 + 30 + 30
    assert (result["num_train"], result["num_test"]) == (60, 30)
    assert result["class"]["linear"]["50pct"]["num_train"] == 30
    assert 0 < result["also"]["partly"]["num_same_keys"] < 10  # fewer of the main set are left
    assert "60 train images of 120, 30 test images of 60" in format_probes(result)
    assert run(place, request)["class"] == result["class"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fractions": (0.02, 1.0)}, r"--fractions 0.02: of 120 train images.*larger shares"),
        ({"fractions": (1.0, 1.0)}, r"--fractions: 1.0 1.0 names one twice"),
        ({"seeds": (1, 1)}, r"--seeds: 1 1 names one twice"),
        ({"num_test": 2}, r"--num-test 2: .*3 classes; give at least"),
        ({"features": ("class_rotation",)}, r"class_rotation: .*no token of the rotation task"),
        (
            {"also_test": ("{}/partly", "{}/partly:test", "{}/partly")},
            r"two sets are called 'partly'.*OTHER=",
        ),
        ({"also_test": ("{}/data:train",)}, r"--also-test .*/data:train hold the same samples"),
        ({"also_test": ("{}/data:val",)}, r"no split 'val'"),
    ],
)
def test_what_cannot_be_read_out_is_told_before_anything_is_encoded(
    changes: dict[str, Any], told: str, place: Path, encoded: list[int]
) -> None:
    if "also_test" in changes:
        changes = {"also_test": tuple(where.format(place) for where in changes["also_test"])}
    with pytest.raises(UserError, match=told):
        run(place, replace(REQUEST, **changes))
    assert not encoded


def test_the_command_keeps_its_result_and_shows_a_table(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(place / "data")
    command = ["evaluate", "probes", str(place / "run"), "--train", data, "--test", data, "--device", "cpu"]
    options = ["--fractions", "0.5", "1", "--epochs", "2", "--inputs", "raw", "--num-test", "30"]
    further = ["--features", "class", "pooled", "--also-test", str(place / "partly"), "--out", str(tmp_path)]
    assert main([*command, *options, *further]) == 0
    result = json.loads((tmp_path / "eval" / "probes.json").read_text())
    told = capsys.readouterr().out
    assert f"{100 * result['class']['linear']['50pct']['top1_ratio']:.2f}" in told
    assert "linear 50 % (60)" in told
    assert {one["inputs"] for one in result["pooled"]["linear"]["100pct"]["runs"][0]["heads"]} == {"raw"}
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--fractions", "1.5"])
    assert stopped.value.code == 2
    assert "1.5: a share is above 0 and at most 1" in capsys.readouterr().err


def test_fresh_weights_are_drawn_from_their_own_seed(place: Path, tmp_path: Path) -> None:
    data = ["--train", f"{place / 'data'}:train", "--test", f"{place / 'data'}:test"]
    settings = ["--features", "mean_patch", "--fractions", "1", "--epochs", "2", "--device", "cpu"]
    found = {}
    for name, seed in (("none", []), ("zero", ["--weights-seed", "0"]), ("one", ["--weights-seed", "1"])):
        out = tmp_path / name
        weights = f"untrained:{place / 'run'}"
        assert main(["evaluate", "probes", weights, *data, *settings, *seed, "--out", str(out)]) == 0
        found[name] = json.loads((out / "eval" / "probes.json").read_text())
    assert [one["encoder"]["seed"] for one in found.values()] == [0, 0, 1]
    linear = {name: one["mean_patch"]["linear"] for name, one in found.items()}
    assert linear["none"] == linear["zero"]
    assert linear["one"] != linear["zero"]


def test_lossless_copies_of_real_test_images_are_paired_with_them(tmp_path: Path) -> None:
    """Nearly all predictions agree. Half of the test set serves to learn from."""
    shards = sorted(real_data("cifar10").glob("*test*.tar.gz"))
    index_folder(real_data("cifar10-lossless-subset"), tmp_path / "lossless")
    (tmp_path / "cifar10").mkdir()
    for split, shard in zip(("test", "train"), shards, strict=True):
        (tmp_path / "cifar10" / f"half-{split}-0.tar.gz").symlink_to(shard)
    index_folder(tmp_path / "cifar10")
    request = ProbesRequest(
        fractions=(1.0,), linear_changes=QUICK, num_train=100, also_test=(str(tmp_path / "lossless"),)
    )
    result = run_probes("pixels", tmp_path / "cifar10", tmp_path / "cifar10", request, CPU)
    found = result["also"]["lossless"]["pixels"]
    for read_out in (found["knn"], found["linear"]):
        assert read_out["num_same_keys"] == read_out["num_test"] == 1000
        assert 0.9 < read_out["agreement_ratio"] < 1
        assert read_out["own_same_keys_top1_ratio"] == pytest.approx(read_out["top1_ratio"])
