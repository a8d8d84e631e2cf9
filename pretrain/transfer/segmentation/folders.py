"""Where images and masks of a data set lie: Cityscapes' own layout, or plain folders with a class list."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import DataError, nearest
from pretrain.transfer.segmentation.recipe import DataRecipe
from pretrain.transfer.segmentation.scores import IGNORED

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# of Cityscapes: name, id in the files *_labelIds.png, colour; numbered 0 to 18 in *_labelTrainIds.png
CITYSCAPES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
CITYSCAPES_IDS = 34  # 0 to 33; those without a class above are left out, as is 255, the license plate's -1

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """One image and its mask."""

    name: str  # below the split, without suffix
    image: Path
    mask: Path


@dataclass(frozen=True)
class Labels:
    """What the values of mask files mean."""

    classes: tuple[str, ...]
    colours: tuple[Colour, ...]
    class_of: Mapping[int, int]  # value in a mask -> class, or IGNORED; other values are unknown
    ids: str  # what tells which values there are, for messages


@dataclass(frozen=True)
class Split:
    """A part of a data set; `scenes` in the order of their names."""

    folder: Path
    name: str
    scenes: tuple[Scene, ...]


def find_data(folder: Path, recipe: DataRecipe) -> tuple[Labels, dict[str, Split]]:
    """The labels, and the splits "train" and "test" of a data set. Raises DataError for what is not there."""
    if not folder.is_dir():
        raise DataError(f"--data {folder}: no such folder")
    layout = recipe.layout
    if layout == "auto":
        layout = "cityscapes" if (folder / "leftImg8bit").is_dir() else "folder"
    names = {"train": recipe.train_split, "test": recipe.test_split}
    if layout == "cityscapes":
        found = {role: _cityscapes_split(folder, name) for role, name in names.items()}
        kinds = {kind for _, kind in found.values()}
        if len(kinds) > 1:
            raise DataError(
                f"{folder / 'gtFine'}: one split has labelIds, the other labelTrainIds; use one kind"
            )
        return _cityscapes_labels(kinds.pop()), {role: split for role, (split, _) in found.items()}
    labels = _listed_labels(folder, recipe.ignore_label)
    return labels, {role: _plain_split(folder, name) for role, name in names.items()}


def _cityscapes_split(folder: Path, name: str) -> tuple[Split, str]:
    """The split, and the kind of its masks."""
    images = _split_folder(folder / "leftImg8bit", name)
    masks = _split_folder(folder / "gtFine", name)
    ending = "_leftImg8bit.png"
    image_of = {_below(path, images, ending): path for path in sorted(images.glob(f"*/*{ending}"))}
    for kind in ("labelIds", "labelTrainIds"):
        ending = f"_gtFine_{kind}.png"
        mask_of = {_below(path, masks, ending): path for path in sorted(masks.glob(f"*/*{ending}"))}
        if mask_of:
            return Split(folder, name, _paired(image_of, mask_of, images, masks)), kind
    if not image_of:
        raise DataError(
            f"{images}: holds no CITY/*_leftImg8bit.png; unpack leftImg8bit_trainvaltest.zip there"
        )
    raise DataError(f"{masks}: holds no CITY/*_gtFine_labelIds.png; unpack gtFine_trainvaltest.zip there")


def _cityscapes_labels(kind: str) -> Labels:
    names, ids, colours = zip(*CITYSCAPES, strict=True)
    class_of = {255: IGNORED}
    if kind == "labelIds":
        class_of |= dict.fromkeys(range(CITYSCAPES_IDS), IGNORED)
        class_of |= {value: index for index, value in enumerate(ids)}
    else:
        class_of |= {index: index for index in range(len(ids))}
    return Labels(names, colours, class_of, f"Cityscapes' {kind}")


def _plain_split(folder: Path, name: str) -> Split:
    images, masks = _split_folder(folder / "images", name), _split_folder(folder / "masks", name)
    image_of = _by_stem(images, IMAGE_SUFFIXES)
    mask_of = _by_stem(masks, (".png",))
    if not image_of:
        raise DataError(f"{images}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return Split(folder, name, _paired(image_of, mask_of, images, masks))


def _listed_labels(folder: Path, ignore_label: int) -> Labels:
    """Classes as classes.txt names them, one a line; the mask's value is the line's number, from 0."""
    path = folder / "classes.txt"
    try:
        names = [line.strip() for line in path.read_text().splitlines()]
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); it names the classes, one a line, in the order of "
            "their values in the masks"
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not a text file") from None
    while names and not names[-1]:
        names.pop()
    if not all(names):
        raise DataError(
            f"{path}: line {names.index('') + 1} is empty; each line names the class of its number"
        )
    kept = [value for value in range(len(names)) if value != ignore_label]
    if not 2 <= len(kept) < IGNORED:
        raise DataError(
            f"{path}: {len(kept)} classes besides the ignored value {ignore_label}; 2 to {IGNORED - 1} are "
            "possible"
        )
    class_of = {ignore_label: IGNORED, **{value: index for index, value in enumerate(kept)}}
    return Labels(
        tuple(names[value] for value in kept),
        tuple(_colour(index) for index in range(len(kept))),
        class_of,
        f"classes.txt (values 0 to {len(names) - 1}) and data.ignore_label={ignore_label}",
    )


def _split_folder(parent: Path, name: str) -> Path:
    folder = parent / name
    if folder.is_dir():
        return folder
    if not parent.is_dir():
        raise DataError(
            f"{parent}: no such folder; --data wants DIR/images/SPLIT, DIR/masks/SPLIT and DIR/classes.txt, "
            "or Cityscapes' leftImg8bit/ and gtFine/"
        )
    there = [path.name for path in parent.iterdir() if path.is_dir()]
    hint = nearest(name, there) if there else "it has none"
    raise DataError(f"{parent}: no split '{name}'; {hint} (the settings train_split and test_split choose)")


def _by_stem(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in found:
                raise DataError(
                    f"{path}: {found[path.stem].name} has the same name; a mask belongs to one image"
                )
            found[path.stem] = path
    return found


def _below(path: Path, folder: Path, ending: str) -> str:
    return path.relative_to(folder).as_posix().removesuffix(ending)


def _paired(
    image_of: Mapping[str, Path], mask_of: Mapping[str, Path], images: Path, masks: Path
) -> tuple[Scene, ...]:
    for have, lack, what, folder in (
        (image_of, mask_of, "images have no mask", masks),
        (mask_of, image_of, "masks have no image", images),
    ):
        alone = sorted(set(have) - set(lack))
        if alone:
            raise DataError(f"{len(alone)} {what} in {folder}; the first is {have[alone[0]]}")
    return tuple(Scene(name, image_of[name], mask_of[name]) for name in sorted(image_of))


def _colour(index: int) -> Colour:
    """Colours of which neighbours differ: hues a golden angle apart, at three brightnesses."""
    red, green, blue = colorsys.hsv_to_rgb(
        (0.58 + index * 0.381966) % 1.0, (0.75, 0.5, 0.9)[index % 3], (0.95, 0.7, 0.5)[index // 3 % 3]
    )
    return round(255 * red), round(255 * green), round(255 * blue)
