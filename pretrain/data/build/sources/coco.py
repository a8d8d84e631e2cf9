"""COCO: a folder of images and `instances_SPLIT.json` beside it or in `annotations/`.

The images named there are taken, without labels: boxes are no class of the image. `--keep annotations` writes
each image's size and annotations into KEY.json. The JSON is read whole (some six times its size in memory).
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from pretrain.data.build.listing import ListingWriter
from pretrain.data.build.settings import BuildRequest
from pretrain.data.build.sources.source import SPLIT_WORDS, Source, default_split, refuse_split, split_word
from pretrain.errors import DataError

_PATTERN = "instances_*.json"
_KEPT_FIELDS = ("file_name", "height", "width")


def looks_like_one(path: Path) -> bool:
    return path.is_dir() and bool(_instances(path))


def find(request: BuildRequest) -> Source:
    root = Path(request.source)
    files = _instances(root)
    if not files:
        raise DataError(f"{root}: no {_PATTERN} here or in annotations/; give the folder that holds them")
    keep = set(request.keep or ())
    if keep - {"annotations"}:
        raise DataError("--keep: of COCO only 'annotations' can be kept")
    found: dict[str, tuple[Path, Path]] = {}
    for file in files:
        part = file.stem.removeprefix("instances_")
        split = split_word(part, default_split(request, root))
        if split in found:
            raise DataError(f"{root}: {found[split][0].name} and {file.name} are both of split {split}")
        found[split] = file, _image_folder(root, part, file)
    if any(word in SPLIT_WORDS for word in found) and found.keys() != {request.split}:
        refuse_split(request, list(found))

    def list_items(writer: ListingWriter) -> None:
        for split, (file, folder) in found.items():
            writer.begin_split(split)
            _list_images(writer, file, folder, bool(keep))

    jsons = tuple(file for file, _ in found.values())
    notes = ("boxes are no image labels: labels are left out",)
    return Source("coco", root, tuple(found), list_items, files=jsons, lists_quickly=True, notes=notes)


def _instances(root: Path) -> list[Path]:
    return sorted([*root.glob(_PATTERN), *(root / "annotations").glob(_PATTERN)])


def _image_folder(root: Path, part: str, file: Path) -> Path:
    places = (root / "images" / part, root / part, root / "images")
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise DataError(
            f"{file}: none of the folders {', '.join(str(place.relative_to(root)) for place in places)} "
            f"is in {root}; put the images there"
        )
    return folder


def _list_images(writer: ListingWriter, file: Path, folder: Path, keep_annotations: bool) -> None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        images = {int(image["id"]): image for image in content["images"]}
        annotations: dict[int, list[Any]] = {number: [] for number in images}
        for annotation in content["annotations"] if keep_annotations else ():
            annotations[int(annotation["image_id"])].append(annotation)
        category_of = {item["id"]: item["name"] for item in content["categories"]} if keep_annotations else {}
        names = [str(image["file_name"]) for image in images.values()]
        num_images = len(content["images"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not COCO instances ({error!r}); fetch this file again") from error
    if len(set(names)) < num_images:
        raise DataError(f"{file}: names an image twice; mend the file")
    outside = [name for name in names if ".." in PurePosixPath(name).parts or name.startswith("/")]
    if outside:
        raise DataError(f"{file}: {outside[0]!r} points out of {folder}; mend the file")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise DataError(
            f"{file}: {len(absent)} of {num_images} images are not in {folder}, such as {absent[0]!r}; "
            "fetch them"
        )
    for image in sorted(images.values(), key=lambda image: str(image["file_name"])):
        path = folder / image["file_name"]
        kept = {field: image[field] for field in _KEPT_FIELDS if field in image}
        own = [
            {**annotation, "category": category_of.get(annotation["category_id"])}
            for annotation in annotations[int(image["id"])]
        ]
        note = {**kept, "annotations": own}
        status = path.stat()
        writer.add(
            str(path.relative_to(writer.root)),
            status.st_size,
            note=json.dumps(note, sort_keys=True).encode() if keep_annotations else b"",
            stamp=status.st_mtime_ns,
        )
