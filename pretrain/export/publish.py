"""The place where an export goes: whole, or as it was before.

What another hand has put or changed there is never lost: a folder that is not an export is refused, and an
older export with anything added or changed is kept beside the new one.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.export.export_report import CARD, REPORT, ExportReport, full_report, read_report
from pretrain.export.source import sha256_of

SWEEP_SECONDS = 3600.0  # after which an unfinished folder is nobody's, on other machines too


def refuse_foreign(out: Path) -> None:
    """UserError if there is anything but an export of ours or an empty folder."""
    if not out.exists() or read_report(out) is not None:
        return
    if not out.is_dir() or any(out.iterdir()):
        raise UserError(f"{out}: exists and is not an export of ours; choose another --out or remove it")


def is_same(out: Path, expected: dict[str, Any]) -> ExportReport | None:
    """The report of an export that says all this of itself, if its files but for the card are as written."""
    record = read_report(out)
    if record is None or any(record.get(key) != value for key, value in expected.items()):
        return None
    return None if _changed_files(out, record, but=(CARD,)) else full_report(record)


def _changed_files(out: Path, record: dict[str, Any], but: tuple[str, ...] = ()) -> list[str]:
    """Files of an export that are missing or not what was written."""
    files: dict[str, str] = record.get("files", {})
    return [
        name
        for name, expected in files.items()
        if name not in but and not ((out / name).is_file() and sha256_of(out / name) == expected)
    ]


def _added_files(out: Path, record: dict[str, Any]) -> list[str]:
    known = {REPORT, *record.get("files", {"model.safetensors": "", "config.json": "", CARD: ""})}
    found = (str(path.relative_to(out)) for path in sorted(out.rglob("*")) if not path.is_dir())
    return [name for name in found if name not in known]


@contextmanager
def half_made(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, for `take_place`; nothing of it is left in the end."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        _sweep(out)
        shutil.rmtree(temporary, ignore_errors=True)  # of a process before, that had the same number
        temporary.mkdir(parents=True)
        yield temporary
    except OSError as error:
        if error.errno is None:  # not of the disk
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"{out}: cannot be written: {error.strerror}{where}; make room or choose another --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_place(new: Path, out: Path) -> Path | None:
    """Rename a finished folder to `out`. An older export of ours goes, unless someone has changed it.

    Returns where the older one was kept.
    """
    _make_durable(new)
    record = read_report(out)
    if record is None:
        new.rename(out)  # also replaces an empty folder
        return None
    is_kept = bool(_added_files(out, record) or _changed_files(out, record))
    aside = _free_name(out, record) if is_kept else out.with_name(f".{out.name}.{os.getpid()}.old")
    out.rename(aside)
    try:
        new.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    if is_kept:
        return aside
    shutil.rmtree(aside, ignore_errors=True)
    return None


def write_whole(path: Path, text: str) -> None:
    """Complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _sweep(out: Path) -> None:
    """Remove what exports left that were killed here, long ago: none of this name can still be at work."""
    for path in (*out.parent.glob(f".{out.name}.*.tmp"), *out.parent.glob(f".{out.name}.*.old")):
        number = path.name.split(".")[-2]
        is_running = number.isdigit() and Path(f"/proc/{number}").exists()
        if not is_running and time.time() - path.stat().st_mtime > SWEEP_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _free_name(out: Path, record: dict[str, Any]) -> Path:
    step = record.get("source_step")
    base = f"{out.name}.step-{step:08d}" if isinstance(step, int) else f"{out.name}.old"
    names = (base if number == 1 else f"{base}.{number}" for number in range(1, 10_000))
    return next(path for path in (out.with_name(name) for name in names) if not path.exists())


def _make_durable(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            if not path.is_dir():
                os.fchmod(handle, 0o644)  # some libraries write for the owner alone
            os.fsync(handle)
        finally:
            os.close(handle)
