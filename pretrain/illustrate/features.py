"""What the backbone makes of images: attention, colours of patches, neighbours, a plane of many images."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain import build
from pretrain.config import RunConfig
from pretrain.data.columns import NO_LABEL
from pretrain.data.decode import BadImage, decode
from pretrain.data.manifest import Split
from pretrain.evaluate.encoder import Encoder, open_encoder
from pretrain.evaluate.feature import FeatureName
from pretrain.evaluate.features import extract
from pretrain.evaluate.knn import nearest_neighbours
from pretrain.illustrate.images import (
    MAX_CLASSES,
    Picked,
    balanced_rows,
    class_name,
    labels_of,
    name_of,
    read_rows,
    spread_rows,
)
from pretrain.models.backbone import encode
from pretrain.report.attention import evenness, last_attention, mass_mask, queries_of
from pretrain.report.attention_maps import Attention, ImageAttention, TokenAttention
from pretrain.report.feature_maps import (
    NUM_NEIGHBOURS,
    Neighbour,
    Neighbours,
    PatchColors,
    Plane,
    Query,
)
from pretrain.report.projection import PERPLEXITY, as_colors, tsne
from pretrain.tokens import TokenLayout

NUM_PLANE = 1000  # images of the plane
NUM_BANK = 4000  # images that neighbours are looked for among
NUM_QUERIES = 6
CHUNK = 4096


@dataclass(frozen=True)
class Network:
    """The backbone whose features are looked at: the teacher's where there is one."""

    encoder: Encoder
    layout: TokenLayout
    name: str  # in words
    device: torch.device


def open_network(
    folder_of_checkpoint: str, config: RunConfig, device: torch.device, readers: Collection[str]
) -> Network:
    """readers: the prefix tokens that tasks read. A class token that none reads has learned nothing: the mean
    of the patches stands for the image."""
    layout = build.token_layout(config)
    feature: FeatureName | None = "mean_patch" if layout.has_class_token and "class" not in readers else None
    encoder = open_encoder(folder_of_checkpoint, feature).to(device)
    words = f"{encoder.origin.get('network', 'student')}, step {encoder.origin.get('step', '?')}"
    return Network(encoder, layout, words, device)


def cropped(network: Network, picked: Picked) -> Tensor:
    """Whole images as an evaluation sees them: uint8 (B, 3, S, S)"""
    return torch.stack([network.encoder.crop(image) for image in picked.pixels])


def normalized(network: Network, images: Tensor) -> Tensor:
    center, scale = (
        torch.tensor(values, device=network.device).view(3, 1, 1)
        for values in (network.encoder.mean, network.encoder.std)
    )
    result: Tensor = (images.to(network.device).float() / 255 - center) / scale
    return result


def to_rows(images: Tensor) -> list[NDArray[np.uint8]]:
    """uint8 (B, 3, S, S) -> (S, S, 3) each"""
    return [np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in images]


@torch.no_grad()
def attention_of(
    network: Network, picked: Picked, count: int, readers: Mapping[str, str]
) -> tuple[Attention | None, str]:
    """None and the reason, where the model has no attention of the whole image."""
    images = cropped(network, picked)[:count]
    weights, why = last_attention(network.encoder.model, normalized(network, images), network.layout)
    if weights is None:
        return None, why
    queries = {name: value.cpu() for name, value in queries_of(weights, network.layout, readers).items()}
    shown = []
    for row, pixels in enumerate(to_rows(images)):
        tokens = []
        for name, value in queries.items():
            heads = value[row]  # (H, P)
            mass = mass_mask(heads.mean(dim=0)).view(network.layout.grid)
            tokens.append(
                TokenAttention(
                    name,
                    heads.view(-1, *network.layout.grid).numpy(),
                    float(heads.sum(dim=1).mean()),
                    evenness(heads),
                    mass.numpy(),
                )
            )
        shown.append(ImageAttention(pixels, tuple(tokens), picked.labels[row]))
    return Attention(tuple(shown), network.name, picked.source, dict(readers)), ""


@torch.no_grad()
def patch_colors_of(network: Network, picked: Picked) -> PatchColors:
    images = cropped(network, picked)
    tokens = encode(network.encoder.model, normalized(network, images), network.layout).final
    patches = network.layout.patches(tokens).float().cpu()  # (B, P, D)
    colors, ratio = as_colors(patches)
    maps = colors.reshape(len(images), *network.layout.grid, 3)
    return PatchColors(tuple(to_rows(images)), tuple(maps), ratio, network.name, picked.source)


@dataclass(frozen=True)
class Encoded:
    """Features of some images of a split, those images, and their classes."""

    features: Tensor  # float32 (N, D), on the host
    classes: Tensor  # int64 (N,), -1 for none
    rows: tuple[int, ...]  # their places in the split
    split: Split

    def name(self, place: int) -> str | None:
        return class_name(int(self.classes[place]), self.split.manifest.class_names)


def encode_rows(network: Network, split: Split, rows: list[int], batch_size: int = 64) -> Encoded:
    """The feature that an evaluation takes, of these rows; images that do not decode are left out."""
    is_whole = torch.ones(len(rows), dtype=torch.bool)

    def images() -> Iterator[tuple[NDArray[np.uint8], int]]:
        for place, sample in enumerate(read_rows(split, rows)):
            try:
                pixels = decode(sample.image)
            except BadImage:
                pixels = np.zeros((8, 8, 3), np.uint8)  # keeps the place
                is_whole[place] = False
            yield pixels, NO_LABEL if sample.label is None else sample.label

    taken = extract(
        network.encoder,
        images(),
        network.encoder.crop,
        batch_size,
        num_images=len(rows),
        device=network.device,
    )
    kept = tuple(row for row, whole in zip(rows, is_whole.tolist(), strict=True) if whole)
    return Encoded(taken.features[is_whole], taken.labels[is_whole], kept, split)


def plane_rows(split: Split, seed: int) -> list[int]:
    return balanced_rows(labels_of(split), NUM_PLANE, seed)


def bank_rows(split: Split) -> list[int]:
    return spread_rows(split.num_samples, NUM_BANK)


def plane_of(network: Network, encoded: Encoded, seed: int) -> Plane:
    classes = encoded.classes
    if len(torch.unique(classes)) > MAX_CLASSES:  # no drawing can tell so many apart
        classes = torch.full_like(classes, NO_LABEL)
    known = torch.unique(classes[classes != NO_LABEL]).tolist()
    names = encoded.split.manifest.class_names
    every = labels_of(encoded.split)
    return Plane(
        tsne(encoded.features, seed),
        classes.numpy(),
        {label: class_name(label, names) or "" for label in known},
        len(torch.unique(every[every != NO_LABEL])),
        name_of(encoded.split),
        network.encoder.feature,
        network.name,
        min(PERPLEXITY, (len(encoded.features) - 1) / 3),
    )


def neighbours_of(network: Network, queries: Encoded, bank: Encoded) -> Neighbours:
    """A few queries spread over the set; a query is not its own neighbour."""
    chosen = spread_rows(len(queries.rows), NUM_QUERIES)
    wanted = torch.nn.functional.normalize(queries.features[chosen], dim=1)
    is_same = (
        queries.split.manifest.hash == bank.split.manifest.hash and queries.split.name == bank.split.name
    )
    more = min(NUM_NEIGHBOURS + is_same, len(bank.rows))
    similarity, places = nearest_neighbours(wanted, bank.features, more, CHUNK)
    found = []
    for number, place in enumerate(chosen):
        near = [
            (float(similarity[number, i]), int(places[number, i]))
            for i in range(more)
            if not (is_same and bank.rows[int(places[number, i])] == queries.rows[place])
        ][:NUM_NEIGHBOURS]
        found.append((place, near))
    pictures = _pictures(network, bank, [place for _, near in found for _, place in near])
    own = _pictures(network, queries, chosen)
    shown = []
    for place, near in found:
        label = int(queries.classes[place])
        neighbours = tuple(
            Neighbour(
                pictures[where],
                bank.name(where),
                value,
                None if NO_LABEL in (label, int(bank.classes[where])) else label == int(bank.classes[where]),
            )
            for value, where in near
        )
        shown.append(Query(own[place], queries.name(place), neighbours))
    return Neighbours(
        tuple(shown),
        len(bank.rows) - is_same,
        name_of(queries.split),
        name_of(bank.split),
        network.encoder.feature,
        network.name,
    )


def _pictures(network: Network, encoded: Encoded, places: list[int]) -> dict[int, NDArray[np.uint8]]:
    """Images as they were encoded, at most 128 px a side, by their place among the encoded."""
    ordered = sorted(set(places))
    samples = read_rows(encoded.split, [encoded.rows[place] for place in ordered])
    found = {}
    for place, sample in zip(ordered, samples, strict=True):
        cut = network.encoder.crop(decode(sample.image))
        side = cut.shape[-1]
        if side > 128:
            small = torch.nn.functional.interpolate(cut[None], (128, 128), mode="bicubic", antialias=True)[0]
        else:
            small = cut
        found[place] = to_rows(small[None])[0]
    return found
