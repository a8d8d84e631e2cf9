"""Names are carried over whole, or not at all."""

from __future__ import annotations

import pytest
import torch

from pretrain.export.parity import ParityError
from pretrain.export.renaming import rename

TABLE = {
    "blocks.N.norm.*": "layer.N.ln.*",
    "stages.N.blocks.N.*": "s.N.b.N.*",
    "blocks.N.qkv.*": ("layer.N.q.*", "layer.N.k.*", "layer.N.v.*"),
}


def test_numbers_and_ends_of_names_keep_their_order() -> None:
    tensors = {"blocks.11.norm.bias": torch.zeros(1), "stages.2.blocks.10.fc.weight": torch.ones(1)}
    renamed = rename(tensors, TABLE)
    assert list(renamed) == ["layer.11.ln.bias", "s.2.b.10.fc.weight"]
    assert renamed["s.2.b.10.fc.weight"] is tensors["stages.2.blocks.10.fc.weight"]


def test_a_fused_tensor_is_cut_in_three_rows_first() -> None:
    fused = torch.arange(12.0).reshape(6, 2)
    renamed = rename({"blocks.0.qkv.weight": fused}, TABLE)
    assert list(renamed) == ["layer.0.q.weight", "layer.0.k.weight", "layer.0.v.weight"]
    assert torch.equal(torch.cat(list(renamed.values())), fused)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blocks.0.gamma"], "'blocks.0.gamma' has 0 places in the other format"),
        (["blocks.x.norm.bias"], "has 0 places"),
        (["wblocks.0.norm.bias"], "has 0 places"),
        (["blocks.0.norm.bias", "same.0"], "two tensors would be 'layer.0.ln.bias'; the second is 'same.0'"),
    ],
)
def test_a_tensor_without_exactly_one_place_fails(names: list[str], message: str) -> None:
    with pytest.raises(ParityError, match=message):
        rename({name: torch.zeros(1) for name in names}, {**TABLE, "same.N": "layer.N.ln.bias"})


def test_a_name_that_two_patterns_know_fails() -> None:
    with pytest.raises(ParityError, match="has 2 places"):
        rename({"blocks.0.norm.bias": torch.zeros(1)}, {**TABLE, "blocks.N.*": "other.N.*"})
