"""Tasks that support others: classification, exemplars, clusters of the whole data, colour classes, and some
options of inpainting and rotation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pydantic
import pytest
import torch
from example_views import LAYOUT, SETTINGS, SITE, example_views, ready, rows_of, with_patches, with_plan
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.backbone import BackboneConfig, layout_of
from pretrain.peers import ALONE
from pretrain.tasks import TASKS, color_bins
from pretrain.tasks.cluster_labels import ClusterLabelsConfig, ClusterLabelsTask
from pretrain.tasks.colorization import AB_SCALE, ColorizationConfig, ColorizationTask, cell_colors
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskOutput, TaskSite
from pretrain.views.pixels import patchify, rgb_to_lab_ab, split_patches
from pretrain.views.plan import ViewConfig, draw_view_plan, stream_indices


def build(name: str, site: TaskSite = SITE, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    spec = TASKS[name]
    return spec.task(spec.config(**{**SETTINGS.get(name, {}), **settings}), site).double()


def with_class_token(views: EncodedViews, rows: Tensor) -> EncodedViews:
    """The same views with these numbers at the front of the class token. (M, n)"""
    tokens = views.tokens.clone()
    tokens[:, 0] = 0.0
    tokens[:, 0, : rows.shape[1]] = rows.to(tokens)
    return replace(views, tokens=tokens)


def pass_on(num_outputs: int, scale: float = 1e3) -> nn.Module:
    """A linear layer that gives the first numbers of its input, scaled."""
    head = nn.Linear(SITE.embed_dim, num_outputs, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(scale * torch.eye(num_outputs, SITE.embed_dim))
    return head


def reason(
    name: str, *, class_token: bool = True, num_samples: int | None = None, **settings: Any
) -> str | None:
    model = BackboneConfig(img_px=16, patch_px=4, class_token=class_token)
    views = {"one": ViewConfig(size_px=16)}
    unsuited = TASKS[name].unsuited
    assert unsuited is not None
    config = TASKS[name].config(**{**SETTINGS.get(name, {}), **settings})
    return unsuited(config, Surroundings(views, model, layout_of(model, ()), num_samples))


def assert_all_gradients_are_zero(task: nn.Module) -> None:
    for parameter in task.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


# --- classification


def test_classification_reads_the_class_of_the_labelled_images_only() -> None:
    """Labels (-1, 0, 1, 2), both views: right for the two of class 0, wrong for the four others, and whatever
    the first image says does not matter."""
    views = example_views()
    assert views.labels is not None
    assert views.labels.tolist() == [-1, 0, 1, 2]
    task = build("classification")
    task.head = pass_on(3, scale=1.0)
    logits = torch.tensor([[9.0, 0.0, 0.0], [5.0, 0.0, 0.0], [5.0, 0.0, 0.0], [5.0, 0.0, 0.0]]).repeat(2, 1)
    output = task(with_class_token(views, logits), ALONE)
    right = math.log(1 + 2 * math.exp(-5))
    assert output.loss.item() == pytest.approx((right + 2 * (right + 5)) / 3, abs=1e-6)
    assert output.metrics["accuracy"].item() == pytest.approx(1 / 3)
    assert output.metrics["chance"].item() == pytest.approx(1 / 3)
    assert output.metrics["labelled"].item() == pytest.approx(3 / 4)


def test_label_smoothing_takes_its_share_from_the_label() -> None:
    """Logits (5, 0, 0) with label 0 and smoothing 0.3: 0.8 of the loss of class 0, 0.1 of each other."""
    views = replace(example_views(), labels=torch.zeros(4, dtype=torch.int64))
    task = build("classification", label_smoothing=0.3)
    task.head = pass_on(3, scale=1.0)
    loss = task(with_class_token(views, torch.tensor([[5.0, 0.0, 0.0]]).repeat(8, 1)), ALONE).loss
    right = math.log(1 + 2 * math.exp(-5))
    assert loss.item() == pytest.approx(0.8 * right + 0.2 * (right + 5), abs=1e-6)


def test_classification_can_read_the_mean_of_the_patches() -> None:
    views = replace(example_views(), labels=torch.tensor([0, 1, 2, 0]))
    patches = nn.functional.one_hot(torch.tensor([0, 1, 2, 0] * 2), 48).double()
    noise = torch.randn(8, 16, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = noise - noise.mean(dim=1, keepdim=True)
    task = build("classification", feature="mean_patch")
    task.head = pass_on(3)
    output = task(with_patches(views, patches.unsqueeze(1) + noise), ALONE)
    assert output.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert output.metrics["accuracy"] == 1.0


def test_without_any_label_classification_costs_nothing_and_its_head_has_a_gradient() -> None:
    task = build("classification")
    output = task(replace(example_views(), labels=torch.full((4,), -1)), ALONE)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert output.metrics["labelled"] == 0.0
    assert_all_gradients_are_zero(task)


def test_a_linear_layer_is_all_of_the_classifier() -> None:
    """Its weights are read from checkpoints under these names."""
    assert list(build("classification").state_dict()) == ["head.weight", "head.bias"]


def test_classification_needs_the_token_it_reads() -> None:
    assert "feature: mean_patch" in str(reason("classification", class_token=False))
    assert reason("classification", class_token=False, feature="mean_patch") is None
    assert reason("classification") is None
    with pytest.raises(pydantic.ValidationError, match="num_classes"):
        TASKS["classification"].config()


# --- exemplar


def test_every_image_is_a_class_of_its_own() -> None:
    """B8.1: the class of both views is the id of the sample; equal logits cost ln 20."""
    views = example_views()
    assert views.sample_ids is not None
    task = build("exemplar")
    task.head = pass_on(20)
    output = task(with_class_token(views, nn.functional.one_hot(views.sample_ids, 20).repeat(2, 1)), ALONE)
    assert output.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert output.metrics["accuracy"] == 1.0
    assert output.metrics["chance"].item() == pytest.approx(1 / 20)
    blank = task(with_class_token(views, torch.zeros(8, 1)), ALONE)
    assert blank.loss.item() == pytest.approx(math.log(20), abs=1e-6)


def test_exemplars_of_many_or_unknown_images_are_refused() -> None:
    assert reason("exemplar", num_samples=100_000) is None
    assert reason("exemplar", num_samples=None) is None  # asked again when the task is made
    assert "at most 100000, not 100001; use contrastive" in str(reason("exemplar", num_samples=100_001))
    with pytest.raises(ConfigError, match="how many there are is not known"):
        build("exemplar", replace(SITE, num_samples=0))


# --- clusters of the whole data set


def clusters(**settings: Any) -> ClusterLabelsTask:
    task = ready("cluster_labels", build("cluster_labels", **settings))
    assert isinstance(task, ClusterLabelsTask)
    return task


def test_before_the_first_assignment_clusters_cost_nothing() -> None:
    task = build("cluster_labels")
    assert isinstance(task, ClusterLabelsTask)
    assert task.assignments.tolist() == [-1] * 20
    output = task(example_views(), ALONE)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert [output.metrics[name].item() for name in ("accuracy", "chance", "used")] == [0.0, 0.0, 0.0]
    assert_all_gradients_are_zero(task)


def test_weights_stand_in_for_drawing_images_uniformly_over_clusters() -> None:
    """B8.2: the mean over all images of the weighted loss is the mean over clusters of their mean loss."""
    views = example_views(num_images=20)
    views = replace(views, sample_ids=torch.arange(20))
    task = clusters()
    logits = task.head(views.features)
    labels = task.assignments.repeat(2)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    of_clusters = torch.stack([losses[labels == cluster].mean() for cluster in range(4)])
    assert task.sizes.tolist() == [10, 5, 4, 1]
    torch.testing.assert_close(task(views, ALONE).loss, of_clusters.mean())
    assert not torch.allclose(losses.mean(), of_clusters.mean())


def test_clusters_are_told_from_features_and_chance_is_the_largest() -> None:
    views = example_views()
    assert views.sample_ids is not None
    task = clusters()
    task.head = pass_on(4)
    own = task.assignments[views.sample_ids]
    output = task(with_class_token(views, nn.functional.one_hot(own, 4).repeat(2, 1)), ALONE)
    assert output.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert output.metrics["accuracy"] == 1.0
    assert output.metrics["chance"].item() == pytest.approx(10 / 20)
    assert output.metrics["used"] == 1.0


def test_a_new_assignment_starts_a_new_classifier_the_same_on_all_ranks() -> None:
    """N(0, 0.01) from seed and epoch; the global generator has no part in it."""
    first, second = clusters(num_clusters=10), clusters(num_clusters=10)
    labels = torch.arange(20) % 10
    torch.manual_seed(1)
    given = first.assign(labels, epoch=3)
    torch.manual_seed(2)
    second.assign(labels, epoch=3)
    assert torch.equal(first.head.weight, second.head.weight)
    assert torch.equal(first.head.weight, given["head.weight"].double())
    assert not first.head.bias.any()
    assert first.head.weight.std().item() == pytest.approx(0.01, rel=0.15)
    before = first.head.weight.clone()
    first.assign(labels, epoch=4)
    assert not torch.equal(first.head.weight, before)
    first.assign(labels, epoch=3)
    assert torch.equal(first.head.weight, before)
    other_seed = clusters(num_clusters=10, seed=1)
    assert not torch.equal(other_seed.assign(labels, epoch=3)["head.weight"], given["head.weight"])


def test_clusters_are_due_at_the_start_and_then_every_so_many_epochs() -> None:
    task = build("cluster_labels", every_epochs=3)
    assert isinstance(task, ClusterLabelsTask)
    assert task.due(0)
    assert task.due(7)  # a run that was resumed before it ever clustered
    task.assign(torch.arange(20) % 4, epoch=2)
    assert [task.due(epoch) for epoch in range(2, 7)] == [False, False, False, True, True]


def test_what_was_assigned_is_in_the_checkpoint() -> None:
    task, fresh = clusters(), clusters()
    task.assign(torch.arange(20) % 3, epoch=5)
    fresh.load_state_dict(task.state_dict())
    views = example_views()
    assert not fresh.due(5)
    torch.testing.assert_close(fresh(views, ALONE).loss, task(views, ALONE).loss)
    buffers = {
        name: value.dtype
        for name, value in ClusterLabelsTask(ClusterLabelsConfig(num_clusters=4), SITE).named_buffers()
    }
    assert set(buffers.values()) <= {torch.int64, torch.float32}


def test_stability_compares_the_last_two_assignments() -> None:
    """Renamed clusters are the same; the first assignment has nothing to be compared with."""
    task = build("cluster_labels")
    assert isinstance(task, ClusterLabelsTask)
    labels = torch.arange(20) % 4
    stability = []
    for epoch, assigned in enumerate((labels, 3 - labels, labels // 2)):
        task.assign(assigned, epoch)
        stability.append(task(example_views(), ALONE).metrics["stability"].item())
    assert stability == pytest.approx([0.0, 1.0, 1 / math.sqrt(2)])


def test_clusters_that_cannot_be_filled_are_refused() -> None:
    assert reason("cluster_labels", num_samples=4) is None
    assert reason("cluster_labels") is None
    assert "4 clusters with 3 images; lower num_clusters" in str(reason("cluster_labels", num_samples=3))
    with pytest.raises(ConfigError, match="unknown number of images"):
        build("cluster_labels", replace(SITE, num_samples=0))


# --- colours as classes


def test_the_bins_hold_every_color_and_no_bin_is_without_one() -> None:
    """B8.6: 261 squares of 10 x 10 of the ab plane hold a colour of sRGB."""
    bins = {tuple(center) for center in color_bins.centers().tolist()}
    assert len(bins) == len(color_bins.centers()) == 261
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(50_000, 3, 1, 1, generator=generator, dtype=torch.float64)
    inside = (rgb_to_lab_ab(colors).flatten(1) / 10).round() * 10
    hit = {tuple(center) for center in inside.float().tolist()}
    assert hit <= bins
    assert len(hit) > 200  # those left out lie at the rim, where colours are few
    assert (0.0, 0.0) in bins


def test_a_color_is_shared_by_its_five_nearest_bins() -> None:
    """At a centre: distances 0 and four times 10, so exp(0) to exp(-2)."""
    centers = color_bins.centers()
    colors = torch.tensor([[0.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    nearest, shares = color_bins.soft_encode(colors, centers)
    weight = math.exp(-2)
    assert shares[0].tolist() == pytest.approx([1 / (1 + 4 * weight), *[weight / (1 + 4 * weight)] * 4])
    assert centers[nearest[0, 0]].tolist() == [0.0, 0.0]
    squares = (centers.double() - colors[1]).square().sum(dim=1)
    assert squares[nearest[1]].tolist() == sorted(squares.tolist())[:5]
    expected = torch.exp(-squares[nearest[1]] / 50)
    torch.testing.assert_close(shares[1], expected / expected.sum())


def test_the_annealed_mean_lies_between_mean_and_mode() -> None:
    """Two bins with probabilities 0.8 and 0.2 at temperature 0.38."""
    centers = torch.tensor([[0.0, 0.0], [10.0, -20.0]])
    logits = torch.tensor([[math.log(0.8), math.log(0.2)]], dtype=torch.float64)
    share = 0.2 ** (1 / 0.38) / (0.2 ** (1 / 0.38) + 0.8 ** (1 / 0.38))
    assert share < 0.2
    found = color_bins.annealed_mean(logits, centers)
    assert found[0].tolist() == pytest.approx([10 * share, -20 * share])


def test_rare_colors_weigh_more_and_the_mean_weight_is_one() -> None:
    """All counts in one bin: its weight is below 1 by what the uniform half gives all others."""
    centers = color_bins.centers()
    none = color_bins.rebalancing(torch.zeros(261, dtype=torch.int64), centers)
    torch.testing.assert_close(none, torch.ones(261))
    gray = (centers == 0).all(dim=1)
    counts = torch.where(gray, 1000, 0)
    weights = color_bins.rebalancing(counts, centers)
    assert (counts * weights).sum().item() / 1000 == pytest.approx(1.0)
    own_share = 1 / (1 + 4 * math.exp(-2))  # of the smoothed counts
    rare = (0.5 * own_share + 0.5 / 261) / (0.5 / 261)
    assert weights.max().item() == pytest.approx(rare, rel=1e-4)
    assert weights[gray].item() == pytest.approx(1.0)


def classified(views: EncodedViews, head: nn.Module | None = None, **settings: Any) -> TaskOutput:
    task = build("colorization", target="ab_cls", **settings)
    if head is not None:
        task.head = head
    return task(views, ALONE)


def test_equal_logits_over_colors_cost_the_log_of_their_number() -> None:
    views = example_views()
    task = build("colorization", target="ab_cls")
    for parameter in task.parameters():
        nn.init.zeros_(parameter)
    assert task(views, ALONE).loss.item() == pytest.approx(math.log(261), abs=1e-5)
    assert TASKS["colorization"].likelihood_of(ColorizationConfig(target="ab_cls")) == "ce"
    assert TASKS["colorization"].likelihood_of(ColorizationConfig()) == "l1"


class Painter(nn.Module):
    """Gives every cell the logarithm of the shares of its true colour among the bins."""

    def __init__(self, views: EncodedViews, cell_px: int) -> None:
        super().__init__()
        index = views.plan.patches.colorization
        tiles = split_patches(views.clean, SITE.patch_px)
        tiles = tiles.gather(1, index[:, :, None, None, None].expand(-1, -1, 3, 4, 4))
        colors = cell_colors(tiles.flatten(0, 1), cell_px).unflatten(0, index.shape)  # (M, K, cells, 2)
        nearest, shares = color_bins.soft_encode(colors, color_bins.centers())
        empty = torch.full((*colors.shape[:-1], 261), 1e-30, dtype=torch.float64)
        self.logits = empty.scatter(3, nearest, shares).log().flatten(2)
        self.entropy = -torch.special.xlogy(shares, shares).sum(dim=-1).mean()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize("cell_px", [1, 2, 4])
def test_true_shares_cost_their_entropy_and_tell_the_color_well(cell_px: int) -> None:
    """The best that cross-entropy with soft targets can do; the annealed mean is near the colour."""
    views = example_views()
    painter = Painter(views, cell_px)
    output = classified(views, painter, cell_px=cell_px)
    assert output.loss.item() == pytest.approx(painter.entropy.item(), abs=1e-6)
    assert output.metrics["error"].item() < 5.0 / AB_SCALE
    assert output.metrics["error"] < output.metrics["chance"] / 2


def test_chance_of_color_classes_is_the_error_of_grey() -> None:
    """Red is a = 80.09, b = 67.20, as for the regression of a and b."""
    views = example_views()
    red = torch.zeros_like(views.clean)
    red[:, 0] = 1.0
    output = classified(replace(views, clean=red))
    assert output.metrics["chance"].item() == pytest.approx(0.6695, abs=2e-4)


def test_cells_are_means_of_their_pixels() -> None:
    tiles = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = cell_colors(tiles, 2)
    assert found.shape == (3, 4, 2)
    torch.testing.assert_close(found[:, 1], rgb_to_lab_ab(tiles)[:, :, :2, 2:].mean(dim=(2, 3)))


def test_views_without_color_count_neither_in_the_loss_nor_in_the_frequencies() -> None:
    views = example_views()
    gray = torch.arange(8) >= 3
    grey_views = with_plan(views, gray=gray)
    task = build("colorization", target="ab_cls", rebalance=True)
    assert isinstance(task, ColorizationTask)
    alone = task(rows_of_first_view(views, 3), ALONE).loss
    task.step_counts.zero_()
    torch.testing.assert_close(task(grey_views, ALONE).loss, alone)
    assert task.step_counts.sum().item() == 3 * 2  # views, patches, one cell of 4 px each


def rows_of_first_view(views: EncodedViews, count: int) -> EncodedViews:
    return rows_of(views.select(("first",)), torch.arange(count))


def test_frequencies_move_on_after_a_step_and_make_rare_colors_dearer() -> None:
    """Seven red views and a blue one: after a step, the blue ones count several times as much."""
    views = example_views()
    red, blue = torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.9])
    paint = torch.stack([red] * 7 + [blue]).double()[:, :, None, None].expand_as(views.clean)
    views = replace(views, clean=paint)
    task = build("colorization", target="ab_cls", rebalance=True)
    assert isinstance(task, ColorizationTask)
    before = task(views, ALONE).loss
    assert torch.equal(task(views, ALONE).loss, before)  # a second micro step of the same step
    assert task.color_counts.sum() == 0
    task.finish_step()
    assert task.step_counts.sum() == 0
    assert task.color_counts.tolist().count(0) == 259
    assert task.color_counts.max().item() == 2 * 7 * 2  # micro steps, views, patches
    weights = color_bins.rebalancing(task.color_counts, color_bins.centers())
    rare, common = weights[task.color_counts == 4], weights[task.color_counts == 28]
    assert rare.item() > 3 * common.item()
    assert not torch.equal(task(views, ALONE).loss, before)


def test_counts_are_kept_only_where_they_are_used() -> None:
    assert not list(build("colorization", target="ab_cls").buffers())
    assert not list(build("colorization", rebalance=True).buffers())
    assert {buffer.dtype for buffer in build("colorization", target="ab_cls", rebalance=True).buffers()} == {
        torch.int64
    }


def test_cells_must_divide_the_patches() -> None:
    assert "3 px cells do not divide 4 px patches" in str(reason("colorization", target="ab_cls", cell_px=3))
    assert reason("colorization", target="ab_cls", cell_px=2) is None
    assert reason("colorization", cell_px=3) is None


# --- inpainting with squared errors


@pytest.mark.parametrize("norm_pix", [False, True])
def test_inpainting_can_square_its_errors(norm_pix: bool) -> None:
    """B8.3: predictions that are off by 0.5 everywhere cost 0.25, and chance is squared too."""
    views = example_views()
    gray = torch.rand(8, 16, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    patches = gray.expand(-1, -1, 48)
    clean = patches.reshape(8, 4, 4, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(8, 3, 16, 16)
    assert torch.equal(patchify(clean, 4), patches)
    targets = torch.zeros_like(patches) if norm_pix else patches

    views = with_patches(replace(views, clean=clean), targets + 0.5)
    task = build("inpainting", loss="l2", norm_pix=norm_pix)
    task.head = nn.Identity()
    output = task(views, ALONE)
    assert output.loss.item() == pytest.approx(0.25)
    assert output.metrics["error"].item() == pytest.approx(0.25)
    plain = build("inpainting", norm_pix=norm_pix)
    plain.head = nn.Identity()
    absolute = plain(views, ALONE)
    assert absolute.loss.item() == pytest.approx(0.5)
    if norm_pix:  # patches of one colour have no deviation to guess
        assert output.metrics["chance"].item() == pytest.approx(0.0)
    else:
        assert 0 < output.metrics["chance"] < absolute.metrics["chance"]
    spec = TASKS["inpainting"]
    assert [spec.likelihood_of(spec.config(loss=loss)) for loss in ("l1", "l2")] == ["l1", "l2"]


# --- all four turns of an image


def test_rotation_reads_the_turns_of_four_views_of_one_crop() -> None:
    """B8.7: views that are alike but for a turn that is always added, 0 to 3."""
    views = {
        f"turn{turns}": ViewConfig(size_px=16, fixed_turn=turns, like=None if turns == 0 else "turn0")
        for turns in range(4)
    }
    plan = draw_view_plan(
        list(views.values()),
        None,
        seed=0,
        epochs=torch.zeros(3, dtype=torch.int64),
        sample_ids=torch.arange(3),
        view_indices=stream_indices(views),
    )
    assert plan.quarter_turns.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    flips = plan.flip.view(4, 3)
    assert torch.equal(flips, flips[:1].expand(4, -1))
    tokens = torch.zeros(12, LAYOUT.num_tokens, 48, dtype=torch.float64)
    tokens[:, 1, :4] = nn.functional.one_hot(torch.arange(4).repeat_interleave(3), 4).double()
    task = build("rotation")
    task.head = pass_on(4)
    output = task(EncodedViews(tuple(views), LAYOUT, tokens, torch.zeros(12, 3, 16, 16), plan), ALONE)
    assert output.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert output.metrics["accuracy"] == 1.0
