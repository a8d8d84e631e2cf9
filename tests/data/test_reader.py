from __future__ import annotations

import gzip
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import make_shards, real_data, samples, write_shard

from pretrain.data.indexing import index_folder
from pretrain.data.manifest import Manifest, Shard
from pretrain.data.order import Run
from pretrain.data.reader import ShardReader, read_split
from pretrain.data.storage import RangeFile, StorageConfig, open_file
from pretrain.errors import DataError


@pytest.fixture(scope="module")
def hurtable(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("hurtable"), [4])


def reader_of(manifest: Manifest) -> closing[ShardReader]:
    return closing(ShardReader(manifest.split("train")))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_runs_give_the_bytes_that_were_packed(tmp_path: Path, suffix: str) -> None:
    manifest = make_shards(tmp_path, [5, 4], suffix)
    packed = dict(samples(0, 9))
    with reader_of(manifest) as reader:
        for runs, expected in [
            ([Run(0, 1, 3, 0)], [1, 2]),
            ([Run(0, 3, 5, 0), Run(1, 0, 1, 0)], [3, 4, 5]),
            ([Run(1, 0, 4, 0)], [5, 6, 7, 8]),  # back to the front
            ([Run(0, 0, 1, 0)], [0]),
        ]:
            read = reader.read(runs)
            assert [sample.sample_id for sample in read] == expected
            for sample in read:
                assert sample.image == packed[f"{sample.key}.jpg"]
                assert sample.label == int(packed[f"{sample.key}.cls"])


def test_labels_come_from_cls_or_json_or_are_none(tmp_path: Path) -> None:
    image = samples(0, 1)[0][1]
    fields = {
        "a": [],
        "b": [("cls", b"12")],
        "c": [("json", b'{"label": 7, "x": 1}')],
        "d": [("cls", b"dog")],
    }
    fields |= {"e": [("json", b'{"label": "7"}')], "f": [("json", b"[1]")], "g": [("json", b"{")]}
    members = [
        (f"{key}.{name}", data) for key, rest in fields.items() for name, data in [("JPG", image), *rest]
    ]
    write_shard(tmp_path / "0.tar", members)
    manifest = index_folder(tmp_path)
    assert [sample.label for sample in read_split(manifest.split("train"))] == [
        None,
        12,
        7,
        None,
        None,
        None,
        None,
    ]


def test_a_split_is_read_whole_and_in_order(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, [300, 2], height=8, width=8)
    assert [sample.sample_id for sample in read_split(manifest.split("train"))] == list(range(302))


def hurt(manifest: Manifest, place: int, data: bytes) -> None:
    """Overwrite bytes of the first shard, leaving its size as it was."""
    with manifest.shards[0].path.open("r+b") as file:
        file.seek(place)
        file.write(data)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_changed_byte_shows_in_its_sample_and_in_no_other(hurtable: Manifest, data: st.DataObject) -> None:
    shard = hurtable.shard(0)
    starts = hurtable.samples(shard).starts
    place = data.draw(st.integers(0, int(starts[-1]) - 1))
    whole = shard.path.read_bytes()
    hurt(hurtable, place, bytes([whole[place] ^ data.draw(st.integers(1, 255))]))
    try:
        read = list(read_split(hurtable.split("train")))
    finally:
        shard.path.write_bytes(whole)
    rotten = [sample.sample_id for sample in read if not sample.is_intact]
    assert rotten == [int(np.searchsorted(starts, place, side="right")) - 1]
    assert len(read) == 4
    assert all(isinstance(sample.key, str) for sample in read)


@pytest.mark.parametrize("shift", [0, 1023])
def test_a_damaged_end_marker_is_an_error(tmp_path: Path, shift: int) -> None:
    manifest = make_shards(tmp_path, [4])
    hurt(manifest, int(manifest.samples(manifest.shard(0)).starts[4]) + shift, b"x")
    problem = r"train-0\.tar: does not hold what its index says \(no end-of-archive marker at byte \d+\)"
    with reader_of(manifest) as reader, pytest.raises(DataError, match=problem):
        reader.read([Run(0, 0, 4, 0)])


def test_a_shard_of_as_many_other_bytes_has_no_intact_sample(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, [4])
    numbers = range(4, 8)
    path = manifest.shard(0).path
    sizes = manifest.samples(manifest.shard(0)).image_bytes.tolist()
    members = [
        (f"{number:06d}.{kind}", bytes(size if kind == "jpg" else 1))
        for number, size in zip(numbers, sizes, strict=True)
        for kind in ("jpg", "cls")
    ]
    write_shard(path, members)
    assert path.stat().st_size == manifest.shard(0).num_bytes
    assert not any(sample.is_intact for sample in read_split(manifest.split("train")))


def test_damaged_columns_of_the_index_are_an_error_where_they_are_used(tmp_path: Path) -> None:
    make_shards(tmp_path, [4, 5])
    data = bytearray((tmp_path / "index.safetensors").read_bytes())
    labels = data.rindex(np.array([4, 5, 6, 7, 8], dtype="<i4").tobytes())
    data[labels] ^= 1
    (tmp_path / "index.safetensors").write_bytes(data)
    manifest = Manifest.load(tmp_path)
    with reader_of(manifest) as reader:
        assert len(reader.read([Run(0, 0, 4, 0)])) == 4
        with pytest.raises(DataError, match=r"damaged where it speaks of train-1\.tar; run `pretrain shards"):
            reader.read([Run(1, 0, 1, 0)])


def test_a_shard_that_shrinks_after_loading_is_an_error(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, [4])
    with reader_of(manifest) as reader:
        reader.read([Run(0, 0, 1, 0)])
        os.truncate(manifest.shard(0).path, int(manifest.samples(manifest.shard(0)).starts[2]))
        with pytest.raises(DataError, match="bytes instead of"):
            reader.read([Run(0, 1, 3, 0)])


def test_a_shard_that_vanishes_is_an_error_that_names_it(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, [2])
    manifest.shard(0).path.unlink()

    class Quick:
        def __call__(self, shard: Shard) -> RangeFile:
            return open_file(shard.location, StorageConfig(retry_seconds=(0.0,)))

        def distrust(self, shard: Shard) -> bool:
            return False

    with pytest.raises(DataError, match=r"train-0\.tar: cannot be read \(no such file"):
        list(read_split(manifest.split("train"), Quick()))


def test_rotten_compressed_bytes_are_an_error(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, [40], suffix=".tar.gz")
    middle = manifest.shards[0].num_bytes // 2
    hurt(
        manifest,
        middle,
        bytes(byte ^ 0xFF for byte in manifest.shards[0].path.read_bytes()[middle : middle + 64]),
    )
    with pytest.raises(DataError, match="does not hold what its index says"):
        list(read_split(manifest.split("train")))


def test_real_shards_give_every_label(tmp_path: Path) -> None:
    folder = real_data("cifar10")
    (tmp_path / "part").mkdir()
    for name in ("cifar10-train-0000.tar.gz", "cifar10-test-0001.tar.gz"):
        (tmp_path / "part" / name).symlink_to(folder / name)
    manifest = index_folder(tmp_path / "part")
    assert manifest.split_names == ("test", "train")
    labels = [sample.label for sample in read_split(manifest.split("test"))]
    assert len(labels) == 5000
    assert set(labels) == set(range(10))
    with gzip.open(folder / "cifar10-test-0001.tar.gz") as file:
        assert file.read(10) == b"005000.jpg"
