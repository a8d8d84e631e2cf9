"""Every format, one per line: who writes it, and for whom."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pretrain.errors import UserError, nearest

if TYPE_CHECKING:
    from pretrain.export.options import ExportOptions
    from pretrain.export.proof import Proof
    from pretrain.export.source import RunWeights
    from pretrain.models.backbone import Backbone

    # (folder, weights, the model that they make, what was asked for); the folder exists and is empty
    Write = Callable[[Path, RunWeights, Backbone, ExportOptions], Proof]

DEFAULT = "timm"
ALL = "all"

# name -> what the command line says of it
FORMATS = {
    "timm": 'timm.create_model("local-dir:..."), with model card (default)',
    "hf-hub": 'the same as a repository of the Hugging Face hub, timm.create_model("hf-hub:...")',
    "transformers": "transformers.AutoModel.from_pretrained",
    "torchvision": "torchvision's VisionTransformer and SwinTransformer",
    "detectron2": "ViTDet and Swin",
    "mmdet": "Swin of mmdetection",
    "mmseg": "ViT and Swin of mmsegmentation",
    "mmpretrain": "ViT and Swin of mmpretrain, which the two before take as well",
    "dino": "teacher_checkpoint.pth with the names of DINO, DINOv2 or EsViT",
    "onnx": "one graph with the position grid of the image size baked in",
}


def chosen(names: list[str]) -> list[str]:
    """The formats that names mean, in the order of the table; `all` means each of them."""
    for name in names:
        if name != ALL and name not in FORMATS:
            raise UserError(f"--format {name}: {nearest(name, [*FORMATS, ALL])}")
    return [name for name in FORMATS if ALL in names or name in names]


def writer(name: str) -> Write:
    """What writes a format; imported when it is asked for, with the libraries that it needs."""
    if name == "timm":
        from pretrain.export import timm_folder

        return timm_folder.write
    if name == "hf-hub":
        from pretrain.export import timm_folder

        return timm_folder.write_hub
    if name == "transformers":
        from pretrain.export import to_transformers

        return _plain(to_transformers.write)
    if name == "torchvision":
        from pretrain.export import to_torchvision

        return _plain(to_torchvision.write)
    if name == "detectron2":
        from pretrain.export import to_detectron2

        return _plain(to_detectron2.write)
    if name in ("mmdet", "mmseg", "mmpretrain"):
        from pretrain.export import to_openmmlab

        return _plain(partial(to_openmmlab.write, library=cast("to_openmmlab.Library", name)))
    if name == "dino":
        from pretrain.export import to_dino

        return _plain(to_dino.write)
    if name == "onnx":
        from pretrain.export import to_onnx

        return _plain(to_onnx.write)
    raise AssertionError(f"'{name}' stands in FORMATS and has no writer")


def _plain(write: Callable[[Path, RunWeights, Backbone], Proof]) -> Write:
    """Of a format that holds the model and nothing of what was asked about license and names."""
    return lambda folder, source, model, _options: write(folder, source, model)
