"""The contrastive frameworks: SimCLR's variants, BYOL, SimSiam, MoCo v2 and v3, MoBY and DINO."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_views import LAYOUT, SETTINGS, SITE, example_views
from torch import Tensor, nn

from pretrain.models.backbone import BackboneConfig, create_backbone, layout_of, num_features
from pretrain.optim import Knobs, OptimConfig, ParameterRule, build_optimizer, set_knobs
from pretrain.peers import ALONE, Peers
from pretrain.tasks import TASKS
from pretrain.tasks.balance import Balance, BalanceConfig
from pretrain.tasks.contract import EncodedViews, Surroundings, TaskOutput, TaskSite
from pretrain.tasks.dino import DinoConfig, teacher_temperature
from pretrain.tasks.dino import agreement as dino_agreement
from pretrain.tasks.moco_v2 import KeyQueue
from pretrain.tasks.multitask import MultiTask, Reading
from pretrain.views.plan import ViewConfig
from pretrain.views.prepare import Inputs, Moment, ViewGroup

WITH_TEACHER = ("byol", "moco_v2", "moco_v3", "moby", "dino")
FRAMEWORKS = ("simsiam", *WITH_TEACHER)


def build(name: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    spec = TASKS[name]
    return spec.task(spec.config(**{**SETTINGS[name], **settings}), SITE).double()


def taught(views: EncodedViews, name: str, heads: Mapping[str, Tensor]) -> EncodedViews:
    """The views with these outputs of the teacher's head: view -> (B, d)."""
    assert views.teacher is not None
    return replace(views, teacher=replace(views.teacher, heads={name: dict(heads)}))


def with_features(views: EncodedViews, features: Tensor) -> EncodedViews:
    """The same views with these class tokens, (M, D)."""
    tokens = torch.cat([features.unsqueeze(1), views.tokens[:, 1:, : features.shape[1]]], dim=1)
    return replace(views, tokens=tokens)


def pass_through(task: nn.Module) -> nn.Module:
    """Compares the image features themselves."""
    task.projector = nn.Identity()
    if hasattr(task, "predictor"):
        task.predictor = nn.Identity()
    return task


def random_rows(num_rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swapped(views: EncodedViews) -> EncodedViews:
    """The second view first."""
    turned = views.select(("second", "first"))
    return replace(turned, names=views.names, teacher=None)


def parts(head: nn.Module) -> list[tuple[str, int | None, bool]]:
    """Per linear layer and batch norm: its name, its width, and whether it has a bias."""
    return [
        (type(layer).__name__, getattr(layer, "out_features", None), layer.bias is not None)
        for layer in head
        if isinstance(layer, nn.Linear | nn.BatchNorm1d)
    ]


# --- defaults


def test_heads_have_the_widths_norms_and_biases_of_the_papers() -> None:
    """B3.1 to B3.7, at their defaults, for a backbone of width 384."""
    site = TaskSite(LAYOUT, embed_dim=384, patch_px=4)
    norm, bare_norm = ("BatchNorm1d", None, True), ("BatchNorm1d", None, False)

    def of(name: str, **settings: Any) -> nn.Module:
        with torch.device("meta"):
            return TASKS[name].task(TASKS[name].config(**settings), site)

    def linear(width: int, bias: bool) -> tuple[str, int, bool]:
        return ("Linear", width, bias)

    byol = of("byol")
    assert parts(byol.projector) == parts(byol.predictor) == [linear(4096, False), norm, linear(256, False)]
    simsiam = of("simsiam")
    hidden = [linear(384, False), norm]
    assert parts(simsiam.projector) == [*hidden, *hidden, linear(2048, False), bare_norm]
    assert parts(simsiam.predictor) == [linear(512, False), norm, linear(2048, True)]
    moco_v3 = of("moco_v3")
    wide, last = [linear(4096, False), norm], [linear(256, False), bare_norm]
    assert parts(moco_v3.projector) == [*wide, *wide, *last]
    assert parts(moco_v3.predictor) == [*wide, *last]
    assert of("moco_v3", predictor=False).predictor is None
    moby = of("moby")
    assert parts(moby.projector) == parts(moby.predictor) == [*wide, linear(256, True)]
    assert parts(of("contrastive", num_layers=1, out_dim=512).head) == [linear(512, True)]
    simclr = of("contrastive", num_layers=2, last_norm=True).head
    assert parts(simclr) == [linear(2048, False), norm, linear(128, False), bare_norm]


def test_moco_v2_has_a_head_without_norm_and_a_long_queue() -> None:
    task = TASKS["moco_v2"].task(TASKS["moco_v2"].config(), TaskSite(LAYOUT, 384, 4))
    assert parts(task.projector) == [("Linear", 384, True), ("Linear", 128, True)]
    assert tuple(task.queue.keys.shape) == (65536, 128)
    torch.testing.assert_close(task.queue.keys.norm(dim=1), torch.ones(65536))
    again = KeyQueue(65536, 128)
    assert torch.equal(again.keys, task.queue.keys)  # on every rank


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_settings_default_to_the_papers(name: str) -> None:
    config = TASKS[name].config()
    expected = {
        "byol": {"hidden_dim": 4096, "out_dim": 256},
        "simsiam": {"out_dim": 2048, "predictor_dim": 512, "constant_predictor_lr": True},
        "moco_v2": {"temperature": 0.2, "queue_length": 65536, "symmetric": False},
        "moco_v3": {"temperature": 0.2, "hidden_dim": 4096, "out_dim": 256},
        "moby": {"temperature": 0.2, "queue_length": 4096},
        "dino": {
            "temperature": 0.1,
            "teacher_temperature": 0.04,
            "center_momentum": 0.9,
            "out_dim": 65536,
            "norm_last_layer": True,
            "freeze_last_layer_epochs": 1.0,
        },
    }[name]
    assert {setting: getattr(config, setting) for setting in expected} == expected
    assert TASKS[name].likelihood == ("l2" if name in ("byol", "simsiam") else "ce")


# --- SimCLR


def test_without_gather_images_are_compared_on_this_rank_only() -> None:
    """SiT v1: as if there were no other ranks, while the gathered loss asks them."""

    def refuse(local: Tensor) -> Tensor:
        raise AssertionError("talks to other ranks")

    peers = Peers(rank=1, world_size=2, gather=refuse, sum=refuse)
    views = example_views()
    alone = build("contrastive")(views, ALONE)
    output = build("contrastive", gather=False)(views, peers)
    assert torch.equal(output.loss, alone.loss)
    assert output.metrics["chance"] == alone.metrics["chance"] == pytest.approx(1 / 7)
    with pytest.raises(AssertionError, match="other ranks"):
        build("contrastive")(views, peers)


# --- BYOL and SimSiam


def byol_loss(features: Tensor, first: Tensor, second: Tensor) -> TaskOutput:
    """Of features (2B, d) with these targets (B, d) of either view."""
    views = with_features(example_views(len(first)), features)
    output: TaskOutput = pass_through(build("byol"))(
        taught(views, "byol", {"first": first, "second": second}), ALONE
    )
    return output


def test_byol_is_zero_for_the_same_eight_for_the_opposite_and_four_for_random_directions() -> None:
    """T-BY-1. The prediction from one view is compared with the target of the other."""
    features = random_rows(400, 36)
    first, second = features.chunk(2)
    same = byol_loss(features, first=second * 3, second=first / 7)
    assert same.loss.item() == pytest.approx(0.0, abs=1e-9)
    assert same.metrics["cosine"].item() == pytest.approx(1.0)
    assert abs(same.metrics["chance"].item()) < 0.01
    assert same.metrics["embedding_std"].item() == pytest.approx(1 / 6, rel=0.02)
    opposite = byol_loss(features, first=-second, second=-first)
    assert opposite.loss.item() == pytest.approx(8.0)
    assert byol_loss(features, first, second).loss.item() == pytest.approx(4.0, abs=0.1)


def test_byol_is_the_squared_distance_between_unit_vectors() -> None:
    features, first, second = random_rows(8, 5), random_rows(4, 5, 1), random_rows(4, 5, 2)
    unit = F.normalize(features, dim=1)
    targets = F.normalize(torch.cat([second, first]), dim=1)
    expected = (unit - targets).square().sum(dim=1).reshape(2, 4).sum(dim=0).mean()
    torch.testing.assert_close(byol_loss(features, first, second).loss, expected)


def test_simsiam_is_zero_for_the_same_and_two_for_opposite_embeddings() -> None:
    """-1 and 1 in the paper; ours is shifted by 1, so that it is never negative."""
    one = random_rows(4, 6)
    task = pass_through(build("simsiam"))
    same = task(with_features(example_views(), torch.cat([one, one * 2])), ALONE)
    assert same.loss.item() == pytest.approx(0.0, abs=1e-9)
    assert same.metrics["cosine"].item() == pytest.approx(1.0)
    opposite = task(with_features(example_views(), torch.cat([one, -one])), ALONE)
    assert opposite.loss.item() == pytest.approx(2.0)
    assert opposite.metrics["cosine"].item() == pytest.approx(-1.0)


def test_simsiam_sends_no_gradient_through_its_targets() -> None:
    """The prediction from the first view is a constant, so that its features are a target only and the others
    have the gradient of their own prediction alone."""

    class FirstIsConstant(nn.Module):
        calls = 0

        def forward(self, rows: Tensor) -> Tensor:
            self.calls += 1
            return torch.ones_like(rows) if self.calls == 1 else rows

    task = pass_through(build("simsiam"))
    task.predictor = FirstIsConstant()
    features = random_rows(8, 6).requires_grad_()
    task(with_features(example_views(), features), ALONE).loss.backward()
    assert not features.grad[:4].any()  # target of the second, and without a part in its own prediction
    first, second = features.detach().chunk(2)
    alone = second.clone().requires_grad_()
    (-F.cosine_similarity(alone, first, dim=1).mean() / 2).backward()
    torch.testing.assert_close(features.grad[4:], alone.grad)


def test_simsiam_keeps_the_learning_rate_of_its_predictor() -> None:
    task = build("simsiam")
    assert task.parameter_rules() == (ParameterRule("predictor.", constant_lr=True),)
    assert any(name.startswith("predictor.") for name, _ in task.named_parameters())
    assert build("simsiam", constant_predictor_lr=False).parameter_rules() == ()


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_a_collapse_is_seen_in_cosine_chance_and_spread(name: str) -> None:
    """1, 1 and 0: different images are as alike as two views of one."""
    ones = torch.ones(4, 6, dtype=torch.float64)
    views = with_features(example_views(), torch.ones(8, 6, dtype=torch.float64))
    output = pass_through(build(name))(taught(views, name, {"first": ones, "second": ones}), ALONE)
    assert output.loss.item() == pytest.approx(0.0, abs=1e-9)
    assert output.metrics["cosine"].item() == pytest.approx(1.0)
    assert output.metrics["chance"].item() == pytest.approx(1.0)
    assert output.metrics["embedding_std"].item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["byol", "simsiam", "moco_v3", "moby"])
def test_batch_norms_of_heads_see_one_view_at_a_time(name: str) -> None:
    """Adding a constant to the features of one view is undone by the norm after the first layer."""
    task, views = build(name), example_views()
    features = views.features
    shifted = torch.cat([features[:4], features[4:] + 100.0])
    views = taught_at_random(views, name)
    expected = build(name)(with_features(views, features), ALONE).loss
    torch.testing.assert_close(
        task(with_features(views, shifted), ALONE).loss, expected, rtol=1e-6, atol=1e-6
    )


def taught_at_random(views: EncodedViews, name: str, seed: int = 3) -> EncodedViews:
    width = int(SETTINGS[name]["out_dim"])
    rows = {
        view: random_rows(views.num_images, width, seed + place) for place, view in enumerate(views.names)
    }
    return taught(views, name, rows)


# --- MoCo v3


def test_constant_features_leave_moco_v3_no_better_than_a_guess() -> None:
    """T-M3-1: 4 * temperature * ln(B_g) in total, T-M3-4: proportional to the temperature."""
    ones = torch.ones(8, 6, dtype=torch.float64)
    views = taught(with_features(example_views(), ones), "moco_v3", {"first": ones[:4], "second": ones[4:]})
    for temperature in (0.1, 0.2, 0.4):
        output = pass_through(build("moco_v3", temperature=temperature))(views, ALONE)
        assert output.loss.item() == pytest.approx(4 * temperature * math.log(4))
        assert output.metrics["chance"] == output.metrics["accuracy"] == 1 / 4


@pytest.mark.parametrize("predictor", [True, False])
def test_moco_v3_looks_for_keys_of_the_other_view_on_all_ranks(predictor: bool) -> None:
    """T-M3-2: on rank 1 of 2 the own keys come after those of rank 0; keys of the same view are not used."""
    others, keys = random_rows(8, 6, 1), random_rows(8, 6, 2)
    everywhere = {"first": torch.cat([others[:4], keys[:4]]), "second": torch.cat([others[4:], keys[4:]])}
    asked: list[Tensor] = []

    def gather(local: Tensor) -> Tensor:
        asked.append(local)
        of_view = "second" if len(asked) == 1 else "first"
        return F.normalize(everywhere[of_view], dim=1)

    task = pass_through(build("moco_v3", predictor=predictor))
    if not predictor:
        task.predictor = None
    features = random_rows(8, 6)
    views = taught(
        with_features(example_views(), features), "moco_v3", {"first": keys[:4], "second": keys[4:]}
    )
    peers = Peers(rank=1, world_size=2, gather=gather, sum=lambda local: 2 * local)
    output = task(views, peers)
    torch.testing.assert_close(asked, [F.normalize(keys[4:], dim=1), F.normalize(keys[:4], dim=1)])
    expected = 0.0
    for queries, of_view in ((features[:4], "second"), (features[4:], "first")):
        logits = F.cosine_similarity(queries.unsqueeze(1), everywhere[of_view].unsqueeze(0), dim=2) / 0.2
        expected += 2 * 0.2 * float(F.cross_entropy(logits, 4 + torch.arange(4)))
    assert output.loss.item() == pytest.approx(expected, rel=1e-9)
    assert output.metrics["chance"] == 1 / 8


# --- queues


def test_enqueued_keys_go_over_the_oldest_and_round_the_end() -> None:
    """T-MC-3."""
    queue = KeyQueue(6, 3)
    start = queue.keys.clone()
    batches = [F.normalize(torch.randn(2, 3), dim=1) for _ in range(4)]
    for number, keys in enumerate(batches, start=1):
        queue.enqueue(keys)
        assert queue.pointer.item() == 2 * number % 6
        if number == 1:
            assert torch.equal(queue.keys, torch.cat([batches[0], start[2:]]))
    assert torch.equal(queue.keys, torch.cat([batches[3], batches[1], batches[2]]))
    assert not queue.keys.requires_grad
    assert [*queue.parameters()] == []
    assert {*queue.state_dict()} == {"keys", "pointer"}
    assert (queue.keys.dtype, queue.pointer.dtype) == (torch.float32, torch.int64)


def test_a_queue_that_starts_in_the_middle_wraps_inside_a_batch() -> None:
    """After going on with a batch of another size."""
    queue = KeyQueue(6, 3)
    start, keys = queue.keys.clone(), F.normalize(torch.randn(3, 3), dim=1)
    queue.pointer.fill_(4)
    queue.enqueue(keys)
    assert torch.equal(queue.keys, torch.cat([keys[2:], start[1:4], keys[:2]]))
    assert queue.pointer.item() == 1


def test_a_queue_that_is_no_multiple_of_the_batch_is_refused_with_lengths_that_are() -> None:
    with pytest.raises(ValueError, match=r"queue_length 10 is not a multiple of the 4 keys.* use 8 or 12"):
        KeyQueue(10, 3).enqueue(torch.ones(4, 3))
    with pytest.raises(ValueError, match="use 4 or 8"):
        KeyQueue(3, 3).enqueue(torch.ones(4, 3))


def slow_term(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float = 0.2) -> float:
    """A query's own key against the queue, one at a time."""
    losses = []
    for query, key in zip(queries, keys, strict=True):
        against = torch.stack([key, *queue])
        logits = F.cosine_similarity(query.unsqueeze(0), against, dim=1) / temperature
        losses.append((logits.logsumexp(dim=0) - logits[0]).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_v2_compares_with_keys_of_earlier_steps_only(symmetric: bool) -> None:
    """T-MC-3 and T-MC-4: the loss of a micro step knows the queue before its own keys entered it."""
    task = build("moco_v2", symmetric=symmetric)
    for step in range(3):
        before = task.queue.keys.clone()
        views = taught_at_random(example_views(seed=step), "moco_v2", seed=10 * step)
        assert views.teacher is not None
        keys = views.teacher.heads["moco_v2"]
        first, second = task.projector(views.features).chunk(2)
        expected = slow_term(first, keys["second"], before)
        if symmetric:
            expected += slow_term(second, keys["first"], before)
        assert task(views, ALONE).loss.item() == pytest.approx(expected, rel=1e-6)
        entered = [keys["second"], keys["first"]] if symmetric else [keys["second"]]
        rows = F.normalize(torch.cat(entered), dim=1)
        places = (len(rows) * step + torch.arange(len(rows))) % len(before)
        torch.testing.assert_close(task.queue.keys[places], rows)
        untouched = [place for place in range(len(before)) if place not in places.tolist()]
        assert torch.equal(task.queue.keys[untouched], before[untouched])


def test_moco_v2_asks_the_teacher_only_for_the_views_its_keys_are_of() -> None:
    spec = TASKS["moco_v2"]
    assert spec.teacher_views is not None
    assert spec.teacher_views(spec.config(), ("a", "b")) == ("b",)
    assert spec.teacher_views(spec.config(symmetric=True), ("a", "b")) == ("a", "b")


@pytest.mark.parametrize("name", ["moco_v2", "moby", "dino"])
def test_what_a_task_keeps_stays_as_it_is_outside_of_training(name: str) -> None:
    task = build(name).eval()
    before = {key: value.clone() for key, value in task.named_buffers()}
    views = taught_at_random(example_views(), name)
    task(views, ALONE)
    assert all(torch.equal(value, before[key]) for key, value in task.named_buffers())
    task.train()(views, ALONE)
    assert not all(torch.equal(value, before[key]) for key, value in task.named_buffers())


def moby_terms(task: nn.Module, views: EncodedViews, keys: list[Tensor], queues: list[Tensor]) -> list[float]:
    predictions = [task.predictor(task.projector(rows)) for rows in views.features.chunk(2)]
    return [slow_term(predictions[i], keys[1 - i], queues[1 - i]) for i in (0, 1)]


def test_swapping_the_views_swaps_the_terms_of_moby() -> None:
    """T-MB-1: and each queue holds the keys of its own view."""
    views = taught_at_random(example_views(), "moby")
    assert views.teacher is not None
    keys = [*views.teacher.heads["moby"].values()]
    task = build("moby")
    start = [task.first_queue.keys.clone(), task.second_queue.keys.clone()]
    assert not torch.equal(*start)
    terms = moby_terms(task, views, keys, start)
    assert terms[0] != pytest.approx(terms[1], rel=1e-3)
    turned = swapped(views)
    assert moby_terms(task, turned, keys[::-1], start[::-1]) == pytest.approx(terms[::-1])
    assert task(views, ALONE).loss.item() == pytest.approx(sum(terms), rel=1e-6)
    torch.testing.assert_close(task.first_queue.keys[:4], F.normalize(keys[0], dim=1))
    torch.testing.assert_close(task.second_queue.keys[:4], F.normalize(keys[1], dim=1))

    other = build("moby")
    other.first_queue.keys.copy_(start[1])
    other.second_queue.keys.copy_(start[0])
    turned = replace(turned, teacher=views.teacher)
    turned = taught(turned, "moby", {"first": keys[1], "second": keys[0]})
    assert other(turned, ALONE).loss.item() == pytest.approx(sum(terms), rel=1e-6)


@pytest.mark.parametrize("name", ["moco_v2", "moby"])
def test_equal_features_and_queues_leave_no_better_than_a_guess(name: str) -> None:
    """T-MC-2 and its like for MoBY: ln(K + 1) for each direction, and an accuracy of 0."""
    task = pass_through(build(name, out_dim=6, queue_length=64))
    ones = torch.ones(8, 6, dtype=torch.float64)
    for buffer, value in task.named_buffers():
        if buffer.endswith("keys"):
            value.copy_(F.normalize(torch.ones(64, 6), dim=1))
    views = taught(with_features(example_views(), ones), name, {"first": ones[:4], "second": ones[4:]})
    output = task(views, ALONE)
    num_directions = 2 if name == "moby" else 1
    assert output.loss.item() == pytest.approx(num_directions * math.log(65), rel=1e-6)
    assert output.metrics["accuracy"] == 0.0
    assert output.metrics["chance"].item() == pytest.approx(1 / 65)
    assert output.metrics["embedding_std"].item() == pytest.approx(0.0, abs=1e-6)


# --- DINO


def test_the_center_moves_once_per_step_to_the_mean_over_its_micro_steps() -> None:
    """T-DI-3: c_k = sum of 0.1 * 0.9^(k - i) m_i over the means m_i of steps i = 1..k; each step has 2 micro
    steps of 4 images and 2 views, and the targets of both know the centre of the step before."""
    task = build("dino")
    means, expected = [], torch.zeros(4, dtype=torch.float64)
    for step in range(5):
        seen = []
        for micro in range(2):
            before = task.center.clone()
            views = taught_at_random(example_views(), "dino", seed=100 * step + 10 * micro)
            assert views.teacher is not None
            task(views, ALONE)
            seen += [*views.teacher.heads["dino"].values()]
            assert torch.equal(task.center, before)
        task.finish_step()
        means.append(torch.cat(seen).mean(dim=0))
        expected = sum(0.1 * 0.9 ** (step - i) * mean for i, mean in enumerate(means))
        torch.testing.assert_close(task.center, expected)
        assert not task.pending.any()
        assert not task.num_pending.any()
    before = task.center.clone()
    task.finish_step()  # nothing was seen
    assert torch.equal(task.center, before)


def test_dino_equals_its_formula_with_local_crops() -> None:
    """A third view of another size is seen by the student only; the centre shifts the teacher's logits."""
    task, views = build("dino"), taught_at_random(example_views(), "dino")
    assert views.teacher is not None
    small = example_views(seed=9).select(("second",))
    small = replace(small, names=("local",), teacher=None)
    task.center.copy_(torch.linspace(-1, 1, 4))
    loss = task(replace(views, more=(small,)), ALONE).loss
    student = {
        "first": task.head(views.features[:4]),
        "second": task.head(views.features[4:]),
        "local": task.head(small.features),
    }
    terms = []
    for q, teacher in views.teacher.heads["dino"].items():
        targets = torch.softmax((teacher - torch.linspace(-1, 1, 4)) / 0.04, dim=1)
        for v, logits in student.items():
            if v != q:
                terms.append(-(targets * torch.log_softmax(logits / 0.1, dim=1)).sum(dim=1).mean())
    assert len(terms) == 4
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_the_loss_of_dino_is_the_teachers_entropy_and_the_divergence_from_it() -> None:
    task, views = build("dino", teacher_temperature=1.0), taught_at_random(example_views(), "dino")
    output = task(views, ALONE)
    metrics = output.metrics
    torch.testing.assert_close(metrics["teacher_entropy"] + metrics["divergence"], output.loss.detach())
    assert metrics["entropy_bound"].item() == pytest.approx(math.log(4))
    assert 0 < metrics["teacher_entropy"] < metrics["entropy_bound"]
    assert metrics["divergence"] > 0


def test_a_uniform_teacher_has_the_highest_entropy_and_a_sharp_one_none() -> None:
    task, views = build("dino"), example_views()
    flat, sharp = torch.zeros(4, 4).double(), 100 * torch.eye(4).double()
    for rows, expected in ((flat, math.log(4)), (sharp, 0.0)):
        output = task(taught(views, "dino", {"first": rows, "second": rows}), ALONE)
        assert output.metrics["teacher_entropy"].item() == pytest.approx(expected, abs=1e-6)


def test_agreement_counts_the_same_prototype_for_other_views_and_its_chance_for_other_images() -> None:
    """Two images, three views of the student, two of the teacher. Of the same image, the teacher's first view
    agrees with 2 + 1 of the others and its second with 2 + 0: 5 of 8. Of different images 3 of 12 agree."""
    student = torch.tensor([[0, 1], [0, 2], [0, 3]])  # (S, B)
    teacher = torch.tensor([[0, 3], [0, 0]])  # (T, B)
    logits, targets = F.one_hot(student, 4).float(), F.one_hot(teacher, 4).float()
    agree, chance = dino_agreement(logits, targets, [0, 1], ALONE)
    assert agree.item() == pytest.approx(5 / 8)
    assert chance.item() == pytest.approx(3 / 12)
    same = torch.zeros(3, 2, 4)
    assert dino_agreement(same, same[:2], [0, 1], ALONE) == (1.0, 1.0)


def test_the_teachers_temperature_rises_over_whole_epochs_to_its_final_value() -> None:
    """Thirty epochs from 0.04 to 0.07: epoch e has 0.04 + 0.03 e / 29, epoch 29 the last."""
    config = DinoConfig(teacher_temperature=0.07, teacher_temperature_warmup_epochs=30)
    at = {
        epoch: teacher_temperature(config, epoch) for epoch in (0.0, 0.99, 1.0, 14.5, 28.9, 29.0, 30.0, 99.0)
    }
    assert at[0.0] == at[0.99] == 0.04
    assert at[1.0] == pytest.approx(0.04 + 0.03 / 29)
    assert at[14.5] == pytest.approx(0.04 + 0.03 * 14 / 29)
    assert at[28.9] < 0.07
    assert at[29.0] == at[30.0] == at[99.0] == 0.07
    assert teacher_temperature(DinoConfig(teacher_temperature=0.07), 0.0) == 0.07


def test_dino_follows_the_epoch_it_is_told() -> None:
    settings = {"teacher_temperature": 2.0, "teacher_temperature_warmup_epochs": 2}
    views = taught_at_random(example_views(), "dino")
    early, late = (
        build("dino", **settings)(replace(views, moment=Moment(epoch=epoch)), ALONE).metrics[
            "teacher_entropy"
        ]
        for epoch in (0.5, 1.0)
    )
    assert early < 0.2 < late


def test_the_teacher_of_dino_sees_the_first_two_views_or_those_it_is_told() -> None:
    spec = TASKS["dino"]
    assert spec.teacher_views is not None
    names = ("one", "two", "small")
    assert spec.teacher_views(DinoConfig(), names) == ("one", "two")
    assert spec.teacher_views(DinoConfig(teacher_views=("two", "one")), names) == ("two", "one")


@pytest.mark.parametrize(
    ("settings", "sizes_px", "reason"),
    [
        ({}, {"one": 16}, "add a view"),
        ({"teacher_views": ("three",)}, {"one": 16, "two": 16}, "'three' is none of the views .* one, two"),
        ({"teacher_views": ("one", "one")}, {"one": 16, "two": 16}, "different views"),
        ({"teacher_views": ()}, {"one": 16, "two": 16}, "different views"),
        ({}, {"one": 16, "small": 8, "two": 16}, "name the global crops in `teacher_views`"),
        ({}, {"one": 16, "two": 16, "small": 8}, None),
        ({"teacher_views": ("one", "two")}, {"one": 16, "small": 8, "two": 16}, None),
    ],
)
def test_dino_tells_which_views_do_not_suit_it(
    settings: dict[str, Any], sizes_px: dict[str, int], reason: str | None
) -> None:
    unsuited = TASKS["dino"].unsuited
    assert unsuited is not None
    views = {name: ViewConfig(size_px=size_px) for name, size_px in sizes_px.items()}
    found = unsuited(DinoConfig(**settings), Surroundings(views, VIT, LAYOUT))
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(reason, found)


# --- with a backbone and its averaged teacher

VIT = BackboneConfig(
    name="vit_tiny_patch16_224", img_px=16, patch_px=4, args={"depth": 2, "embed_dim": 24, "num_heads": 2}
)
SWIN = BackboneConfig(
    name="swin_tiny_patch4_window7_224",
    img_px=64,
    patch_px=2,
    args={"window_size": 2, "embed_dim": 6, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
)
NUM_IMAGES = 4


def model_of(name: str, backbone: BackboneConfig = VIT, local_px: int = 0, **settings: Any) -> MultiTask:
    torch.manual_seed(0)
    spec = TASKS[name]
    encoder = create_backbone(backbone)
    layout = layout_of(backbone, ())
    config = spec.config(**{**SETTINGS[name], **settings})
    task = spec.task(config, TaskSite(layout, num_features(encoder), backbone.token_px))
    names = ("first", "second", "local") if local_px else ("first", "second")
    seen = spec.teacher_views(config, names) if spec.teacher_views else ()
    layouts = {backbone.img_px: layout}
    if local_px:
        layouts[local_px] = layout_of(backbone, (), local_px)
    return MultiTask(
        encoder,
        layouts,
        {name: task},
        {name: Reading(names, teacher_views=seen, teacher_head=spec.teacher_head if seen else None)},
        Balance({name: spec.likelihood_of(config)}, {name: 1.0}, BalanceConfig(kind="fixed")),
        mask_token=False,
        no_position=False,
    )


def group_of(names: tuple[str, ...], side_px: int, seed: int = 0) -> ViewGroup:
    """Random images; what the plan says does not matter to these tasks."""
    images = torch.randn(
        len(names) * NUM_IMAGES, 3, side_px, side_px, generator=torch.Generator().manual_seed(seed)
    )
    plan = example_views(len(names) * NUM_IMAGES // 2 or 1).plan
    plan = replace(plan.rows(torch.arange(len(images))), mask=None)
    return ViewGroup(names, images, images, plan, whole=images)


def inputs_of(side_px: int, local_px: int = 0, seed: int = 0) -> Inputs:
    groups = [group_of(("first", "second"), side_px, seed)]
    if local_px:
        groups.append(group_of(("local",), local_px, seed + 1))
    return Inputs(tuple(groups), torch.arange(NUM_IMAGES))


def student_of(model: MultiTask, parts: tuple[str, ...]) -> list[tuple[str, Tensor]]:
    return [
        pair
        for part in parts
        for pair in [
            *model.get_submodule(part).named_parameters(prefix=part),
            *model.get_submodule(part).named_buffers(prefix=part),
        ]
    ]


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_teacher_has_the_projector_alone_gets_no_gradient_and_moves_only_by_averaging(name: str) -> None:
    """T-BY-2, T-BY-3, T-BY-4 and T-DI-5."""
    model = model_of(name)
    teacher = model.make_teacher()
    head = "head" if name == "dino" else "projector"
    assert teacher.parts == ("backbone", f"tasks.{name}.{head}")
    assert not any("predictor" in key for key in teacher.state_dict())
    start = {key: value.clone() for key, value in teacher.state_dict().items()}
    inputs = model.consult(teacher, inputs_of(16))
    assert inputs.teacher is not None
    assert not any(rows.requires_grad for rows in inputs.teacher.heads[name].values())
    model(inputs)["total"].backward()
    for part in (teacher.backbone, *teacher.heads.values()):
        assert all(parameter.grad is None for parameter in part.parameters())
    parameters = {key for key in start if "running" not in key and "num_batches" not in key}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.grad + 0.01
    student = student_of(model, teacher.parts)
    teacher.update(student, 1.0)
    assert all(torch.equal(teacher.state_dict()[key], start[key]) for key in parameters)
    teacher.update(student, 0.0)
    moved = dict(student)
    for key in parameters:
        torch.testing.assert_close(teacher.state_dict()[key], moved[key].detach(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(moved[key], start[key])


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("backbone", [VIT, SWIN], ids=["vit", "swin"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_framework_runs_on_vit_and_swin_and_leaves_no_parameter_without_gradient(
    name: str, backbone: BackboneConfig, precision: str
) -> None:
    model = model_of(name, backbone)
    teacher = model.make_teacher()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        named = model(model.consult(teacher, inputs_of(backbone.img_px)))
    assert teacher.num_calls == (name != "simsiam")
    assert model.num_backbone_calls == 1
    assert named[f"loss/{name}"].dtype == torch.float32
    assert all(torch.isfinite(value) for value in named.values())
    named["total"].backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    model.finish_step()
    assert {value.dtype for value in model.buffers() if value.is_floating_point()} <= {torch.float32}


def test_local_crops_reach_the_student_but_not_the_teacher() -> None:
    """Two encoder passes of the student, one of the teacher on the two global crops."""
    model = model_of("dino", local_px=8)
    teacher = model.make_teacher()
    inputs = model.consult(teacher, inputs_of(16, local_px=8))
    assert inputs.teacher is not None
    assert set(inputs.teacher.heads["dino"]) == {"first", "second"}
    images = inputs.groups[1].images.requires_grad_()
    model(inputs)["total"].backward()
    assert images.grad is not None
    assert images.grad.any()
    assert model.num_backbone_calls == 2
    assert teacher.num_calls == 1


def test_a_frozen_patch_embedding_gets_no_gradient_from_moco_v3() -> None:
    """T-M3-3."""
    model = model_of("moco_v3", VIT.model_copy(update={"freeze_patch_embed": True}))
    model(model.consult(model.make_teacher(), inputs_of(16)))["total"].backward()
    assert all(parameter.grad is None for parameter in model.backbone.patch_embed.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


def changed_by_a_step(model: MultiTask, knobs: Knobs) -> set[str]:
    """Names of the parameters that a step with the run's own optimizer moves."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1), model.parameter_rules())
    set_knobs(optimizer, knobs)
    inputs = inputs_of(16)
    inputs = model.consult(model.make_teacher(), inputs)
    model(inputs)["total"].backward()
    optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("learned_gain", [False, True])
def test_the_last_layer_of_dino_is_unchanged_in_the_first_epoch_and_nothing_else(learned_gain: bool) -> None:
    """T-DI-6: also not by weight decay, and neither is the gain of its rows where that is learned."""
    settings = {"norm_last_layer": not learned_gain}
    model = model_of("dino", **settings)
    everything = {name for name, _ in model.named_parameters()}
    last = {name for name in everything if name.startswith("tasks.dino.head.last.")}
    assert len(last) == 1 + learned_gain
    assert changed_by_a_step(model, Knobs(1e-3, 1e-3, 0.1, epoch=0.99)) == everything - last
    assert changed_by_a_step(model_of("dino", **settings), Knobs(1e-3, 1e-3, 0.1, epoch=1.0)) == everything
    unfrozen = model_of("dino", freeze_last_layer_epochs=0.0, **settings)
    assert changed_by_a_step(unfrozen, Knobs(1e-3, 1e-3, 0.1, epoch=0.0)) == everything


def test_the_predictor_of_simsiam_goes_on_when_the_learning_rate_is_zero() -> None:
    knobs = Knobs(lr=0.0, peak_lr=1e-3, weight_decay=0.0, epoch=3.0)
    moved = changed_by_a_step(model_of("simsiam"), knobs)
    assert moved
    assert all(name.startswith("tasks.simsiam.predictor.") for name in moved)
    assert changed_by_a_step(model_of("simsiam", constant_predictor_lr=False), knobs) == set()


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_few_steps_towards_teacher_and_queues_that_stand_still_lower_the_loss(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New noise on four images at every step."""
    monkeypatch.setattr(KeyQueue, "enqueue", lambda queue, keys: None)
    model = model_of(name, **({"out_dim": 16} if name == "dino" else {}))
    teacher = model.make_teacher()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(NUM_IMAGES, 3, 16, 16, generator=generator)
    losses = []
    for _ in range(12):
        images = base.repeat(2, 1, 1, 1) + 0.1 * torch.randn(2 * NUM_IMAGES, 3, 16, 16, generator=generator)
        inputs = inputs_of(16)
        group = replace(inputs.groups[0], images=images, whole=images)
        named = model(model.consult(teacher, replace(inputs, groups=(group,))))
        optimizer.zero_grad()
        named["total"].backward()
        optimizer.step()
        losses.append(named[f"loss/{name}"].item())
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
