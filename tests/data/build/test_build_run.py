from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from build_material import (
    build,
    class_folders,
    images_and_labels,
    in_order,
    png,
    stored,
    sums,
    write_files,
)
from PIL import Image
from small_shards import jpeg, samples, write_shard

from pretrain.data.build import progress
from pretrain.data.build.settings import BuildRequest
from pretrain.data.decode import image_size
from pretrain.data.manifest import Manifest
from pretrain.errors import DataError


def source_of(folder: Path, num_images: int = 23, height: int = 12, width: int = 14) -> Path:
    files = {f"{'ab'[n % 2]}/{n:03d}.jpg": jpeg(n, height, width) for n in range(num_images)}
    return write_files(folder, files)


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    source = source_of(tmp_path / "in")
    for workers in (1, 2, 3):
        build(source, tmp_path / str(workers), num_workers=workers, samples_per_shard=4, name="set")
    assert len(sums(tmp_path / "1")) == 6
    assert sums(tmp_path / "1") == sums(tmp_path / "2") == sums(tmp_path / "3")
    hashes = {Manifest.load(tmp_path / str(workers)).hash for workers in (1, 2, 3)}
    assert len(hashes) == 1


def test_the_seed_alone_moves_the_samples_and_no_shuffle_keeps_the_order(tmp_path: Path) -> None:
    source = source_of(tmp_path / "in")
    for name, settings in {"0": {}, "1": {"seed": 1}, "plain": {"shuffle": False}}.items():
        build(source, tmp_path / name, samples_per_shard=5, name="set", **settings)
    assert not set(sums(tmp_path / "0").values()) & set(sums(tmp_path / "1").values())
    assert images_and_labels(tmp_path / "0") == images_and_labels(tmp_path / "1")
    kept = [members["jpg"] for members in stored(tmp_path / "plain").values()]
    assert kept == [path.read_bytes() for path in sorted(source.rglob("*.jpg"))]


KILLED_BUILD = """
import sys
from pathlib import Path
from pretrain.data.build.run import build_shards
from pretrain.data.build.settings import BuildRequest
if __name__ == "__main__":
    request = BuildRequest(
        sys.argv[1], Path(sys.argv[2]), name="set", samples_per_shard=1, max_side_px=100, num_workers=2
    )
    build_shards(request, lambda line: None)
"""


def test_a_build_killed_in_the_middle_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = source_of(tmp_path / "in", 40, 400, 500)
    settings = {"name": "set", "samples_per_shard": 1, "max_side_px": 100}
    build(source, tmp_path / "whole", **settings)
    (tmp_path / "build.py").write_text(KILLED_BUILD)
    command = [sys.executable, str(tmp_path / "build.py"), str(source), str(tmp_path / "out")]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    notes = tmp_path / "out" / ".build" / "done"
    while len(list(notes.glob("[!.]*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []  # orphans would write on, or wait for ever
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    num_noted = len(list(notes.glob("[!.]*.json")))
    assert 3 <= num_noted < 40
    _, lines = build(source, tmp_path / "out", **settings)
    assert f"resume  {num_noted} shards were finished before" in lines
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")
    assert not (tmp_path / "out" / ".build").exists()
    kept = sum((tmp_path / "out" / name).stat().st_mtime_ns == then for name, then in finished.items())
    assert kept >= num_noted


DYING_BUILDS = """
import os, signal, sys
from pathlib import Path
from pretrain.data.build.run import build_shards
from pretrain.data.build.settings import BuildRequest

def dying(call):
    def counted(*arguments, **keywords):
        global num_left
        num_left -= 1
        if num_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **keywords)
    return counted

status, num_kills = 1, 0
while status:
    num_kills += int(sys.argv[3])
    child = os.fork()
    if not child:
        num_left = num_kills
        for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        out = Path(sys.argv[2]) / str(num_kills)
        request = BuildRequest(sys.argv[1], out, name="set", samples_per_shard=3, num_workers=1)
        build_shards(request, lambda line: None)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
"""


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_build_may_die_before_any_call_that_renames_removes_or_syncs(tmp_path: Path, step: int) -> None:
    source = source_of(tmp_path / "in", 5)
    write_files(source, {"a/bad.jpg": b"no image"})
    settings = {"name": "set", "samples_per_shard": 3}
    build(source, tmp_path / "whole", **settings)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    (tmp_path / "build.py").write_text(DYING_BUILDS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "build.py"), str(source), str(tmp_path / "outs"), str(step)]
    subprocess.run(command, env=environment, check=True)
    outs = sorted((tmp_path / "outs").iterdir(), key=lambda out: int(out.name))
    assert len(outs) > 20 // step
    for out in outs:
        is_done = (out / "index.json").exists() and not (out / ".build" / "plan.json").exists()
        if is_done:
            with pytest.raises(DataError, match="holds finished shards"):
                build(source, out, **settings)
        else:
            build(source, out, **settings)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected, out.name


def unfinished(tmp_path: Path, **settings: Any) -> Path:
    """A build that stopped because too many images are bad."""
    source = source_of(tmp_path / "in", 12)
    write_files(source, {"a/x.jpg": b"", "b/y.jpg": jpeg(0)[:300], "b/z.png": b"GIF89a"})
    with pytest.raises(DataError, match="3 of 15 images are bad, 1 are allowed"):
        build(source, tmp_path / "out", samples_per_shard=4, **settings)
    return source


def test_bad_images_are_listed_and_fail_the_build_until_they_are_allowed(tmp_path: Path) -> None:
    source = unfinished(tmp_path)
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = {image["source"]: image["reason"].partition(":")[0] for image in listed}
    assert reasons == {"a/x.jpg": "empty", "b/y.jpg": "damaged", "b/z.png": "unknown_format"}
    assert not (tmp_path / "out" / "index.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    result, lines = build(source, tmp_path / "out", samples_per_shard=4, max_bad_ratio=0.2)
    assert (result.num_samples, result.num_rejected) == (12, 3)
    assert any(line.startswith("bad     3 images left out, listed in") for line in lines)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was written again
    good = [path for path in source.rglob("*.jpg") if path.stem.isdigit()]
    expected = [(path.read_bytes(), "ab".index(path.parent.name)) for path in good]
    assert images_and_labels(tmp_path / "out") == in_order(expected)


def test_one_bad_image_is_always_allowed_and_trusting_the_source_lets_it_in(tmp_path: Path) -> None:
    cut = jpeg(0)[:-20]
    source = write_files(tmp_path / "in", {"a.jpg": jpeg(1), "b.jpg": cut})
    assert build(source, tmp_path / "checked")[0].num_rejected == 1
    assert build(source, tmp_path / "trusted", check_images=False)[0].num_rejected == 0
    assert (cut, None) in images_and_labels(tmp_path / "trusted")


def test_a_shard_of_bad_images_only_leaves_no_file(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", {"0.jpg": b"", "1.jpg": jpeg(1), "2.jpg": jpeg(2)})
    result, _ = build(source, tmp_path / "out", samples_per_shard=1, shuffle=False)
    assert result.manifest.num_samples == 2
    assert sorted(sums(tmp_path / "out")) == ["out-train-000001.tar", "out-train-000002.tar"]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_source_without_a_good_image_is_refused(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", {"0.jpg": b""})
    with pytest.raises(DataError, match=r"no image of split 'train' is good; see .*rejected\.jsonl"):
        build(source, tmp_path / "out")


def test_an_unfinished_build_goes_on_as_it_was_begun_only(tmp_path: Path) -> None:
    source = unfinished(tmp_path)
    again: dict[str, Any] = {"samples_per_shard": 4, "max_bad_ratio": 0.5}
    with pytest.raises(DataError, match=r"other settings \(seed: 0 there, 9 now\)"):
        build(source, tmp_path / "out", **again, seed=9)
    other = source_of(tmp_path / "other", 12)
    with pytest.raises(DataError, match=r"other settings \(source: .*in there, .*other now\)"):
        build(other, tmp_path / "out", **again)
    changed = source / "a" / "000.jpg"
    before, times = changed.read_bytes(), changed.stat()
    changed.write_bytes(before[:-3] + b"abc")  # of the same size
    with pytest.raises(DataError, match="the source has changed since this build was begun"):
        build(source, tmp_path / "out", **again)
    changed.write_bytes(before)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    build(source, tmp_path / "out", **again)


def test_a_source_of_tars_that_changes_ends_an_unfinished_build(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    bad = [("x.jpg", b"no image"), ("y.jpg", b"none either")]
    write_shard(tmp_path / "in" / "0.tar", [*samples(0, 4), *bad])
    with pytest.raises(DataError, match="2 of 6 images are bad"):
        build(tmp_path / "in", tmp_path / "out")
    write_shard(tmp_path / "in" / "0.tar", [*samples(1, 4), *bad])
    with pytest.raises(DataError, match="the source has changed since this build was begun"):
        build(tmp_path / "in", tmp_path / "out", max_bad_ratio=0.5)


def test_a_finished_shard_that_was_hurt_is_written_again(tmp_path: Path) -> None:
    source = unfinished(tmp_path)
    before = sums(tmp_path / "out")
    first, second = sorted((tmp_path / "out").glob("*.tar"))[:2]
    first.write_bytes(first.read_bytes()[:-700])
    second.unlink()
    build(source, tmp_path / "out", samples_per_shard=4, max_bad_ratio=0.5)
    assert sums(tmp_path / "out") == before


def test_a_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path / "in", 4)
    write_files(tmp_path / "full", {"thesis.txt": b""})
    with pytest.raises(DataError, match=r"full: is not empty \(thesis\.txt\) and no unfinished build"):
        build(source, tmp_path / "full")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="file: is a file; name a new folder"):
        build(source, tmp_path / "file")
    build(source, tmp_path / "out")
    before = sums(tmp_path / "out")
    with pytest.raises(DataError, match="out: holds finished shards with their index"):
        build(source, tmp_path / "out")
    assert sums(tmp_path / "out") == before


def test_two_builds_do_not_write_into_one_folder(tmp_path: Path) -> None:
    import fcntl

    source = unfinished(tmp_path)
    with (tmp_path / "out" / ".build" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another build is writing here"):
            build(source, tmp_path / "out", samples_per_shard=4)


def test_a_disk_that_is_too_small_is_told_before_a_shard_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path / "in", 4)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 0, 5000))
    with pytest.raises(DataError, match=r"the shards need about .* KiB, the disk has 5 KiB left"):
        build(source, tmp_path / "out")
    assert not sums(tmp_path / "out")


def test_larger_images_are_shrunk_and_smaller_ones_keep_their_bytes(tmp_path: Path) -> None:
    files = {"big.jpg": jpeg(0, 300, 200), "small.jpg": jpeg(1, 64, 64), "wide.png": png(2, 50, 640)}
    source = write_files(tmp_path / "in", files)
    result, lines = build(source, tmp_path / "out", max_side_px=64, shuffle=False)
    big, small, wide = (members["jpg"] for members in stored(tmp_path / "out").values())
    assert (image_size(big), image_size(wide)) == ((64, 43), (5, 64))
    assert small == files["small.jpg"]
    assert result.num_reencoded == 2
    assert result.source_image_bytes == sum(map(len, files.values()))
    assert result.image_bytes == len(big) + len(small) + len(wide)
    assert any("2 encoded again, 1 as they were" in line for line in lines)
    # the picture is the same: against a plain reduction of the whole original
    original = Image.open(io.BytesIO(files["big.jpg"])).resize((43, 64), Image.Resampling.BOX)
    shrunk = Image.open(io.BytesIO(big))
    assert np.abs(np.asarray(original, dtype=float) - np.asarray(shrunk, dtype=float)).mean() < 3


@pytest.mark.parametrize(("subsampling", "factors"), [("420", (2, 2)), ("422", (2, 1)), ("444", (1, 1))])
def test_quality_and_subsampling_are_as_asked(
    tmp_path: Path, subsampling: str, factors: tuple[int, int]
) -> None:
    source = write_files(tmp_path / "in", {"a.png": png(0, 100, 100)})
    sizes = []
    for quality in (50, 90):
        out = tmp_path / f"out{quality}"
        build(source, out, max_side_px=64, quality=quality, subsampling=subsampling)
        (members,) = stored(out).values()
        sizes.append(len(members["jpg"]))
        image = Image.open(io.BytesIO(members["jpg"]))
        first = image.layer[0]  # type: ignore[attr-defined]
        assert first[1:3] == factors
    assert sizes[0] < sizes[1]


def test_a_shrunk_image_is_upright_and_without_metadata(tmp_path: Path) -> None:
    pixels = np.zeros((40, 120, 3), dtype=np.uint8)
    pixels[:, :60] = 255  # bright on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: bright on top
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, exif=exif)
    build(write_files(tmp_path / "in", {"a.jpg": buffer.getvalue()}), tmp_path / "out", max_side_px=60)
    (members,) = stored(tmp_path / "out").values()
    image = Image.open(io.BytesIO(members["jpg"]))
    assert image.size == (20, 60)
    assert not image.getexif()
    rows = np.asarray(image).mean(axis=(1, 2))
    assert rows[:25].min() > 240
    assert rows[35:].max() < 15


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"samples_per_shard": 0}, "--samples-per-shard 0: must be at least 1"),
        ({"samples_per_shard": 1, "shard_mib": 1}, "give one"),
        ({"kind": "zip"}, "--kind zip: unknown; known: folder"),
        ({"quality": 101}, "--quality 101"),
        ({"subsampling": "411"}, "--subsampling 411: unknown"),
        ({"max_bad_ratio": 2.0}, "--max-bad-ratio 2.0"),
        ({"split": "Train 1"}, "--split Train 1"),
        ({"name": "a/b"}, "shard name 'a/b'"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        BuildRequest(**{"source": "in", "out": tmp_path / "out", **settings})


def test_a_name_that_speaks_of_another_split_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", {"train/a": 1, "val/a": 1})
    with pytest.raises(DataError, match=r"my-test-train-000000\.tar would be taken for split 'test'"):
        build(tmp_path / "in", tmp_path / "out", name="my-test")


def test_without_a_terminal_progress_is_told_in_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    _, lines = build(source_of(tmp_path / "in", 3), tmp_path / "out")
    told = [line for line in lines if " of 3 images, " in line]
    assert [line.split(" of ")[0] for line in told] == ["1", "2", "3"]
    assert told[-1].endswith("a second, 0 min left")
