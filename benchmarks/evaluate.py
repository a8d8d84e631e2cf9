"""What evaluations cost, and what their shortcuts change. Each part writes a JSON of its own.

    python benchmarks/evaluate.py knn-memory      --out benchmarks/results/knn-memory.json
    python benchmarks/evaluate.py knn-precision   --out benchmarks/results/knn-precision.json --shards DIR
    python benchmarks/evaluate.py linear-sweep    --out benchmarks/results/linear-sweep.json --shards DIR
    python benchmarks/evaluate.py online-knn      --out benchmarks/results/online-knn.json --config CONFIG

knn-memory: the resident memory of a process that takes the features of as many images as ImageNet has, here
synthetic ones 768 wide, and classifies queries by them. knn-precision: the same accuracies with a bank in 32
and in 16 bits. linear-sweep: ten learning rates beside one, of the probe alone and of the whole evaluation.
online-knn: its share of a training's time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from result import tell
from torch import Tensor, nn

from pretrain.evaluate.encoder import CentreCrop, Encoder
from pretrain.evaluate.features import Features, extract
from pretrain.evaluate.frozen import take_features
from pretrain.evaluate.knn import KS, knn, unit_half
from pretrain.evaluate.linear import held_out_split, linear_probe
from pretrain.evaluate.probe import LinearConfig, train_probe
from pretrain.evaluate.protocols import PROTOCOLS
from pretrain.evaluate.report import EvaluateConfig

GREY = (0.5, 0.5, 0.5)
NUM_CLASSES = 1000


class Sketch(nn.Module):
    """Stands for a network: a fixed random projection of four pixels to a feature, so that all time and
    memory are the evaluation's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(12, width).requires_grad_(False)

    def forward_features(self, pixels: Tensor) -> Tensor:
        return self.projection(pixels.flatten(1))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS here")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def images(count: int, seed: int) -> Iterator[tuple[int, int]]:
    """(seed of an image, its class): the class moves the colours, so that there is something to find."""
    for number in range(count):
        yield seed + number, number % NUM_CLASSES


def draw(number: int) -> Tensor:
    """uint8 (3, 2, 2)"""
    mixed = (number * 2654435761 + (number % NUM_CLASSES) * 40503) & 0xFFFFFFFFFFFFFFFF
    return torch.tensor([(mixed >> (5 * place)) & 0xFF for place in range(12)], dtype=torch.uint8).view(
        3, 2, 2
    )


def knn_memory(num_bank: int, width: int, num_queries: int) -> dict[str, Any]:
    """Through the same functions as `pretrain evaluate knn`, without shards and network."""
    encoder = Encoder("sketch", Sketch(width).eval(), "pooled", CentreCrop(2, 2), GREY, GREY, width, {})
    before = resident_bytes()
    started = time.perf_counter()
    bank = extract(
        encoder, images(num_bank, 0), draw, 4096, num_images=num_bank, keep=unit_half, num_threads=1
    )
    extracted, with_bank = time.perf_counter(), resident_bytes()
    queries = extract(encoder, images(num_queries, 7), draw, 4096, num_images=num_queries, num_threads=1)
    begun = time.perf_counter()
    result = knn(bank, queries, KS)
    classified = time.perf_counter()
    peak = peak_bytes()
    return {
        "num_bank": num_bank,
        "width": width,
        "num_queries": num_queries,
        "bank_gib": round(bank.features.numel() * bank.features.element_size() / 2**30, 3),
        "bank_precision": result["bank_precision"],
        "resident_before_gib": round(before / 2**30, 3),  # the interpreter and its libraries
        "resident_with_bank_gib": round(with_bank / 2**30, 3),
        "peak_gib": round(peak / 2**30, 3),  # of the whole process
        "growth_gib": round((peak - before) / 2**30, 3),  # of what the evaluation itself takes
        "extract_seconds": round(extracted - started, 1),
        "classify_seconds": round(classified - begun, 1),
    }


def knn_precision(weights: list[str], shards: str) -> dict[str, Any]:
    rows = {}
    for name in weights:
        sets = take_features(name, shards, shards, EvaluateConfig(device="cpu"))
        train, test = sets.of(sets.protocol.knn)
        exact = knn(train, test)
        rounded = knn(Features(unit_half(train.features), train.labels), test)
        differences = {
            k: rounded["top1_ratio_by_k"][k] - ratio for k, ratio in exact["top1_ratio_by_k"].items()
        }
        rows[name] = {
            "num_bank": exact["num_bank"],
            "num_queries": exact["num_queries"],
            "float32": exact["top1_ratio_by_k"],
            "float16": rounded["top1_ratio_by_k"],
            "float16_minus_float32": {k: round(value, 6) for k, value in differences.items()},
        }
    return {"shards": Path(shards).name, "weights": rows}


def linear_sweep(weights: str, shards: str, rounds: int) -> dict[str, Any]:
    """One rate and ten take turns; seconds of CPU time, medians."""
    config = EvaluateConfig(device="cpu")
    sets = take_features(weights, shards, shards, config)
    train, test = sets.of(sets.protocol.linear)
    classes, targets = torch.unique(train.labels, return_inverse=True)
    kept, _ = held_out_split(targets, 0.1, 0)
    parts: dict[str, Any] = {}
    for protocol in ("moco_v3", "generic"):
        ten = replace(PROTOCOLS[protocol].probe, num_epochs=5)
        one = replace(ten, lr_factors=(1.0,))
        seconds: dict[str, list[float]] = {"one rate": [], "ten rates": []}
        for _ in range(rounds):
            for name, probe in (("one rate", one), ("ten rates", ten)):
                begin = time.process_time()
                train_probe(probe, train.features, targets, len(classes), rows=kept)
                seconds[name].append((time.process_time() - begin) / probe.num_epochs)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        parts[protocol] = {
            "kinds_of_input": len(ten.inputs),
            "seconds_per_epoch": {name: round(value, 4) for name, value in medians.items()},
            "ten_over_one": round(medians["ten rates"] / medians["one rate"], 2),
        }
    return {
        "weights": weights,
        "shards": Path(shards).name,
        "num_train": len(targets),
        "width": train.features.shape[1],
        "num_classes": len(classes),
        "probe_alone": parts,
        "whole_evaluation": whole_evaluation(sets.extract_seconds, train, test),
    }


def whole_evaluation(extract_seconds: float, train: Features, test: Features) -> dict[str, Any]:
    """`pretrain evaluate linear` with one rate and with ten: encoding, sweep, and training the chosen one."""
    seconds = {}
    for name, factors in (("one rate", (1.0,)), ("ten rates", LinearConfig().lr_factors)):
        probe = replace(PROTOCOLS["moco_v3"].probe, lr_factors=factors)
        begin = time.perf_counter()
        linear_probe(train, test, probe)
        seconds[name] = extract_seconds + time.perf_counter() - begin
    return {
        "protocol": "moco_v3",
        "extract_seconds": round(extract_seconds, 1),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "ten_over_one": round(seconds["ten rates"] / seconds["one rate"], 3),
    }


def online_knn(config: str, overrides: list[str]) -> dict[str, Any]:
    """A training with its k-NN, read from its records."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "pretrain", "train", config, *overrides, "--output-dir", str(run)]
        subprocess.run(command, check=True)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [record for record in records if "knn_seconds" in record]
    first, last = records[0], records[-1]
    # a record's seconds are the mean over the steps since the one before
    steps = [
        one["step"] - before["step"] for before, one in zip([{"step": 0}, *records], records, strict=False)
    ]
    training = sum(count * record["step_seconds"] for count, record in zip(steps, records, strict=True))
    knn_seconds = sum(record["knn_seconds"] for record in measured)
    return {
        "config": config,
        "overrides": overrides,
        "steps": last["step"] - first["step"] + 1,
        "epochs": last["epoch"],
        "times_measured": len(measured),
        "median_knn_seconds": round(statistics.median(record["knn_seconds"] for record in measured), 3),
        "training_seconds": round(training, 1),
        "share_of_time": round(knn_seconds / (training + knn_seconds), 4),
        "knn_top1_ratio": {str(record["step"]): record["knn_top1_ratio"] for record in measured},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("knn-memory", "knn-precision", "linear-sweep", "online-knn"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config of online-knn")
    parser.add_argument("--num-bank", type=int, default=1_281_167)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--num-queries", type=int, default=4096)
    parser.add_argument("--weights", nargs="+", default=["pixels"])
    parser.add_argument("--shards", default="data_shards/cifar10")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if arguments.part == "knn-memory":
        measured = knn_memory(arguments.num_bank, arguments.width, arguments.num_queries)
    elif arguments.part == "knn-precision":
        measured = knn_precision(arguments.weights, arguments.shards)
    elif arguments.part == "linear-sweep":
        measured = linear_sweep(arguments.weights[0], arguments.shards, arguments.rounds)
    else:
        measured = online_knn(arguments.config, arguments.overrides)
    tell(measured, arguments.out)


if __name__ == "__main__":
    main()
