from __future__ import annotations

import gzip
import os
from contextlib import closing
from pathlib import Path

import pytest
from small_shards import make_shards, real_data, samples, write_shard

import pretrain.data.reader
from pretrain.data.manifest import Manifest, index_folder
from pretrain.data.order import Run
from pretrain.data.reader import ShardReader, read_split
from pretrain.errors import DataError


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain.data.reader, "RETRY_SECONDS", (0.0,))


def reader_of(manifest: Manifest) -> closing[ShardReader]:
    return closing(ShardReader(manifest.shards))


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
    assert [sample.label for sample in read_split(manifest, "train")] == [None, 12, 7, None, None, None, None]


def test_a_split_is_read_whole_and_in_order(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, [300, 2], height=8, width=8)
    assert [sample.sample_id for sample in read_split(manifest, "train")] == list(range(302))


def hurt(manifest: Manifest, place: int, data: bytes) -> None:
    """Overwrite bytes of the first shard, leaving its size as it was."""
    with manifest.shards[0].path.open("r+b") as file:
        file.seek(place)
        file.write(data)


@pytest.mark.parametrize(
    ("sample", "shift", "data"),
    [
        (2, 0, bytes(512)),  # a header zeroed: reads as the end of the archive
        (2, 5, b"\xff"),  # a header rotten
        (3, -1024, bytes(512)),  # the header of the label before
        (4, -1024, b"\xff"),  # the header of the last label
        (4, 0, b"x"),  # the end marker
        (4, 1023, b"x"),
    ],
)
def test_damage_since_indexing_is_an_error_never_a_short_read(
    tmp_path: Path, sample: int, shift: int, data: bytes
) -> None:
    manifest = make_shards(tmp_path, [4])
    hurt(manifest, int(manifest.shards[0].offsets[sample]) + shift, data)
    problem = r"train-0\.tar: does not hold what its index says .* restore the shard"
    with reader_of(manifest) as reader, pytest.raises(DataError, match=problem):
        reader.read([Run(0, 0, 4, 0)])


def test_a_run_that_starts_amid_a_member_is_an_error(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, [4])
    manifest.shards[0].offsets.flags.writeable = True
    manifest.shards[0].offsets[1:3] += 512
    with reader_of(manifest) as reader, pytest.raises(DataError, match="does not hold what its index says"):
        reader.read([Run(0, 1, 2, 0)])


def test_a_shard_that_shrinks_after_loading_is_an_error(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, [4])
    with reader_of(manifest) as reader:
        reader.read([Run(0, 0, 1, 0)])
        os.truncate(manifest.shards[0].path, int(manifest.shards[0].offsets[2]))
        with pytest.raises(DataError, match="ends at byte"):
            reader.read([Run(0, 1, 3, 0)])
    with reader_of(manifest) as reader, pytest.raises(DataError, match="bytes instead of"):
        reader.read([Run(0, 0, 1, 0)])


def test_a_shard_that_vanishes_is_an_error_that_names_it(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, [2])
    manifest.shards[0].path.unlink()
    with pytest.raises(DataError, match=r"train-0\.tar: cannot be read \(No such file"):
        list(read_split(manifest, "train"))


def test_a_read_that_fails_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_shards(tmp_path, [2])
    opened, really_open = [], pretrain.data.reader.open_shard

    def flaky(shard: pretrain.data.reader.Shard) -> object:
        opened.append(shard.name)
        if len(opened) == 1:
            raise OSError(5, "Input/output error")
        return really_open(shard)

    monkeypatch.setattr(pretrain.data.reader, "open_shard", flaky)
    assert len(list(read_split(manifest, "train"))) == 2
    assert len(opened) == 2


def test_rotten_compressed_bytes_are_an_error(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, [40], suffix=".tar.gz")
    middle = manifest.shards[0].num_bytes // 2
    hurt(
        manifest,
        middle,
        bytes(byte ^ 0xFF for byte in manifest.shards[0].path.read_bytes()[middle : middle + 64]),
    )
    with pytest.raises(DataError, match="does not hold what its index says"):
        list(read_split(manifest, "train"))


def test_real_shards_give_every_label(tmp_path: Path) -> None:
    folder = real_data("cifar10")
    (tmp_path / "part").mkdir()
    for name in ("cifar10-train-0000.tar.gz", "cifar10-test-0001.tar.gz"):
        (tmp_path / "part" / name).symlink_to(folder / name)
    manifest = index_folder(tmp_path / "part")
    assert manifest.split_names == ("test", "train")
    labels = [sample.label for sample in read_split(manifest, "test")]
    assert len(labels) == 5000
    assert set(labels) == set(range(10))
    with gzip.open(folder / "cifar10-test-0001.tar.gz") as file:
        assert file.read(10) == b"005000.jpg"
