"""What a sample is made of: the image, the label and the JSON of an item, and the members they become."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

from pretrain.data import scan
from pretrain.data.build.listing import OWN_FILE, Item, Listing
from pretrain.data.columns import NO_LABEL
from pretrain.data.scan import IMAGE_EXTENSIONS
from pretrain.data.tar import walk
from pretrain.errors import DataError

DEFAULT_KEEP = ("image", "cls", "json")


@dataclass(frozen=True)
class Sample:
    """An item's parts, still in the source's own encoding."""

    name: str  # in the source
    image: bytes
    label: int | None
    kept: dict[str, bytes]  # other members, by extension


def read_sample(listing: Listing, index: int, keep: tuple[str, ...], labels: bool) -> Sample:
    """The sample behind an item of the list."""
    item = listing.item(index)
    data = listing.read(item)
    if item.place != OWN_FILE and listing.containers[item.place].holds_samples:
        return from_stretch(item, data, keep, labels)
    return from_image(item, data)


def from_image(item: Item, data: bytes) -> Sample:
    return Sample(item.name, data, item.label, {"json": item.note} if item.note else {})


def from_stretch(item: Item, data: bytes, keep: tuple[str, ...], labels: bool) -> Sample:
    """Take apart the stretch of a tar that holds all members of a sample."""
    found = next(scan.group(walk(io.BytesIO(data)), problems=[]), None)
    if found is None or found.image is None:
        raise DataError(
            f"{item.name}: changed while the build ran (no sample at byte {item.offset}); "
            "leave the source alone and build into a new folder"
        )
    others = {
        extension: member.data
        for extension, member in found.members.items()
        if extension in keep and extension != "cls" and extension not in IMAGE_EXTENSIONS
    }
    name = f"{item.name}/{found.key}"
    label = _label(name, found) if labels and "cls" in keep else None
    return Sample(name, found.image.data, label, others)


def members_of(sample: Sample, image: bytes, extension: str, keep_name: bool) -> list[tuple[str, bytes]]:
    """(extension, bytes) of each member to write."""
    members = [(extension, image)]
    if sample.label is not None:
        members.append(("cls", str(sample.label).encode("ascii")))
    kept = dict(sample.kept)
    if keep_name:
        content = {**_json_object(sample.name, kept.get("json")), "source": sample.name}
        kept["json"] = json.dumps(content).encode("ascii")
    return members + sorted(kept.items())


def _label(name: str, sample: scan.Sample) -> int | None:
    """As every reader tells it; but where one would overlook a label that is no number, this is an error."""
    if sample.label != NO_LABEL:
        return sample.label
    text = sample.members["cls"].data if "cls" in sample.members else b"-1"
    if text.strip() != b"-1":
        raise DataError(
            f"{name}.cls holds {text[:20]!r}, which is no class index; "
            "mend it, or leave labels out with --no-labels"
        )
    return None


def _json_object(name: str, data: bytes | None) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}.json cannot be read ({error}); leave it out with --keep image,cls"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{name}.json is not an object, so no name fits in; leave out --keep-names")
    return content
