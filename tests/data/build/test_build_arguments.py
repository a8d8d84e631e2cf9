from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.data.build.arguments import add_arguments, request_from
from pretrain.data.build.settings import BuildRequest


def parse(line: str) -> BuildRequest:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return request_from(parser.parse_args(line.split()))


def test_without_flags_the_request_has_its_own_defaults() -> None:
    assert parse("in out") == BuildRequest("in", Path("out"))


def test_every_flag_reaches_the_request() -> None:
    parsed = parse(
        "in out --kind parquet --split test --no-labels --follow-symlinks --image-column a --label-column b "
        "--val-labels c --synset-ids d --download-dir e --keep image,txt --max-side 512 --quality 80 "
        "--subsampling 444 --no-check-images --max-bad-ratio 0.5 --name n --shard-mib 3 --seed 4 "
        "--no-shuffle --keep-names --workers 5"
    )
    assert parsed == BuildRequest(
        source="in",
        out=Path("out"),
        kind="parquet",
        split="test",
        labels=False,
        follow_symlinks=True,
        image_column="a",
        label_column="b",
        val_labels=Path("c"),
        synset_ids=Path("d"),
        download_dir=Path("e"),
        keep=("image", "txt"),
        max_side_px=512,
        quality=80,
        subsampling="444",
        check_images=False,
        max_bad_ratio=0.5,
        name="n",
        shard_mib=3,
        seed=4,
        shuffle=False,
        keep_names=True,
        num_workers=5,
    )
    assert parse("in out --samples-per-shard 7").samples_per_shard == 7
