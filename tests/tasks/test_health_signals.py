"""What tells a collapse: the spread, the similarity and the effective rank of image features."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.tasks.health import effective_rank, spread


def test_similarities_are_mean_cosines_of_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 5, 8, generator=generator)  # views, images
    unit = F.normalize(features, dim=-1)
    cosine = torch.einsum("vid,wjd->viwj", unit, unit)
    same, different = [], []
    for v in range(3):
        for w in range(3):
            for i in range(5):
                for j in range(5):
                    if i != j:
                        different.append(float(cosine[v, i, w, j]))
                    elif v != w:
                        same.append(float(cosine[v, i, w, j]))
    found = spread(features.flatten(0, 1), num_views=3)
    assert float(found["similarity/same"]) == pytest.approx(sum(same) / len(same), abs=1e-6)
    assert float(found["similarity/different"]) == pytest.approx(sum(different) / len(different), abs=1e-6)


def test_a_collapse_has_no_spread_and_no_gap() -> None:
    features = torch.ones(8, 4) * torch.arange(1, 9).unsqueeze(1)  # one direction, many lengths
    found = spread(features, num_views=2)
    assert float(found["feature_std"]) == pytest.approx(0.0, abs=1e-3)
    assert float(found["similarity/same"]) == pytest.approx(float(found["similarity/different"]), abs=1e-6)
    assert float(effective_rank(features)) == pytest.approx(1.0, abs=1e-6)


def test_one_view_or_one_image_has_no_pairs() -> None:
    assert set(spread(torch.eye(4), num_views=1)) == {"feature_std"}
    assert set(spread(torch.eye(2), num_views=2)) == {"feature_std"}
    assert spread(torch.eye(1), num_views=1) == {}


@pytest.mark.parametrize("shape", [(16, 4), (4, 16), (6, 6)])
def test_the_effective_rank_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.linalg.svdvals(features)
    shares = values / values.sum()
    expected = math.exp(-float((shares * shares.log()).sum()))
    assert float(effective_rank(features)) == pytest.approx(expected, rel=1e-6)


def test_directions_used_alike_count_fully_and_the_scale_does_not_matter() -> None:
    for scale in (1e-3, 1.0, 1e3):
        assert float(effective_rank(scale * torch.eye(6, 12))) == pytest.approx(6.0, rel=1e-6)


def test_features_that_are_not_finite_give_nan_and_no_error() -> None:
    features = torch.eye(4)
    features[1, 2] = torch.inf
    assert math.isnan(float(effective_rank(features)))
