"""Evaluations of frozen features, from names of weights and shards to results: k-NN and linear probe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pretrain.errors import UserError
from pretrain.evaluate.augmented import CACHED, augmentation_of, linear_probe_augmented
from pretrain.evaluate.encoder import Encoder, open_encoder
from pretrain.evaluate.feature import FeatureName, columns_in, num_parts
from pretrain.evaluate.features import Features, extract
from pretrain.evaluate.image_set import open_images
from pretrain.evaluate.intervals import accuracy_of
from pretrain.evaluate.knn import EXACT_BYTES, KS, TEMPERATURE, knn, unit_half
from pretrain.evaluate.linear import Reading, linear_probe
from pretrain.evaluate.protocols import Protocol, protocol_for
from pretrain.evaluate.report import (
    EvaluateConfig,
    check_colours,
    coloured,
    hardware,
    results_folder,
    save_result,
    sources_of,
    versions,
)
from pretrain.evaluate.shards import LabelledSplit, Role, decode_and_crop, open_splits

HALF_FROM_BYTES = 8 * 2**30  # features for a linear probe are kept in float16 where float32 takes more


@dataclass(frozen=True)
class FeatureSets:
    """Frozen features of both sets, and where they come from."""

    train: Features
    test: Features
    encoder: Encoder  # its feature is the one that was stored
    protocol: Protocol
    splits: dict[Role, LabelledSplit]
    accelerator: Accelerator
    extract_seconds: float

    def has(self, feature: FeatureName) -> bool:
        return columns_in(self.encoder.feature, feature, self.encoder.token_width) is not None

    def of(self, feature: FeatureName) -> tuple[Features, Features]:
        """Train and test set with the columns of one feature, which are not copied."""
        columns = columns_in(self.encoder.feature, feature, self.encoder.token_width)
        assert columns is not None, (self.encoder.feature, feature)
        train, test = (replace(one, features=one.features[:, columns]) for one in (self.train, self.test))
        return train, test


def take_features(
    weights: str | Path,
    train: str | Path,
    test: str | Path,
    config: EvaluateConfig | None = None,
    *,
    for_knn_only: bool = False,
) -> FeatureSets:
    """Encode both sets once. `run_knn` and `run_linear` accept the result: one encoding serves both.

    What is stored holds the features of both read-outs. for_knn_only: that of k-NN alone, rounded to 16 bits
    where a large bank would not fit into memory otherwise.
    """
    config = config or EvaluateConfig()
    if config.save:
        results_folder(weights, config.out)  # a wrong place is told before the work
    check_colours(config)
    splits = open_splits(train, test)
    encoder = open_encoder(weights, config.feature, config.network, config.weights_seed)
    protocol = protocol_for(encoder, config.protocol)
    if config.feature is None or encoder.feature == "pixels":
        encoder = encoder.reading(protocol.knn if for_knn_only else protocol.linear)
    else:
        protocol = replace(protocol, knn=config.feature, linear=config.feature, also=())
    accelerator = Accelerator(cpu=config.device == "cpu")
    encoder = coloured(encoder, splits["train"], config)
    began = time.perf_counter()
    of_train, of_test = (
        extract(
            encoder,
            splits[role].samples(),
            partial(decode_and_crop, crop=encoder.crop),
            config.batch_size,
            num_images=splits[role].num_samples,
            keep=rounding(4 * splits[role].num_samples * encoder.num_features, for_knn_only),
            accelerator=accelerator,
        )
        for role in ("train", "test")
    )
    seconds = time.perf_counter() - began
    return FeatureSets(of_train, of_test, encoder, protocol, splits, accelerator, seconds)


def rounding(num_bytes: int, for_knn_only: bool) -> Any:
    """What is kept of features that take so many bytes in float32; None keeps them as they are."""
    if for_knn_only:
        return unit_half if num_bytes > EXACT_BYTES else None
    return (lambda features: features.half()) if num_bytes > HALF_FROM_BYTES else None


def run_knn(
    weights: str | Path,
    train: str | Path,
    test: str | Path,
    config: EvaluateConfig | None = None,
    *,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    sets: FeatureSets | None = None,
) -> dict[str, Any]:
    """Weighted k-NN of the test set among the train set. sets: features already taken of the same names."""
    config = config or EvaluateConfig()
    sets = sets or take_features(weights, train, test, config, for_knn_only=True)
    began = time.perf_counter()
    result = knn(*sets.of(sets.protocol.knn), ks, temperature, device=sets.accelerator.device)
    result |= accuracy_of([result["top1_ratio"]], result["num_queries"])
    return _finish("knn", weights, result, began, sets, sets.protocol.knn, config)


def run_linear(
    weights: str | Path,
    train: str | Path,
    test: str | Path,
    config: EvaluateConfig | None = None,
    *,
    changes: dict[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    augment: bool = False,
    num_workers: int | None = None,
    sets: FeatureSets | None = None,
) -> dict[str, Any]:
    """Linear probe learnt on the train set, tested on the test set, once a seed. sets: as in `run_knn`.

    changes: fields of LinearConfig that replace those of the protocol. augment: encode other crops of the
    train images in every epoch, as the papers do, in place of learning from cached features.
    """
    config = config or EvaluateConfig()
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: {' '.join(map(str, seeds))} names one twice")
    sets = sets or take_features(weights, train, test, config)
    protocol, device = sets.protocol, sets.accelerator.device
    probe = replace(protocol.probe, **(changes or {}))
    readings = readings_of(sets.encoder, protocol)
    began, runs = time.perf_counter(), []
    for seed in seeds:
        settings = replace(probe, seed=seed)
        if augment:
            images = open_images(sets.splits["train"])
            run = linear_probe_augmented(
                sets.encoder, images, sets.train, sets.test, settings, readings, sets.accelerator, num_workers
            )
        else:
            run = linear_probe(sets.train, sets.test, settings, device, readings)
        runs.append({"seed": seed, **run})
    result = {
        **accuracy_of([run["top1_ratio"] for run in runs], len(sets.test.labels)),
        "protocol": protocol.name,
        "augmentation": augmentation_of(sets.encoder, probe) if augment else CACHED,
        "seeds": list(seeds),
        "runs": runs,
    }
    return _finish("linear", weights, result, began, sets, protocol.linear, config)


def readings_of(encoder: Encoder, protocol: Protocol) -> list[Reading]:
    """What the heads of a protocol see of the stored features."""
    readings = []
    for feature in (protocol.linear, *protocol.also):
        columns = columns_in(encoder.feature, feature, encoder.token_width)
        assert columns is not None, (encoder.feature, feature)
        readings.append(Reading(feature, columns, num_parts(feature)))
    return readings


def _finish(
    method: str,
    weights: str | Path,
    result: dict[str, Any],
    began: float,
    sets: FeatureSets,
    feature: FeatureName,
    config: EvaluateConfig,
) -> dict[str, Any]:
    result = {
        "method": method,
        **result,
        **sources_of(sets.encoder.reading(feature), sets.splits["train"], sets.splits["test"], config),
        "extract_seconds": sets.extract_seconds,
        "classify_seconds": time.perf_counter() - began,
        "hardware": hardware(sets.accelerator, "fp32"),
        "versions": versions(),
    }
    if config.save and sets.accelerator.is_main_process:
        save_result(results_folder(weights, config.out), result)
    return result
