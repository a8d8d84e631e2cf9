"""The labels of ImageNet's validation images: image name -> WordNet id, out of the files people have.

Taken: the challenge's CSV (`ILSVRC2012_val_00000001,n01751748 1 2 3 4`), lines of `IMAGE WNID`, or one
WordNet id a line in the order of the images. Numbers alone do not say which class they mean (the challenge's
own ids, 1 to 1000, are not in the order of the WordNet ids), so they need a file of lines `WNID ID`.
"""

from __future__ import annotations

import re
from pathlib import Path

from pretrain.data.build.settings import BuildRequest
from pretrain.errors import DataError

_KNOWN_NAMES = (
    "LOC_val_solution.csv",
    "val_labels.txt",
    "ILSVRC2012_val_labels.txt",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
    "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
)
_SYNSET = re.compile(r"n[0-9]{8}")
_NUMBER = re.compile(r"[0-9]{1,4}")


def find_val_labels(request: BuildRequest, folder: Path) -> Path | None:
    """--val-labels, or a file of a usual name beside the tars."""
    if request.val_labels is not None:
        if not request.val_labels.is_file():
            raise DataError(f"--val-labels {request.val_labels}: no such file")
        return request.val_labels
    return next((folder / name for name in _KNOWN_NAMES if (folder / name).is_file()), None)


def read_val_labels(path: Path, synset_ids: Path | None) -> dict[str, str]:
    """Image name without its extension -> WordNet id."""
    synset_of_id = _read_synset_ids(synset_ids) if synset_ids is not None else None
    labels: dict[str, str] = {}
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    for number, line in enumerate((line for line in lines if line), start=1):
        words = re.split(r"[\s,]+", line.strip(" ,"))
        if number == 1 and words[0] in ("ImageId", "filename", "image"):
            continue  # the title of a CSV
        image = f"ILSVRC2012_val_{number:08d}" if len(words) == 1 else Path(words[0]).stem
        label = words[0] if len(words) == 1 else words[1]
        if _NUMBER.fullmatch(label):
            if synset_of_id is None:
                raise DataError(
                    f"{path}: line {number} holds the number {label}, which does not say which class it "
                    "means (the challenge's ids are not in the order of the WordNet ids); give --synset-ids "
                    "with lines 'WNID ID' from the development kit, or a file of WordNet ids"
                )
            if label not in synset_of_id:
                raise DataError(f"{path}: line {number}: {synset_ids} has no id {label}; give all of them")
            label = synset_of_id[label]
        if not _SYNSET.fullmatch(label):
            raise DataError(
                f"{path}: line {number}: {label!r} is no WordNet id such as n01440764; "
                "expected 'IMAGE WNID' or one WNID a line"
            )
        if image in labels:
            raise DataError(f"{path}: line {number}: {image} is there twice; remove one")
        labels[image] = label
    if not labels:
        raise DataError(f"{path}: holds no labels; give another file")
    return labels


def _read_synset_ids(path: Path) -> dict[str, str]:
    """Lines of a WordNet id and a number, in either order; what follows on the line is a name."""
    if not path.is_file():
        raise DataError(f"--synset-ids {path}: no such file")
    synset_of_id: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = re.split(r"[\s,]+", line.strip())[:2]
        synsets = [word for word in words if _SYNSET.fullmatch(word)]
        ids = [word for word in words if _NUMBER.fullmatch(word)]
        if not line.strip():
            continue
        if len(synsets) != 1 or len(ids) != 1 or ids[0] in synset_of_id:
            raise DataError(f"{path}: line {number}: expected one new 'WNID ID', such as 'n02119789 1'")
        synset_of_id[ids[0]] = synsets[0]
    return synset_of_id
