"""A copy of the repository in which the pages' commands run, with small stand-ins for what they name."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import yaml
from documents import ROOT, tracked_files
from images import encoded, picture
from pyarrow import parquet
from small_coco import write_split
from small_scenes import save_mask, scene

CLASSES = ("boat", "cup", "tree")
# classes of a small scene -> ids of Cityscapes: sky, road, car, unlabelled
STREET = {0: 23, 1: 7, 2: 26, 255: 0}
VOID = 11  # CamVid's number for what is unlabelled


def copy_of_repository(folder: Path, smaller: dict[str, dict[str, Any]]) -> None:
    """Tracked files, `smaller` settings in some configs, and the environment of this test as .venv."""
    for name in tracked_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    for name, settings in smaller.items():
        path = folder / name
        path.write_text(yaml.safe_dump(changed(yaml.safe_load(path.read_text()), settings), sort_keys=False))
    environment = folder / ".venv"
    environment.mkdir()
    for entry in Path(sys.prefix).iterdir():
        (environment / entry.name).symlink_to(entry)
    ready = environment / ".ready"
    ready.unlink(missing_ok=True)  # the link: a file of its own is newer than what make compares it with
    ready.touch()


def changed(content: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`section.key: value` set in a config."""
    for name, value in settings.items():
        *sections, key = name.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return content


def surroundings(folder: Path) -> dict[str, str]:
    """Variables of a shell in the sandbox, whose package comes before an installed one."""
    path = f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    offline = {"HF_HUB_OFFLINE": "1"}
    return {**os.environ, **offline, "PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def shell(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """`script` by bash in the sandbox; what it says comes as one text."""
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=surroundings(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def write_stand_ins(folder: Path) -> None:
    """All that needs no run: labelled shards, pictures, tars, tables, and images with objects or masks."""
    sample = "python data_shards/embedded_sample.py --size-px 48"
    for name, seed in (("DIR", 1), ("OTHER", 2)):
        done = shell(folder, f"{sample} --images 240 --test-images 120 --seed {seed} {name}")
        assert done.returncode == 0, done.stdout
    (folder / "data_shards" / "cifar10").symlink_to("../DIR")  # of ten classes as well
    for name in ("PHOTOS", "photos"):
        write_photos(folder / name)
    for name in ("TARS", "their-shards"):
        (folder / name).mkdir()
        for number in range(2):
            write_tar(folder / name / f"part-{number}.tar", members(32, first=100 * number))
    write_imagenet(folder / "imagenet")
    write_tables(folder / "tables")
    for name in ("coco", "nuclei"):
        write_split(folder / name, "train", 4, seed=1)
        write_split(folder / name, "val", 2, seed=2)
    write_cityscapes(folder / "CITYSCAPES")
    write_camvid(folder / "camvid")
    picture(8, 8).convert("P").save(folder / "palette.png")
    (folder / "CONFIG").write_text("extends: configs/demo.yaml\n")


def jpeg(number: int) -> bytes:
    return encoded(picture(48, 56, seed=number), "JPEG")


def write_photos(folder: Path) -> None:
    for place, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(64):
            (folder / name / f"{number:03d}.jpg").write_bytes(jpeg(100 * place + number))


def members(count: int, first: int) -> dict[str, bytes]:
    """Images with classes, as a tar of WebDataset holds them."""
    found = {}
    for number in range(first, first + count):
        found[f"{number:06d}.jpg"] = jpeg(number)
        found[f"{number:06d}.cls"] = str(number % len(CLASSES)).encode()
    return found


def write_tar(path: Path, content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def write_imagenet(folder: Path) -> None:
    """A tar of the tars of two classes, a tar of validation images, and the file of their labels."""
    folder.mkdir()
    names = ("n01440764", "n01443537")
    inner = {
        f"{name}.tar": write_tar(
            folder / "class.tar",
            {f"{name}_{number}.JPEG": jpeg(500 * place + number) for number in range(64)},
        )
        for place, name in enumerate(names)
    }
    (folder / "class.tar").unlink()
    write_tar(folder / "ILSVRC2012_img_train.tar", inner)
    keys = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 65)]
    write_tar(
        folder / "ILSVRC2012_img_val.tar",
        {f"{key}.JPEG": jpeg(2000 + place) for place, key in enumerate(keys)},
    )
    rows = [f"{key},{names[place % 2]} 1 2 3 4" for place, key in enumerate(keys)]
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")


def write_tables(folder: Path) -> None:
    folder.mkdir()
    images = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in range(32)]
    labels = [number % len(CLASSES) for number in range(32)]
    table = arrow.table({"image": arrow.array(images), "label": arrow.array(labels)})
    parquet.write_table(table, folder / "train.parquet")


def write_street(image_path: Path, mask_path: Path, seed: int, ids: dict[int, int]) -> None:
    image, classes = scene(seed, height=96, width=128)
    save_mask(image_path, image)
    save_mask(mask_path, np.vectorize(lambda value: ids.get(value, value))(classes).astype(np.uint8))


def write_cityscapes(folder: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            name = f"aachen/aachen_{number:06d}_000019"
            image = folder / "leftImg8bit" / split / f"{name}_leftImg8bit.png"
            write_street(image, folder / "gtFine" / split / f"{name}_gtFine_labelIds.png", number, STREET)


def write_camvid(folder: Path) -> None:
    for split, count in (("train", 6), ("test", 2)):
        for number in range(count):
            name = f"{split}/{number:03d}.png"
            write_street(folder / "images" / name, folder / "masks" / name, number, {255: VOID})
    (folder / "classes.txt").write_text("".join(f"class {number}\n" for number in range(VOID)) + "Void\n")


def name_the_run(folder: Path) -> None:
    """runs/demo under the other names that pages give to a run and to its weights."""
    (folder / "RUN").symlink_to("runs/demo")
    (folder / "runs" / "segmentation_camvid_pretrain").symlink_to("demo")
    for name in ("EXPORT", "WEIGHTS"):
        (folder / name).symlink_to("runs/demo/exported")
