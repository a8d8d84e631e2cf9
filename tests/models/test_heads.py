"""Heads. That batch norm over two ranks equals one on the joined batch is shown in test_two_ranks.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pretrain.models.heads import (
    PeerBatchNorm,
    PrototypeHead,
    WeightNormLinear,
    mlp,
    per_view,
    projection_head,
    synchronize_batch_norm,
)
from pretrain.peers import ALONE, Peers


def echo(local: Tensor) -> Tensor:
    """The sum over two ranks that hold the same rows."""
    return 2 * local


TWINS = Peers(rank=0, world_size=2, sum=echo)


def test_mlp_has_activation_between_layers_and_no_bias_that_a_norm_cancels() -> None:
    plain, normed = mlp([4, 5, 6]), mlp([4, 5, 6], norm=True, activation=nn.ReLU)
    assert [type(layer) for layer in plain] == [nn.Linear, nn.GELU, nn.Linear]
    assert [type(layer) for layer in normed] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert plain[0].bias is not None
    assert normed[0].bias is None
    assert normed[3].bias is not None


def test_projection_head_has_the_widths_of_the_paper() -> None:
    """B1: D -> 2048 -> 2048 -> 128, batch norm and ReLU after the first two."""
    head = projection_head(384)
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (384, 2048),
        (2048, 2048),
        (2048, 128),
    ]
    assert [type(layer).__name__ for layer in head[1:3]] == ["BatchNorm1d", "ReLU"]
    assert isinstance(head[-1], nn.Linear)


def test_a_norm_after_the_last_layer_has_no_scale_and_shift_and_takes_the_place_of_the_bias() -> None:
    head = mlp([4, 5, 6], norm=True, activation=nn.ReLU, last_norm=True)
    assert [type(layer) for layer in head] == [
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
        nn.Linear,
        nn.BatchNorm1d,
    ]
    assert head[0].bias is None
    assert head[1].affine
    assert head[3].bias is None
    assert not head[4].affine
    out = head(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1)
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(dim=0, correction=0), torch.ones(6), atol=1e-3, rtol=0)


def test_without_bias_no_layer_has_one() -> None:
    assert [layer.bias for layer in mlp([4, 5, 6, 7], bias=False) if isinstance(layer, nn.Linear)] == [
        None
    ] * 3
    plain = projection_head(4, 5, 6, num_layers=1)
    assert [type(layer) for layer in plain] == [nn.Linear]
    assert plain[0].bias is not None


def test_per_view_normalizes_each_view_with_its_own_statistics() -> None:
    """Two views a thousand apart: by themselves both have mean 0, together neither has."""
    norm = nn.BatchNorm1d(2, affine=False)
    first = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([first, first + 1000])
    apart, together = per_view(norm, rows, 2), norm(rows)
    torch.testing.assert_close(apart[:8], apart[8:], atol=1e-3, rtol=0)
    assert apart[:8].mean().abs() < 1e-3
    assert together[:8].mean() < -0.9
    assert norm.num_batches_tracked == 3


def test_rows_of_a_weight_normalized_layer_have_the_length_of_their_gain() -> None:
    torch.manual_seed(0)
    layer = WeightNormLinear(5, 7, learn_gain=True)
    layer.direction.data *= torch.linspace(0.1, 30, 7).unsqueeze(1)
    inputs = torch.randn(3, 5)
    expected = inputs @ (layer.direction / layer.direction.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(layer(inputs), expected)
    layer.gain.data[2] = 4.0
    torch.testing.assert_close(layer(inputs)[:, 2], 4 * expected[:, 2])
    fixed = WeightNormLinear(5, 7)
    assert [name for name, _ in fixed.named_parameters()] == ["direction"]
    fixed(inputs).square().sum().backward()
    along = (fixed.direction.grad * fixed.direction).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros(7), atol=1e-4, rtol=0)  # the length has no gradient


def test_prototype_head_gives_cosines_with_the_widths_of_the_paper_and_survives_a_copy() -> None:
    """B3.7: D -> 2048 -> 2048 -> 256, then unit length and 65536 unit rows."""
    with torch.device("meta"):
        layers = [layer for layer in PrototypeHead(384).modules() if hasattr(layer, "weight")]
        assert [tuple(layer.weight.shape) for layer in layers] == [(2048, 384), (2048, 2048), (256, 2048)]
        assert tuple(PrototypeHead(384).last.direction.shape) == (65536, 256)
    torch.manual_seed(0)
    head = PrototypeHead(6, 8, 4, 5)
    rows = torch.randn(9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(rows)
    assert logits.dtype == torch.float32
    assert logits.abs().max() <= 1 + 1e-6
    direction = head.last.direction.data
    bottleneck = head.mlp(rows)
    expected = nn.functional.cosine_similarity(bottleneck.unsqueeze(1), direction.unsqueeze(0), dim=2)
    torch.testing.assert_close(head(rows), expected)
    twin = copy.deepcopy(head)
    torch.testing.assert_close(twin(rows), head(rows))
    head.last.direction.data.neg_()
    torch.testing.assert_close(twin(rows), expected)


@pytest.mark.parametrize("affine", [True, False])
def test_peer_batch_norm_alone_equals_torch_in_training_and_evaluation(affine: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = PeerBatchNorm(3, ALONE, affine=affine), nn.BatchNorm1d(3, affine=affine)
    for _ in range(2):
        rows = torch.randn(5, 3, generator=generator) * 4 + 2
        torch.testing.assert_close(ours(rows), theirs(rows))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    torch.testing.assert_close(ours.eval()(rows), theirs.eval()(rows))


def test_running_variance_counts_the_rows_of_all_ranks() -> None:
    """Rows 0 and 2 on both of two ranks: mean 1, unbiased variance 4 / 3; momentum 0.1."""
    norm = PeerBatchNorm(1, TWINS)
    norm(torch.tensor([[0.0], [2.0]]))
    assert norm.running_mean.item() == pytest.approx(0.1)
    assert norm.running_var.item() == pytest.approx(0.9 + 0.1 * 4 / 3)
    assert norm.num_batches_tracked.item() == 1


def test_statistics_are_float32_for_half_precision_rows() -> None:
    """256 and 258 are in bfloat16, their mean 257 is not."""
    norm = PeerBatchNorm(1, ALONE, momentum=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(torch.tensor([[256.0], [258.0]], dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32
    assert norm.running_mean.item() == 257.0
    assert out.flatten().tolist() == [-1.0, 1.0]


def test_one_row_in_all_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="two or more rows"):
        PeerBatchNorm(2, ALONE)(torch.zeros(1, 2))


def test_synchronizing_keeps_parameters_buffers_and_names() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(mlp([2, 3, 4], norm=True), nn.BatchNorm1d(4, affine=False))
    head(torch.randn(6, 2))
    before = copy.deepcopy(head.state_dict())
    parameters = list(head.parameters())
    synchronized = synchronize_batch_norm(head, TWINS, "cpu")
    assert [type(module) for module in synchronized.modules()].count(PeerBatchNorm) == 2
    assert all(ours is theirs for ours, theirs in zip(synchronized.parameters(), parameters, strict=True))
    torch.testing.assert_close(dict(synchronized.state_dict()), dict(before))
    again = synchronize_batch_norm(synchronized, TWINS, "cpu")
    assert [type(module) for module in again.modules()].count(PeerBatchNorm) == 2


def test_a_bare_batch_norm_is_replaced_and_keeps_its_settings() -> None:
    plain = nn.BatchNorm1d(3, eps=1e-3, momentum=0.3).eval()
    synchronized = synchronize_batch_norm(plain, TWINS, "cpu")
    assert isinstance(synchronized, PeerBatchNorm)
    assert (synchronized.eps, synchronized.momentum, synchronized.training) == (1e-3, 0.3, False)


def test_a_lone_rank_keeps_plain_batch_norm_and_cuda_gets_torchs_own() -> None:
    head = projection_head(2, 3, 4)
    assert type(synchronize_batch_norm(head, ALONE, "cuda")[1]) is nn.BatchNorm1d
    on_cuda = synchronize_batch_norm(head, TWINS, "cuda")
    assert [type(module) for module in on_cuda.modules()].count(nn.SyncBatchNorm) == 2
