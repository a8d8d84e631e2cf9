"""Losses against numbers worked by hand and slow references."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.losses import cross_entropy, fp32, global_mean, info_nce, nt_xent, sinkhorn


def random_views(num_images: int = 6, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, num_images, width, generator=generator, dtype=torch.float64)
    return first, second


def test_equal_embeddings_leave_nt_xent_no_better_than_a_guess() -> None:
    """T-NT-1: ln(2 * 128 - 1) = 5.54126."""
    loss, _ = nt_xent(torch.ones(256, 7), temperature=0.2)
    assert loss.item() == pytest.approx(5.54126, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.2, 0.5])
def test_orthogonal_images_with_identical_views_give_the_closed_form(temperature: float) -> None:
    """T-NT-2: ln(1 + (2 B_g - 2) e^(-1 / tau)) for B_g = 4."""
    images = torch.eye(4, dtype=torch.float64)
    loss, accuracy = nt_xent([images, images], temperature)
    assert loss.item() == pytest.approx(math.log(1 + 6 * math.exp(-1 / temperature)), rel=1e-5)
    assert accuracy.item() == 1.0


def test_nt_xent_reaches_its_lower_bound_with_opposite_images_and_never_passes_it() -> None:
    """T-NT-2: two images at opposite ends attain ln(1 + (2 B_g - 2) e^(-2 / tau))."""
    ends = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    bound = math.log(1 + 2 * math.exp(-2 / 0.5))
    assert nt_xent([ends, ends], 0.5)[0].item() == pytest.approx(bound, rel=1e-9)
    for seed in range(20):
        assert nt_xent(random_views(2, seed=seed), 0.5)[0].item() >= bound


def test_nt_xent_ignores_the_length_of_embeddings_and_the_order_of_images() -> None:
    """T-NT-3."""
    first, second = random_views()
    loss, accuracy = nt_xent([first, second], 0.2)
    lengths = torch.linspace(0.1, 30, 6, dtype=torch.float64).unsqueeze(1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for other in ([first * lengths, second * 7], [first[order], second[order]], [second, first]):
        same_loss, same_accuracy = nt_xent(other, 0.2)
        torch.testing.assert_close(same_loss, loss)
        assert same_accuracy == accuracy


def test_nt_xent_equals_its_formula_written_as_loops() -> None:
    """T-NT-4."""
    first, second = random_views()
    rows = [row / row.norm() for row in (*first, *second)]
    losses = []
    nearest = []
    for a in range(12):
        similarity = {b: math.exp(float(rows[a] @ rows[b]) / 0.2) for b in range(12) if b != a}
        positive = (a + 6) % 12
        losses.append(-math.log(similarity[positive] / sum(similarity.values())))
        nearest.append(max(similarity, key=lambda b: similarity[b]) == positive)
    for views in ([first, second], torch.cat([first, second])):
        loss, accuracy = nt_xent(views, 0.2)
        assert loss.item() == pytest.approx(sum(losses) / 12, rel=1e-9)
        assert accuracy.item() == pytest.approx(sum(nearest) / 12)


def test_contrastive_gradients_flow_through_both_sides_of_each_similarity() -> None:
    """Against finite differences: detached negatives or keys would give another gradient."""
    first, second = (view.requires_grad_() for view in random_views(3, 4))
    assert torch.autograd.gradcheck(lambda *views: nt_xent(views, 0.5)[0], (first, second))
    assert torch.autograd.gradcheck(lambda queries, keys: info_nce(queries, keys, 0.5), (first, second))


def test_nt_xent_is_positive_so_its_information_estimate_stays_below_its_ceiling() -> None:
    """T-NT-5."""
    for seed in range(20):
        first, _ = random_views(seed=seed)
        assert nt_xent([first, first], 0.1)[0].item() > 0


def test_nt_xent_is_computed_in_float32_under_autocast() -> None:
    first, second = (view.float() for view in random_views())
    expected, _ = nt_xent([first, second], 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = nt_xent([first, second], 0.05)
        from_half, _ = nt_xent([first.bfloat16(), second.bfloat16()], 0.05)
    assert actual == expected
    assert from_half.dtype == torch.float32


def test_fp32_raises_half_precision_wherever_it_is_passed_and_stops_autocast() -> None:
    @fp32
    def dtypes(pair: list[Tensor], *, other: Tensor) -> list[torch.dtype]:
        return [pair[0].dtype, other.dtype, (pair[0] @ pair[1]).dtype]

    half = torch.ones(2, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert dtypes([half, half], other=half) == [torch.float32] * 3
    assert dtypes([half.double()] * 2, other=half.double()) == [torch.float64] * 3


def test_info_nce_equals_cross_entropy_over_all_keys() -> None:
    queries, keys = (F.normalize(view, dim=1) for view in random_views())
    expected = F.cross_entropy(queries @ keys.T / 0.3, torch.arange(6))
    torch.testing.assert_close(info_nce(queries, keys, 0.3), expected)


def test_info_nce_of_orthogonal_pairs_gives_the_closed_form() -> None:
    """One positive at cosine 1, three negatives at cosine 0: ln(1 + 3 e^(-1 / tau))."""
    loss = info_nce(torch.eye(4), torch.eye(4), temperature=0.5)
    assert loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-2)), rel=1e-6)


def test_sinkhorn_rows_sum_to_one_and_prototypes_are_used_equally() -> None:
    """B8.2: rows sum to 1 exactly; usage is M / K = 8, nearly after 3 alternations, closely after 100."""
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(48, 8, generator=generator), dim=1)
    scores = embeddings @ F.normalize(torch.randn(6, 8, generator=generator), dim=1).T
    few, many = sinkhorn(scores), sinkhorn(scores, iterations=100)
    torch.testing.assert_close(few.sum(dim=1), torch.ones(48))
    torch.testing.assert_close(few.sum(dim=0), torch.full((6,), 8.0), rtol=0.5, atol=0)
    torch.testing.assert_close(many.sum(dim=0), torch.full((6,), 8.0), rtol=1e-3, atol=0)


def test_sinkhorn_of_a_symmetric_pair_is_a_softmax() -> None:
    """Scores [[1, 0], [0, 1]] at epsilon 1 use both prototypes equally already: e / (e + 1) = 0.73106."""
    assignments = sinkhorn(torch.eye(2), epsilon=1.0)
    torch.testing.assert_close(
        assignments, torch.tensor([[0.73106, 0.26894], [0.26894, 0.73106]]), atol=1e-5, rtol=0
    )


def test_sinkhorn_spreads_images_that_all_prefer_one_prototype() -> None:
    scores = torch.tensor([[0.9, 0.1]]).repeat(8, 1)
    torch.testing.assert_close(sinkhorn(scores), torch.full((8, 2), 0.5))


def test_sinkhorn_solves_stacked_problems_separately_and_passes_no_gradient() -> None:
    scores = torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    both = sinkhorn(scores)
    assert not both.requires_grad
    for problem in range(2):
        torch.testing.assert_close(both[problem], sinkhorn(scores[problem]))


def test_sinkhorn_stays_finite_at_the_extremes_of_cosines_in_half_precision() -> None:
    """exp(1 / 0.05) = 4.9e8 overflows float16 but not float32."""
    scores = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]], dtype=torch.float16)
    assert sinkhorn(scores).isfinite().all()


def test_global_mean_of_a_lone_rank_is_the_mean() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    assert global_mean(values.sum(), torch.tensor(3)).item() == 3.0


def test_global_mean_of_nothing_is_zero_with_a_gradient_of_zero() -> None:
    values = torch.ones(3, requires_grad=True)
    loss = global_mean((values * 0).sum(), torch.tensor(0))
    loss.backward()
    assert loss.item() == 0.0
    assert values.grad is not None
    assert not values.grad.any()


def test_cross_entropy_takes_classes_and_probabilities() -> None:
    logits = torch.zeros(3, 8, dtype=torch.bfloat16)
    assert cross_entropy(logits, torch.tensor([0, 3, 7])).item() == pytest.approx(math.log(8), rel=1e-6)
    assert cross_entropy(logits, torch.full((3, 8), 1 / 8)).item() == pytest.approx(math.log(8), rel=1e-6)
