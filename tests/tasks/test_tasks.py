"""Every task on made-up tokens: values worked by hand, and the laws that all tasks share."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from example_views import (
    LAYOUT,
    SETTINGS,
    SITE,
    as_float32,
    example_plan,
    example_views,
    ready,
    suited,
    with_patches,
    with_plan,
)
from small_config import small_config
from torch import Tensor, nn

from pretrain.check import check
from pretrain.errors import ConfigError
from pretrain.peers import ALONE
from pretrain.tasks import TASKS
from pretrain.tasks.clustering import agreement
from pretrain.tasks.colorization import color_target
from pretrain.tasks.contract import EncodedViews, TaskOutput, TaskSite
from pretrain.tasks.hidden_patches import normalize_patches
from pretrain.tokens import TokenLayout
from pretrain.views.pixels import patchify, split_patches


def build(name: str, site: TaskSite = SITE, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    spec = TASKS[name]
    return ready(name, spec.task(spec.config(**{**SETTINGS.get(name, {}), **settings}), site)).double()


def run(name: str, encoded: EncodedViews, head: nn.Module | None = None, **settings: Any) -> TaskOutput:
    task = build(name, **settings)
    if head is not None:
        task.head = head
    output: TaskOutput = task(encoded, ALONE)
    return output


class Sharp(nn.Module):
    """Logits so large that the softmax is one-hot."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * 1e3


# --- the table


def test_the_core_tasks_have_the_likelihoods_of_the_method() -> None:
    likelihoods = {
        name: spec.likelihood_of(spec.config(**SETTINGS.get(name, {}))) for name, spec in TASKS.items()
    }
    core = {
        "contrastive": "ce",
        "rotation": "ce",
        "clustering": "ce",
        "colorization": "l1",
        "inpainting": "l1",
        "relative_position": "ce",
        "jigsaw": "ce",
    }
    assert likelihoods.items() >= core.items()
    assert {"rotation", "clustering"} <= {name for name, spec in TASKS.items() if spec.needs_register}
    lower = {name for name, spec in TASKS.items() if not spec.higher_is_better}
    assert {"colorization", "inpainting"} <= lower


@pytest.mark.parametrize("name", TASKS)
def test_an_unknown_setting_is_refused(name: str) -> None:
    with pytest.raises(pydantic.ValidationError, match="wieght"):
        TASKS[name].config(wieght=2.0)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reports_its_headline_and_chance_as_detached_scalars(name: str) -> None:
    output = run(name, suited(name, example_views()))
    assert {TASKS[name].headline, "chance"} <= output.metrics.keys()
    assert output.loss.dim() == 0
    assert output.loss.requires_grad
    for value in output.metrics.values():
        assert value.dim() == 0
        assert not value.requires_grad


@pytest.mark.parametrize("name", TASKS)
def test_a_task_draws_nothing_at_random(name: str) -> None:
    """T-A-2: all draws are the plan's, so the same views give the same loss and no global state moves."""
    task, views = build(name), suited(name, example_views())
    state = torch.get_rng_state()
    # of a copy, because some tasks keep what they have seen
    first, second = copy.deepcopy(task)(views, ALONE), task(views, ALONE)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.loss, second.loss)


@pytest.mark.parametrize("name", TASKS)
def test_losses_are_float32_and_finite_under_autocast(name: str) -> None:
    task = build(name).float()
    views = suited(name, as_float32(example_views()))
    with torch.autocast("cpu", torch.bfloat16):
        output = task(views, ALONE)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in task.parameters())


# --- how many patches


@pytest.mark.parametrize(
    ("name", "field", "at_64", "at_196"),
    [
        ("colorization", "colorization", 6, 20),
        ("inpainting", "inpainting", 10, 29),
        ("relative_position", "pairs", 4, 12),
        ("jigsaw", "jigsaw", 8, 25),
    ],
)
def test_default_ratios_give_the_published_counts(name: str, field: str, at_64: int, at_196: int) -> None:
    """B1: N = 64 and N = 196."""
    spec = TASKS[name]
    assert spec.patch_request is not None
    assert [spec.patch_request(spec.config(), n)[field] for n in (64, 196)] == [at_64, at_196]


def test_patch_requests_of_all_tasks_fill_no_more_than_half_of_any_grid() -> None:
    """B1, the hard rule, for all square grids from 4 x 4 patches: there 2 + 2 + 2 * 1 + 2 = 8."""
    for num_patches in (side * side for side in range(4, 65)):
        request: dict[str, Any] = {}
        for spec in TASKS.values():
            if spec.patch_request is not None:
                request |= spec.patch_request(spec.config(), num_patches)
        total = request["colorization"] + request["inpainting"] + 2 * request["pairs"] + request["jigsaw"]
        assert total <= num_patches / 2
        assert request["jigsaw"] >= 2
        assert min(request["colorization"], request["inpainting"], request["pairs"]) >= 1


def test_patch_requests_pass_on_modes() -> None:
    def request(name: str, **settings: Any) -> dict[str, Any]:
        spec = TASKS[name]
        assert spec.patch_request is not None
        return spec.patch_request(spec.config(**settings), 64)

    assert request("inpainting", block=True) == {"inpainting": 10, "inpainting_block": True}
    assert request("relative_position", mode="any") == {"pairs": 4, "pair_mode": "any"}
    assert request("jigsaw", mode="permset", num_permutations=1000) == {
        "jigsaw": 9,
        "jigsaw_mode": "permset",
        "num_permutations": 1000,
    }


# --- values at heads of zero


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rotation", 1.38629),  # ln 4
        ("relative_position", 2.07944),  # ln 8
        ("jigsaw", 4.15888),  # ln 64
        ("clustering", 1.60944),  # ln 5
        ("contrastive", 1.94591),  # ln (2 * 4 - 1)
    ],
)
def test_a_head_of_zeros_gives_the_loss_of_a_guess(name: str, expected: float) -> None:
    """T-MT-3."""
    layout = TokenLayout((8, 8), LAYOUT.registers)
    task = build(name, replace(SITE, layout=layout))
    for parameter in task.parameters():
        nn.init.zeros_(parameter)
    output = task(example_views(num_images=4, layout=layout), ALONE)
    assert output.loss.item() == pytest.approx(expected, abs=1e-5)


def test_a_permutation_head_of_zeros_gives_the_loss_of_a_guess() -> None:
    """B8.5: ln 100 = 4.60517."""
    task = build("jigsaw", mode="permset")
    for parameter in task.parameters():
        nn.init.zeros_(parameter)
    views = example_views()
    nine = torch.arange(9).repeat(8, 1)
    output = task(
        with_plan(views, patches=replace(views.plan.patches, jigsaw=nine, jigsaw_source=nine)), ALONE
    )
    assert output.loss.item() == pytest.approx(4.60517, abs=1e-5)
    assert output.metrics["chance"].item() == pytest.approx(0.01)


# --- contrastive


def test_contrastive_finds_the_other_view_and_knows_the_odds() -> None:
    """Four orthogonal images: ln(1 + 6 e^-5) = 0.03963; chance 1 / 7; information ln 7 - loss."""
    views = example_views(4)
    tokens = views.tokens.clone()
    tokens[:, 0] = torch.eye(4, 48, dtype=torch.float64).repeat(2, 1)
    output = run("contrastive", replace(views, tokens=tokens), nn.Identity())
    assert output.loss.item() == pytest.approx(0.03963, abs=1e-5)
    assert output.metrics["accuracy"] == 1.0
    assert output.metrics["chance"].item() == pytest.approx(1 / 7)
    assert output.metrics["mutual_information"].item() == pytest.approx(math.log(7) - 0.03963, abs=1e-5)


def test_contrastive_compares_the_views_it_is_told_to() -> None:
    """Of three views the first and last are alike; the default pair is not."""
    eye, generator = torch.eye(4, 48, dtype=torch.float64), torch.Generator().manual_seed(0)
    tokens = torch.randn(12, LAYOUT.num_tokens, 48, generator=generator, dtype=torch.float64)
    tokens[:, 0] = torch.cat([eye, eye.roll(1, dims=0), eye])
    views = replace(example_views(6), names=("a", "b", "c"), tokens=tokens)
    for names, accuracy in ((("a", "c"), 1.0), (("a", "b"), 0.0)):
        assert run("contrastive", views.select(names), nn.Identity()).metrics["accuracy"] == accuracy


@pytest.mark.parametrize("name", [name for name, spec in TASKS.items() if spec.reads == "pair"])
def test_one_view_is_refused_by_tasks_that_compare_two(name: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, "views={only: {size_px: 32}}", f"tasks={{{name}: {{}}}}")
    with pytest.raises(ConfigError, match=f"tasks.{name}: compares two views, but has 1; add a view"):
        check(config, world_size=1)


# --- rotation


def test_rotation_reads_the_turn_from_its_own_token() -> None:
    views = example_views()
    tokens = views.tokens.clone()
    tokens[:, 1, :4] = nn.functional.one_hot(views.plan.quarter_turns, 4).double()
    head = nn.Linear(48, 4, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(1e3 * torch.eye(4, 48))
    output = run("rotation", replace(views, tokens=tokens), head)
    assert output.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert output.metrics["accuracy"] == 1.0
    assert output.metrics["chance"] == 0.25


# --- clustering


def test_agreement_is_told_apart_from_collapse() -> None:
    """Two images with a prototype each: views agree, images do not. One prototype for all: both agree."""
    apart = torch.eye(2).expand(2, 2, 2)
    assert [value.item() for value in agreement(apart, ALONE)] == [1.0, 0.0]
    collapsed = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).expand(2, 2, 2)
    assert [value.item() for value in agreement(collapsed, ALONE)] == [1.0, 1.0]


def test_chance_of_agreement_counts_pairs_of_different_images() -> None:
    """Best prototypes (0, 0, 1) and (0, 1, 1): 2 of 3 images agree, and 2 of 6 pairs of different images."""
    scores = nn.functional.one_hot(torch.tensor([[0, 0, 1], [0, 1, 1]]), 4).float()
    agree, chance = agreement(scores, ALONE)
    assert agree.item() == pytest.approx(2 / 3)
    # view 1 of i and view 2 of j != i: 0-1, 0-1; 0-0, 0-1; 1-0, 1-1
    assert chance.item() == pytest.approx(2 / 6)


def test_clustering_falls_when_views_agree_on_balanced_prototypes() -> None:
    """Embeddings on orthogonal prototypes, so one-hot targets: ln(1 + 3 e^-10) at temperature 0.1."""
    views = example_views(4)
    task = build("clustering", num_prototypes=4)
    task.head = nn.Identity()
    task.prototypes.weight = nn.Parameter(
        torch.eye(4, 48, dtype=torch.float64) * 3
    )  # their length does not matter
    tokens = views.tokens.clone()
    tokens[:, 2] = torch.eye(4, 48, dtype=torch.float64).repeat(2, 1)
    output = task(replace(views, tokens=tokens), ALONE)
    assert output.loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-10)), abs=1e-6)
    assert output.metrics["agreement"] == 1.0


# --- colorization and inpainting


@pytest.mark.parametrize("target", ["pixel", "mean", "ab"])
def test_perfect_colors_cost_nothing(target: Any) -> None:
    """T-MT-5: with tokens that are the targets and a head that passes them on."""
    views = example_views()
    tiles = split_patches(views.clean, SITE.patch_px)
    patches = color_target(tiles.flatten(0, 1), target).reshape(*tiles.shape[:2], -1)
    output = run("colorization", with_patches(views, patches), nn.Identity(), target=target)
    assert output.loss.item() == 0.0
    assert output.metrics["chance"].item() > 0.01


@pytest.mark.parametrize(
    ("target", "chance"),
    [
        ("pixel", 0.4330),  # grey of red is 0.299: (0.701 + 0.299 + 0.299) / 3
        ("mean", 0.4330),
        ("ab", 0.6695),  # a = 80.09, b = 67.20 in CIE Lab: (80.09 + 67.20) / 2 / 110
    ],
)
def test_chance_of_colors_is_the_error_of_repeating_the_grey(target: Any, chance: float) -> None:
    views = example_views()
    red = torch.zeros_like(views.clean)
    red[:, 0] = 1.0
    output = run("colorization", replace(views, clean=red), target=target)
    assert output.metrics["chance"].item() == pytest.approx(chance, abs=2e-4)


def test_views_without_color_do_not_count() -> None:
    """Zero predictions: three of eight views, all 0.6, give 0.6 whatever the grey ones hold."""
    views = example_views()
    clean = torch.full_like(views.clean, 0.9)
    clean[:3] = 0.6
    gray = torch.arange(8) >= 3
    task = build("colorization")
    for parameter in task.parameters():
        nn.init.zeros_(parameter)
    output = task(with_plan(replace(views, clean=clean), gray=gray), ALONE)
    assert output.loss.item() == pytest.approx(0.6)


def test_a_batch_without_color_costs_nothing_and_still_gives_every_head_a_gradient() -> None:
    task = build("colorization")
    output = task(with_plan(example_views(), gray=torch.ones(8, dtype=torch.bool)), ALONE)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert output.metrics["chance"].item() == 0.0
    for parameter in task.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize("norm_pix", [False, True])
def test_perfect_pixels_cost_nothing(norm_pix: bool) -> None:
    """T-MT-5."""
    views = example_views()
    patches = patchify(views.clean, SITE.patch_px)
    patches = normalize_patches(patches) if norm_pix else patches
    output = run("inpainting", with_patches(views, patches), nn.Identity(), norm_pix=norm_pix)
    assert output.loss.item() == pytest.approx(0.0, abs=1e-12)
    assert output.metrics["chance"].item() > 0.1


def test_only_hidden_patches_are_painted_and_chance_is_the_mean_clean_color() -> None:
    """Hidden patches 0.7, clean 0.2, those of other tasks 1.0: zero predictions err by 0.7, chance by 0.5."""
    views = example_views()
    sets = views.plan.patches
    patches = torch.full((8, 16, 48), 1.0, dtype=torch.float64)
    patches = patches.scatter(1, sets.inpainting.unsqueeze(2).expand(-1, -1, 48), 0.7)
    worked_on = torch.cat([sets.colorization, sets.inpainting, sets.pairs.flatten(1), sets.jigsaw], dim=1)
    untouched = torch.ones(8, 16, dtype=torch.bool).scatter(1, worked_on, False)
    patches[untouched] = 0.2
    clean = patches.reshape(8, 4, 4, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(8, 3, 16, 16)
    task = build("inpainting")
    for parameter in task.parameters():
        nn.init.zeros_(parameter)
    output = task(replace(views, clean=clean), ALONE)
    assert output.loss.item() == pytest.approx(0.7)
    assert output.metrics["chance"].item() == pytest.approx(0.5)


def test_normalized_patches_have_mean_zero_and_variance_one() -> None:
    patches = torch.rand(2, 3, 48, generator=torch.Generator().manual_seed(0)) * 7 + 3
    normalized = normalize_patches(patches)
    torch.testing.assert_close(normalized.mean(dim=2), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalized.var(dim=2), torch.ones(2, 3))


# --- relative position and jigsaw


class Compass(nn.Module):
    """Reads (row, column) from the first two numbers of each token, points from the first to the second."""

    def forward(self, joined: Tensor) -> Tensor:
        first, second = joined.chunk(2, dim=-1)
        toward = (second - first)[..., :2].sign()  # down, right
        directions = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
        return (toward.unsqueeze(-2) == toward.new_tensor(directions)).all(dim=-1) * 1e3


def test_relative_position_is_the_direction_of_the_second_patch_seen_from_the_first() -> None:
    """Classes: left-up, up, right-up, left, right, left-down, down, right-down."""
    patches = LAYOUT.positions().double().expand(8, 16, 2)
    output = run("relative_position", with_patches(example_views(), patches), Compass())
    assert output.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert output.metrics["accuracy"] == 1.0
    assert output.metrics["chance"] == 1 / 8


def test_relative_position_asks_each_pair_in_both_orders() -> None:
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, joined: Tensor) -> Tensor:
            seen.append(joined)
            return joined[..., :8]

    views = with_patches(example_views(), torch.arange(16.0).reshape(1, 16, 1).expand(8, 16, 8))
    run("relative_position", views, Recorder())
    asked = seen[0][..., [0, 8]].long()  # (M, 2R, 2): the two patches of each question
    pairs = views.plan.patches.pairs
    assert torch.equal(asked, torch.cat([pairs, pairs.flip(2)], dim=1))


def test_jigsaw_asks_each_slot_where_its_content_came_from() -> None:
    """Tokens name the patch whose content they show; of three shuffled patches two are left to guess from."""
    views = example_views()
    sets = views.plan.patches
    content = torch.arange(16).repeat(8, 1).scatter(1, sets.jigsaw, sets.jigsaw_source)
    patches = nn.functional.one_hot(content, 16).double()
    output = run("jigsaw", with_patches(views, patches), Sharp())
    assert output.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert output.metrics["accuracy"] == 1.0
    assert output.metrics["chance"] == 1 / 16
    assert output.metrics["guess_among_shuffled"] == 1 / 2


def test_permutation_mode_reads_nine_tokens_in_order_and_tells_the_permutation() -> None:
    nine = torch.randperm(16, generator=torch.Generator().manual_seed(0))[:9].repeat(8, 1)
    views = example_views()
    sets = replace(views.plan.patches, jigsaw=nine, jigsaw_source=nine)
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, joined: Tensor) -> Tensor:
            seen.append(joined)
            return 1e3 * nn.functional.one_hot(sets.jigsaw_class, 100).double()

    patches = torch.arange(16.0).reshape(1, 16, 1).expand(8, 16, 1)
    output = run("jigsaw", with_plan(with_patches(views, patches), patches=sets), Recorder(), mode="permset")
    assert torch.equal(seen[0].long(), nine)
    assert output.metrics["accuracy"] == 1.0


def test_example_sets_are_disjoint() -> None:
    """The made-up plan keeps the law of real ones (T-MT-1), or the tests above would prove less."""
    sets = example_plan(8).patches
    together = torch.cat([sets.colorization, sets.inpainting, sets.pairs.flatten(1), sets.jigsaw], dim=1)
    assert all(len(set(row)) == 11 for row in together.tolist())
