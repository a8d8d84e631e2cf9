"""Projections: against slow references, and the same every time."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.errors import UserError
from pretrain.report import projection
from pretrain.report.projection import as_colors, principal_components, require_tsne, tsne


def clusters(num: int, each: int, dim: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 6 * torch.randn(num, dim, generator=generator)
    return (centres.repeat_interleave(each, 0) + torch.randn(num * each, dim, generator=generator)).float()


def test_components_are_those_of_the_covariance() -> None:
    features = clusters(4, 20)
    coordinates, shares = principal_components(features, 5)
    centered = features.double().numpy() - features.double().numpy().mean(axis=0)
    values, vectors = np.linalg.eigh(centered.T @ centered)
    values, vectors = values[::-1], vectors[:, ::-1]
    for place in range(5):
        wanted = centered @ vectors[:, place]
        sign = np.sign(vectors[np.abs(vectors[:, place]).argmax(), place])
        np.testing.assert_allclose(coordinates[:, place].numpy(), sign * wanted, atol=1e-8)
    np.testing.assert_allclose(shares.numpy(), values[:5] / values.sum(), rtol=1e-9)


def test_the_sign_is_fixed_by_the_data_not_by_the_routine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decomposition with all directions turned round is as right as the other."""
    features = clusters(3, 10)
    wanted, _ = principal_components(features, 3)
    own = torch.linalg.svd

    def turned(matrix: torch.Tensor, full_matrices: bool) -> tuple[torch.Tensor, ...]:
        left, sizes, right = own(matrix, full_matrices=full_matrices)
        return -left, sizes, -right

    monkeypatch.setattr(torch.linalg, "svd", turned)
    torch.testing.assert_close(principal_components(features, 3)[0], wanted)


def test_what_has_fewer_directions_than_asked_for_gets_zeros() -> None:
    features = torch.arange(4.0).unsqueeze(1) @ torch.ones(1, 2)
    coordinates, shares = principal_components(features, 3)
    assert coordinates.shape == (4, 3)
    assert coordinates[:, 1:].abs().max() < 1e-9
    assert float(shares[0]) == pytest.approx(1.0)
    constant, shares = principal_components(torch.ones(5, 3), 3)
    assert torch.isfinite(constant).all()
    assert torch.isfinite(shares).all()


def test_equal_patches_get_equal_colours_in_all_images_and_groups_get_their_own() -> None:
    groups = clusters(3, 1, seed=3)
    which = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    colors, ratio = as_colors(groups[which])
    for group in range(3):
        assert len({tuple(color) for color in colors[(which == group).numpy()]}) == 1
    assert len({tuple(color) for color in colors.reshape(-1, 3)}) == 3
    assert ratio == pytest.approx(1.0)
    flat, _ = as_colors(torch.ones(1, 4, 6))
    assert (flat == 128).all()


def test_the_plane_keeps_groups_together_and_is_the_same_every_time() -> None:
    features = clusters(3, 40)
    placed = tsne(features, seed=1)
    assert placed.shape == (120, 2)
    np.testing.assert_array_equal(placed, tsne(features, seed=1))
    apart = np.linalg.norm(placed[:, None] - placed[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    groups = np.repeat(np.arange(3), 40)
    assert (groups[apart.argmin(axis=1)] == groups).mean() == 1.0


def test_few_points_and_long_or_short_vectors_do() -> None:
    features = clusters(2, 4)
    placed = tsne(features * torch.logspace(-3, 3, 8).unsqueeze(1), seed=0)
    assert np.isfinite(placed).all()


def test_a_missing_library_is_told_in_one_line_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    require_tsne()
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"pip install 'pretrain\[report\]'") as told:
        require_tsne()
    assert "\n" not in str(told.value)
    assert str(told.value) == projection.MISSING
