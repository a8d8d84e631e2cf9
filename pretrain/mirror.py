"""A second home for checkpoints: copied to another file system or an object store, and fetched from there.

MIRROR/NAME-OF-THE-RUN/step-00001000/...   the files of a checkpoint as they are in the run folder
MIRROR/NAME-OF-THE-RUN/RUN_ID              whose they are: another run of that name is refused

A checkpoint of a mirror is complete once its MANIFEST.json is there, which is copied last. Every file is
hashed on its way, in both directions, so neither side takes over what the other has damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pretrain import checkpoint
from pretrain.checkpoint import MANIFEST
from pretrain.data.location import Location, StorageError, parse_location
from pretrain.data.remote import explained, load_package, object_store
from pretrain.errors import ConfigError, TrainingError, UserError

logger = logging.getLogger("pretrain")

RUN_ID = "RUN_ID"  # in the run folder too
WRITABLE_SCHEMES = ("", "s3", "gs")
PIECE_BYTES = 2**23  # read, hashed and sent at a time; also the size of an object store's upload parts
TIMEOUT_SECONDS = 60.0  # for each answer of an object store
RETRY_SECONDS = (1.0, 5.0)  # waits before a request that failed is tried again
MAX_MANIFEST_BYTES = 2**20

T = TypeVar("T")
Pieces = Callable[[], Iterator[bytes]]  # begins anew at each call, so that a failed upload can be repeated
Allows = Callable[[int, int], bool]  # (attempt, step): whether a checkpoint belongs to this run's history


class MirrorError(TrainingError):
    """A mirror that cannot be reached or refuses a file. To a run that trains it is a warning only."""


class DamagedError(Exception):
    """A file whose bytes are not those that its manifest vouches for."""


class Store(Protocol):
    """A folder that may be far away; raises MirrorError only."""

    def names(self) -> dict[str, int]:
        """Every file below it, such as `step-00001000/state.json`, and its bytes."""
        ...

    def read(self, name: str) -> Iterator[bytes]: ...

    def write(self, name: str, pieces: Pieces) -> int:
        """Put a file there as a whole, or not at all if `pieces` raises. Gives its bytes."""
        ...

    def remove(self, names: Collection[str]) -> None: ...


def parse_mirror(address: str, where: str = "checkpoint.mirror") -> Location:
    """The location that a user wrote, or a ConfigError in one line."""
    location = parse_location(address, where)
    if location.scheme not in WRITABLE_SCHEMES:
        raise ConfigError(
            f"{where}: {location} cannot be written to; use a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
        )
    return location


def open_store(address: str, run_dir: Path) -> Store:
    """The part of a mirror that belongs to a run: the folder of the run's name below the address."""
    location = parse_mirror(address).join(run_dir.resolve().name)
    if location.is_local:
        return LocalStore(location.path)
    try:
        load_package(location)
        with explained(location):
            files = object_store(location.scheme, TIMEOUT_SECONDS, os.getpid())
    except StorageError as error:
        raise MirrorError(str(error)) from error
    return ObjectStore(files, location, RETRY_SECONDS)


class LocalStore:
    """A folder of a file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> dict[str, int]:
        def listed() -> dict[str, int]:
            return {
                path.relative_to(self.root).as_posix(): path.stat().st_size
                for path in self.root.rglob("*")
                if path.is_file() and not path.name.startswith(".")
            }

        return self._explained(self.root, listed)

    def read(self, name: str) -> Iterator[bytes]:
        path = self.root / name
        try:
            yield from read_pieces(path)
        except OSError as error:
            raise _unusable(path, error) from error

    def write(self, name: str, pieces: Pieces) -> int:
        path = self.root / name
        return self._explained(path, lambda: self._write(path, pieces))

    def remove(self, names: Collection[str]) -> None:
        def removed() -> None:
            for name in names:
                (self.root / name).unlink(missing_ok=True)
            for folder in sorted({(self.root / name).parent for name in names}, reverse=True):
                while folder != self.root and folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
                    folder = folder.parent

        self._explained(self.root, removed)

    def _write(self, path: Path, pieces: Pieces) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part-{os.getpid()}")
        try:
            with part.open("wb") as file:
                for piece in pieces():
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            num_bytes = part.stat().st_size
            part.rename(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return num_bytes

    @staticmethod
    def _explained(path: Path, task: Callable[[], T]) -> T:
        try:
            return task()
        except OSError as error:
            raise _unusable(path, error) from error


class ObjectStore:
    """A folder of an object store, through its fsspec package."""

    def __init__(self, files: Any, location: Location, retry_seconds: tuple[float, ...]) -> None:
        self._files = files
        self._location = location
        self._retry_seconds = retry_seconds

    def names(self) -> dict[str, int]:
        def listed() -> dict[str, int]:
            self._files.invalidate_cache()
            found: Mapping[str, Mapping[str, Any]] = self._files.find(self._location.url, detail=True)
            root = self._files._strip_protocol(self._location.url).rstrip("/") + "/"
            return {
                path.removeprefix(root): int(entry["size"] or 0)
                for path, entry in found.items()
                if entry["type"] == "file" and path.startswith(root)
            }

        return self._retried(self._location, listed)

    def read(self, name: str) -> Iterator[bytes]:
        location = self._location.join(name)
        num_bytes = self._retried(location, lambda: int(self._files.info(location.url)["size"]))
        for begin in range(0, num_bytes, PIECE_BYTES):
            end = min(begin + PIECE_BYTES, num_bytes)
            yield self._retried(location, partial(self._files.cat_file, location.url, start=begin, end=end))

    def write(self, name: str, pieces: Pieces) -> int:
        location = self._location.join(name)
        return self._retried(location, lambda: self._write(location, pieces))

    def remove(self, names: Collection[str]) -> None:
        for name in names:
            location = self._location.join(name)
            try:
                self._retried(location, partial(self._files.rm_file, location.url))
            except MirrorError as error:
                if not isinstance(error.__cause__, StorageError) or not error.__cause__.missing:
                    raise

    def _write(self, location: Location, pieces: Pieces) -> int:
        # closing a file publishes what it holds, a half as well, unless that is put off until commit()
        file = self._files.open(location.url, "wb", block_size=PIECE_BYTES, autocommit=False)
        num_bytes = 0
        try:
            for piece in pieces():
                num_bytes += file.write(piece)
            file.close()
            file.commit()
        except BaseException:
            with suppress(Exception):
                file.close()  # else it tries to send the rest when it is collected
            with suppress(Exception):
                file.discard()
            raise
        return num_bytes

    def _retried(self, location: Location, task: Callable[[], T]) -> T:
        for wait_seconds in (*self._retry_seconds, None):
            try:
                with explained(location):
                    try:
                        return task()
                    except DamagedError as error:  # of the source: not the store's to explain
                        damage = error
                raise damage
            except StorageError as error:
                if error.permanent or wait_seconds is None:
                    raise MirrorError(str(error)) from error
                time.sleep(max(wait_seconds, error.retry_after_seconds))
        raise AssertionError("the last try returns or raises")


def push(folder: Path, address: str) -> int:
    """Copy a complete checkpoint to a mirror; gives the bytes sent, 0 if it is there already.

    A file that is not as the manifest says is not sent, and raises DamagedError.
    """
    store = open_store(address, folder.parent.parent)
    manifest = (folder / MANIFEST).read_bytes()
    files = listed_files(manifest)
    if files is None:
        raise DamagedError(f"{folder / MANIFEST} is not readable")
    there = store.names()
    prefix = f"{folder.name}/"
    if f"{prefix}{MANIFEST}" in there:
        if b"".join(store.read(f"{prefix}{MANIFEST}")) == manifest:
            return 0
        # another checkpoint of the same name: incomplete from now on, until all of this one is there
        store.remove([f"{prefix}{MANIFEST}"])
    sent = {
        f"{prefix}{name}": store.write(f"{prefix}{name}", partial(checked_pieces, folder / name, expected))
        for name, expected in files.items()
    }
    found = {name: num_bytes for name, num_bytes in store.names().items() if name.startswith(prefix)}
    for name, num_bytes in sent.items():
        if found.pop(name, None) != num_bytes:
            raise MirrorError(f"{address}: {name} is not there with the {num_bytes} bytes that were sent")
    store.remove(sorted(found))  # of the other one
    return sum(sent.values()) + store.write(f"{prefix}{MANIFEST}", lambda: iter((manifest,)))


def claim(address: str, run_dir: Path, may_become: bool = False) -> None:
    """Note that this part of the mirror is of this run; a UserError if it is of another.

    may_become: a run folder without checkpoints, as after the loss of a disk, goes on as the run found there.
    """
    store, path = open_store(address, run_dir), run_dir / RUN_ID
    theirs = b"".join(store.read(RUN_ID)) if RUN_ID in store.names() else None
    try:
        ours = path.read_bytes() if path.exists() else None
        is_free = theirs is None
        if theirs is None:
            theirs = ours or secrets.token_hex(16).encode()
        if ours is None and (is_free or (may_become and not checkpoint.list_checkpoints(run_dir, True))):
            path.write_bytes(theirs)
            ours = theirs
    except OSError as error:
        raise MirrorError(f"{path}: {error.strerror or error}") from error
    if ours != theirs:
        raise UserError(
            f"checkpoint.mirror: {address} holds another run of the name '{run_dir.resolve().name}'; give "
            "this one an --output-dir of another name, or another mirror"
        )
    if is_free:
        store.write(RUN_ID, lambda: iter((theirs,)))


def pull_newest(address: str, run_dir: Path, allows: Allows) -> Path | None:
    """Fetch the newest complete checkpoint that verifies into the run folder; None if the mirror has none.

    One that is in the run folder already, and whole, is not fetched. Raises MirrorError if the mirror cannot
    be asked: to take that for an empty one would let a run begin anew.
    """
    store = open_store(address, run_dir)
    there = store.names()
    for name in _complete(there):
        attempt, step = checkpoint.attempt_of(Path(name)), checkpoint.step_of(Path(name))
        if not allows(attempt, step):
            continue
        final = run_dir / checkpoint.FOLDER / name
        if final.is_dir() and not checkpoint.verify(final):
            return final
        try:
            return _fetch(store, there, final)
        except DamagedError as error:
            logger.warning("%s on the mirror %s is passed over: %s", name, address, error)
        except OSError as error:
            raise MirrorError(
                f"{final}: could not be fetched from {address} ({error.strerror or error})"
            ) from error
    return None


def prune(
    address: str,
    run_dir: Path,
    keep_last: int,
    keep_every_steps: int | None,
    keep: Collection[str] = (),
    allows: Allows = lambda attempt, step: True,
    attempt: int = 1,
) -> list[str]:
    """Remove from a mirror what the run folder would not keep either; gives the names of what was removed.

    Those stay: the newest `keep_last` (at least one), milestones, the names in `keep`. What the history of
    the run does not allow counts for nothing; it is removed if an attempt before this one wrote it, as that
    will never be resumed from.
    """
    store = open_store(address, run_dir)
    there = store.names()
    complete = _complete(there)
    ours = [
        name for name in complete if allows(checkpoint.attempt_of(Path(name)), checkpoint.step_of(Path(name)))
    ]
    stays = {*ours[: max(1, keep_last)], *keep}
    if keep_every_steps:
        stays |= {name for name in ours if checkpoint.step_of(Path(name)) % keep_every_steps == 0}
    doomed = [name for name in ours if name not in stays]
    doomed += [name for name in complete if name not in ours and checkpoint.attempt_of(Path(name)) < attempt]
    if ours:  # what a killed run left half-sent, unless it is newer and so may still be on its way
        newest = _age(ours[0])
        doomed += [name for name in _folders(there) if name not in complete and _age(name) < newest]
    for name in doomed:
        inside = [path for path in there if path.startswith(f"{name}/")]
        manifest = f"{name}/{MANIFEST}"
        store.remove(
            [path for path in inside if path == manifest]
        )  # first, so that no half passes for a whole
        store.remove([path for path in inside if path != manifest])
    return doomed


def listed_files(manifest: bytes) -> dict[str, str] | None:
    """File name -> sha256, or None where a manifest is none or names a file outside of its folder."""
    try:
        files = json.loads(manifest)["files"]
        root = Location("checkpoint")
        for name, digest in files.items():
            root.join(name)
            if not isinstance(digest, str) or name == MANIFEST:
                return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError):
        return None
    return dict(files)


def read_pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def checked_pieces(path: Path, expected: str) -> Iterator[bytes]:
    """The bytes of a file; DamagedError at their end, if they are others than the manifest vouches for."""
    digest = hashlib.sha256()
    try:
        for piece in read_pieces(path):
            digest.update(piece)
            yield piece
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror or error})") from error
    if digest.hexdigest() != expected:
        raise DamagedError(f"{path} is damaged (sha256 differs)")


def _fetch(store: Store, there: Mapping[str, int], final: Path) -> Path:
    """Copy a checkpoint under a temporary name, which `checkpoint.sweep` knows, and verify it there."""
    name = final.name
    if there[f"{name}/{MANIFEST}"] > MAX_MANIFEST_BYTES:
        raise DamagedError(f"{MANIFEST} is too large to be one")
    manifest = b"".join(store.read(f"{name}/{MANIFEST}"))
    files = listed_files(manifest)
    if files is None:
        raise DamagedError(f"{MANIFEST} is not readable")
    missing = sorted(file for file in files if f"{name}/{file}" not in there)
    if missing:
        raise DamagedError(f"{missing[0]} is missing")
    writing = final.parent / f".writing-{name}-pulled-{os.getpid()}"
    shutil.rmtree(writing, ignore_errors=True)
    fetched = writing / name  # under its name, with which `verify` compares the manifest
    try:
        fetched.mkdir(parents=True)
        for file in files:
            _download(store.read(f"{name}/{file}"), fetched / file)
        _download(iter((manifest,)), fetched / MANIFEST)
        problems = checkpoint.verify(fetched)
        if problems:
            raise DamagedError("; ".join(problems))
        for folder in {path.parent for path in fetched.rglob("*")}:
            _sync_folder(folder)
        if final.exists():  # damaged, as it did not verify
            checkpoint.remove_checkpoint(final)
        fetched.rename(final)
        _sync_folder(final.parent)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return final


def _download(pieces: Iterator[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _folders(there: Collection[str]) -> list[str]:
    """Names of the checkpoints of which a mirror has any file, newest first."""
    found = {path.partition("/")[0] for path in there if "/" in path}
    return sorted((name for name in found if _is_checkpoint(name)), key=_age, reverse=True)


def _complete(there: Collection[str]) -> list[str]:
    return [name for name in _folders(there) if f"{name}/{MANIFEST}" in there]


def _is_checkpoint(name: str) -> bool:
    try:
        _age(name)
    except ValueError:
        return False
    return True


def _age(name: str) -> tuple[int, int]:
    return checkpoint.step_of(Path(name)), checkpoint.attempt_of(Path(name))


def _unusable(path: Path, error: OSError) -> MirrorError:
    return MirrorError(f"{path}: {error.strerror or error}")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
