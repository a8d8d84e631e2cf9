"""`_info.json` (read by timm) and `sizes.json` (webdataset, OpenCLIP): how many samples each shard holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.data.replacing import json_bytes, write_bytes
from pretrain.data.storage import Location, read_bytes
from pretrain.errors import DataError

INFO_NAME, SIZES_NAME = "_info.json", "sizes.json"
SPLITS = {  # word -> split
    "train": "train",
    "test": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "unlabeled": "unlabeled",
    "unlabelled": "unlabeled",
}


@dataclass(frozen=True)
class SizesFiles:
    """What these files say of a folder, as far as they are there."""

    splits: dict[str, str]  # shard name -> split
    sizes: dict[str, dict[str, int]]  # file -> shard name -> samples

    @classmethod
    def read(cls, folder: Location, own: Mapping[str, str]) -> SizesFiles:
        """own: sha256 of files that an earlier index of ours wrote; they say nothing new."""
        splits: dict[str, str] = {}
        sizes: dict[str, dict[str, int]] = {}
        if (listed := _read_json(folder, SIZES_NAME, own)) is not None:
            sizes[SIZES_NAME] = {Path(name).name: size for name, size in listed.items() if _is_count(size)}
        described = (_read_json(folder, INFO_NAME, own) or {}).get("splits", {})
        entries = described.values() if isinstance(described, dict) else [None]
        if not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{folder.join(INFO_NAME)}: its 'splits' are not objects; mend or remove it")
        for split, entry in described.items():
            names, lengths = entry.get("filenames"), entry.get("shard_lengths")
            if not isinstance(names, list):
                continue
            base_names = [Path(str(name)).name for name in names]
            splits.update((name, SPLITS.get(split, str(split))) for name in base_names)
            if isinstance(lengths, list) and len(lengths) == len(names):
                sizes.setdefault(INFO_NAME, {}).update(zip(base_names, lengths, strict=True))
        return cls(splits, sizes)

    def disagreements(self, found: Mapping[str, int]) -> list[str]:
        """found: shard name -> samples counted."""
        return [
            f"{file} counts {size} samples in {name}, there are {found.get(name, 'no such shard')}: "
            f"restore the shard, or remove {file} if it is out of date"
            for file, sizes in self.sizes.items()
            for name, size in sizes.items()
            if found.get(name) != size
        ]


def write_sizes_files(
    folder: Path, shards: Sequence[tuple[str, str, int]], own: Mapping[str, str]
) -> dict[str, str]:
    """Write both beside the shards (name, split, samples) and give their sha256; others' files are left."""
    splits: dict[str, dict[str, Any]] = {}
    for name, split, num_samples in shards:
        entry = splits.setdefault(
            split, {"name": split, "num_samples": 0, "filenames": [], "shard_lengths": [], "alt_label": None}
        )
        entry["num_samples"] += num_samples
        entry["filenames"].append(name)
        entry["shard_lengths"].append(num_samples)
    sizes = {name: num_samples for name, _, num_samples in shards}
    written = {}
    for file_name, value in ((INFO_NAME, {"splits": splits}), (SIZES_NAME, sizes)):
        path, data = folder / file_name, json_bytes(value)
        before = _sha256(path.read_bytes()) if path.exists() else None
        if before in (None, own.get(file_name), _sha256(data)):
            write_bytes(path, data)
            written[file_name] = _sha256(data)
    return written


def _read_json(folder: Location, name: str, own: Mapping[str, str]) -> dict[str, Any] | None:
    if not folder.is_local or not (folder.path / name).is_file():
        return None
    data = read_bytes(folder.join(name))
    if own.get(name) == _sha256(data):
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{folder.join(name)}: is not JSON ({error}); mend or remove it") from error
    if not isinstance(value, dict):
        raise DataError(f"{folder.join(name)}: is not an object; mend or remove it")
    return value


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
