"""The arguments of `pretrain shards build`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.data.build.settings import KINDS, SUBSAMPLINGS, BuildRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder, a file, or torchvision:NAME")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder, or one of an unfinished build")

    reading = parser.add_argument_group("what is read")
    reading.add_argument("--kind", choices=KINDS, help="of SOURCE (default: told from its files)")
    reading.add_argument("--split", metavar="NAME", help="where SOURCE does not say it (default: train)")
    reading.add_argument("--no-labels", action="store_true", help="folders are not classes; write no labels")
    reading.add_argument(
        "--follow-symlinks", action="store_true", help="also links that lead out of SOURCE (else refused)"
    )
    reading.add_argument("--image-column", metavar="NAME", help="parquet (default: found by its type)")
    reading.add_argument("--label-column", metavar="NAME", help="parquet (default: label, if there is one)")
    reading.add_argument(
        "--val-labels", type=Path, metavar="FILE", help="imagenet: labels of the validation images"
    )
    reading.add_argument(
        "--synset-ids", type=Path, metavar="FILE", help="imagenet: lines of 'WNID ID' for a file of ids"
    )
    reading.add_argument("--download-dir", type=Path, metavar="DIR", help="torchvision: its root folder")
    reading.add_argument(
        "--keep",
        metavar="A,B",
        help="webdataset: members of a sample (default: image,cls,json); coco: annotations",
    )

    images = parser.add_argument_group("images (bytes are kept as they are unless --max-side is given)")
    images.add_argument("--max-side", type=int, metavar="PX", help="shrink larger images and encode as JPEG")
    images.add_argument("--quality", type=int, default=90, metavar="Q", help="of that JPEG (default: 90)")
    images.add_argument("--subsampling", choices=SUBSAMPLINGS, default="420", help="default: 420")
    images.add_argument("--no-check-images", action="store_true", help="do not decode every image once")
    images.add_argument(
        "--max-bad-ratio",
        type=float,
        default=0.001,
        metavar="R",
        help="more bad images fail the build (default: 0.001; one is always allowed)",
    )

    shards = parser.add_argument_group("shards")
    shards.add_argument("--name", help="first part of their names (default: the name of OUT)")
    size = shards.add_mutually_exclusive_group()
    size.add_argument("--samples-per-shard", type=int, metavar="N")
    size.add_argument("--shard-mib", type=int, metavar="M", help="about this size (default: 256)")
    shards.add_argument("--seed", type=int, default=0, metavar="N", help="of the shuffle (default: 0)")
    shards.add_argument("--no-shuffle", action="store_true", help="keep the order of SOURCE")
    shards.add_argument("--keep-names", action="store_true", help="write names in SOURCE into KEY.json")
    shards.add_argument("--workers", type=int, metavar="N", help="processes (default: one per CPU core)")


def request_from(arguments: argparse.Namespace) -> BuildRequest:
    return BuildRequest(
        source=arguments.source,
        out=arguments.out,
        kind=arguments.kind,
        split=arguments.split,
        name=arguments.name,
        seed=arguments.seed,
        shuffle=not arguments.no_shuffle,
        samples_per_shard=arguments.samples_per_shard,
        shard_mib=arguments.shard_mib,
        max_side_px=arguments.max_side,
        quality=arguments.quality,
        subsampling=arguments.subsampling,
        check_images=not arguments.no_check_images,
        max_bad_ratio=arguments.max_bad_ratio,
        keep=None if arguments.keep is None else tuple(part.strip() for part in arguments.keep.split(",")),
        keep_names=arguments.keep_names,
        labels=not arguments.no_labels,
        follow_symlinks=arguments.follow_symlinks,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        val_labels=arguments.val_labels,
        synset_ids=arguments.synset_ids,
        download_dir=arguments.download_dir,
        num_workers=arguments.workers,
    )
