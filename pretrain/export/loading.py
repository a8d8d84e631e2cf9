"""How a user of each format opens a folder: the lines of the model card."""

from __future__ import annotations

from pathlib import Path

from pretrain.export.export_report import ExportReport
from pretrain.export.source import RunWeights

_REGISTER_T2T = "from pretrain.models.t2t import register_t2t\n\nregister_t2t()  # timm has no T2T-ViT\n"
_LIBRARIES = {"timm": "timm", "hf-hub": "timm", "transformers": "transformers", "onnx": "onnx"}


def library_of(format: str) -> str | None:
    """As model hubs call it, where they know it."""
    return _LIBRARIES.get(format)


def loading(source: RunWeights, report: ExportReport) -> str:
    """Markdown: a few lines of code, then what to mind."""
    name = Path(report.folder).name
    height, width = source.image_size
    images = f"normalised (B, 3, {height}, {width})"
    is_swin = source.backbone.is_swin
    if report.format in ("timm", "hf-hub"):
        return _timm(source, report, name, images)
    if report.format == "transformers":
        code = (
            "from transformers import AutoModel\n"
            f'model = AutoModel.from_pretrained("{name}").eval()  # the path of this folder\n'
            f"tokens = model(images).last_hidden_state  # {images}\n"
        )
    elif report.format == "torchvision":
        kind, head = ("SwinTransformer", "head") if is_swin else ("VisionTransformer", "heads")
        code = (
            "import json\nfrom pathlib import Path\n\nimport torch\n"
            f"from torchvision.models import {kind}\n\n"
            f'folder = Path("{name}")  # the path of this folder\n'
            f'model = {kind}(**json.loads((folder / "model.json").read_text())["arguments"]).eval()\n'
            f"model.{head} = torch.nn.Identity()\n"
            'model.load_state_dict(torch.load(folder / "model.pth", weights_only=True))\n'
            f"features = model(images)  # {images} -> (B, {source.embed_dim})\n"
        )
    elif report.format == "detectron2":
        code = f'train.init_checkpoint = "{name}/model.pth?matching_heuristics=True"  # in a lazy config\n'
    elif report.format == "onnx":
        code = (
            "import onnxruntime\n"
            f'session = onnxruntime.InferenceSession("{name}/model.onnx")  # the path of this folder\n'
            f'features, tokens = session.run(None, {{"images": images.numpy()}})  # {images}\n'
        )
    elif report.format == "dino":
        code = (
            "import torch\n"
            f'teacher = torch.load("{name}/teacher_checkpoint.pth", weights_only=True)["teacher"]\n'
            'state = {key.removeprefix("backbone."): value for key, value in teacher.items()}\n'
        )
    else:  # OpenMMLab
        code = f'_base_ = ["CONFIG.py", "{name}/backbone.py"]  # its first lines tell the rest\n'
    return f"```python\n{code}```\n\n{_sentence(report.note)}"


def _timm(source: RunWeights, report: ExportReport, name: str, images: str) -> str:
    if report.format == "hf-hub":
        where, comment = "hf-hub:OWNER/NAME", "where this folder was uploaded"
        before = f"Upload the folder once: `hf upload OWNER/NAME {name}`.\n\n"
    else:
        where, comment, before = f"local-dir:{name}", "the path of this folder", ""
    return (
        f"{before}```python\nimport timm\n"
        + (_REGISTER_T2T if source.backbone.name == "t2t_vit_14" else "")
        + f'model = timm.create_model("{where}", pretrained=True).eval()  # {comment}\n'
        + f"features = model(images)  # {images} -> (B, {source.embed_dim})\n```\n\n"
        "`pretrained=True` matters: without it timm builds the same model with random weights and says "
        f"nothing. It {report.note}. `num_classes=N` adds a new classifier, another `img_size` resamples "
        "the position grid, `features_only=True` gives feature maps." + _pooling(source)
    )


def _pooling(source: RunWeights) -> str:
    """What timm's own way to pool by the mean would do to a model with a class token."""
    if source.backbone.is_swin or not source.backbone.class_token:
        return ""
    if source.backbone.args.get("global_pool") == "avg":
        return " The mean of the patch tokens is taken behind the trained norm (`fc_norm=False`)."
    return (
        ' `global_pool="avg"` needs `fc_norm=False` with it, or an export with `--global-pool avg`: alone it '
        "fails, and with `num_classes=N` it silently puts a fresh norm in the place of the trained one."
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""
