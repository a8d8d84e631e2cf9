"""ImageNet-1k as it is distributed: a tar of 1000 tars of JPEGs, and 50,000 validation images in a tar.

Nothing is unpacked: the headers of both levels are read once, and each image is then read from its place in
the tar. A label is the place of the image's WordNet id among all of them, sorted.
"""

from __future__ import annotations

import re
from pathlib import Path

from pretrain.data.build.listing import NO_LABEL, ListingWriter
from pretrain.data.build.settings import BuildRequest
from pretrain.data.build.sources.source import Source, refuse_split
from pretrain.data.build.sources.val_labels import find_val_labels, read_val_labels
from pretrain.data.build.tar_members import TarMember, list_members
from pretrain.errors import DataError

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
TEST_TARS = "ILSVRC2012_img_test*.tar"
_SYNSET_TAR = re.compile(r"(?:.*/)?(n[0-9]{8})\.tar")
_READ_BUFFER_BYTES = 4096


def looks_like_one(path: Path) -> bool:
    return bool(_tars(path))


def find(request: BuildRequest) -> Source:
    path = Path(request.source)
    tars = _tars(path)
    if not tars:
        raise DataError(f"{path}: holds neither {TRAIN_TAR} nor {VAL_TAR}; give the folder they lie in")
    refuse_split(request, list(tars))
    labels_path = None
    notes = []
    if "val" in tars and request.labels:
        labels_path = find_val_labels(request, path if path.is_dir() else path.parent)
        if labels_path is None:
            notes.append("val is left without labels: no file of them found, give --val-labels")
    own = [file for files in tars.values() for file in files]
    label_files = [file for file in (labels_path, request.synset_ids) if file is not None]

    def list_items(writer: ListingWriter) -> None:
        names = read_val_labels(labels_path, request.synset_ids) if labels_path is not None else {}
        train = [item for file in tars.get("train", ()) for item in _train_tars(file)]
        synsets = sorted({synset for _, _, _, synset in train}) if train else sorted(set(names.values()))
        label_of = {synset: number for number, synset in enumerate(synsets)} if request.labels else {}
        writer.class_names = tuple(label_of)
        if train:
            writer.begin_split("train")
            _list_train(writer, train, label_of)
        for split in (name for name in ("val", "test") if name in tars):
            writer.begin_split(split)
            for file in tars[split]:
                _list_flat(writer, file, names if split == "val" else {}, label_of)

    files = tuple(dict.fromkeys([*own, *label_files]))
    root = path if path.is_dir() else path.parent
    return Source("imagenet", root, tuple(tars), list_items, files=files, notes=tuple(notes))


def _tars(path: Path) -> dict[str, list[Path]]:
    """Split -> its tars. The train tars of the synsets may lie in SOURCE or SOURCE/train by themselves."""
    if path.is_file():
        split = {TRAIN_TAR: "train", VAL_TAR: "val"}.get(path.name)
        return {split: [path]} if split else {}
    found = {"train": [path / TRAIN_TAR], "val": [path / VAL_TAR], "test": sorted(path.glob(TEST_TARS))}
    found = {split: [file for file in files if file.is_file()] for split, files in found.items()}
    if not found["train"]:
        loose = [*path.glob("n*.tar"), *(path / "train").glob("n*.tar")]
        found["train"] = sorted(file for file in loose if _SYNSET_TAR.fullmatch(file.name))
    return {split: files for split, files in found.items() if files}


def _train_tars(path: Path) -> list[tuple[Path, int, int, str]]:
    """The tars of the synsets: (file, where it begins, bytes, WordNet id)."""
    if (loose := _SYNSET_TAR.fullmatch(path.name)) is not None:
        return [(path, 0, path.stat().st_size, loose[1])]
    found = []
    with path.open("rb", buffering=_READ_BUFFER_BYTES) as file:
        for member in list_members(file, path, 0, path.stat().st_size):
            synset = _SYNSET_TAR.fullmatch(member.name)
            if synset is None:
                raise DataError(
                    f"{path}: member {member.name!r} is not a tar named by a WordNet id (n01440764.tar); "
                    "give the file as it is distributed"
                )
            found.append((path, member.data_offset, member.num_bytes, synset[1]))
    if len({synset for *_, synset in found}) < len(found):
        raise DataError(f"{path}: holds the tar of a WordNet id twice; give the file as it is distributed")
    return sorted(found, key=lambda item: item[3])


def _list_train(
    writer: ListingWriter, tars: list[tuple[Path, int, int, str]], label_of: dict[str, int]
) -> None:
    places = {path: writer.container(path) for path in dict.fromkeys(path for path, *_ in tars)}
    for path, begin, num_bytes, synset in tars:
        label = label_of.get(synset, NO_LABEL)
        num_images = 0
        with path.open("rb", buffering=_READ_BUFFER_BYTES) as file:
            for member in list_members(file, path, begin, num_bytes, f"{synset}.tar"):
                if _is_image(writer, member):
                    _add(writer, member, f"{synset}/{member.name}", places[path], label)
                    num_images += 1
        if not num_images:
            raise DataError(f"{path}: {synset}.tar holds no images; fetch this archive again")


def _list_flat(
    writer: ListingWriter, path: Path, synset_of: dict[str, str], label_of: dict[str, int]
) -> None:
    place = writer.container(path)
    num_images = 0
    with path.open("rb", buffering=_READ_BUFFER_BYTES) as file:
        for member in list_members(file, path, 0, path.stat().st_size):
            if not _is_image(writer, member):
                continue
            num_images += 1
            label = NO_LABEL
            if synset_of:
                synset = synset_of.get(Path(member.name).stem)
                if synset is None:
                    raise DataError(
                        f"{path}: {member.name!r} has no label in the file of labels; give one that has all"
                    )
                if synset not in label_of:
                    raise DataError(
                        f"{path}: {member.name!r} is labelled {synset}, which the train tar does not hold"
                        "; give the labels of the same classes"
                    )
                label = label_of[synset]
            _add(writer, member, member.name, place, label)
    if synset_of and num_images != len(synset_of):
        raise DataError(
            f"{path}: {num_images} images, but {len(synset_of)} labels; give the labels of these images"
        )


def _add(writer: ListingWriter, member: TarMember, name: str, place: int, label: int) -> None:
    writer.add(name, member.num_bytes, place=place, offset=member.data_offset, label=label)


def _is_image(writer: ListingWriter, member: TarMember) -> bool:
    if member.name.lower().endswith((".jpeg", ".jpg", ".png")):
        return True
    writer.skipped[Path(member.name).suffix.lower() or "without extension"] += 1
    return False
