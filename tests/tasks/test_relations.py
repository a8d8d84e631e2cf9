"""RelViT's relations of the patches of a grid: labels, heads, shuffling, and what positions give away."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from example_views import LAYOUT, SETTINGS, SITE, example_views, with_patches, with_plan
from torch import Tensor, nn

from pretrain.models.backbone import BackboneConfig, create_backbone, encode, layout_of
from pretrain.peers import ALONE
from pretrain.tasks import TASKS
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskOutput
from pretrain.tasks.grid_relations import (
    PairHead,
    angles,
    distances,
    grid_tokens,
    labels_of,
    labels_on,
    spatial_relations,
)
from pretrain.tasks.spatial_relation import guesses
from pretrain.tokens import TokenLayout, take
from pretrain.views.masks import MaskConfig
from pretrain.views.plan import ViewConfig

RELATIONS = ("spatial_relation", "distance", "angle", "absolute_position")
CPU = torch.device("cpu")
TINY = BackboneConfig(
    name="vit_tiny_patch16_224", img_px=16, patch_px=4, args={"depth": 2, "embed_dim": 48, "num_heads": 2}
)
UNPLACED = TINY.model_copy(update={"pos_embed": "none"})


def build(name: str, site: Any = SITE, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    spec = TASKS[name]
    return spec.task(spec.config(**{**SETTINGS.get(name, {}), **settings}), site).double()


def run(name: str, views: EncodedViews, head: nn.Module | None = None, **settings: Any) -> TaskOutput:
    task = build(name, **settings)
    if head is not None:
        task.head = head
    output: TaskOutput = task(views, ALONE)
    return output


# --- labels


def test_relations_of_a_grid_of_four_worked_by_hand() -> None:
    """T-RV-1. Patches 0 1 / 2 3: patch 0 lies left-up of 3 (0), 1 up-right of 2 (2), 3 right of 2 (5)."""
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert spatial_relations((2, 2)).tolist() == expected


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (8, 8), (2, 5)])
def test_tables_equal_a_slow_reference(grid: tuple[int, int]) -> None:
    """T-RV-1: the closed forms, pair by pair."""
    rows, columns = grid
    points = [(row, column) for row in range(rows) for column in range(columns)]
    widest = max(
        math.acos(_cosine(first, second, grid)) for first in points for second in points if first != second
    )
    tables = spatial_relations(grid), distances(grid), angles(grid)
    for i, (y, x) in enumerate(points):
        for j, (other_y, other_x) in enumerate(points):
            down, right = (y > other_y) - (y < other_y), (x > other_x) - (x < other_x)
            apart = math.hypot(y - other_y, x - other_x) / math.hypot(rows - 1, columns - 1)
            angle = 0.0 if i == j else math.acos(_cosine(points[i], points[j], grid)) / widest
            expected = 3 * (down + 1) + right + 1, 2 * apart - 1, 2 * angle - 1
            assert tables[0][i, j] == expected[0]
            assert tables[1][i, j].item() == pytest.approx(expected[1], abs=1e-14)
            assert tables[2][i, j].item() == pytest.approx(expected[2], abs=1e-12)


def _cosine(first: tuple[int, int], second: tuple[int, int], grid: tuple[int, int]) -> float:
    a, b = ([place + side / 2 for place, side in zip(point, grid, strict=True)] for point in (first, second))
    return (a[0] * b[0] + a[1] * b[1]) / (math.hypot(*a) * math.hypot(*b) + 1e-4)


@pytest.mark.parametrize(
    ("side", "corner", "edge", "center", "entropy"),
    [(8, 0.19141, 0.05469, 0.015625, 1.96655), (7, 0.18367, 0.06122, 0.02041, 2.00848)],
)
def test_relations_are_as_frequent_as_published(
    side: int, corner: float, edge: float, center: float, entropy: float
) -> None:
    """T-RV-1; and both orders of a pair are opposite: r_ij + r_ji = 8."""
    table = spatial_relations((side, side))
    frequency = table.flatten().bincount(minlength=9).double() / table.numel()
    expected = [corner, edge, corner, edge, center, edge, corner, edge, corner]
    assert frequency.tolist() == pytest.approx(expected, abs=5e-6)
    assert -(frequency * frequency.log()).sum().item() == pytest.approx(entropy, abs=5e-6)
    assert torch.equal(table + table.T, torch.full_like(table, 8))
    chance, uninformed = guesses(table)
    assert chance.item() == pytest.approx(corner, abs=5e-6)
    assert uninformed.item() == pytest.approx(corner + center, abs=1e-5)


@pytest.mark.parametrize("side", [2, 3, 7, 8, 14])
@pytest.mark.parametrize("relation", [distances, angles])
def test_distances_and_angles_are_symmetric_from_minus_one_to_exactly_one(relation: Any, side: int) -> None:
    """T-RV-5, also once they are float32."""
    for table in (relation((side, side)), labels_on(CPU, relation, (side, side))):
        assert table.isfinite().all()
        assert torch.equal(table, table.T)
        assert table.max() == 1.0
        assert table.min() == -1.0
        assert (table.diagonal() == -1.0).all()
    assert labels_on(CPU, relation, (side, side)).dtype == torch.float32


@pytest.mark.parametrize(
    ("relation", "side", "mean", "variance"),
    [
        (distances, 8, -0.16430, 0.15876),
        (angles, 8, -0.43710, 0.16569),
        (distances, 7, None, 0.16510),
        (angles, 7, None, 0.17145),
    ],
)
def test_the_best_constant_errs_as_published(
    relation: Any, side: int, mean: float | None, variance: float
) -> None:
    """T-RV-1, F 16: the shift by half a grid and the epsilon of 1e-4 show in the fifth digit."""
    table = relation((side, side))
    assert table.var(correction=0).item() == pytest.approx(variance, abs=5e-6)
    assert mean is None or table.mean().item() == pytest.approx(mean, abs=5e-6)


@pytest.mark.parametrize(("side", "widest"), [(8, 0.8733), (7, 0.8648)])
def test_the_widest_angle_is_between_the_corners_beside_the_first(side: int, widest: float) -> None:
    """T-RV-1: in radians, before it is scaled."""
    top_right, bottom_left = (0, side - 1), (side - 1, 0)
    assert math.acos(_cosine(top_right, bottom_left, (side, side))) == pytest.approx(widest, abs=5e-5)
    assert angles((side, side))[side - 1, side * (side - 1)] == 1.0


# --- losses and their guesses


@pytest.mark.parametrize(
    ("name", "expected"), [("spatial_relation", 2.19722), ("absolute_position", 4.15888)]
)
def test_equal_logits_give_the_loss_of_a_guess(name: str, expected: float) -> None:
    """T-RV-2: ln 9 and ln 64."""
    layout = TokenLayout((8, 8), LAYOUT.registers)
    task = build(name, replace(SITE, layout=layout))
    for parameter in task.parameters():
        nn.init.zeros_(parameter)
    output = task(example_views(layout=layout), ALONE)
    assert output.loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("name", "chance"), [("distance", 15.876), ("angle", 16.569)])
def test_a_constant_score_errs_by_chance(name: str, chance: float) -> None:
    """F 20: errors are told a hundredfold. The best constant is the mean of the labels."""
    layout = TokenLayout((8, 8), LAYOUT.registers)
    mean = {"distance": distances, "angle": angles}[name]((8, 8)).mean()

    class Constant(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return mean.expand(len(tokens), 1, 64, 64)

    output = run(name, example_views(layout=layout), Constant())
    assert output.metrics["error_x100"].item() == pytest.approx(chance, abs=1e-3)
    assert output.metrics["chance"].item() == pytest.approx(chance, abs=1e-3)
    assert output.loss.item() == pytest.approx(chance / 100, abs=1e-5)


def answers(name: str, sources: Tensor, grid: tuple[int, int] = LAYOUT.grid) -> nn.Module:
    """A head that knows the answers for tokens whose first number is the patch they show."""
    num_patches = grid[0] * grid[1]

    class Answers(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            assert torch.equal(tokens[..., 0].long(), sources)
            first, second = sources.unsqueeze(2), sources.unsqueeze(1)  # (M, N, 1), (M, 1, N)
            if name == "absolute_position":
                return 1e3 * nn.functional.one_hot(sources, num_patches).double()
            if name == "spatial_relation":
                relation = spatial_relations(grid)[first, second]
                return 1e3 * nn.functional.one_hot(relation, 9).double().permute(0, 3, 1, 2)
            return {"distance": distances, "angle": angles}[name](grid)[first, second].unsqueeze(1)

    return Answers()


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("shuffle", [False, True], ids=["in place", "shuffled"])
def test_whoever_knows_what_each_place_shows_makes_no_error(name: str, shuffle: bool) -> None:
    """T-RV-4: labels move with the contents, on both axes."""
    views = example_views()
    order = torch.rand(8, 16, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    source = order if shuffle else torch.arange(16).repeat(8, 1)
    views = with_patches(views, source.unsqueeze(2).double().expand(-1, -1, 48))
    if shuffle:
        views = with_plan(views, patches=replace(views.plan.patches, shuffled=order))
    output = run(name, views, answers(name, source))
    assert output.loss.item() == pytest.approx(0.0, abs=1e-6)
    still = with_plan(views, patches=replace(views.plan.patches, shuffled=None))
    if shuffle:  # labels that stay where they are, are wrong
        assert run(name, still, answers(name, source)).loss.item() > 0.1
    headline = TASKS[name].headline
    assert output.metrics[headline].item() == pytest.approx(float(TASKS[name].higher_is_better), abs=1e-6)
    assert output.metrics["chance"] > 0


def test_labels_permuted_as_the_formula_says() -> None:
    """T-RV-4: label (i, j) of a shuffled view is r[source_i, source_j]."""
    table = torch.arange(9).view(3, 3)
    found = labels_of(table, torch.tensor([[2, 0, 1]]), 1)
    assert found.tolist() == [[[8, 6, 7], [2, 0, 1], [5, 3, 4]]]


# --- the head


@pytest.mark.parametrize(("num_outputs", "width"), [(9, 42), (1, 384)])
def test_a_pair_head_is_the_sum_it_stands_for(num_outputs: int, width: int) -> None:
    """F 15: rank D // K, divided by its root; the scores by explicit loops over outputs and pairs."""
    torch.manual_seed(0)
    head = PairHead(384, num_outputs, bilinear_full=False).double()
    tokens = torch.randn(2, 3, 384, dtype=torch.float64)
    found = head(tokens)
    assert found.shape == (2, num_outputs, 3, 3)
    assert head.key is not None
    for output in range(num_outputs):
        rows = slice(output * width, (output + 1) * width)
        for i in range(3):
            for j in range(3):
                query, key = head.query.weight[rows] @ tokens[1, i], head.key.weight[rows] @ tokens[1, j]
                expected = query @ key / math.sqrt(width)
                assert found[1, output, i, j].item() == pytest.approx(expected.item(), abs=1e-10)


def test_the_full_form_is_the_papers() -> None:
    """F 15: z W z' / sqrt(D), W of D x D for each output."""
    torch.manual_seed(0)
    head = PairHead(8, 3, bilinear_full=True).double()
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    matrices = head.query.weight.view(3, 8, 8)  # query = W x, so the form is x_i' W' x_j
    expected = torch.einsum("mid,kde,mje->mkij", tokens, matrices.mT, tokens) / math.sqrt(8)
    torch.testing.assert_close(head(tokens), expected)
    assert [name for name, _ in head.named_parameters()] == ["query.weight"]


def test_exchanging_the_patches_exchanges_queries_and_keys() -> None:
    """T-RV-8."""
    torch.manual_seed(0)
    head, other = (PairHead(18, 9, bilinear_full=False).double() for _ in range(2))
    assert head.key is not None
    assert other.key is not None
    other.query.weight, other.key.weight = head.key.weight, head.query.weight
    tokens = torch.randn(2, 5, 18, dtype=torch.float64)
    assert not torch.allclose(head(tokens), head(tokens).mT)
    torch.testing.assert_close(other(tokens), head(tokens).mT)


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("bilinear_full", [False, True])
def test_every_parameter_of_a_head_gets_a_gradient(name: str, bilinear_full: bool) -> None:
    """T-RV-7; there is no value projection that would not."""
    settings = {} if name == "absolute_position" else {"bilinear_full": bilinear_full}
    task = build(name, **settings)
    task(example_views(), ALONE).loss.backward()
    for parameter in task.parameters():
        assert parameter.grad is not None
        assert parameter.grad.flatten(1 if parameter.dim() > 1 else 0).any(dim=-1).all()


def test_scores_are_float32_under_autocast() -> None:
    head = PairHead(48, 9, bilinear_full=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(2, 4, 48)).dtype == torch.float32


# --- permutations and positions, through a real Vision Transformer


@pytest.mark.parametrize("placed", [False, True], ids=["no positions", "positions"])
def test_without_positions_shuffling_patches_shuffles_tokens_and_scores(placed: bool) -> None:
    """T-RV-3: f(pi x) = pi f(x) and phi(pi x) = pi phi pi'; with positions neither holds."""
    torch.manual_seed(0)
    model = TINY if placed else UNPLACED
    vit, layout = create_backbone(model).eval(), layout_of(model, ())
    head = PairHead(48, 9, bilinear_full=False)
    order = torch.randperm(16)
    tiles = torch.randn(2, 16, 3, 4, 4)

    def encoded(tiles: Tensor) -> Tensor:
        images = tiles.view(2, 4, 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 16)
        return layout.patches(encode(vit, images, layout).final)

    with torch.no_grad():
        plain, moved = encoded(tiles), encoded(tiles[:, order])
        same_tokens = torch.allclose(moved, plain[:, order], atol=1e-5)
        expected = head(plain)[:, :, order][:, :, :, order]
        same_scores = torch.allclose(head(moved), expected, atol=1e-5)
    assert same_tokens == same_scores == (not placed)


def noise_accuracy(model: BackboneConfig, num_steps: int) -> tuple[float, float]:
    """Accuracy on fresh noise after training on noise, with a new image of independent pixels every time;
    and the bound without information."""
    torch.manual_seed(0)
    vit, layout = create_backbone(model), layout_of(model, ())
    task = TASKS["spatial_relation"].task(TASKS["spatial_relation"].config(), replace(SITE, layout=layout))
    optimizer = torch.optim.AdamW([*vit.parameters(), *task.parameters()], lr=2e-3, weight_decay=0.0)
    base = example_views(num_images=8, layout=layout)

    def output() -> TaskOutput:
        tokens = encode(vit, torch.randn(16, 3, 16, 16), layout).final
        found: TaskOutput = task(replace(base, tokens=tokens), ALONE)
        return found

    for _ in range(num_steps):
        optimizer.zero_grad()
        output().loss.backward()
        optimizer.step()
    vit.eval()
    with torch.no_grad():
        found = [output().metrics for _ in range(20)]
    accuracy = torch.stack([metrics["accuracy"] for metrics in found]).mean()
    return accuracy.item(), found[0]["uninformed"].item()


def test_positions_give_the_relations_of_noise_away_and_nothing_else_does() -> None:
    """T-RV-6. Of the 4 x 4 grid the bound without information is 9/64 + 1/16 = 20.3 %."""
    shallow = {"args": {**TINY.args, "depth": 1}}
    with_positions, bound = noise_accuracy(TINY.model_copy(update=shallow), num_steps=100)
    without, _ = noise_accuracy(UNPLACED.model_copy(update=shallow), num_steps=100)
    assert bound == pytest.approx(9 / 64 + 1 / 16)
    assert with_positions > 0.99
    # 320 views; their pairs are guesses among four equal corners, correlated within a view
    assert 1 / 16 < without < bound + 0.01


# --- pooling and what is refused


def test_pooling_is_the_mean_of_the_neighbours_that_exist() -> None:
    """14 x 14 to 7 x 7; the first is of 2 x 2 patches, the one right of it of 2 x 3, inner ones of 3 x 3."""
    layout = TokenLayout((14, 14), LAYOUT.registers)
    views = example_views(num_images=1, layout=layout)
    tokens, grid = grid_tokens(views, pool=True)
    assert grid == (7, 7)
    patches = layout.patches(views.tokens).unflatten(1, (14, 14))
    at = tokens.unflatten(1, grid)
    torch.testing.assert_close(at[:, 0, 0], patches[:, :2, :2].mean(dim=(1, 2)))
    torch.testing.assert_close(at[:, 0, 1], patches[:, :2, 1:4].mean(dim=(1, 2)))
    torch.testing.assert_close(at[:, 2, 6], patches[:, 3:6, 11:14].mean(dim=(1, 2)))


@pytest.mark.parametrize("name", [*RELATIONS, "drloc"])
def test_pooled_relations_are_those_of_the_smaller_grid(name: str) -> None:
    """A view of 4 x 4 patches, pooled, is worth one of the pooled tokens as 2 x 2 patches."""
    task = build(name, pool=True)
    views = example_views()
    pooled, grid = grid_tokens(views, pool=True)
    small = with_patches(replace(views, layout=TokenLayout((2, 2), LAYOUT.registers)), pooled)
    plain = build(name, replace(SITE, layout=TokenLayout(grid, LAYOUT.registers)))
    assert grid == (2, 2)
    torch.testing.assert_close(task(views, ALONE).loss, plain(small, ALONE).loss)


def reason(name: str, *, img_px: int = 16, pool: bool = False, **views: ViewConfig) -> str | None:
    model = TINY.model_copy(update={"img_px": img_px})
    unsuited = TASKS[name].unsuited
    assert unsuited is not None
    config = TASKS[name].config(pool=pool)
    return unsuited(config, Surroundings(views, model, layout_of(model, ())))


@pytest.mark.parametrize("name", [*RELATIONS, "drloc"])
def test_views_that_lack_patches_or_places_are_refused(name: str) -> None:
    whole = ViewConfig(size_px=16)
    assert reason(name, one=whole, two=whole.model_copy(update={"shuffle": False})) is None
    dropped = ViewConfig(size_px=16, mask=MaskConfig(kind="random"))
    assert "'two' drops some" in str(reason(name, one=whole, two=dropped))
    hidden = ViewConfig(size_px=16, mask=MaskConfig(kind="random", how="token"))
    assert reason(name, one=hidden) is None
    shuffled = ViewConfig(size_px=16, shuffle=True)
    assert reason(name, one=shuffled) is None
    assert "pool: false" in str(reason(name, pool=True, one=shuffled))
    assert "encoded together" in str(reason(name, one=whole, two=shuffled))
    assert "left with one" in str(reason(name, img_px=4, one=ViewConfig(size_px=4)))
    assert "left with one" in str(reason(name, pool=True, img_px=8, one=ViewConfig(size_px=8)))


def test_places_are_known_for_views_of_the_models_own_size_only() -> None:
    small = ViewConfig(size_px=8)
    assert "8 px" in str(reason("absolute_position", one=small))
    assert reason("spatial_relation", one=small) is None


def test_a_view_of_another_size_has_relations_of_its_own_grid() -> None:
    """A head knows no grid: 2 x 2 patches of the same task give ln 9 at equal logits."""
    task = build("spatial_relation")
    layout = TokenLayout((2, 2), LAYOUT.registers)
    views = example_views()
    small = with_patches(
        replace(views, layout=layout), take(LAYOUT.patches(views.tokens), torch.arange(4).repeat(8, 1))
    )
    for parameter in task.parameters():
        nn.init.zeros_(parameter)
    assert task(small, ALONE).loss.item() == pytest.approx(math.log(9), abs=1e-6)
