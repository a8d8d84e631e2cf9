"""The documentation as the tests read it: pages, links, and blocks of commands."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "configs" / "README.md",
    ROOT / "data_shards" / "README.md",
)
BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
COMMANDS = "sh"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int  # of its first line, from 1
    language: str
    text: str
    library: str = ""  # that a block of Python needs, beside this package's own

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def needs(self) -> str | None:
        """What it cannot be run without, in its own words: its first line is '# needs ...'."""
        found = re.match(r"# needs (.+)", self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[str]:
        """One a line, without comments; a line that ends with a backslash goes on."""
        joined = re.sub(r"\\\n\s*", " ", self.text)
        lines = (re.sub(r"(^|\s)#( .*)?$", "", line).strip() for line in joined.splitlines())
        return [line for line in lines if line]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        language, _, library = match[1].strip().partition(" ")
        found.append(Block(page, text.count("\n", 0, match.start()) + 2, language, match[2], library))
    return found


def prose_of(page: Path) -> str:
    """Without code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text()))


def anchors_of(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = 0
        while (name := f"{slug}-{count}" if count else slug) in found:
            count += 1
        found.add(name)
    return found


@dataclass(frozen=True)
class Call:
    """A command taken apart: variables before it, then its words."""

    variables: dict[str, str]
    words: list[str]

    @property
    def pretrain_arguments(self) -> list[str] | None:
        """Those of `pretrain`, whoever launches it; None for another program."""
        words = self.words
        if Path(words[0]).name == "pretrain":
            return words[1:]
        launchers = {"torchrun", "deepspeed", "accelerate", "python", "srun"}
        if Path(words[0]).name in launchers and "pretrain" in [Path(word).name for word in words]:
            at = [Path(word).name for word in words].index("pretrain")
            return words[at + 1 :]
        return None


def call_of(command: str) -> Call:
    words = shlex.split(command)
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return Call(variables, words)


def tracked_files() -> list[str]:
    """Of the repository; what git ignores is no part of it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name]
