"""Clustering of features: against slow references, and what must hold whatever the data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pretrain.models.clusters import (
    kmeans,
    nearest_center,
    normalized_mutual_information,
    reduce_and_whiten,
    size_metrics,
    split_for_empty,
)


def blobs(num_each: int, centers: Tensor, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around centers (K, d), in random order, and which center each is of."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(len(centers)).repeat(num_each)
    truth = truth[torch.randperm(len(truth), generator=generator)]
    return centers[truth] + spread * torch.randn(len(truth), centers.shape[1], generator=generator), truth


# --- whitening


@pytest.mark.parametrize("rows_at_a_time", [1 << 16, 7])
def test_whitened_directions_have_variance_one_and_no_correlation(
    rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the rows are scaled to unit length, which is undone here through their known lengths."""
    monkeypatch.setattr("pretrain.models.clusters._ROWS", rows_at_a_time)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 7.0
    white = reduce_and_whiten(features, dim=6).double()
    torch.testing.assert_close(white.norm(dim=1), torch.ones(500, dtype=torch.float64))
    centered = features.double() - features.double().mean(dim=0)
    covariance = centered.T @ centered / 500
    length = (centered @ torch.linalg.inv(covariance) * centered).sum(dim=1).sqrt()  # Mahalanobis
    whitened = white * length.unsqueeze(1)
    torch.testing.assert_close(
        whitened.T @ whitened / 500, torch.eye(6, dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_the_main_directions_are_kept_and_empty_ones_are_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 10.0, 0.0, 3.0])
    features = torch.randn(300, 4, generator=generator) * scale
    white = reduce_and_whiten(features, dim=2)
    kept = features[:, [1, 3]]
    similar = (
        torch.cdist(white, white),
        torch.cdist(*[torch.nn.functional.normalize(_white(kept), dim=1)] * 2),
    )
    torch.testing.assert_close(*similar, atol=2e-2, rtol=0)  # the others only tilt the axes a little
    assert reduce_and_whiten(features, dim=4)[:, 3].abs().max() == 0.0
    assert reduce_and_whiten(torch.ones(5, 3)).abs().max() == 0.0
    assert reduce_and_whiten(features, dim=9).shape == (300, 4)


def _white(features: Tensor) -> Tensor:
    return (features - features.mean(dim=0)) / features.std(dim=0, correction=0)


# --- k-means


def test_clusters_that_are_far_apart_are_found() -> None:
    """A start with two centers in one cluster may stay wrong, so one of a few seeds has to be right."""
    features, truth = blobs(30, 10 * torch.eye(3, 5), spread=0.5)
    found = [normalized_mutual_information(kmeans(features, 3, seed=seed), truth).item() for seed in range(4)]
    assert max(found) == pytest.approx(1.0)


def test_lloyds_algorithm_equals_a_slow_reference() -> None:
    features, _ = blobs(10, torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), spread=0.7)
    first = torch.randperm(40, generator=torch.Generator().manual_seed(5))[:6]
    points, centers = features.tolist(), features[first].tolist()
    for iteration in range(4):
        labels = [_nearest(point, centers) for point in points]
        assert len(set(labels)) == 6  # nothing empty, so nothing is split
        if iteration < 3:
            for k in range(6):
                members = [point for point, label in zip(points, labels, strict=True) if label == k]
                centers[k] = [sum(column) / len(members) for column in zip(*members, strict=True)]
    assert kmeans(features, 6, iterations=3, seed=5).tolist() == labels


def _nearest(point: list[float], centers: list[list[float]]) -> int:
    distances = [math.dist(point, center) for center in centers]
    return distances.index(min(distances))


def test_more_iterations_never_lead_farther_from_the_centers() -> None:
    features = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))

    def inertia(iterations: int) -> float:
        labels = kmeans(features, 10, iterations, seed=0)
        means = torch.stack([features[labels == k].mean(dim=0) for k in range(10)])
        return (features - means[labels]).square().sum().item()

    found = [inertia(iterations) for iterations in range(6)]
    assert found == sorted(found, reverse=True)
    assert found[5] < found[0]


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first, again, other = (kmeans(features, 7, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_clusters", [1, 10, 40, 50])
def test_no_cluster_stays_empty_even_of_few_different_points(num_clusters: int) -> None:
    """Three places hold 50 points, so by distance alone at most three clusters would have members."""
    features = torch.eye(3)[torch.arange(50) % 3]
    labels = kmeans(features, num_clusters, iterations=5)
    assert labels.bincount(minlength=num_clusters).min() >= 1
    assert labels.max() == num_clusters - 1


def test_more_clusters_than_points_are_refused() -> None:
    with pytest.raises(ValueError, match="3 features cannot fill 4 clusters"):
        kmeans(torch.randn(3, 2), 4)


def test_an_empty_cluster_gets_the_farther_half_of_a_big_one() -> None:
    """Of clusters with 6, 1 and 0 members only the first can be split: 3 and 3, along one direction."""
    features = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [9.0]])
    labels = split_for_empty(features, torch.tensor([0] * 6 + [1]), 3, torch.Generator().manual_seed(0))
    assert labels[6] == 1
    assert labels[:6].tolist() in ([0, 0, 0, 2, 2, 2], [2, 2, 2, 0, 0, 0])


def test_the_nearest_center_is_found_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features, centers = torch.randn(50, 4, generator=generator), 2 * torch.randn(9, 4, generator=generator)
    monkeypatch.setattr("pretrain.models.clusters._CHUNK", 7 * 9)  # seven rows at a time
    assert torch.equal(nearest_center(features, centers), torch.cdist(features, centers).argmin(dim=1))


# --- what is watched


def test_mutual_information_worked_by_hand() -> None:
    """Halves against quarters: I = ln 2, entropies ln 2 and ln 4, so 1 / sqrt(2)."""
    halves, quarters = torch.tensor([0, 0, 1, 1] * 2), torch.tensor([0, 1, 2, 3] * 2)
    assert normalized_mutual_information(halves, quarters).item() == pytest.approx(1 / math.sqrt(2))
    independent = torch.tensor([0, 1, 0, 1] * 2)
    assert normalized_mutual_information(halves, independent).item() == pytest.approx(0.0, abs=1e-12)


def test_mutual_information_knows_no_names() -> None:
    labels = torch.randint(5, (100,), generator=torch.Generator().manual_seed(0))
    renamed = torch.tensor([3, 1, 4, 0, 2])[labels]
    assert normalized_mutual_information(labels, renamed).item() == pytest.approx(1.0)
    one = torch.zeros_like(labels)
    assert normalized_mutual_information(one, one) == 1.0
    assert normalized_mutual_information(one, labels) == 0.0


def test_sizes_tell_even_clusters_from_collapse() -> None:
    def found(*sizes: int) -> list[float]:
        metrics = size_metrics(torch.tensor(sizes))
        return [metrics[name].item() for name in ("used", "largest", "evenness")]

    assert found(5, 5, 5, 5) == pytest.approx([1.0, 0.25, 1.0])
    assert found(20, 0, 0, 0) == pytest.approx([0.25, 1.0, 0.25])
    assert found(10, 10, 0, 0) == pytest.approx([0.5, 0.5, 0.5])
    assert found(0, 0, 0, 0) == [0.0, 0.0, 0.0]
