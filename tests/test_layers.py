"""The shape of the code base: imports point from the wiring through the edges to the core, never back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "pretrain"

LAYERS = {
    "core": {
        "constants",
        "randomness",
        "tokens",
        "losses",
        "schedules",
        "optim",
        "errors",
        "parser",
        "peers",
        "settings",
        "views",
        "models",
        "tasks",
        "guard",
        "passed_over",
        "read_counts",
    },
    "edge": {
        "data",
        "engine",
        "metrics",
        "checkpoint",
        "attempts",
        "cluster",
        "preempt",
        "watchdog",
        "watchdog_process",
        "memory",
        "garbage",
        "work_time",
        "section_time",
    },
    "downstream": {"export", "evaluate", "transfer", "report", "doctor"},
    "wiring": {
        "config",
        "build",
        "check",
        "preflight",
        "rehearsal",
        "changes",
        "conflict",
        "checkpoint_writer",
        "mirror",
        "online_knn",
        "oversight",
        "final_export",
        "saving",
        "loop",
        "relabel",
        "plan",  # of a whole run, so it knows every part
        "rollbacks",
        "run_folder",
        "train",
        "utilisation",
        "pretext",
        "illustrate",
        "sweep",
        "listing",
        "cli",
        "__main__",
    },
}
ALLOWED = {
    ("checkpoint", "attempts"),  # edges of one store: whose checkpoints count is known to attempts
    ("export", "checkpoint"),  # which of a run's checkpoints count has one home
    ("export", "attempts"),  # and so has whether a run has finished
    ("doctor", "attempts"),  # or lives; what of this reads no tensor is read without importing torch
}
LAYER_OF = {part: layer for layer, parts in LAYERS.items() for part in parts}

# library -> the only parts that may import it
HOMES = {
    "deepspeed": {"engine"},
    "webdataset": {"data"},
    "fsspec": {"data"},
    "aiohttp": {"data"},
    "s3fs": {"data"},
    "gcsfs": {"data"},
    "pyarrow": {"data"},
    "prometheus_client": {"metrics"},
    "accelerate": {"evaluate", "transfer"},
}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "np.load", "numpy.load", "eval", "exec", "os.system", "os.popen"}
# (module, call) -> what makes it safe: exports in files of torch.save are read back as their users read them,
# tensors only, and only files that the same process has just written
MADE_SAFE = {("pretrain.export.torch_file", "torch.load"): "weights_only"}


def part_of(module: str) -> str:
    """'pretrain.data.order' -> 'data'; the package itself, which holds the version only, is ''."""
    return [*module.split("."), ""][1]


def may_import(importer: str, imported: str) -> bool:
    if imported in ("", importer) or importer == "__init__":
        return True
    if (importer, imported) in ALLOWED:
        return True
    layers = LAYER_OF[importer], LAYER_OF[imported]
    if layers[0] == "wiring":
        return True
    if layers[0] == "downstream":
        return layers[1] in ("core", "downstream") or imported == "data"
    return layers[1] == "core"  # of the core and of each edge


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, at its top or inside functions; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


def _made_safe(module: str, call: ast.Call) -> bool:
    """`keyword=True` stands in the call itself."""
    required = MADE_SAFE.get((module, _dotted(call.func)))
    return any(
        keyword.arg == required and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        for keyword in call.keywords
        if required is not None
    )


def violations(source: str, module: str) -> list[str]:
    """What a module of the package does that its layer forbids, one line each."""
    tree = ast.parse(source)
    part = part_of(module)
    if part not in ("__init__", *LAYER_OF):
        return [f"{module}: '{part}' is in no layer; add it to LAYERS"]
    found = []
    for line, name in imported_modules(tree, module.rpartition(".")[0]):
        library = name.partition(".")[0]
        if library == "pretrain":
            target = part_of(name)
            # `from pretrain import __version__` names no module
            if (target in LAYER_OF or target == "") and not may_import(part, target):
                found.append(f"{module}:{line}: {LAYER_OF[part]} '{part}' imports '{target}'")
        if library in HOMES and part not in HOMES[library]:
            found.append(f"{module}:{line}: '{library}' is imported outside {sorted(HOMES[library])}")
        if library in UNSAFE_MODULES:
            found.append(f"{module}:{line}: '{library}' runs code from files")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith("SLURM_") and part != "cluster":
                found.append(f"{module}:{node.lineno}: '{node.value}' is read outside cluster.py")
        elif isinstance(node, ast.Call):
            if _dotted(node.func) in UNSAFE_CALLS and not _made_safe(module, node):
                found.append(f"{module}:{node.lineno}: calls {_dotted(node.func)}")
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "shell" and not is_false:
                    found.append(f"{module}:{node.lineno}: starts a shell")
                if keyword.arg == "allow_pickle" and not is_false:
                    found.append(f"{module}:{node.lineno}: allows pickles")
    return sorted(set(found))


def modules() -> list[tuple[str, Path]]:
    files = sorted(ROOT.rglob("*.py"))
    return [
        (".".join(("pretrain", *path.relative_to(ROOT).with_suffix("").parts)), path)
        for path in files
        if path.stat().st_size
    ]


def test_every_module_keeps_to_its_layer() -> None:
    assert len(modules()) > 40
    found = [line for name, path in modules() for line in violations(path.read_text(), name)]
    assert found == []


def test_every_file_and_folder_of_the_package_belongs_to_a_layer() -> None:
    parts = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    assert parts - {"__init__"} <= LAYER_OF.keys()


@pytest.mark.parametrize(
    ("module", "source", "told"),
    [
        ("pretrain.losses", "from pretrain.data.manifest import Manifest", "core 'losses' imports 'data'"),
        ("pretrain.tasks.rotation", "import pretrain.engine.local", "core 'tasks' imports 'engine'"),
        ("pretrain.views.plan", "from ..config import RunConfig", "core 'views' imports 'config'"),
        ("pretrain.tokens", "def f():\n    from pretrain import checkpoint", "imports 'checkpoint'"),
        ("pretrain.data.order", "from pretrain import cluster", "edge 'data' imports 'cluster'"),
        ("pretrain.checkpoint", "from pretrain.metrics import names", "edge 'checkpoint' imports 'metrics'"),
        ("pretrain.engine.local", "from pretrain import build", "edge 'engine' imports 'build'"),
        ("pretrain.evaluate.encoder", "from pretrain.checkpoint import read", "imports 'checkpoint'"),
        ("pretrain.evaluate.knn", "from pretrain.train import run", "downstream 'evaluate' imports 'train'"),
        ("pretrain.evaluate.knn", "from pretrain.engine.local import x", "imports 'engine'"),
        ("pretrain.train", "import deepspeed", "'deepspeed' is imported outside"),
        ("pretrain.data.scan", "import deepspeed.comm as dist", "'deepspeed' is imported outside"),
        ("pretrain.evaluate.shards", "import webdataset", "'webdataset' is imported outside"),
        ("pretrain.train", "from prometheus_client import Gauge", "'prometheus_client' is imported outside"),
        ("pretrain.engine.local", "from accelerate import Accelerator", "'accelerate' is imported outside"),
        ("pretrain.train", "import os\nos.environ['SLURM_JOB_ID']", "'SLURM_JOB_ID' is read outside"),
        ("pretrain.checkpoint", "import pickle", "'pickle' runs code"),
        ("pretrain.checkpoint", "import torch\ntorch.load('x')", "calls torch.load"),
        ("pretrain.export.source", "import torch\ntorch.load('x', weights_only=True)", "calls torch.load"),
        ("pretrain.export.torch_file", "import torch\ntorch.load('x')", "calls torch.load"),
        ("pretrain.export.torch_file", "import torch\ntorch.load('x', weights_only=y)", "calls torch.load"),
        ("pretrain.train", "import subprocess\nsubprocess.run('ls', shell=True)", "starts a shell"),
        ("pretrain.train", "import subprocess\nsubprocess.run('ls', shell=x)", "starts a shell"),
        ("pretrain.data.scan", "import os\nos.system('ls')", "calls os.system"),
        ("pretrain.data.scan", "f(allow_pickle=True)", "allows pickles"),
        ("pretrain.utils", "", "'utils' is in no layer"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str, told: str) -> None:
    found = violations(source, module)
    assert len(found) == 1
    assert told in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pretrain.train", "from pretrain.data.loader import open_batches\nfrom pretrain import cluster"),
        (
            "pretrain.data.order",
            "from pretrain.views.plan import ORDER_STREAM\nfrom .manifest import Manifest",
        ),
        ("pretrain.evaluate.shards", "from pretrain.data.reader import read_split\nimport accelerate"),
        ("pretrain.evaluate.knn", "from pretrain.export import source"),
        ("pretrain.engine.local", "import deepspeed"),
        ("pretrain.cluster", "import os\nos.environ['SLURM_PROCID']"),
        ("pretrain.cli", "from pretrain import __version__"),
        ("pretrain.export.torch_file", "import torch\ntorch.load('x', weights_only=True)"),
        ("pretrain.train", "import subprocess\nsubprocess.run(['ls'], shell=False)"),
    ],
)
def test_what_the_layers_allow_is_let_through(module: str, source: str) -> None:
    assert violations(source, module) == []
