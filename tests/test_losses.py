"""Losses against numbers worked by hand and slow references."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.losses import (
    cross_entropy,
    cross_view_cross_entropy,
    embedding_std,
    fp32,
    global_mean,
    info_nce,
    mean_cosine,
    mean_cosine_of_strangers,
    nt_xent,
    queue_cross_entropy,
    sharpened,
    sinkhorn,
)
from pretrain.peers import Peers


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
    assert torch.autograd.gradcheck(lambda queries, keys: info_nce(queries, keys, 0.5)[0], (first, second))


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
    cosines = queries @ keys.T
    for loss, accuracy in (info_nce(queries, keys, 0.3), info_nce(queries * 9, keys / 9, 0.3)):
        torch.testing.assert_close(loss, F.cross_entropy(cosines / 0.3, torch.arange(6)))
        assert accuracy == (cosines.argmax(dim=1) == torch.arange(6)).float().mean()


def test_info_nce_of_orthogonal_pairs_gives_the_closed_form() -> None:
    """One positive at cosine 1, three negatives at cosine 0: ln(1 + 3 e^(-1 / tau))."""
    loss, accuracy = info_nce(torch.eye(4), torch.eye(4), temperature=0.5)
    assert loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-2)), rel=1e-6)
    assert accuracy == 1.0


def test_info_nce_finds_the_own_keys_among_those_of_all_ranks() -> None:
    """T-M3-2: the images of rank 1 of 3 with 2 images each are keys 2 and 3."""
    keys = torch.eye(6)
    peers = Peers(rank=1, world_size=3, gather=lambda local: keys)
    assert info_nce(keys[2:4], keys[2:4], 0.2, peers)[1] == 1.0
    loss, accuracy = info_nce(keys[:2], keys[:2], 0.2, peers)  # as near as keys 0 and 1, which are others'
    assert accuracy == 0.0
    assert loss.item() == pytest.approx(math.log(math.exp(5) + 5), rel=1e-6)


@pytest.mark.parametrize(("length", "expected"), [(65536, 11.09037), (4096, 8.31801)])
def test_equal_features_and_queue_leave_no_better_than_a_guess(length: int, expected: float) -> None:
    """T-MC-2: ln(K + 1). Nothing is told apart, so the accuracy is 0."""
    same = F.normalize(torch.ones(2, 3), dim=1)
    loss, accuracy = queue_cross_entropy(same, same * 5, same[:1].expand(length, -1), temperature=0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    assert accuracy == 0.0


def test_queue_cross_entropy_equals_its_formula_written_as_loops() -> None:
    queries, keys = random_views()
    queue = F.normalize(random_views(9, seed=1)[0], dim=1)
    losses, nearest = [], []
    for query, key in zip(queries, keys, strict=True):
        own = float(query @ key / query.norm() / key.norm())
        others = [float(query @ old / query.norm()) for old in queue]
        total = math.exp(own / 0.3) + sum(math.exp(other / 0.3) for other in others)
        losses.append(math.log(total) - own / 0.3)
        nearest.append(own > max(others))
    loss, accuracy = queue_cross_entropy(queries, keys, queue, 0.3)
    assert loss.item() == pytest.approx(sum(losses) / 6, rel=1e-9)
    assert accuracy.item() == pytest.approx(sum(nearest) / 6)
    assert 0 < accuracy < 1


def test_mean_cosine_is_one_zero_and_minus_one_for_parallel_orthogonal_and_opposite_rows() -> None:
    rows = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
    assert mean_cosine(rows, 7 * rows).item() == pytest.approx(1.0)
    assert mean_cosine(rows, rows.flip(0)).item() == pytest.approx(0.0)
    assert mean_cosine(rows, -rows).item() == pytest.approx(-1.0)
    assert mean_cosine(rows, rows * torch.tensor([[1.0], [-1.0]])).item() == pytest.approx(0.0)


def test_cosine_of_strangers_is_the_mean_over_all_pairs_of_different_rows() -> None:
    first, second = (torch.stack(random_views(5, seed=seed)) for seed in (0, 1))  # (2, 5, d) each
    pairs = [
        float(F.cosine_similarity(first[view, i], second[view, j], dim=0))
        for view in range(2)
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    expected = sum(pairs) / len(pairs)
    assert mean_cosine_of_strangers(first, second).item() == pytest.approx(expected, rel=1e-9)
    same = torch.ones(2, 5, 3)
    assert mean_cosine_of_strangers(same, same).item() == pytest.approx(1.0)
    assert not mean_cosine_of_strangers(first.requires_grad_(), second).requires_grad


def test_the_spread_of_embeddings_is_healthy_at_one_over_the_root_of_the_width() -> None:
    """1 / sqrt(256) = 0.0625 on the sphere, 0 in a point whatever the lengths; two poles spread
    by 1 along one of two coordinates: (1 + 0) / 2."""
    wide = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))
    assert embedding_std(wide).item() == pytest.approx(0.0625, rel=0.01)
    collapsed = wide[:1] * torch.linspace(0.1, 9, 50).unsqueeze(1)
    assert embedding_std(collapsed).item() == pytest.approx(0.0, abs=1e-4)
    assert embedding_std(torch.tensor([[2.0, 0.0], [-5.0, 0.0]])).item() == pytest.approx(0.5)


def random_distillation(num_views: int, num_teachers: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_views, 3, 7, generator=generator, dtype=torch.float64)
    teacher = torch.randn(num_teachers, 3, 7, generator=generator, dtype=torch.float64)
    return logits, teacher


@pytest.mark.parametrize(("num_views", "num_terms"), [(2, 2), (10, 18)])
def test_every_crop_predicts_every_global_crop_but_itself(num_views: int, num_terms: int) -> None:
    """T-DI-2: two global crops give 2 terms, with eight local ones 18; each is a mean over images."""
    logits, teacher = random_distillation(num_views, 2)
    targets = torch.softmax(teacher, dim=2)
    places = [1, 0]  # the first of the teacher's views is the second of the student's
    terms = []
    for q in range(2):
        for v in range(num_views):
            if v != places[q]:
                of_images = [
                    -sum(
                        float(targets[q, b, k] * torch.log_softmax(logits[v, b] / 0.1, 0)[k])
                        for k in range(7)
                    )
                    for b in range(3)
                ]
                terms.append(sum(of_images) / 3)
    assert len(terms) == num_terms
    loss = cross_view_cross_entropy(logits, targets, places, 0.1)
    assert loss.item() == pytest.approx(sum(terms) / num_terms, rel=1e-9)


def test_uniform_student_and_teacher_give_the_logarithm_of_the_number_of_prototypes() -> None:
    """T-DI-1: ln 65536 = 11.09035."""
    logits = torch.full((2, 2, 65536), 3.0)
    targets = sharpened(logits, torch.zeros(65536), 0.04)
    assert cross_view_cross_entropy(logits, targets, [0, 1], 0.1).item() == pytest.approx(11.09035, abs=1e-4)


def test_the_center_cancels_what_is_added_to_all_of_the_teachers_logits() -> None:
    """T-DI-4."""
    _, teacher = random_distillation(2, 2)
    center, shift = torch.linspace(-1, 1, 7).double(), torch.linspace(5, -3, 7).double()
    torch.testing.assert_close(
        sharpened(teacher + shift, center + shift, 0.04), sharpened(teacher, center, 0.04)
    )
    torch.testing.assert_close(
        sharpened(teacher, center, 0.5)[1, 2], torch.softmax((teacher[1, 2] - center) * 2, 0)
    )
    assert not sharpened(teacher.requires_grad_(), center, 0.1).requires_grad


def test_distillation_is_float32_from_half_precision_logits_under_autocast() -> None:
    logits, teacher = (value.float() for value in random_distillation(3, 2))
    with torch.autocast("cpu", torch.bfloat16):
        targets = sharpened(teacher.bfloat16(), torch.zeros(7), 0.04)
        loss = cross_view_cross_entropy(logits.bfloat16(), targets, [0, 1], 0.1)
    assert (targets.dtype, loss.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(targets.sum(dim=2), torch.ones(2, 3))


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
