"""A small study, and a program that stands in for `pretrain` where a test is about the order of commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_config import CONFIG

from pretrain.sweep import execute

STUDY = """\
base: run.yaml
overrides: [log.every_steps=1]
seeds: [0, 1]
variants:
  both: [tasks.jigsaw=null]
  rotation: [tasks.contrastive=null, tasks.jigsaw=null]
evaluate:
  - {name: knn, kind: knn, test: others, args: [--feature, class, --batch-size, "2{seed}"]}
metrics: [rotation/accuracy]
"""

# Takes the arguments of `pretrain`. `train` keeps the steps it has taken and goes on from there; told to
# stop it ends with 75; while there is a file `slow`, a step takes a minute. calls.txt lists every command.
PROGRAM = """\
import json, signal, sys, time
from pathlib import Path

command, *rest = sys.argv[1:]
flags = {rest[i]: rest[i + 1] for i in range(len(rest) - 1) if rest[i].startswith("--")}
settings = dict(word.split("=", 1) for word in rest if "=" in word)
with open("calls.txt", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if command == "train":
    run, steps = Path(flags["--output-dir"]), int(settings.get("schedule.steps", 3))
    if settings.get("optim.base_lr") == "9":
        print("first line", flush=True)
        print("the loss exploded", file=sys.stderr)
        sys.exit(3)
    run.mkdir(parents=True, exist_ok=True)
    (run / "environment.json").write_text(json.dumps({"commit": "c0ffee", "gpus": ["H1", "H1"]}))
    lines = run / "metrics.jsonl"
    done = len(lines.read_text().splitlines()) if lines.exists() else 0
    seconds = 0.1 if "tasks.contrastive=null" in rest else 0.4
    for step in range(done + 1, steps + 1):
        value = step / 10 if step < steps else None
        with lines.open("a") as file:
            record = {"step": step, "images": 16 * step, "step_seconds": seconds, "rotation/accuracy": value}
            file.write(json.dumps(record) + "\\n")
        if Path("slow").exists():
            time.sleep(60)
elif command == "export":
    Path(flags["--out"]).mkdir()
else:
    out = Path(flags["--out"]) / "eval"
    out.mkdir(parents=True)
    value = 0.5 + 0.02 * (int(flags["--batch-size"]) - 20) - 0.1 * ("rotation" in rest[1])
    key = "miou_ratio" if rest[0] == "dense" else "top1_ratio"
    name = "_".join([rest[0], *([flags["--recipe"]] if "--recipe" in flags else [])])
    (out / (name + ".json")).write_text(json.dumps({key: value}))
"""


def write_study(folder: Path, text: str = STUDY) -> Path:
    """A study and its base config in a folder."""
    engine = "{kind: local, precision: fp32}"
    config = CONFIG.replace("{precision: fp32}", engine).replace("steps: 10", "steps: 3")
    (folder / "run.yaml").write_text(config)
    path = folder / "study.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that lists what the stand-in was asked to do."""
    (tmp_path / "program.py").write_text(PROGRAM)
    # without site-packages, which this one needs not and which take longest to start
    monkeypatch.setattr(execute, "PROGRAM", (sys.executable, "-I", "-S", str(tmp_path / "program.py")))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "calls.txt"
