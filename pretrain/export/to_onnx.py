"""Export as one ONNX graph: normalised images -> the feature of each image, and all tokens.

The positions are baked in for the model's own image size, so the graph resizes nothing. Opset 18 is what
torch's exporter itself writes; onnxruntime reads it from 1.14 on, TensorRT and OpenVINO for as long.
"""

from __future__ import annotations

import importlib.metadata
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.export.comparison import Difference, compare, conclude, seeded_images
from pretrain.export.parity import ParityError
from pretrain.export.proof import Proof
from pretrain.export.quiet import quiet
from pretrain.export.source import RunWeights
from pretrain.export.timm_folder import crop_ratio
from pretrain.models.backbone import Backbone
from pretrain.models.t2t import TokensToToken

FORMAT = "onnx"
GRAPH = "model.onnx"
OPSET = 18
INPUT, OUTPUTS = "images", ("features", "tokens")
# onnxruntime has kernels of its own and its own erf, which differ by processor: measured on one, 4e-6 of the
# largest feature for ViT-S and 3e-6 for Swin-T; deeper models add up more
RELATIVE_TOLERANCE = 1e-4
_LARGEST_FILE_BYTES = 2**31 - 2**24  # protobuf's limit, less a little for the graph itself


class _PooledAndTokens(nn.Module):
    """(B, 3, H, W) -> (B, D), and (B, N, D) of a ViT or (B, h, w, D) of a Swin"""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.backbone.forward_features(images)
        return self.backbone.forward_head(tokens, pre_logits=True), tokens


def write(
    folder: Path, source: RunWeights, model: Backbone, *, dynamic_batch: bool = True, opset: int = OPSET
) -> Proof:
    """Write model.onnx, check it, and run it with onnxruntime.

    dynamic_batch: any number of images at a time; otherwise one.
    """
    absent = [library for library in ("onnx", "onnxscript", "onnxruntime") if find_spec(library) is None]
    if absent:
        raise UserError(f"--format onnx: needs {' and '.join(absent)}; pip install 'pretrain[export]'")
    if opset < OPSET:
        raise UserError(f"--format onnx: opset {opset} is older than {OPSET}, the oldest that torch writes")
    folder.mkdir(parents=True, exist_ok=True)
    whole = _PooledAndTokens(model).eval()
    height, width = model.patch_embed.img_size
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with quiet():
        program = torch.onnx.export(
            whole,
            (seeded_images(height, width, 2 if dynamic_batch else 1),),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=opset,
            dynamo=True,
            # the optimizer takes the 1e-8 that T2T's attention adds before a division for zero, and drops it
            optimize=not isinstance(model.patch_embed, TokensToToken),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}} if dynamic_batch else None,
        )
        assert program is not None
        _describe(program.model, source)
        program.save(folder / GRAPH, external_data=num_bytes > _LARGEST_FILE_BYTES)
    difference = _prove(folder, whole, batch_sizes=(1, 3) if dynamic_batch else (1,))
    consumer = f"onnxruntime {importlib.metadata.version('onnxruntime')}"
    files = sorted(path.name for path in folder.iterdir() if path.name.startswith(GRAPH))
    note = (
        f"opset {opset}; `{INPUT}` takes {'any number of images' if dynamic_batch else 'one image'} of "
        f"{height} x {width} px, RGB, normalised by the mean and std in the graph's metadata"
    )
    return conclude(FORMAT, consumer, files, source.state, difference, note)


def _describe(graph: Any, source: RunWeights) -> None:
    """Say in the graph what it wants to see, and take out where on this machine it was traced."""
    graph.metadata_props.update(
        {
            "architecture": source.backbone.name,
            "mean": json.dumps(source.mean),
            "std": json.dumps(source.std),
            "interpolation": source.interpolation,
            "crop_ratio": json.dumps(crop_ratio(source.backbone.img_px)),
        }
    )
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None


def _prove(folder: Path, whole: _PooledAndTokens, batch_sizes: tuple[int, ...]) -> Difference:
    import onnx
    import onnxruntime

    onnx.checker.check_model(folder / GRAPH, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()]
    if names != ([INPUT], list(OUTPUTS)):
        raise ParityError(f"onnxruntime: the graph has inputs {names[0]} and outputs {names[1]}")
    expected, found = {}, {}
    height, width = whole.backbone.patch_embed.img_size
    for size in batch_sizes:
        images = seeded_images(height, width, size)
        with torch.inference_mode():
            ours = whole(images)
        theirs = session.run(list(OUTPUTS), {INPUT: images.numpy()})
        for name, mine, other in zip(OUTPUTS, ours, theirs, strict=True):
            expected[f"{name} of {size}"], found[f"{name} of {size}"] = mine, torch.from_numpy(other)
    return compare("onnxruntime", expected, found, RELATIVE_TOLERANCE)
