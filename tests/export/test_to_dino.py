"""teacher_checkpoint.pth bears the names of the DINO family; stock timm makes the same features of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from format_models import every_tensor_counts, load

from pretrain.errors import UserError
from pretrain.export import to_dino

FAMILIES = {
    "class token": "DINO",
    "one register, no class token": "DINO",
    "no positions": "DINO",
    "extras": "DINO",
    "class token, pooled by mean": "DINO",
    "registers": "DINOv2",
    "registers without positions of their own": "DINOv2",
    "swin": "Swin (EsViT)",
    "swin with odd maps": "Swin (EsViT)",
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_timm_reproduces_the_checkpoint_from_the_names_of_the_family(kind: str, tmp_path: Path) -> None:
    source, model = load(kind, tmp_path)
    proof = to_dino.write(tmp_path / "out", source, model)
    assert proof.consumer.endswith(f"the names of {FAMILIES[kind]}")
    assert set(proof.matched) == set(source.state)
    assert proof.max_abs_difference is not None
    assert proof.tolerance is not None
    assert proof.max_abs_difference <= proof.tolerance


@pytest.mark.parametrize("kind", ["class token", "registers", "swin"])
def test_every_tensor_counts(kind: str, tmp_path: Path) -> None:
    every_tensor_counts(to_dino, kind, tmp_path)


def test_the_file_has_what_the_loaders_of_the_family_ask_for(tmp_path: Path) -> None:
    """Both take `teacher`, and off every name `module.` and `backbone.`."""
    source, model = load("registers", tmp_path)
    to_dino.write(tmp_path / "out", source, model)
    content = torch.load(tmp_path / "out" / "teacher_checkpoint.pth", weights_only=True)
    assert content.keys() == {"teacher"}
    state = {name.replace("backbone.", ""): tensor for name, tensor in content["teacher"].items()}
    # the parameters of DINOv2's own class for this size, with registers and layer scales
    assert {
        name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith("blocks.")
    } == {
        "cls_token": (1, 1, 24),
        "pos_embed": (1, 17, 24),
        "register_tokens": (1, 2, 24),
        "mask_token": (1, 24),
        "patch_embed.proj.weight": (24, 3, 8, 8),
        "patch_embed.proj.bias": (24,),
        "norm.weight": (24,),
        "norm.bias": (24,),
    }
    assert torch.equal(state["blocks.1.ls2.gamma"], torch.ones(24))
    # a register's position goes into the register: DINOv2 adds none
    moved = source.state["reg_token"] + source.state["pos_embed"][:, 1:3]
    assert torch.equal(state["register_tokens"], moved)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("patches only", "its Vision Transformer always has a class token"),
        ("tokens to token", "its patches are embedded by TokensToToken"),
    ],
)
def test_what_dino_cannot_hold_is_refused(kind: str, message: str, tmp_path: Path) -> None:
    source, model = load(kind, tmp_path)
    with pytest.raises(UserError, match=f"--format dino: .*{message}"):
        to_dino.write(tmp_path / "out", source, model)
