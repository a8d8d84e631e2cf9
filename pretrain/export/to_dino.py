"""Export as `teacher_checkpoint.pth` of the DINO family: {"teacher": {"backbone.<name>": tensor}}.

A ViT with a class token gets the names of DINO (Caron et al., 2021, arXiv:2104.14294); with registers those
of DINOv2 (Oquab et al., 2023, arXiv:2304.07193; Darcet et al., 2023, arXiv:2309.16588), whose position table
does not cover them; a Swin those of the Swin authors, which EsViT took over. DINOv3 turns positions instead
of adding them and cannot hold these weights. Both DINO loaders read the file with
`checkpoint_key="teacher"`.

The original classes come with no package, so the proof is stock timm, which knows all three sets of names.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as swin_from_original
from timm.models.vision_transformer import checkpoint_filter_fn as vit_from_original
from torch import Tensor, nn

from pretrain.export.comparison import Difference, compare, conclude, refuse_strangers, seeded_images
from pretrain.export.plain_swin import original_names
from pretrain.export.plain_vit import PlainViT, feature_of_image, plain_vit, refuse_no_class_token
from pretrain.export.proof import Proof
from pretrain.export.source import RunWeights
from pretrain.export.torch_file import load_tensors, save_tensors
from pretrain.models.backbone import Backbone, model_args

FORMAT = "dino"
WEIGHTS = "teacher_checkpoint.pth"
_PREFIX = "backbone."


def write(folder: Path, source: RunWeights, model: Backbone) -> Proof:
    """Write teacher_checkpoint.pth and read it back as DINO's own loaders do."""
    vit = None
    if isinstance(model, SwinTransformer):
        tensors, family = original_names(source, model), "Swin (EsViT)"
        note = "the names are those of Swin's authors, as EsViT writes them; DINO itself has no Swin"
    else:
        vit = plain_vit(FORMAT, source, model)
        refuse_no_class_token(FORMAT, vit)
        tensors, family = _vit(vit)
        note = _note(vit)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({"teacher": {_PREFIX + name: value for name, value in tensors.items()}}, folder / WEIGHTS)
    consumer = f"timm {timm.__version__} on the names of {family}"
    difference = _prove(folder, source, model, vit, consumer)
    return conclude(FORMAT, consumer, (WEIGHTS,), source.state, difference, note)


def _vit(vit: PlainViT) -> tuple[dict[str, Tensor], str]:
    assert vit.leader is not None
    tensors = {"cls_token": vit.leader, "pos_embed": vit.positions, **vit.blocks}
    if not vit.registers.shape[1]:
        return tensors, "DINO"
    tensors |= {"register_tokens": vit.registers, "mask_token": torch.zeros(1, vit.dim)}
    for number in range(vit.depth):  # absent, they would keep the small value that DINOv2 starts them with
        for scale in ("ls1", "ls2"):
            tensors[f"blocks.{number}.{scale}.gamma"] = torch.ones(vit.dim)
    return tensors, "DINOv2"


def _note(vit: PlainViT) -> str:
    if vit.registers.shape[1]:
        note = (
            f"for DINOv2's class with num_register_tokens={vit.registers.shape[1]}, init_values=1.0, "
            "block_chunks=0"
        )
    else:
        note = "for DINO's class with qkv_bias=True and a norm epsilon of 1e-6"
    note += f", img_size={vit.img_px}, patch_size={vit.patch_px}; its loader must say that all keys matched"
    return f"{note}; {feature_of_image(vit)}"


def _prove(
    folder: Path, source: RunWeights, reference: Backbone, vit: PlainViT | None, consumer: str
) -> Difference:
    teacher: dict[str, Tensor] = load_tensors(folder / WEIGHTS)["teacher"]
    state = {name.removeprefix(_PREFIX): value for name, value in teacher.items()}
    arguments = model_args(source.backbone, 0)
    if vit is not None:
        arguments |= {"class_token": True, "global_pool": "token", "pos_embed": "learn", "qkv_bias": True}
        arguments |= {"no_embed_class": False, "init_values": None, "fc_norm": None}
        if vit.registers.shape[1]:
            arguments |= {"reg_tokens": vit.registers.shape[1], "no_embed_class": True, "init_values": 1.0}
    model: nn.Module
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(source.backbone.name, pretrained=False, num_classes=0, **arguments)
    from_original = swin_from_original if vit is None else vit_from_original
    loading = model.load_state_dict(from_original(state, model), strict=False)
    refuse_strangers(consumer, loading.missing_keys, loading.unexpected_keys)
    images = seeded_images(*reference.patch_embed.img_size)
    with torch.inference_mode():
        expected = {"tokens": reference.forward_features(images)}
        found = {"tokens": model.eval().forward_features(images)}  # type: ignore[operator]
    return compare(consumer, expected, found)
