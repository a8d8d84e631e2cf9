"""Links lead somewhere, commands are commands, and the reference is what the code says."""

from __future__ import annotations

import itertools
import re
import runpy
from pathlib import Path

import pytest
from documents import BLOCK, COMMANDS, PAGES, ROOT, Block, anchors_of, blocks_of, call_of, prose_of
from documents import LINK as LINK_PATTERN

from pretrain.cli import parse

LANGUAGES = {COMMANDS, "bash", "text", "python", "yaml", "json", "promql"}
OTHERS = {  # programs that are not this package's
    "git", "pip", ".", "cd", "export", "sbatch", "srun", "scancel", "squeue", "docker", "curl", "kubectl",
    "apptainer", "enroot", "python", "python3", ".venv/bin/pip", ".venv/bin/python", "torchrun", "deepspeed",
    "accelerate", "prometheus", "promtool", "sh", "mkdir", "cp", "tensorboard", "ls", "cat", "sed", "kill",
}  # fmt: skip
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMAND_BLOCKS = [block for block in BLOCKS if block.language == COMMANDS]
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK_PATTERN.findall(prose_of(page)):
        if re.match(r"[a-z]+:", link):
            continue  # elsewhere in the world
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors_of(target)):
            broken.append(link)
    assert not broken


def test_every_guide_is_in_the_index() -> None:
    listed = set(LINK_PATTERN.findall((ROOT / "docs" / "README.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed


def test_every_picture_is_shown() -> None:
    shown = {
        (page.parent / link).resolve() for page in PAGES for link in LINK_PATTERN.findall(prose_of(page))
    }
    assert set((ROOT / "docs" / "pictures").glob("**/*.png")) <= shown


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_says_what_it_is(block: Block) -> None:
    """Commands are marked as such, so that none is overlooked."""
    assert block.language in LANGUAGES


@pytest.mark.parametrize("block", COMMAND_BLOCKS, ids=str)
def test_commands_are_ones_that_there_are(block: Block) -> None:
    assert block.commands
    for command in block.commands:
        check_command(command)


def check_command(command: str) -> None:
    call = call_of(command.replace("<this repository>", "repository"))
    arguments = call.pretrain_arguments
    program = call.words[0]
    if arguments is not None:
        check_arguments(arguments)
    elif program == "make":
        targets = [word for word in call.words[1:] if "=" not in word]
        assert set(targets) <= TARGETS, command
    else:
        assert program in OTHERS, command
    files = [word for word in [*call.words, *call.variables.values()] if is_own_file(word)]
    for file in files:
        assert (ROOT / file.partition(":")[0]).exists(), f"{command}: {file}"


def is_own_file(word: str) -> bool:
    return bool(re.match(r"(configs|slurm|benchmarks|deploy|docs|tests)/", word))


def check_arguments(arguments: list[str]) -> None:
    if "..." in arguments or any("[" in word for word in arguments):
        return
    code: int | str | None = 0
    try:
        parse(arguments)
    except SystemExit as ending:  # of --help, or of what the parser refuses
        code = ending.code
    assert code == 0, arguments


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_sentences_are_ones_that_there_are(page: Path) -> None:
    for command in re.findall(r"`pretrain ([^`\n]+)`", BLOCK.sub("", page.read_text())):
        words = command.split()
        check_arguments([*itertools.takewhile(re.compile("[a-z]+$").match, words), "--help"])
        assert all((ROOT / word).exists() for word in words if is_own_file(word)), command


@pytest.mark.parametrize(
    "command", ["pretrain trian x", "make no-such-target", "pretrain train configs/no.yaml"]
)
def test_a_wrong_command_is_seen(command: str) -> None:
    with pytest.raises(AssertionError):
        check_command(command)


def test_the_reference_is_what_the_code_says() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["page"]()
    assert (ROOT / "docs" / "reference.md").read_text() == page, "run python docs/make_reference.py"
