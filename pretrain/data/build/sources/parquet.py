"""Tables of images: .parquet files (also as they lie on the Hugging Face hub), .arrow files, saved data sets.

The split of a file is told from its name (`train-00000-of-00005.parquet`) or its folder's. Rows can only be
read in groups, so the encoded images are spooled. A label column that holds class names' numbers brings the
names along where the table's schema tells them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.data.build.listing import NO_LABEL, ListingWriter
from pretrain.data.build.settings import BuildRequest
from pretrain.data.build.sources.source import (
    SPLIT_WORDS,
    Source,
    default_split,
    natural_key,
    refuse_split,
    split_word,
)
from pretrain.errors import DataError

SUFFIXES = (".parquet", ".arrow")
ROWS_PER_READ = 128
DEFAULT_LABEL_COLUMN = "label"
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")


def looks_like_one(path: Path) -> bool:
    if path.is_file():
        return path.name.endswith(SUFFIXES)
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json")) or any(
        any(path.glob(f"{folder}*{suffix}")) for folder in ("", "data/", "train/") for suffix in SUFFIXES
    )


def find(request: BuildRequest) -> Source:
    path = Path(request.source)
    _pyarrow()
    by_split = _files(path, default_split(request, path))
    if not by_split:
        raise DataError(f"{path}: no .parquet or .arrow files here; give the folder that holds them")
    if by_split.keys() != {default_split(request, path)}:
        refuse_split(request, list(by_split))
    files = [file for group in by_split.values() for file in group]

    def list_items(writer: ListingWriter) -> None:
        for split, group in by_split.items():
            writer.begin_split(split)
            for file in group:
                _list_file(writer, file, path, request)

    root = path if path.is_dir() else path.parent
    spool_bytes = sum(file.stat().st_size for file in files)
    return Source("parquet", root, tuple(by_split), list_items, files=tuple(files), spool_bytes=spool_bytes)


def _pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise DataError(
            "parquet and arrow files need pyarrow; run `pip install 'pretrain[parquet]'`"
        ) from error


def _files(path: Path, default: str) -> dict[str, list[Path]]:
    if path.is_file():
        return {split_word(path.name, default): [path]} if path.name.endswith(SUFFIXES) else {}
    if (path / "dataset_dict.json").is_file():
        names = _read_json(path / "dataset_dict.json").get("splits", [])
        return {SPLIT_WORDS.get(name, name): _saved_files(path / Path(name).name) for name in names}
    if (path / "state.json").is_file():
        return {default: _saved_files(path)}
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*"), key=lambda file: (str(file.parent), natural_key(file))):
        inside = file.relative_to(path)
        if file.suffix in SUFFIXES and not any(part.startswith(".") for part in inside.parts):
            of_folder = (
                SPLIT_WORDS.get(inside.parts[-2].lower(), default) if len(inside.parts) > 1 else default
            )
            found.setdefault(split_word(file.name, of_folder), []).append(file)
    return found


def _saved_files(folder: Path) -> list[Path]:
    """The files of a data set that was saved to disk, in its own order."""
    state = _read_json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(f"{folder}: saved with an index of rows apart; call flatten_indices() and save again")
    names = [entry["filename"] for entry in state.get("_data_files", [])]
    if any(Path(name).name != name for name in names):
        raise DataError(f"{folder / 'state.json'}: names files outside of its folder; save the data again")
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save the data set again") from error
    return content


def _list_file(writer: ListingWriter, file: Path, source: Path, request: BuildRequest) -> None:
    import pyarrow as arrow

    try:
        with file.open("rb") as opened:
            schema, batches = _open(opened, file)
            image = _image_column(schema, file, request.image_column)
            label = _label_column(schema, file, request) if request.labels else None
            names = _class_names(schema, label) if label is not None else ()
            if writer.class_names and names and names != writer.class_names:
                raise DataError(
                    f"{file}: its classes differ from those of the files before; build them apart"
                )
            writer.class_names = names or writer.class_names
            prefix = file.relative_to(source) if source.is_dir() else Path(file.name)
            row = 0
            for batch in batches([image] if label is None else [image, label]):
                images = batch.column(image)
                labels = batch.column(label).to_pylist() if label is not None else [None] * len(batch)
                for place in range(len(batch)):
                    data = _image_bytes(images[place].as_py(), file, row)
                    spool_place, offset = writer.spool(data)
                    number = _label(labels[place], file, label, row)
                    name = f"{prefix}#{row}"
                    writer.add(name, len(data), place=spool_place, offset=offset, label=number)
                    row += 1
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: cannot be read as a table ({reason}); fetch this file again") from error


def _open(opened: Any, file: Path) -> tuple[Any, Any]:
    """(schema, function that reads some columns in batches)."""
    import pyarrow as arrow
    import pyarrow.ipc as ipc
    import pyarrow.parquet as parquet

    if file.suffix == ".parquet":
        table = parquet.ParquetFile(opened, memory_map=False)
        return table.schema_arrow, lambda columns: table.iter_batches(ROWS_PER_READ, columns=columns)
    mapped = arrow.memory_map(str(file))
    try:
        stream = ipc.open_stream(mapped)
    except arrow.ArrowInvalid:
        whole = ipc.open_file(mapped)  # the other of the two arrow layouts
        return whole.schema, lambda columns: _arrow_batches(
            (whole.get_batch(number) for number in range(whole.num_record_batches)), columns
        )
    return stream.schema, lambda columns: _arrow_batches(stream, columns)


def _arrow_batches(batches: Any, columns: list[str]) -> Iterator[Any]:
    for batch in batches:
        yield batch.select(columns)


def _image_column(schema: Any, file: Path, wanted: str | None) -> str:
    """The column asked for; else the one the schema calls an image; else the only one that can be one."""
    import pyarrow.types as types

    def can_hold_images(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(field.name == "bytes" and can_hold_images(field.type) for field in kind)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    possible = [field.name for field in schema if can_hold_images(field.type)]
    if wanted is not None:
        if wanted not in possible:
            raise DataError(
                f"{file}: --image-column {wanted} holds no encoded images; columns that do: "
                f"{', '.join(possible) or 'none'} (of {', '.join(schema.names)})"
            )
        return wanted
    typed = [name for name, kind in _features(schema).items() if kind.get("_type") == "Image"]
    for candidates in (
        [name for name in typed if name in possible],
        [name for name in possible if name.lower() in _IMAGE_NAMES],
        possible,
    ):
        if len(candidates) == 1:
            return candidates[0]
    told = f"holds several: {', '.join(possible)}" if possible else f"has: {', '.join(schema.names)}"
    raise DataError(f"{file}: no single column of encoded images (it {told}); name it with --image-column")


def _label_column(schema: Any, file: Path, request: BuildRequest) -> str | None:
    import pyarrow.types as types

    name = request.label_column or DEFAULT_LABEL_COLUMN
    if name not in schema.names:
        if request.label_column is not None:
            raise DataError(f"{file}: no column {name!r}; columns: {', '.join(schema.names)}")
        return None
    if not types.is_integer(schema.field(name).type):
        raise DataError(
            f"{file}: column {name!r} holds {schema.field(name).type}, not whole numbers; "
            "name another with --label-column, or give --no-labels"
        )
    return name


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    return tuple(str(name) for name in _features(schema).get(label, {}).get("names") or ())


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}


def _image_bytes(value: Any, file: Path, row: int) -> bytes:
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            raise DataError(
                f"{file}: row {row} holds the path {value['path']!r} instead of an image; "
                "embed the images when saving, or build from the folder of files"
            )
        value = value.get("bytes")
    return bytes(value or b"")  # an empty row is rejected later as an empty image


def _label(value: Any, file: Path, column: str | None, row: int) -> int:
    if value is None or value == NO_LABEL:
        return NO_LABEL
    if not 0 <= value < 1 << 31:
        raise DataError(f"{file}: row {row}: label {value} in {column!r} is no class index; give --no-labels")
    return int(value)
