"""Nothing in the package runs a shell, runs code from data, or unpacks archives to disk.

`test_layers.py` forbids whole modules; this looks for single calls, under whatever name they were imported,
and at what timm does with weights that are handed to it.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.errors import UserError
from pretrain.evaluate.encoder import open_encoder

ROOT = Path(__file__).parents[1] / "pretrain"

FORBIDDEN = {
    "builtins.eval",
    "builtins.exec",
    "eval",
    "exec",
    "os.popen",
    "os.system",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "shutil.unpack_archive",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "yaml.full_load",
    "yaml.unsafe_load",
}
FORBIDDEN_METHODS = {"extract", "extractall"}  # of an archive
SAFE_LOADERS = {"SafeLoader", "CSafeLoader"}


def names_of_imports(tree: ast.AST) -> dict[str, str]:
    """Local name -> what it stands for: `from os import system as run` gives run -> os.system."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def dangers(source: str) -> list[str]:
    """Every dangerous use in a file, as `line: what`."""
    tree = ast.parse(source)
    imported = names_of_imports(tree)

    def full_name(node: ast.expr) -> str:
        first, dot, rest = ast.unparse(node).partition(".")
        return imported.get(first, first) + dot + rest

    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and full_name(node) in FORBIDDEN:
            found.append(f"{node.lineno}: {full_name(node)}")  # also where it is only handed on
        if not isinstance(node, ast.Call):
            continue
        name, keywords = full_name(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if "shell" in keywords and not is_constant(keywords["shell"], False):
            found.append(f"{node.lineno}: shell=")
        if name == "torch.load" and not is_constant(keywords.get("weights_only"), True):
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if name in ("numpy.load", "np.load") and "allow_pickle" in keywords:
            found.append(f"{node.lineno}: allow_pickle=")
        if name in ("yaml.load", "yaml.load_all") and not is_safe_yaml(node, keywords, source):
            found.append(f"{node.lineno}: {name} without a safe loader")
        if isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS:
            found.append(f"{node.lineno}: .{node.func.attr}()")
    return found


def is_safe_yaml(call: ast.Call, keywords: dict[str | None, ast.expr], source: str) -> bool:
    """The loader is a safe one, or a class of the same file that builds on one."""
    loader = keywords.get("Loader") or (call.args[1] if len(call.args) > 1 else None)
    if loader is None:
        return False
    name = ast.unparse(loader).rpartition(".")[2]
    bases = {
        ast.unparse(base).rpartition(".")[2]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and node.name == name
        for base in node.bases
    }
    return bool(SAFE_LOADERS & {name, *bases})


def test_nothing_in_the_package_is_dangerous() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 40
    assert [f"{path.name}:{danger}" for path in files for danger in dangers(path.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.Popen('ls', shell=flag)",
        "import os\nos.system('ls')",
        "from os import system as go\ngo('ls')",
        "import os as o\no.popen('ls')",
        "import os\nlist(map(os.system, names))",
        "import subprocess\nsubprocess.getoutput('ls')",
        "eval('1')",
        "exec('1')",
        "run = eval",
        "import pickle\npickle.load(file)",
        "from pickle import loads\nloads(data)",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import load\nload('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import tarfile\ntarfile.open('x').extractall('/')",
        "import shutil\nshutil.unpack_archive('x')",
    ],
)
def test_a_planted_danger_is_found(source: str) -> None:
    assert len(dangers(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import torch\ntorch.load('x', weights_only=True)",
        "model.eval()",
        "import yaml\nyaml.safe_load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml\nclass Strict(yaml.SafeLoader): ...\nyaml.load(text, Loader=Strict)",
        "tar.extractfile(member)",
    ],
)
def test_what_is_safe_is_let_through(source: str) -> None:
    assert dangers(source) == []


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("from_folder", [False, True], ids=["cached by timm", "a folder for timm"])
def test_weights_that_timm_reads_run_no_code(
    from_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 37 of the fault catalogue: other people's weights are pickles now and then."""
    canary, path = Canary(tmp_path / "it ran"), tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": {"cls_token": canary}}, path)
    described = {"architecture": "test_vit", "pretrained_cfg": {"num_classes": 10}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(path))
    with pytest.raises((UserError, RuntimeError), match="weights_only"):
        open_encoder(tmp_path if from_folder else "test_vit.r160_in1k")
    assert not canary.path.exists()
    torch.load(path, weights_only=False)
    assert canary.path.exists(), "it was meant to run where everything is let through"
