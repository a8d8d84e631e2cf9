"""k-NN accuracy while a run trains: a cheap number that tells learning from collapse, on few labelled images.

The images are chosen once, from the labels in the indexes; each rank reads, keeps and encodes its share of
them. Nothing random is drawn and nothing of the training is touched, so a run has the same weights with it
and without, and a resumed run the same accuracies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pretrain.data.loader import DataConfig
from pretrain.data.manifest import Manifest
from pretrain.data.reader import ShardReader
from pretrain.engine.engine import Engine
from pretrain.errors import ConfigError, DataError
from pretrain.evaluate.encoder import CentreCrop
from pretrain.evaluate.features import Features
from pretrain.evaluate.image_set import runs_of, spread_rows
from pretrain.evaluate.knn import TEMPERATURE, knn
from pretrain.evaluate.protocols import PROTOCOLS, method_of
from pretrain.evaluate.shards import USUAL_SPLITS, LabelledSplit, decode_and_crop, find_split
from pretrain.export.timm_folder import crop_ratio
from pretrain.models.backbone import encode, num_features
from pretrain.models.compiled import uncompiled
from pretrain.models.teacher import Teacher
from pretrain.peers import Peers
from pretrain.tokens import TokenLayout
from pretrain.views.pixels import normalize
from pretrain.views.plan import ViewConfig

if TYPE_CHECKING:
    from pretrain.config import RunConfig

Count = Annotated[int, Field(gt=0)]
CHOICE_SEED = 0  # the same images in all runs on the same data
READ_THREADS = 8

logger = logging.getLogger("pretrain")


class OnlineKnnConfig(BaseModel):
    """When, and on which labelled images. The teacher is measured where there is one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_epochs: Annotated[float, Field(gt=0.0)] = 1.0
    every_steps: Count | None = None  # in place of the epochs
    train: str | None = None  # DIR or DIR:split, in which neighbours are found; null: the run's own data
    test: str | None = None  # null: the test split of the same folder, else other images of the same split
    num_train: Annotated[int, Field(ge=2)] = 2000  # images, at most
    num_test: Count = 1000
    k: Count = 20
    batch_size: Count = 100  # images that a rank encodes at a time

    def interval(self, global_batch: int, num_samples: int) -> int:
        """Steps from one measurement to the next."""
        return self.every_steps or max(1, round(self.every_epochs * num_samples / global_batch))


@dataclass(frozen=True)
class Chosen:
    """Some labelled images of a split."""

    split: LabelledSplit
    rows: Tensor  # int64 (N,), ascending
    labels: Tensor  # int64 (N,)


def choose_images(config: OnlineKnnConfig, data: DataConfig) -> tuple[Chosen, Chosen]:
    """The images to find neighbours in, and those to classify; no image is in both.

    As many of each class as of any other, where there are so many; of no more classes than leave each about k
    images in the bank. Reads the indexes only; UserError where they are missing or have no labels.
    """
    train, test = _find_splits(config, data)
    labels, tested = train.labels(), test.labels()
    classes = torch.unique(labels)
    if len(classes) < 2:
        raise ConfigError(f"online_knn: all images of {train.manifest.folder}:{train.name} have one label")
    most = max(2, config.num_train // config.k)
    if len(classes) > most:
        classes = classes[torch.randperm(len(classes), generator=_generator())[:most]]
    if test == train:
        both = spread_rows(labels, classes, config.num_train + config.num_test, _generator())
        num_test = len(both) * config.num_test // (config.num_train + config.num_test)
        in_test, in_bank = both[:num_test], both[num_test:]
    else:
        in_test, in_bank = (
            spread_rows(tested, classes, config.num_test, _generator()),
            spread_rows(labels, classes, config.num_train, _generator()),
        )
    if not len(in_test) or not len(in_bank):
        raise ConfigError(
            f"online_knn: {test.manifest.folder}:{test.name} has no images for the classes of "
            f"{train.manifest.folder}:{train.name}; give two splits of one labelling, and more images"
        )
    return _chosen(train, in_bank, labels), _chosen(test, in_test, tested)


def _find_splits(config: OnlineKnnConfig, data: DataConfig) -> tuple[LabelledSplit, LabelledSplit]:
    """Of the bank and of the queries; one split may serve as both."""
    if config.train is not None:
        train = find_split(config.train, "train")
    elif data.shards:
        train = LabelledSplit(Manifest.load(data.shards), data.split)
    else:
        raise ConfigError("online_knn.train: the run mixes several sources; name labelled shards")
    if config.test is not None:
        test = find_split(config.test, "test")
        same = test.manifest.hash == train.manifest.hash and test.name == train.name
        return train, train if same else test
    others = [name for name in USUAL_SPLITS["test"] if name in train.manifest.split_names]
    return train, replace(train, name=others[0] if others else train.name)


def _chosen(split: LabelledSplit, rows: Tensor, labels: Tensor) -> Chosen:
    rows = rows.sort().values
    return Chosen(split, rows, labels[rows])


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(CHOICE_SEED)


class OnlineKnn:
    """Made before the engine, which may take the parameters apart: without a teacher it has its own copy."""

    def __init__(
        self, config: RunConfig, backbone: nn.Module, num_steps: int, num_samples: int, peers: Peers
    ) -> None:
        """num_samples: of the data that the run trains on."""
        assert config.online_knn is not None
        self.config, self.run, self.peers = config.online_knn, config, peers
        self.num_steps = num_steps
        self.interval = self.config.interval(config.batch.global_size, num_samples)
        self.copy = None if config.teacher else Teacher(backbone)
        self.feature = PROTOCOLS[method_of(config.tasks.enabled())].knn
        sets = choose_images(self.config, config.data)
        self.num_bank = len(sets[0].rows)
        self.labels = torch.cat([one.labels for one in sets])
        side = config.model.img_px
        crop = CentreCrop(side, int(side / crop_ratio(side)), _interpolation(config.views, side))
        # every world-size-th of bank and queries together: all ranks have as many, but for one
        self.places = torch.arange(peers.rank, len(self.labels), peers.world_size)
        mine = self.places[self.places < self.num_bank], self.places[self.places >= self.num_bank]
        of_sets = _read(sets[0], mine[0], crop), _read(sets[1], mine[1] - self.num_bank, crop)
        self.images, self.is_whole = (torch.cat(parts) for parts in zip(*of_sets, strict=True))

    def due(self, step: int) -> bool:
        """After so many steps; the last one always is."""
        return step % self.interval == 0 or step == self.num_steps

    @torch.no_grad()
    def measure(self, engine: Engine, teacher: Teacher | None) -> dict[str, float]:
        """Values for the log record of a step. Every rank calls this, and all get the same but the seconds.

        Nothing is measured where features are not finite: what becomes of such a run is for its guard to say.
        """
        started = time.perf_counter()
        module, network = engine.module, teacher or self.copy
        assert network is not None
        if self.copy is not None:
            student = engine.student(module.backbone)  # whole, also where ZeRO has divided it
            self.copy.update(((f"backbone.{name}", value) for name, value in student), momentum=0.0)
        table = self.peers.sum(self._table(network.backbone, module.layout)).cpu()
        features, is_whole = table[:, :-1], table[:, -1] > 0
        in_bank = torch.arange(len(table)) < self.num_bank
        if not (table.isfinite().all() and is_whole[in_bank].any() and is_whole[~in_bank].any()):
            logger.warning("k-NN was not measured: there are no images, or features are NaN or Inf")
            return {}
        bank, queries = (
            Features(features[part & is_whole], self.labels[part & is_whole]) for part in (in_bank, ~in_bank)
        )
        result = knn(bank, queries, (self.config.k,), TEMPERATURE)
        seconds = time.perf_counter() - started
        if self.peers.rank == 0:
            logger.info(
                "k-NN %.1f %% (k=%d, %d images among %d, %s, chance %.1f %%) in %.1f s",
                100 * result["top1_ratio"],
                self.config.k,
                len(queries.labels),
                len(bank.labels),
                "teacher" if self.copy is None else "student",
                100 * result["chance_ratio"],
                seconds,
            )
        return {"knn_top1_ratio": result["top1_ratio"], "knn_seconds": seconds}

    def _table(self, backbone: Any, layout: TokenLayout) -> Tensor:
        """This rank's features and a 1 in the rows of its whole images, else 0: float32 (N, D + 1)"""
        width = num_features(backbone)
        colours, device = self.run.normalization, next(backbone.parameters()).device
        is_bf16 = self.run.engine.precision == "bf16"
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)
        table = torch.zeros(len(self.labels), width + 1, device=device)
        for start in range(0, len(self.places), self.config.batch_size):
            part = slice(start, start + self.config.batch_size)
            pixels = normalize(self.images[part].to(device).float() / 255, colours.mean, colours.std)
            with uncompiled(), autocast:  # batches of other sizes than those of a step
                tokens = encode(backbone, pixels, layout).final
            if self.feature == "class" and layout.has_class_token:
                features = layout.class_token(tokens)
            else:
                features = layout.patches(tokens).mean(dim=1)
            rows = self.places[part].to(device)
            table[rows, :-1], table[rows, -1] = features.float(), self.is_whole[part].to(device).float()
        return table


def _read(chosen: Chosen, wanted: Tensor, crop: CentreCrop) -> tuple[Tensor, Tensor]:
    """Some of the chosen images, decoded: uint8 (N, 3, S, S), and which could be: bool (N,).

    wanted: places among the chosen ones, ascending. An image that is damaged costs a run nothing.
    """
    rows = chosen.rows[wanted]
    split = chosen.split.manifest.split(chosen.split.name)
    runs = runs_of(split, rows)
    images = torch.zeros(len(rows), 3, crop.size_px, crop.size_px, dtype=torch.uint8)
    is_whole = torch.zeros(len(rows), dtype=torch.bool)

    def read(places: Tensor) -> None:
        with closing(ShardReader(split)) as reader:  # which reads a compressed shard on and on
            for place in places.tolist():
                try:
                    (sample,) = reader.read([runs[place]])
                    images[place] = decode_and_crop(sample, crop)
                except DataError as error:
                    logger.warning("online k-NN does without an image: %s", error)
                else:
                    is_whole[place] = True

    with ThreadPoolExecutor(READ_THREADS) as pool:
        list(pool.map(read, torch.arange(len(rows)).chunk(READ_THREADS)))
    return images, is_whole


def _interpolation(views: Mapping[str, ViewConfig], side_px: int) -> str:
    """That of the first view of the model's own size, else of the first view."""
    ordered = sorted(views.values(), key=lambda view: view.size_px != side_px)
    return str(ordered[0].interpolation)
