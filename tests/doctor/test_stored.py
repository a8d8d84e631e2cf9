"""The doctor looks at checkpoints by itself, without torch; it must see what a resumed run would see."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_checkpoint import write

from pretrain import checkpoint
from pretrain.checkpoint import CONFIG, MANIFEST, OPTIMIZER, STATE, STUDENT, TEACHER
from pretrain.doctor.stored import stored_checkpoints


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def unlist(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][name]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def change_manifest(folder: Path, **values: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **values}))


def lose_the_teacher(folder: Path) -> None:
    """As if a writer had forgotten it: everything that is listed is whole."""
    (folder / TEACHER).unlink()
    (folder / CONFIG).write_text("teacher: {momentum: 0.9}\n")
    files = json.loads((folder / MANIFEST).read_text())["files"]
    del files[TEACHER]
    change_manifest(
        folder, files={**files, CONFIG: hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()}
    )


DAMAGES: dict[str, Callable[[Path], object]] = {
    "none": lambda folder: None,
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "manifest cut short": lambda folder: (folder / MANIFEST).write_text("{"),
    "manifest of another kind": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "a byte of the weights": lambda folder: flip_a_byte(folder / STUDENT),
    "a byte of the state": lambda folder: flip_a_byte(folder / STATE),
    "no optimizer": lambda folder: (folder / OPTIMIZER).unlink(),
    "no teacher": lambda folder: (folder / TEACHER).unlink(),
    "weights are not listed": lambda folder: unlist(folder, STUDENT),
    "the teacher is not listed": lambda folder: unlist(folder, TEACHER),
    "another step": lambda folder: change_manifest(folder, step=9),
    "another attempt": lambda folder: change_manifest(folder, attempt=3),
    "the teacher was never there": lose_the_teacher,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_finds_what_a_resume_finds(damage: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 8)
    DAMAGES[damage](folder)
    [found] = stored_checkpoints(tmp_path, hash_bytes=0, hash_all=True)
    assert list(found.problems) == checkpoint.verify(folder)
    assert bool(found.problems) == (damage != "none")


def test_a_file_that_was_cut_short_is_told_without_hashes_too(tmp_path: Path) -> None:
    folder = write(tmp_path, 8)
    whole = (folder / STUDENT).read_bytes()
    (folder / STUDENT).write_bytes(whole[:-4])
    [found] = stored_checkpoints(tmp_path, hash_bytes=0, hash_all=False)
    assert found.problems == (f"{STUDENT} is cut short",)
    assert checkpoint.verify(folder) == [f"{STUDENT} is damaged (sha256 differs)"]
    shutil.rmtree(folder)
    assert stored_checkpoints(tmp_path, 0, False) == []
