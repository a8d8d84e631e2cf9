"""`pretrain train` as a user starts it, and how fast its `metrics.jsonl` says that it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from gpu.clock import digits
from gpu.setting import ROOT, Measured, Setting
from pretrain.data.indexing import index_folder
from pretrain.data.tar_writer import TarWriter

# a benchmark is itself a rank of one, which the run must not take itself for
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
QUIET = ["log.prometheus={enabled: false}"]  # no port is taken
NUM_SHARDS = 8
LAST_LINES = 3


@dataclass(frozen=True)
class Length:
    """Steps of a run, and how often it records."""

    steps: int
    every: int
    warmup: int  # steps that are not counted: compiling, filling the ring


def train(setting: Setting, config: Path, overrides: Sequence[str], length: Length) -> Measured:
    """Run it to its end. RuntimeError with its last lines if it fails."""
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        command = [sys.executable, "-m", "pretrain", "train", str(config), "--output-dir", str(run)]
        settings = [
            f"schedule={{kind: cosine, steps: {length.steps}, warmup_steps: 0}}",
            f"log.every_steps={length.every}",
            f"checkpoint.every_steps={length.steps}",
            *QUIET,
            *overrides,
        ]
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        with log.open("wb") as out:
            status = subprocess.call(
                [*command, *settings], cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        if status:
            last = " | ".join(log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:])
            raise RuntimeError(f"pretrain train ended with {status}: {last}")
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shown = ["pretrain", "train", str(config.relative_to(ROOT)), *overrides]
    return {"run": " ".join(shown), **speed(records, length)}


def speed(records: Sequence[dict[str, Any]], length: Length) -> Measured:
    """Of the steps after the warm-up: wall time between two records, and means of what they hold."""
    counted = [record for record in records if record["step"] >= length.warmup]
    first, last = counted[0], counted[-1]
    steps = last["step"] - first["step"]
    windows = counted[1:]
    batch = last["images"] / last["step"]
    seconds = (last["unix_time"] - first["unix_time"]) / steps
    sections = sorted({key for record in windows for key in record if key.startswith("seconds/")})
    mean = {
        key: digits(sum(record.get(key, 0.0) for record in windows) / len(windows))
        for key in ("step_seconds", "data_wait_seconds", *sections)
    }
    return {
        "steps": steps,
        "batch": batch,
        "wall_seconds_per_step": digits(seconds),
        "images_per_second": digits(batch / max(seconds, 1e-9)),
        "recorded": mean,
        "data_wait_ratio": digits(mean["data_wait_seconds"] / max(mean["step_seconds"], 1e-9)),
    }


def random_shards(folder: Path, num_images: int, height: int, width: int) -> Path:
    """JPEGs of smooth noise with labels 0 to 9, indexed; stands in where no data are given."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for shard in range(NUM_SHARDS):
        with TarWriter(folder / f"images-{shard:04d}.tar") as tar:
            for number in range(shard, num_images, NUM_SHARDS):
                coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, height // 8, width // 8)))
                smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
                pixels = np.ascontiguousarray(smooth.permute(1, 2, 0).numpy().astype(np.uint8))
                tar.add(f"{number:06d}.jpg", simplejpeg.encode_jpeg(pixels, quality=90))
                tar.add(f"{number:06d}.cls", str(number % 10).encode())
            tar.finish()
    index_folder(folder)
    return folder
