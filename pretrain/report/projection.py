"""Features brought down to three colours or two coordinates, the same every time."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.errors import UserError

NUM_COMPONENTS = 50  # that the neighbour embedding starts from
PERPLEXITY = 30.0
SPREAD_QUANTILES = (0.01, 0.99)  # of a component, between which its colour goes from none to full
MISSING = (
    "t-SNE needs scikit-learn, which is not installed; pip install 'pretrain[report]', or leave out --eval"
)


def principal_components(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Coordinates along the directions of largest variance, and the share of the variance of each.

    features: (N, D) -> float64 (N, count), (count,). A direction's sign is that which makes its largest
    coefficient positive, so that two runs of the same weights give the same. Missing directions are zeros.
    """
    centered = features.double() - features.double().mean(dim=0)
    _, sizes, directions = torch.linalg.svd(centered, full_matrices=False)  # (D', D)
    largest = directions.abs().argmax(dim=1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    total = sizes.square().sum().clamp(min=1e-30)
    coordinates = centered @ directions[:count].T
    missing = count - coordinates.shape[1]
    shares = sizes[:count].square() / total
    if missing > 0:
        coordinates = torch.nn.functional.pad(coordinates, (0, missing))
        shares = torch.nn.functional.pad(shares, (0, missing))
    return coordinates, shares


def as_colors(patches: Tensor) -> tuple[NDArray[np.uint8], float]:
    """The first three components of patch features as red, green and blue, common to all images.

    patches: (B, P, D) -> uint8 (B, P, 3), and the share of the variance that they hold.
    """
    coordinates, shares = principal_components(patches.flatten(0, 1), 3)  # (B * P, 3)
    low, high = (torch.quantile(coordinates, q, dim=0) for q in SPREAD_QUANTILES)
    scaled = ((coordinates - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    scaled = torch.where(high > low, scaled, 0.5)
    colors = (255 * scaled).round().to(torch.uint8).view(*patches.shape[:2], 3)
    return colors.numpy(), float(shares.sum())


def require_tsne() -> None:
    """One clear line, before anything is computed, where scikit-learn is missing."""
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError:
        raise UserError(MISSING) from None


def tsne(features: Tensor, seed: int) -> NDArray[np.float64]:
    """Two coordinates that keep neighbours together: unit length, 50 components, t-SNE of perplexity 30.

    features: (N, D), N >= 4 -> float64 (N, 2). Below 91 points the perplexity is a third of their number.
    Started from the first two components and computed by one thread, so that the same features give the same.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    directions = torch.nn.functional.normalize(features.double(), dim=1)
    start, _ = principal_components(directions, min(NUM_COMPONENTS, *features.shape))
    with threadpool_limits(limits=1):
        model = TSNE(perplexity=min(PERPLEXITY, (len(features) - 1) / 3), init="pca", random_state=seed)
        placed: NDArray[np.float64] = model.fit_transform(start.numpy())
    return placed
