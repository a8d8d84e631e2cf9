"""All read-outs of frozen features on one encoding: k-NN, and linear probes with shares of the labels."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pretrain.errors import UserError
from pretrain.evaluate.augmented import CACHED
from pretrain.evaluate.encoded_sets import EncodedSet, encode_set, pairs_of, rows_of
from pretrain.evaluate.encoder import PIXELS, Encoder, open_encoder
from pretrain.evaluate.feature import FeatureName, num_parts
from pretrain.evaluate.features import Features
from pretrain.evaluate.fewshot import share_name
from pretrain.evaluate.image_set import balanced_rows
from pretrain.evaluate.intervals import accuracy_of
from pretrain.evaluate.knn import KS, TEMPERATURE, predict, score
from pretrain.evaluate.linear import Head, Reading, train_head
from pretrain.evaluate.probe import LinearConfig
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
from pretrain.evaluate.shards import Role, open_also, open_splits

FRACTIONS = (0.01, 0.1, 1.0)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbesRequest:
    """Which read-outs, of what."""

    features: tuple[FeatureName, ...] = ()  # (): those of the protocol
    fractions: tuple[float, ...] = FRACTIONS  # of the labels of each class
    seeds: tuple[int, ...] = (0,)  # of each linear probe
    linear_changes: Mapping[str, Any] = field(default_factory=dict)  # of the protocol's LinearConfig
    ks: tuple[int, ...] = KS
    temperature: float = TEMPERATURE
    also_test: tuple[str, ...] = ()  # DIR, DIR:split or NAME=DIR of further test sets
    num_train: int | None = None  # images at most, as many of each class; None: all
    num_test: int | None = None


@dataclass(frozen=True)
class ReadOuts:
    """What one feature gives on a test set: the results, and what is needed to read out further sets."""

    knn: dict[str, Any]
    linear: dict[str, Any]  # by share of the labels
    train: Features
    knn_predicted: Tensor  # (N,) classes of the test images by the reported k
    heads: tuple[Head, ...]  # of the largest share, one a seed
    knn_seconds: float
    linear_seconds: float


def run_probes(
    weights: str | Path,
    train: str | Path,
    test: str | Path,
    request: ProbesRequest | None = None,
    config: EvaluateConfig | None = None,
) -> dict[str, Any]:
    """k-NN and linear probes of each feature; the same bank and heads read further test sets out.

    With one seed and all labels, the numbers are those of `run_knn` and `run_linear` for the same feature.
    config.feature is not read: request.features is.
    """
    request, config = request or ProbesRequest(), config or EvaluateConfig()
    _refuse_twice(request)
    if config.save:
        results_folder(weights, config.out)  # a wrong place is told before the work
    check_colours(config)
    splits = open_splits(train, test)
    also_splits = open_also(request.also_test, splits["train"])
    rows: dict[Role, Tensor] = {
        "train": rows_of(splits["train"], request.num_train, "--num-train"),
        "test": rows_of(splits["test"], request.num_test, "--num-test"),
    }
    shares = _shares(splits["train"].labels()[rows["train"]], request)
    encoder = open_encoder(weights, None, config.network, config.weights_seed)
    protocol = protocol_for(encoder, config.protocol)
    encoder = encoder.reading_all(_features(request, protocol, encoder))
    accelerator = Accelerator(cpu=config.device == "cpu")
    encoder = coloured(encoder, splits["train"], config)
    in_train, in_test = (
        encode_set(
            encoder,
            splits[role],
            rows[role],
            config.batch_size,
            accelerator,
            with_keys=bool(also_splits) and role == "test",
        )
        for role in ("train", "test")
    )
    in_others = {
        name: encode_set(encoder, split, None, config.batch_size, accelerator, with_keys=True)
        for name, split in also_splits.items()
    }
    encoded = (in_train, in_test, *in_others.values())
    began = time.perf_counter()
    names = (encoder.feature, *encoder.besides)
    read: dict[FeatureName, ReadOuts] = {}
    for name in names:
        bank, queries = in_train.of(encoder, name), in_test.of(encoder, name)
        read[name] = _read_out(name, bank, queries, shares, request, protocol, accelerator)
    also = {
        name: _compared(encoder, one, in_test, read, request, accelerator) for name, one in in_others.items()
    }
    largest = share_name(max(request.fractions))
    shown = read[names[0]].linear[largest]
    by_feature: dict[str, Any] = {name: {"knn": one.knn, "linear": one.linear} for name, one in read.items()}
    result = {
        "method": "probes",
        **{key: shown[key] for key in ("top1_ratio", "top1_ratio_std", "top1_ratio_95", "interval")},
        "reported": f"{names[0]}.linear.{largest}",
        "protocol": protocol.name,
        "augmentation": CACHED,
        "features": list(names),
        "fractions": list(request.fractions),
        "seeds": list(request.seeds),
        **by_feature,
        "also": also,
        "num_train": len(rows["train"]),
        "num_test": len(rows["test"]),
        "is_part_of_train": len(rows["train"]) < splits["train"].num_samples,
        "is_part_of_test": len(rows["test"]) < splits["test"].num_samples,
        **sources_of(encoder, splits["train"], splits["test"], config),
        "extract_seconds": sum(one.seconds for one in encoded),
        "knn_seconds": sum(one.knn_seconds for one in read.values()),
        "linear_seconds": sum(one.linear_seconds for one in read.values()),
        "classify_seconds": time.perf_counter() - began,
        "hardware": hardware(accelerator, "fp32"),
        "versions": versions(),
    }
    if config.save and accelerator.is_main_process:
        save_result(results_folder(weights, config.out), result)
    return result


def _refuse_twice(request: ProbesRequest) -> None:
    named: dict[str, Sequence[Any]] = {
        "features": request.features,
        "fractions": request.fractions,
        "seeds": request.seeds,
    }
    for name, values in named.items():
        if len(set(values)) < len(values):
            raise UserError(f"--{name}: {' '.join(map(str, values))} names one twice")


def _shares(labels: Tensor, request: ProbesRequest) -> dict[tuple[float, int], Tensor]:
    """Which of the train images used have a label for a probe: ascending, by share of the labels and seed.

    With one seed, a smaller share lies within every larger one. UserError for a share that leaves every class
    one image: a learning rate is chosen on others than it is trained on.
    """
    shares = {}
    for fraction in sorted(request.fractions):
        for seed in request.seeds:
            rows = torch.arange(len(labels)) if fraction == 1 else balanced_rows(labels, fraction, seed)
            if len(rows) == len(torch.unique(labels)):
                raise UserError(
                    f"--fractions {fraction:g}: of {len(labels)} train images, every class keeps one label, "
                    "and none is left to choose a learning rate on; give larger shares or more images"
                )
            shares[fraction, seed] = rows
    return shares


def _features(request: ProbesRequest, protocol: Protocol, encoder: Encoder) -> tuple[FeatureName, ...]:
    """The protocol's own first; without a network, there is one only."""
    own = tuple(dict.fromkeys((protocol.linear, protocol.knn)))
    if not request.features or encoder.feature == PIXELS:
        return own
    return (
        *(one for one in own if one in request.features),
        *(one for one in request.features if one not in own),
    )


def _read_out(
    name: FeatureName,
    train: Features,
    test: Features,
    shares: Mapping[tuple[float, int], Tensor],
    request: ProbesRequest,
    protocol: Protocol,
    accelerator: Accelerator,
) -> ReadOuts:
    began = time.perf_counter()
    device = accelerator.device
    predicted = predict(train, test, request.ks, request.temperature, device=device)
    knn = score(predicted, train, test, request.temperature)
    knn |= accuracy_of([knn["top1_ratio"]], len(test.labels))
    knn_seconds = time.perf_counter() - began
    settings: LinearConfig = replace(protocol.probe, **request.linear_changes)
    readings = (Reading(name, num_parts=num_parts(name)),)
    largest, heads = max(request.fractions), []
    runs: dict[float, list[dict[str, Any]]] = {}
    for (fraction, seed), rows in shares.items():
        labelled = (
            train if len(rows) == len(train.labels) else Features(train.features[rows], train.labels[rows])
        )
        of_seed = replace(settings, seed=seed)
        head, run = train_head(labelled, test, of_seed, device, readings, few_labels=fraction < 1)
        runs.setdefault(fraction, []).append({"seed": seed, **run})
        if fraction == largest:
            heads.append(head)
    linear = {
        share_name(fraction): {
            **accuracy_of([run["top1_ratio"] for run in of_share], len(test.labels)),
            "fraction_ratio": fraction,
            "num_train": of_share[0]["num_train"],
            "runs": of_share,
        }
        for fraction, of_share in runs.items()
    }
    logger.info("%s: k-NN and %d linear probes done", name, len(shares))
    linear_seconds = time.perf_counter() - began - knn_seconds
    by_neighbours = predicted[knn["reported_k"]]
    return ReadOuts(knn, linear, train, by_neighbours, tuple(heads), knn_seconds, linear_seconds)


def _compared(
    encoder: Encoder,
    other: EncodedSet,
    test: EncodedSet,
    read: Mapping[FeatureName, ReadOuts],
    request: ProbesRequest,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """A further test set, read out by the banks and heads there are, beside the main one."""
    pairs = pairs_of(other, test)
    result: dict[str, Any] = {
        **other.split.describe(),
        "num_same_keys": len(pairs[0]),
        "fraction_ratio": max(request.fractions),  # of the labels, of the linear heads
    }
    for name, one in read.items():
        here, there = other.of(encoder, name), test.of(encoder, name)
        k = one.knn["reported_k"]
        neighbours = predict(one.train, here, (k,), request.temperature, device=accelerator.device)[k]
        by_heads = [(head.predict(here.features), head.predict(there.features)) for head in one.heads]
        result[name] = {
            "knn": {"k": k, **_beside([(neighbours, one.knn_predicted)], here.labels, pairs)},
            "linear": _beside(by_heads, here.labels, pairs),
        }
    return result


def _beside(
    predicted: Sequence[Sequence[Tensor]], labels: Tensor, pairs: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """predicted: of each seed, classes in the further set and in the main one. labels: of the former.

    `same_keys_top1_ratio` is that of the main test set on the images that both have.
    """
    in_other, in_test = pairs
    truth = labels[in_other]

    def mean(ratios: list[Tensor]) -> float | None:
        return statistics.fmean(ratio.double().mean().item() for ratio in ratios) if len(truth) else None

    ratios = [int((other == labels).sum()) / len(labels) for other, _ in predicted]
    return {
        **accuracy_of(ratios, len(labels)),
        "num_test": len(labels),
        "num_same_keys": len(truth),
        "own_same_keys_top1_ratio": mean([other[in_other] == truth for other, _ in predicted]),
        "same_keys_top1_ratio": mean([test[in_test] == truth for _, test in predicted]),
        "agreement_ratio": mean([other[in_other] == test[in_test] for other, test in predicted]),
    }
