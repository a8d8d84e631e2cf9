from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from s3_server import S3Server, s3_server

from pretrain import mirror
from pretrain.checkpoint import (
    FOLDER,
    MANIFEST,
    OPTIMIZER,
    STATE,
    STUDENT,
    TEACHER,
    newest_valid,
    step_folder,
    sweep,
    verify,
    write_checkpoint,
)
from pretrain.data.location import Location
from pretrain.errors import ConfigError, UserError
from pretrain.mirror import (
    DamagedError,
    LocalStore,
    MirrorError,
    ObjectStore,
    Store,
    claim,
    parse_mirror,
    prune,
    pull_newest,
    push,
)


def write(run: Path, step: int, attempt: int = 1, note: str = "") -> Path:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        STUDENT: {"backbone.w": torch.randn(50, 40, generator=generator)},
        OPTIMIZER: {"exp_avg.backbone.w": torch.ones(3) * step},
    }
    run.mkdir(parents=True, exist_ok=True)
    return write_checkpoint(run, step, tensors, {"step": step, "note": note}, "seed: 1\n", attempt=attempt)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(attempt: int, step: int) -> bool:
    return True


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(params=["folder", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty mirror; a test that also wants one of S3 says so, as its requests take long."""
    if request.param == "folder":
        yield str(tmp_path / "mirror")
    elif request.param == "memory":
        files = fsspec.filesystem("memory", skip_instance_cache=True)
        files.store.clear()

        def opened(address: str, run_dir: Path) -> Store:
            return ObjectStore(files, Location(f"memory://bucket/{run_dir.name}"), retry_seconds=())

        monkeypatch.setattr(mirror, "open_store", opened)
        yield "memory"
        files.store.clear()
    else:
        with on_s3(request.getfixturevalue("server"), monkeypatch, "mirror") as place:
            yield place


class on_s3:
    """A fresh bucket, and an environment that may write to it."""

    def __init__(self, server: S3Server, monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
        from pretrain.data import remote

        remote.object_store.cache_clear()  # a client keeps the credentials it was made with
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        monkeypatch.setattr(mirror, "RETRY_SECONDS", ())
        self.client: Any = server.client()
        self.bucket = bucket

    def __enter__(self) -> str:
        self.client.create_bucket(Bucket=self.bucket)
        return f"s3://{self.bucket}/runs"

    def __exit__(self, *raised: object) -> None:
        for entry in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", []):
            self.client.delete_object(Bucket=self.bucket, Key=entry["Key"])
        self.client.delete_bucket(Bucket=self.bucket)
        self.client.close()


@pytest.mark.parametrize("address", ["folder", "memory", "s3"], indirect=True)
def test_what_is_pushed_is_pulled_back_byte_for_byte_after_the_run_folder_is_lost(
    address: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert pull_newest(address, run, everything) is None
    older, newer = write(run, 10), write(run, 20, attempt=2)
    was = contents(newer)
    for folder in (older, newer):
        assert push(folder, address) == sum(len(data) for data in contents(folder).values())
        assert push(folder, address) == 0  # is there already
    shutil.rmtree(run)
    found = pull_newest(address, run, everything)
    assert found == newer
    assert contents(newer) == was
    assert verify(newer) == []
    assert [path.name for path in (run / FOLDER).iterdir()] == ["step-00000020.2"]


def test_only_what_the_history_of_the_run_allows_is_pulled(address: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, attempt in ((10, 1), (30, 1), (20, 2)):
        push(write(run, step, attempt), address)
    shutil.rmtree(run)
    seen = []

    def allows(attempt: int, step: int) -> bool:
        seen.append((attempt, step))
        return attempt == 2 or step <= 10

    assert pull_newest(address, run, allows) == step_folder(run, 20, 2)
    assert seen == [(1, 30), (2, 20)]  # newest first
    assert pull_newest(address, run, lambda attempt, step: False) is None


def test_a_checkpoint_without_its_manifest_is_not_there_yet(address: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    push(write(run, 10), address)
    push(write(run, 20), address)
    mirror.open_store(address, run).remove([f"step-00000020/{MANIFEST}"])
    shutil.rmtree(run)
    assert pull_newest(address, run, everything) == step_folder(run, 10)


def test_the_manifest_is_sent_last_and_taken_away_before_another_of_the_same_name_is_sent(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So at no moment does a half pass for a whole, be the sender killed wherever it is."""
    run = tmp_path / "run"
    store = mirror.open_store(address, run)
    manifest = f"step-00000010/{MANIFEST}"
    kind = type(store)
    real = kind.write
    sent: list[str] = []

    def watched(self: Any, name: str, pieces: mirror.Pieces) -> int:
        sent.append(name)
        if name != manifest:
            assert manifest not in store.names()
        return real(self, name, pieces)

    monkeypatch.setattr(kind, "write", watched)
    for note in ("first", "again"):
        sent.clear()
        folder = write(run, 10, note=note)
        assert push(folder, address) > 0
        assert len(sent) == len(contents(folder))
        assert sent[-1] == manifest
    shutil.rmtree(run)
    folder = pull_newest(address, run, everything) or tmp_path
    assert json.loads((folder / STATE).read_text())["note"] == "again"


def test_files_of_a_replaced_checkpoint_do_not_stay_beside_those_of_the_new(
    address: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    weights = {STUDENT: {"w": torch.ones(3)}, OPTIMIZER: {"exp_avg.w": torch.ones(3)}}
    push(write_checkpoint(run, 10, {**weights, TEACHER: {"w": torch.ones(3)}}, {}, ""), address)
    folder = write_checkpoint(run, 10, weights, {}, "")
    push(folder, address)
    names = {name.removeprefix("step-00000010/") for name in mirror.open_store(address, run).names()}
    assert names == contents(folder).keys()
    assert TEACHER not in names


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_a_damaged_file_of_the_run_folder_never_gets_to_the_mirror(
    damage: Callable[[Path], None], address: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    folder = write(run, 10)
    damage(folder / STUDENT)
    with pytest.raises(DamagedError, match=STUDENT):
        push(folder, address)
    there = mirror.open_store(address, run).names()
    assert f"step-00000010/{MANIFEST}" not in there
    assert address == "memory" or f"step-00000010/{STUDENT}" not in there  # that store publishes at once
    assert not any(".part" in path.name for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("name", [STUDENT, STATE, MANIFEST])
@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_a_damaged_checkpoint_of_the_mirror_is_passed_over_with_a_word_and_leaves_nothing(
    damage: Callable[[Path], None], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, address = tmp_path / "run", str(tmp_path / "mirror")
    push(write(run, 10), address)
    push(write(run, 20), address)
    damage(tmp_path / "mirror" / "run" / "step-00000020" / name)
    shutil.rmtree(run)
    assert pull_newest(address, run, everything) == step_folder(run, 10)
    assert [path.name for path in (run / FOLDER).iterdir()] == ["step-00000010"]
    if (name, damage) != (MANIFEST, Path.unlink):  # that one was never complete
        assert "step-00000020" in caplog.text
        assert "passed over" in caplog.text


@pytest.mark.parametrize(
    "name", ["../../../escaped", "/tmp/escaped", "a/../../escaped", "", "a//b", MANIFEST]
)
def test_a_manifest_of_the_mirror_cannot_name_a_file_outside_of_its_folder(name: str, tmp_path: Path) -> None:
    run, address = tmp_path / "run", str(tmp_path / "mirror")
    push(write(run, 10), address)
    path = tmp_path / "mirror" / "run" / "step-00000010" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][name] = "0" * 64
    path.write_text(json.dumps(manifest))
    shutil.rmtree(run)
    assert mirror.listed_files(path.read_bytes()) is None
    assert pull_newest(address, run, everything) is None
    assert list(tmp_path.rglob("escaped")) == []


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", '{"files": 3}', '{"files": {"a": 5}}', "{", "[" * 100_000]
)
def test_a_manifest_of_another_form_is_none(text: str) -> None:
    assert mirror.listed_files(text.encode()) is None


def test_a_whole_checkpoint_of_the_run_folder_is_not_fetched_and_a_damaged_one_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, address = tmp_path / "run", str(tmp_path / "mirror")
    folder = write(run, 10)
    push(folder, address)
    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "read", lambda self, name: pytest.fail("was fetched"))
        assert pull_newest(address, run, everything) == folder
    cut(folder / STUDENT)
    assert pull_newest(address, run, everything) == folder
    assert newest_valid(run) == (folder, [])


def test_a_pull_that_breaks_off_leaves_only_what_a_sweep_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, address = tmp_path / "run", str(tmp_path / "mirror")
    push(write(run, 10), address)
    shutil.rmtree(run)

    def away(self: LocalStore, name: str) -> Iterator[bytes]:
        if not name.endswith(MANIFEST):
            raise MirrorError("the mirror is away")
        yield from real(self, name)

    real = LocalStore.read
    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "read", away)
        patched.setattr(mirror.shutil, "rmtree", lambda *path, **how: None)  # as if killed
        with pytest.raises(MirrorError, match="is away"):
            pull_newest(address, run, everything)
    assert newest_valid(run) == (None, [])
    litter = sweep(run)
    assert len(litter) == 1
    assert list((run / FOLDER).iterdir()) == []
    assert pull_newest(address, run, everything) == step_folder(run, 10)


def test_a_mirror_that_cannot_be_asked_is_not_taken_for_an_empty_one(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would begin anew otherwise."""
    run = tmp_path / "run"
    with (
        on_s3(server, monkeypatch, "elsewhere"),
        pytest.raises(MirrorError, match="s3://absent/runs") as caught,
    ):
        pull_newest("s3://absent/runs", run, everything)
    assert "\n" not in str(caught.value)
    (tmp_path / "a file").write_text("")
    with pytest.raises(MirrorError):
        push(write(run, 1), str(tmp_path / "a file"))


class Unsteady:
    """A file system whose next requests fail."""

    def __init__(self, files: Any, num_failures: int) -> None:
        self.files, self.left = files, num_failures

    def __getattr__(self, name: str) -> Any:
        if name in ("open", "find", "rm_file", "info", "cat_file") and self.left:
            self.left -= 1
            raise ConnectionError("reset by peer")
        return getattr(self.files, name)


@pytest.mark.parametrize(("num_failures", "succeeds"), [(2, True), (3, False)])
def test_a_request_is_tried_again_as_often_as_there_are_waits(num_failures: int, succeeds: bool) -> None:
    files = fsspec.filesystem("memory", skip_instance_cache=True)
    store = ObjectStore(
        Unsteady(files, num_failures), Location("memory://tries/run"), retry_seconds=(0.0, 0.0)
    )
    if succeeds:
        assert store.write("a", lambda: iter((b"ab", b"c"))) == 3
        assert b"".join(store.read("a")) == b"abc"
        store.remove(["a", "never there"])
        assert store.names() == {}
    else:
        with pytest.raises(MirrorError, match="reset by peer"):
            store.write("a", lambda: iter((b"abc",)))


def test_an_upload_of_several_parts_that_breaks_off_is_never_visible(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Closing an fsspec file publishes what it holds; here a file is published whole or not at all."""
    with on_s3(server, monkeypatch, "parts") as address:
        store = mirror.open_store(address, tmp_path)
        piece = bytes(mirror.PIECE_BYTES)

        def breaks_off() -> Iterator[bytes]:
            yield piece
            yield piece
            raise DamagedError("the source is damaged")

        with pytest.raises(DamagedError):
            store.write("a", breaks_off)
        assert store.names() == {}
        assert store.write("a", lambda: iter((piece, piece, b"end"))) == 2 * len(piece) + 3
        assert store.names() == {"a": 2 * len(piece) + 3}
        assert b"".join(store.read("a")) == piece + piece + b"end"
        store.remove(["a", "never there"])
        assert store.names() == {}


def test_a_file_that_the_store_cuts_short_is_noticed_before_the_manifest_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, address = tmp_path / "run", str(tmp_path / "mirror")
    real = LocalStore.write

    def short(self: LocalStore, name: str, pieces: mirror.Pieces) -> int:
        num_bytes = real(self, name, pieces)
        if name.endswith(STATE):
            cut(self.root / name)
        return num_bytes

    monkeypatch.setattr(LocalStore, "write", short)
    with pytest.raises(MirrorError, match=r"state.json is not there with the \d+ bytes"):
        push(write(run, 10), address)
    assert f"step-00000010/{MANIFEST}" not in mirror.open_store(address, run).names()


def names_on(address: str, run: Path) -> list[str]:
    return sorted({name.partition("/")[0] for name in mirror.open_store(address, run).names()})


def test_pruning_keeps_the_newest_the_milestones_and_the_named(address: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in range(1, 8):
        push(write(run, step), address)
    removed = prune(address, run, keep_last=2, keep_every_steps=3, keep=["step-00000001"])
    assert sorted(removed) == [f"step-{step:08d}" for step in (2, 4, 5)]
    assert names_on(address, run) == [f"step-{step:08d}" for step in (1, 3, 6, 7)]
    assert prune(address, run, keep_last=2, keep_every_steps=3, keep=["step-00000001"]) == []
    prune(address, run, keep_last=0, keep_every_steps=None)
    assert names_on(address, run) == ["step-00000007"]  # the newest always stays
    shutil.rmtree(run)
    assert pull_newest(address, run, everything) == step_folder(run, 7)


def test_pruning_counts_only_this_history_and_removes_only_what_went_before(
    address: str, tmp_path: Path
) -> None:
    """A stale attempt, which ran ahead, must not push the good checkpoints out of the mirror."""
    run = tmp_path / "run"
    for step, attempt in ((10, 1), (20, 1), (30, 1), (40, 1), (20, 2), (90, 4)):
        push(write(run, step, attempt), address)
    mirror.open_store(address, run).remove(
        [f"step-00000010/{MANIFEST}"]
    )  # half-sent by a run that was killed

    def allows(attempt: int, step: int) -> bool:
        return attempt == 2 or (attempt == 1 and step <= 20)

    removed = prune(address, run, 2, None, allows=allows, attempt=2)
    assert sorted(removed) == ["step-00000010", "step-00000030", "step-00000040"]
    assert names_on(address, run) == ["step-00000020", "step-00000020.2", "step-00000090.4"]


def test_a_newer_checkpoint_that_is_still_on_its_way_is_left_alone(address: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    push(write(run, 10), address)
    push(write(run, 20), address)
    mirror.open_store(address, run).remove([f"step-00000020/{MANIFEST}"])
    assert prune(address, run, 1, None) == []
    assert names_on(address, run) == ["step-00000010", "step-00000020"]


def test_two_runs_may_share_a_mirror(address: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    push(write(first, 10), address)
    push(write(second, 20), address)
    prune(address, second, 1, None)
    shutil.rmtree(first)
    assert pull_newest(address, first, everything) == step_folder(first, 10)


def test_another_run_of_the_same_name_is_refused_and_a_lost_folder_goes_on_as_its_run(
    address: str, tmp_path: Path
) -> None:
    run, other = tmp_path / "here" / "run", tmp_path / "there" / "run"
    for folder in (run, other):
        folder.mkdir(parents=True)
    claim(address, run)
    claim(address, run)
    folder = write(run, 10)
    push(folder, address)
    with pytest.raises(UserError, match="holds another run of the name 'run'"):
        claim(address, other)  # begins anew
    write(other, 5)
    with pytest.raises(UserError, match="holds another run of the name 'run'"):
        claim(address, other, may_become=True)  # has checkpoints of its own
    shutil.rmtree(run)
    run.mkdir()
    claim(address, run, may_become=True)
    assert pull_newest(address, run, everything) == folder
    claim(address, run)
    prune(address, run, 1, None)
    assert names_on(address, run) == [mirror.RUN_ID, "step-00000010"]


def test_a_run_that_was_not_mirrored_before_can_be(address: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, 10)
    claim(address, run)
    with pytest.raises(UserError, match="holds another run"):
        claim(address, tmp_path / "other" / "run")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("https://host/folder", "cannot be written to"),
        ("hf://datasets/a/b", "cannot be written to"),
        ("memory://x", "'memory:' is refused"),
        ("file:///x", "'file:' is refused"),
        ("s3://key:secret@bucket/x", "ends up in logs"),
        ("", "no place is given"),
    ],
)
def test_an_address_that_is_no_mirror_is_refused_in_one_line(address: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        parse_mirror(address)
    assert str(caught.value).startswith("checkpoint.mirror: ")
    assert "\n" not in str(caught.value)
    assert parse_mirror("s3://bucket/x").scheme == "s3"
    assert parse_mirror("/a/b").is_local
