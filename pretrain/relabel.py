"""Between epochs: cluster the features of all images, and hand the clusters to the task that learns them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pretrain import build
from pretrain.config import RunConfig
from pretrain.data.loader import Batches, open_batches
from pretrain.data.manifest import Split
from pretrain.engine.engine import Engine
from pretrain.models.clusters import kmeans, reduce_and_whiten
from pretrain.models.teacher import Teacher
from pretrain.peers import Peers
from pretrain.tasks.cluster_labels import ClusterLabelsTask
from pretrain.views.pixels import normalize, to_float
from pretrain.views.plan import JitterConfig, ViewConfig

logger = logging.getLogger("pretrain")


class Relabeler:
    """Gives `cluster_labels` its labels at the start of an epoch (DeepCluster, arXiv:1807.05520).

    Every rank takes the features of its share of the images, from a centre crop. As the data are read in
    rounds that leave out fewer images than there are lanes, a few have no label until the next time.
    """

    def __init__(
        self,
        config: RunConfig,
        task: ClusterLabelsTask,
        backbone: torch.nn.Module,
        splits: Sequence[Split],
        num_samples: int,
        peers: Peers,
        device: torch.device,
    ) -> None:
        """Made before the engine, which may take the parameters apart: it needs a whole backbone to copy."""
        self.config, self.task = config, task
        self.network = Teacher(backbone)
        self.splits, self.num_samples = tuple(splits), num_samples
        self.peers, self.device = peers, device
        self._asked_epoch: int | None = None

    def due(self, epoch: float) -> bool:
        """At the start of a step. A GPU is asked, and so waited for, once in an epoch."""
        asked, self._asked_epoch = self._asked_epoch, int(epoch)
        return asked != int(epoch) and self.task.due(int(epoch))

    def relabel(self, engine: Engine, epoch: float) -> None:
        """Cluster, and start a new classifier. Every rank calls this."""
        started = time.perf_counter()
        features, seen = self._features(engine, epoch)
        settings = self.task.config
        labels = torch.full((self.num_samples,), -1, device=self.device)
        reduced = reduce_and_whiten(features[seen], settings.pca_dim)
        clusters = kmeans(reduced, settings.num_clusters, settings.iterations, settings.seed + int(epoch))
        # those of rank 0 everywhere, should two devices round differently
        of_first = clusters.double() * (self.peers.rank == 0)
        labels[seen] = self.peers.sum(of_first).round().long()
        engine.set_parameters(
            {f"tasks.cluster_labels.{name}": v for name, v in self.task.assign(labels, int(epoch)).items()}
        )
        if self.peers.rank == 0:
            seconds = time.perf_counter() - started
            logger.info(
                "epoch %d: %d of %d images in %d clusters, in %.1f s",
                int(epoch), int(seen.sum()), self.num_samples, settings.num_clusters, seconds,
            )  # fmt: skip

    @torch.no_grad()
    def _features(self, engine: Engine, epoch: float) -> tuple[Tensor, Tensor]:
        """Of every image: float32 (N, D), and which were seen, bool (N,)."""
        module, normalization = engine.module, self.config.normalization
        self.network.update(_named("backbone", engine, module), momentum=0.0)
        table: Tensor | None = None
        seen = torch.zeros(self.num_samples, device=self.device)
        steps = self._micro_steps(int(epoch))
        batches = self._batches(steps.start)
        try:
            for _ in steps:
                batch = next(batches)
                pixels = to_float(batch.crops[0][0].to(self.device))
                images = normalize(pixels, normalization.mean, normalization.std)
                features = module.layout.image_feature(self.network.encode(images, module.layout)).float()
                if table is None:
                    table = features.new_zeros(self.num_samples, features.shape[1])
                ids = batch.sample_ids.to(self.device)
                table[ids], seen[ids] = features, 1.0
        finally:
            batches.close()
        assert table is not None
        counts = self.peers.sum(seen)  # an image that stands in for a bad one may be seen by two ranks
        return self.peers.sum(table) / counts.clamp(min=1).unsqueeze(1), counts > 0

    def _batches(self, start: int) -> Batches:
        model = self.config.model
        view = ViewConfig(
            size_px=model.img_px,
            scale=(1.0, 1.0),
            aspect=(1.0, 1.0),
            flip_prob=0.0,
            jitter=JitterConfig(prob=0.0),
            gray_prob=0.0,
        )
        return open_batches(
            self.config.data,
            self.splits,
            [view],
            seed=self.config.seed,
            batch_size=build.micro_step_batch(self.config),
            rank=self.peers.rank,
            world_size=self.peers.world_size,
            start_micro_step=start,
            device=self.device,
        )

    def _micro_steps(self, epoch: int) -> range:
        """Those that together read the round of an epoch, in which every lane is read once."""
        lanes, batch = self.config.data.lanes, build.micro_step_batch(self.config)
        in_round = lanes * (self.num_samples // lanes)
        return range(epoch * in_round // batch, -(-(epoch + 1) * in_round // batch))


def _named(part: str, engine: Engine, module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in engine.student(module.get_submodule(part)):
        yield f"{part}.{name}", value
