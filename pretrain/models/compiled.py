"""Compile the blocks of a network, each on its own and in place: names, state and hooks stay as they are.

A graph for each block, not one for the network: gradients become ready block by block, so their reduction
over ranks still overlaps with the backward pass, and blocks that are alike share one graph. What is between
blocks, embeddings and heads, runs as written.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

# Graphs of one process: kinds of blocks (a Swin has up to 8) x sizes of views x student and teacher, with
# room to spare. A Swin with two sizes of views would pass torch's own limit, 8.
MAX_GRAPHS = 64
_REPEATED = (Block, SwinTransformerBlock)


class SharedDropPath(nn.Module):
    """timm's `DropPath` with its probability in a tensor, so that blocks that differ in it share one graph.

    timm's is a number of the code, for which each block would be compiled anew.
    """

    def __init__(self, drop_prob: float, scale_by_keep: bool, device: torch.device) -> None:
        super().__init__()
        # plain attributes, no buffers: nothing saves, averages or compares them
        keep = 1.0 - drop_prob
        self.keep_ratio = torch.tensor(keep, device=device)
        self.scale = torch.tensor(1.0 / keep if scale_by_keep else 1.0, device=device)

    def forward(self, branch: Tensor) -> Tensor:
        """(M, ...) -> the same, with the branch of some samples zero."""
        if not self.training:
            return branch
        shape = (len(branch),) + (1,) * (branch.dim() - 1)
        kept = torch.rand(shape, device=branch.device) < self.keep_ratio
        return branch * (kept * self.scale).to(branch.dtype)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """What is compiled: blocks of a ViT, of a Swin's stages and of decoders.

    T2T's two token layers are not: at the first step on a CPU they took more than 15 minutes.
    """
    stack = getattr(network, "blocks", None)  # of a ViT, also of a kind that is not listed above
    own = set(stack) if isinstance(stack, nn.Sequential) else set()
    return [part for part in network.modules() if part in own or isinstance(part, _REPEATED)]


def compile_blocks(
    network: nn.Module,
    mode: str = "default",
    dynamic: bool = False,
    backend: str | Callable[..., Any] = "inductor",
) -> int:
    """Compile every repeated block in place, when first called; returns how many there are.

    mode: as of `torch.compile`. dynamic: for numbers of tokens that change from step to step; one graph
    serves all. Otherwise each shape has a graph of its own, which is faster. A block that cannot be compiled
    whole, or needs more than `MAX_GRAPHS` graphs, is an error: nothing runs uncompiled without a word.

    A copy of a compiled network is not compiled. Draws of dropout and drop path differ from those of the same
    network uncompiled, and follow from torch's seed as they do there.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    # a hint that TF32 exists; whether products are rounded is for engine.precision to say
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    blocks = repeated_blocks(network)
    drops = any(isinstance(part, DropPath) for part in network.modules())
    settings: dict[str, Any] = {"mode": mode} if backend == "inductor" else {}
    for block in blocks:
        if drops:
            _share_drop_path(block)
        block.compile(fullgraph=True, dynamic=dynamic, backend=backend, **settings)
    return len(blocks)


def _share_drop_path(block: nn.Module) -> None:
    """Make blocks alike that differ in their drop path only; one that is not trained never drops."""
    trains = any(parameter.requires_grad for parameter in block.parameters())
    device = next(block.parameters()).device
    for name, part in list(block.named_children()):
        if not isinstance(part, DropPath) and not (isinstance(part, nn.Identity) and "drop_path" in name):
            continue
        shared: nn.Module = nn.Identity()
        if trains:
            prob = float(part.drop_prob) if isinstance(part, DropPath) else 0.0
            shared = SharedDropPath(prob, getattr(part, "scale_by_keep", True), device)
        setattr(block, name, shared.train(part.training))


def uncompiled() -> AbstractContextManager[object]:
    """Within it blocks run as written: for shapes that come seldom, and graphs that are walked back twice."""
    if not is_loaded():
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def is_loaded() -> bool:
    """Whether this process has torch's compiler, without which nothing is compiled. Loading takes seconds."""
    return "torch._dynamo" in sys.modules


def missing_tool(device_type: str) -> str | None:
    """What compiling for a device needs and this machine lacks; None if it has all."""
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton"
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    else:
        names = [os.environ.get("CXX") or "g++"]
    if not any(shutil.which(shlex.split(name)[0]) for name in names):
        return f"a compiler ({' or '.join(names)})"
    headers = Path(sysconfig.get_path("include"))
    return None if (headers / "Python.h").is_file() else f"Python's headers (Python.h in {headers})"
