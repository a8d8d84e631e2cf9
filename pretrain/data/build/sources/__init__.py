"""What a build can read: one file per kind of source, all of them in one table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pretrain.data.build.settings import TORCHVISION_PREFIX, BuildRequest
from pretrain.data.build.sources import arrays, coco, folder, imagenet, parquet, webdataset
from pretrain.data.build.sources.source import Source
from pretrain.errors import DataError

# kind -> (does SOURCE look like one?, find its splits and files); the last one takes what no other claims
SOURCES: dict[str, tuple[Callable[[Path], bool], Callable[[BuildRequest], Source]]] = {
    "imagenet": (imagenet.looks_like_one, imagenet.find),
    "webdataset": (webdataset.looks_like_one, webdataset.find),
    "parquet": (parquet.looks_like_one, parquet.find),
    "coco": (coco.looks_like_one, coco.find),
    "folder": (Path.is_dir, folder.find),
}


def find_source(request: BuildRequest) -> Source:
    """Tell what SOURCE is from the names of its files, or take the user's word for it."""
    if request.source.startswith(TORCHVISION_PREFIX):
        if request.kind not in (None, "torchvision"):
            raise DataError(f"{request.source} is not of --kind {request.kind}; leave --kind out")
        return arrays.find(request)
    if request.kind == "torchvision":
        raise DataError(f"{request.source}: name a data set, such as {TORCHVISION_PREFIX}cifar10")
    path = Path(request.source)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; SOURCE is what the images are read from")
    if request.kind is not None:
        return SOURCES[request.kind][1](request)
    claims = [kind for kind, (looks_like_one, _) in SOURCES.items() if looks_like_one(path)]
    if not claims:
        raise DataError(
            f"{path}: no folder, and neither .tar nor .parquet nor .arrow; give the folder that holds it"
        )
    if "imagenet" in claims:  # its tars are no shards
        claims = [kind for kind in claims if kind != "webdataset"]
    if len(claims) > 2 or (len(claims) == 2 and claims[1] != "folder"):
        raise DataError(f"{path}: holds {' and '.join(claims[:-1])} data; say which with --kind")
    return SOURCES[claims[0]][1](request)
