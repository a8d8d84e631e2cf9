"""Every format, one per line: who writes it, and for whom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

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
    "timm": 'a folder for timm.create_model("local-dir:..."), with model card (default)',
    "hf-hub": 'the same as a repository of the Hugging Face hub, for timm.create_model("hf-hub:...")',
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
    raise AssertionError(f"'{name}' stands in FORMATS and has no writer")
