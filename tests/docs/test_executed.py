"""Every command of the pages that can run on one machine is run, as it is printed, in the order of its page.

A page runs in a folder of its own: the repository, and small stand-ins for what pages name (sandbox.py). Its
Python runs there as well, after its commands.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import sandbox
from documents import COMMANDS, PAGES, ROOT, Block, blocks_of

# Settings of configs in the folder that the pages' commands run in. Models, tasks and kinds of settings stay.
SHORT_RUN = {
    "schedule.steps": 24,
    "schedule.warmup_steps": 4,
    "batch.global_size": 32,
    "checkpoint.every_steps": 20,
}
SHORT_DETECTION = {"schedule.steps": 2, "schedule.warmup_steps": 1, "schedule.save_every_steps": 1}
SETR_PUP = "configs/transfer/segmentation_cityscapes_setr_pup.yaml"
SMALLER: dict[str, dict[str, Any]] = {
    "configs/demo.yaml": SHORT_RUN,  # six minutes otherwise
    "configs/cifar10_cpu_multitask.yaml": SHORT_RUN,  # eight minutes
    "configs/methods/mae_vits4_cifar10.yaml": {"batch.global_size": 64},  # steps of 1,024 images are for GPUs
    "configs/transfer/detection_nuclei_cpu.yaml": SHORT_DETECTION,  # 19 minutes
    # 80,000 steps of crops of 768 px of images of 2048 px are for GPUs
    SETR_PUP: {
        "num_steps": 2,
        "batch_size": 2,
        "crop_px": 48,
        "data.fit_px": [128, 96],
        "test.stride_px": 32,
    },
    "configs/transfer/segmentation_camvid_cpu.yaml": {"num_steps": 2, "optim.warmup_steps": 1},  # 8 minutes
}
# Words put behind commands that begin so.
APPENDED = {
    # 15 fine-tunings of 100 epochs
    "pretrain evaluate fewshot": "num_epochs=1 warmup_epochs=0.1 --fractions 0.5 --seeds 0",
    "pretrain evaluate finetune": "num_epochs=1 warmup_epochs=0.1",  # 100 epochs
}
# Run once, where the folder is made that every page gets a copy of: minutes each.
PREPARED = ("make shards", "make demo")
# What a block may need that keeps it from being run here; the first words of its mark.
NEEDS = (
    "a network", "a cluster", "Slurm", "two machines", "GPUs", "ImageNet", "CIFAR-10", "some hours",
    "a container engine", "Apptainer", "prometheus", "promtool",
)  # fmt: skip

COMMAND_BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.language == COMMANDS]
RUNNABLE = [block for block in COMMAND_BLOCKS if block.needs is None]
PYTHON = [
    block for page in PAGES for block in blocks_of(page) if block.language == "python" and not block.library
]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def printed(page: Path) -> list[str]:
    """The commands of a page that this module runs."""
    return [command for block in RUNNABLE if block.page == page for command in block.commands]


def lengthened(command: str) -> str:
    for beginning, words in APPENDED.items():
        if command.startswith(beginning):
            return f"{command} {words}"
    return command


def script_of(commands: list[str]) -> str:
    """One shell for a page, so that `cd` and `activate` last; it ends at the first command that fails."""
    lines = ['failed() { echo "exit code $1 of: $2"; exit 1; }']
    for command in commands:
        shown = shlex.quote(command)
        lines.append(f"echo; echo '$' {shown}; {lengthened(command)} || failed $? {shown}")
    return "\n".join(lines)


def test_what_a_block_needs_is_one_of_few_things() -> None:
    unknown = [
        f"{block}: {block.needs}"
        for block in COMMAND_BLOCKS
        if block.needs and not block.needs.startswith(NEEDS)
    ]
    assert not unknown


def test_no_command_is_passed_over() -> None:
    """Each stands in the script of its page, or is run before all pages."""
    for block in RUNNABLE:
        script = script_of([command for command in printed(block.page) if command not in PREPARED])
        for command in block.commands:
            assert command in PREPARED or lengthened(command) in script


def test_every_exception_is_one_of_a_command_that_there_is() -> None:
    commands = [command for block in RUNNABLE for command in block.commands]
    for beginning in (*APPENDED, *PREPARED):
        assert any(command.startswith(beginning) for command in commands), beginning
    for name in SMALLER:
        assert (ROOT / name).exists(), name
    for need in NEEDS:
        assert any((block.needs or "").startswith(need) for block in COMMAND_BLOCKS), need


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    done = sandbox.shell(tmp_path, script_of(["true", "sh -c 'exit 3'", "echo never"]))
    assert done.returncode == 1
    assert "exit code 3 of: sh -c 'exit 3'" in done.stdout
    assert "\nnever" not in done.stdout


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every page gets a copy of, with a run that `make demo` has made."""
    folder = tmp_path_factory.mktemp("pages") / "pretrain"
    sandbox.copy_of_repository(folder, SMALLER)
    done = sandbox.shell(folder, script_of(list(PREPARED)))
    assert done.returncode == 0, done.stdout
    sandbox.write_stand_ins(folder)
    sandbox.name_the_run(folder)
    joint = "engine.kind=local schedule.steps=8 tasks.classification.num_classes=10 --output-dir JOINT"
    done = sandbox.shell(folder, f"pretrain train configs/demo.yaml data.shards=DIR {joint}")
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "pretrain", symlinks=True)


PAGES_THAT_RUN = [page for page in PAGES if any(block.page == page for block in (*RUNNABLE, *PYTHON))]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=name_of)
def test_a_page_runs_from_its_first_line_to_its_last(page: Path, folder: Path) -> None:
    commands = [command for command in printed(page) if command not in PREPARED]
    done = sandbox.shell(folder, script_of(commands))
    assert done.returncode == 0, done.stdout[-6000:]
    for block in PYTHON:
        if block.page == page:
            run_python(block, folder)


def run_python(block: Block, folder: Path) -> None:
    script = folder / "block.py"
    script.write_text(block.text)
    done = sandbox.shell(folder, f"{shlex.quote(sys.executable)} block.py")
    assert done.returncode == 0, f"{block}: {done.stdout[-3000:]}"
