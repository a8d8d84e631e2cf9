"""What tells a collapse of the representation: numbers of image features, computed on the way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROWS = 256  # of the features whose effective rank is measured


@torch.no_grad()
def spread(features: Tensor, num_views: int) -> dict[str, Tensor]:
    """How far the directions of features lie apart. features: (V * B, D), view-major -> (), each

    `feature_std`: root mean square distance of the unit vectors from their mean, from 0, all the same, to 1.
    `similarity/same`, `similarity/different`: mean cosine between two views of one image, and between views
    of two images; only where there are several of both.
    """
    if len(features) < 2:
        return {}
    features = F.normalize(features.float(), dim=1)
    found = {"feature_std": (1 - features.mean(dim=0).square().sum()).clamp(min=0).sqrt()}
    num_images = len(features) // num_views
    if num_views < 2 or num_images < 2:
        return found
    # sums over ordered pairs, from the lengths of sums of unit vectors
    of_image = features.view(num_views, num_images, -1).sum(dim=0).square().sum()
    of_all = features.sum(dim=0).square().sum()
    same = (of_image - len(features)) / (num_images * num_views * (num_views - 1))
    different = (of_all - of_image) / (num_images * (num_images - 1) * num_views**2)
    return {**found, "similarity/same": same, "similarity/different": different}


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the singular values, taken as shares: RankMe (Garrido et al., 2023,
    arXiv:2210.02885, eq. 1). features: (N, D), of which the first 256 count -> ()

    From 1, where all features are multiples of one vector, to the smaller side. NaN where one is not finite.
    """
    features = features[:MAX_ROWS].double()
    is_finite = features.isfinite().all()
    features = features.where(is_finite, 0.0)
    gram = features @ features.T if len(features) < features.shape[1] else features.T @ features
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=1e-12)
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank.where(is_finite, torch.nan)
