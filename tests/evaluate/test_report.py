"""From names of weights and shards to saved results."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from range_server import RangeServer
from run_folder import seal, tiny_config, write_checkpoint

from pretrain.data.indexing import index_folder
from pretrain.errors import DataError, UserError
from pretrain.evaluate.frozen import run_knn, run_linear, take_features
from pretrain.evaluate.report import EvaluateConfig, results_folder
from pretrain.evaluate.shards import find_split, refuse_overlap
from pretrain.evaluate.table import table
from pretrain.export.timm_folder import export_timm

CPU = EvaluateConfig(device="cpu", batch_size=16)


def png(label: int, rng: np.random.Generator) -> bytes:
    """One of three colours, with noise."""
    pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
    pixels[:, :, label] += 150
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, count: int, seed: int, labels: bool = True, damaged: bool = False) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            content = png(number % 3, rng)
            members = {"png": content[:-30] if damaged and number == 3 else content}
            if labels:
                members["cls"] = str(number % 3).encode()
            for extension, data in members.items():
                entry = tarfile.TarInfo(f"{number:06d}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., Path]:
    def build(folder: str, **splits: int) -> Path:
        for seed, (name, count) in enumerate(splits.items()):
            write_shard(tmp_path / folder / f"set-{name}-0000.tar", count, seed)
        index_folder(tmp_path / folder)
        return tmp_path / folder

    return build


def test_colours_are_told_apart_and_results_are_saved(shards: Callable[..., Path], tmp_path: Path) -> None:
    folder = shards("data", train=60, test=30)
    write_checkpoint(tmp_path / "run", tiny_config())
    config = EvaluateConfig(device="cpu", batch_size=16, save=True)
    sets = take_features(tmp_path / "run", folder, folder, config)
    results = [
        run_knn(tmp_path / "run", folder, folder, config, ks=(5, 20), sets=sets),
        run_linear(tmp_path / "run", folder, folder, config, changes={"num_epochs": 20}, sets=sets),
        run_knn("pixels", folder, folder, CPU),
    ]
    for result in results:
        assert result["top1_ratio"] > 0.95
        assert (result["train"]["num_samples"], result["test"]["num_samples"]) == (60, 30)
    for result in results[:2]:
        path = tmp_path / "run" / "eval" / f"{result['method']}.json"
        assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert results[0]["encoder"]["step"] == 1000
    lines = table(results).splitlines()
    assert len(lines) == 4
    assert "pixels" in lines[3]


def test_results_go_to_the_run_and_never_into_a_sealed_checkpoint(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", tiny_config())
    assert results_folder(checkpoint) == tmp_path / "run" / "eval" / "step-00001000"
    assert results_folder(tmp_path / "run") == tmp_path / "run" / "eval"
    assert results_folder("pixels", tmp_path / "out") == tmp_path / "out" / "eval"
    with pytest.raises(UserError, match="--out"):
        results_folder("pixels")


def test_a_folder_alone_means_the_usual_split(shards: Callable[..., Path]) -> None:
    both = shards("both", train=6, test=6, val=6)
    assert find_split(both, "train").name == "train"
    assert find_split(both, "test").name == "test"
    assert find_split(f"{both}:val", "test").name == "val"
    assert find_split(shards("trainval", train=6, val=6), "test").name == "val"
    assert find_split(shards("only", test=6), "train").name == "test"


def test_a_split_that_cannot_be_guessed_or_found_is_listed(shards: Callable[..., Path]) -> None:
    folder = shards("data", test=6, val=6)
    with pytest.raises(DataError, match=r"which split is the train set.*test, val"):
        find_split(folder, "train")
    with pytest.raises(DataError, match="no split 'tset'"):
        find_split(f"{folder}:tset", "test")


def test_the_port_of_an_address_is_no_split(
    shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    folder = shards("served", train=6, test=6)
    with RangeServer(folder) as server:
        assert find_split(server.url, "train").name == "train"
        assert find_split(f"{server.url}/", "train").name == "train"
        assert find_split(f"{server.url}/:test", "train").name == "test"
    with RangeServer(folder.parent) as server:
        assert find_split(f"{server.url}/served", "train").name == "train"
        assert find_split(f"{server.url}/served:test", "train").name == "test"
    unclear = shards("unclear", test=6, val=6)
    with RangeServer(unclear) as server:
        with pytest.raises(DataError, match=rf"--train {server.url}/:test"):
            find_split(server.url, "train")
        assert find_split(f"{server.url}/:test", "train").name == "test"


def test_training_and_testing_on_the_same_samples_is_refused(
    shards: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shards("data", train=6, test=6)
    with pytest.raises(DataError, match="same samples"):
        refuse_overlap(find_split(folder, "train"), find_split(f"{folder}:train", "test"))
    copy = tmp_path / "copy" / "renamed-test-0.tar"
    copy.parent.mkdir()
    copy.write_bytes((folder / "set-train-0000.tar").read_bytes())
    index_folder(copy.parent)
    with pytest.raises(DataError, match="same samples"):
        refuse_overlap(find_split(folder, "train"), find_split(copy.parent, "test"))
    refuse_overlap(find_split(folder, "train"), find_split(folder, "test"))


def test_a_test_set_of_other_classes_is_refused_before_anything_is_encoded(
    shards: Callable[..., Path], tmp_path: Path
) -> None:
    write_shard(tmp_path / "few" / "few-train-0.tar", 2, seed=9)  # without label 2
    index_folder(tmp_path / "few")
    with pytest.raises(DataError, match=r"3 classes, of which 1 \(such as 2\).*two splits of one labelling"):
        take_features("pixels", tmp_path / "few", shards("data", test=6), CPU)


def test_a_result_says_whether_its_data_are_those_of_the_pretraining(
    shards: Callable[..., Path], tmp_path: Path
) -> None:
    own, other = shards("own", train=12, test=6), shards("other", train=15, test=6)
    checkpoint = write_checkpoint(tmp_path / "run", tiny_config())
    state = json.loads((checkpoint / "state.json").read_text())
    state["identity"] = {"manifest_hash": [find_split(own, "train").manifest.hash]}
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)
    export_timm(tmp_path / "run", tmp_path / "export")
    for weights in (tmp_path / "run", tmp_path / "export"):
        at_home = run_knn(weights, own, own, CPU)
        assert at_home["domain"]["is_transfer"] is False
        assert "transfer" not in table([at_home])
        colours = replace(CPU, normalization_of_data=True)
        away = run_knn(weights, other, other, colours)
        assert away["domain"] == {
            "pretrained_on": ["data_shards/cifar10"],
            "evaluated_on": str(other),
            "is_transfer": True,
            "normalization": "of the data",
        }
        assert "transfer from cifar10 to other, normalisation of the data" in table([away])
    assert run_knn("pixels", own, own, CPU)["domain"]["is_transfer"] is None


@pytest.mark.parametrize(
    ("shard", "message"),
    [({"labels": False}, "has no label"), ({"damaged": True}, r"image '000003'.*damaged")],
)
def test_a_sample_that_cannot_be_used_is_named(
    shard: dict[str, bool], message: str, shards: Callable[..., Path], tmp_path: Path
) -> None:
    write_shard(tmp_path / "bad" / "bad-test-0.tar", 6, seed=9, **shard)
    index_folder(tmp_path / "bad")
    with pytest.raises(DataError, match=message):
        take_features("pixels", shards("data", train=6), tmp_path / "bad", CPU)
