"""Writes reference.md: every command with its arguments, and every setting of a run with its default.

The commands come from the parser of the command line, the settings from the models that read a config; what
a setting means is the comment that stands beside it in the code. `python docs/make_reference.py` writes it.
"""

from __future__ import annotations

import argparse
import inspect
import io
import re
import tokenize
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pretrain.cli import _parser
from pretrain.config import RunConfig

PAGE = Path(__file__).with_name("reference.md")
WIDTH = 100

HEADER = """# Reference

Every command and every setting, written by `python docs/make_reference.py` from the code; a test keeps it
true.

## Exit codes

| code | meaning |
| --- | --- |
| 0 | done |
| 2 | the input is wrong: one line says what, where and the remedy, before any process or GPU is used |
| 75 | stopped on request, saved and resumable (`--resume auto`) |
| 1 | anything else |

## Run folder

| file | what it holds |
| --- | --- |
| `config.yaml` | all settings of the run, defaults written out |
| `environment.json` | command, versions, GPUs, commit |
| `train.log` | what was printed, for people |
| `metrics.jsonl` | one JSON object for each log line, for programs |
| `anomalies.jsonl` | steps that were not finite, loss spikes, collapses, with their sample ids |
| `quarantine.jsonl` | samples that could not be used: shard, offset, key, reason |
| `targets.json` | where each rank answers Prometheus, while the run lives |
| `attempts/` | each start of the run: who, where, from which checkpoint, how it ended |
| `health/` | what each rank was doing when one of them stood still |
| `checkpoints/step-00001000/` | weights and optimizer as safetensors, state, config, sha256 of every file |
| `exported/` | the weights for timm |
| `eval/` | results of evaluations |
| `tensorboard/` | if `log.tensorboard` is set |
| `report.html` | what `pretrain report` drew |
"""


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """All that do something, in the order of the help."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for group in groups:
        for sub in group.choices.values():
            yield from commands(sub)
    if not groups:
        yield parser


def command_text(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=WIDTH)
    help_text = re.sub(r"\n\nexit codes:.*", "", parser.format_help(), flags=re.DOTALL).rstrip()
    return f"### {parser.prog}\n\n```text\n{help_text}\n```\n"


def comments_of(model: type[BaseModel]) -> dict[str, str]:
    """What the code says beside each field: the comment on its line, or the lines of comment above it."""
    found: dict[str, str] = {}
    for base in model.__bases__:
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= comments_of(base)
    above: list[str] = []
    try:
        lines = inspect.getsource(model).splitlines()
    except (OSError, TypeError):  # a model that is made, not written
        return found
    field = re.compile(r"    (\w+): ")
    for number, line in enumerate(lines):
        if line.startswith("    #"):
            above.append(line.strip(" #"))
            continue
        match = field.match(line)
        if match and match[1] in model.model_fields:
            beside = _comment_in(lines[number : number + 4])
            found[match[1]] = "; ".join(part for part in (" ".join(above), beside) if part)
        above = []
    return found


def _comment_in(lines: list[str]) -> str:
    """The comment in the statement that the first of the lines begins."""
    comments: list[str] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO("\n".join(part[4:] for part in lines)).readline):
            if token.type == tokenize.COMMENT:
                comments.append(token.string.strip("# "))
            elif token.type == tokenize.NEWLINE:
                break
    except (tokenize.TokenError, IndentationError):
        pass
    return " ".join(comments)


def kind(annotation: Any) -> str:
    """A type as people write it in YAML."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(args[0])
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind(arg) for arg in args))
    if annotation is type(None):
        return "null"
    if origin in (tuple, list):
        return f"list of {kind(args[0])}" if args else "list"
    if origin is dict or annotation is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}
    return names.get(annotation, "value")


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a setting holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := model_in(arg))), None)


def default_of(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "needed" if field.default_factory is None else "`{}`"
    if isinstance(field.default, BaseModel):
        return ""
    if field.default is None:
        return "null"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{list(field.default) if isinstance(field.default, tuple) else field.default}`"


def section_text(name: str, model: type[BaseModel], about: str) -> str:
    comments = comments_of(model)
    head = ["| setting | kind | default | meaning |", "| --- | --- | --- | --- |"]
    rows = [f"### {name}", "", about, "", *head]
    inner: list[str] = []
    for key, field in model.model_fields.items():
        section = model_in(field.annotation)
        meaning = comments.get(key, "").replace("|", "\\|")
        if section is not None:
            where = f"{name}.{key}"
            meaning = f"{meaning}; below" if meaning else "below"
            inner.append(section_text(where, section, " ".join((section.__doc__ or "").split())))
        rows.append(f"| `{key}` | {kind(field.annotation)} | {default_of(field)} | {meaning} |")
    return "\n".join([*rows, "", *inner])


def settings() -> Iterator[str]:
    yield "## Settings of a run\n"
    yield (
        "A config is YAML; `extends: other.yaml` takes another one and replaces what it says itself. On "
        "the command line `section.key=value` replaces any setting. What is not known is refused, with the "
        "nearest known name.\n"
    )
    plain = {name: field for name, field in RunConfig.model_fields.items() if not model_in(field.annotation)}
    yield f"At the top: {', '.join(f'`{name}` ({default_of(field)})' for name, field in plain.items())}.\n"
    for name, field in RunConfig.model_fields.items():
        section = model_in(field.annotation)
        if section is None:
            continue
        shown = f"{name}.NAME" if name == "views" else name
        yield section_text(shown, section, " ".join((section.__doc__ or "").split()))


def page() -> str:
    told = [HEADER, "## Commands\n", *map(command_text, commands(_parser())), *settings()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(told)).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
