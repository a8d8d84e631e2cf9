"""Settings read strictly from YAML and `key=value` overrides into pydantic models; errors in one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pretrain.errors import ConfigError, nearest

MAX_DEPTH = 32  # of nested settings
MAX_WRONG_SETTINGS = 20  # after which it is another sort of file

Model = TypeVar("Model", bound=BaseModel)
Inline: TypeAlias = Callable[[dict[str, Any], Path], None]  # puts other files' content into those of a path


class Settings(BaseModel):
    """A group of settings: complete, unchangeable, and without room for unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _nothing(settings: dict[str, Any], path: Path) -> None:
    """No other files."""


def read_settings(
    model: type[Model], path: Path | None, overrides: Sequence[str] = (), inline: Inline = _nothing
) -> Model:
    """The model's defaults, under those of a file and of what it `extends`, under the overrides.

    Raises ConfigError with one line that names each wrong key, what is expected and the nearest known name.
    """
    try:
        # by way of JSON: strict types, yet lists for tuples and text for paths
        return validated(model, json.dumps(_settings(path, overrides, inline)), str(path or ""))
    except ConfigError as error:
        raise ConfigError(_in_one_line(str(error))) from None


def readable_settings(
    model: type[Model], path: Path, overrides: Sequence[str] = (), inline: Inline = _nothing
) -> Model | None:
    """The settings without the wrong ones, to look for further problems with; None if these are none."""
    try:
        settings = _settings(path, overrides, inline)
    except ConfigError:
        return None
    for _ in range(MAX_WRONG_SETTINGS):
        try:
            return model.model_validate_json(json.dumps(settings), strict=True)
        except ValidationError as error:
            removed = [_remove(settings, problem["loc"]) for problem in error.errors()]
            if not any(removed):
                return None
    return None


def validated(model: type[Model], settings_json: str, where: str) -> Model:
    try:
        return model.model_validate_json(settings_json, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_describe(error, model)}".removeprefix(": ")) from None


def _settings(path: Path | None, overrides: Sequence[str], inline: Inline) -> dict[str, Any]:
    settings = {} if path is None else _read(path, inline)
    for argument in overrides:
        _override(settings, argument)
    if path is not None:
        inline(settings, path)
    return settings


def _remove(settings: Any, place: Sequence[int | str]) -> bool:
    """Take out the innermost setting that a place names; whether there was one."""
    for number, key in enumerate(place):
        if not isinstance(settings, dict) or key not in settings:
            return False
        if number == len(place) - 1 or not isinstance(settings[key], dict):
            del settings[key]
            return True
        settings = settings[key]
    return False


def _read(path: Path, inline: Inline, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a file, put over those of the file that its key `extends` names, relative to it."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file") from None
    settings = parse_yaml(text, str(path))
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, such as `seed: 0`")
    try:
        settings = plain(settings)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    inline(settings, path)  # so that an override can reach into it
    if "extends" not in settings:
        return settings  # type: ignore[no-any-return]
    base = settings.pop("extends")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: {base!r} is not the path of another config")
    chain = (*below, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise ConfigError(f"{path}: extends: {base} extends this file in turn; one of them must stand alone")
    return _put_over(_read(path.parent / base, inline, chain), settings)


def _put_over(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Mappings are joined, key by key; everything else is replaced."""
    joined = dict(base)
    for key, value in settings.items():
        inner = joined.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = _put_over(inner, value)
        joined[key] = value
    return joined


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML without surprises: a repeated key is an error, and 1e-4 is a number."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {line}: a key must be a plain word")
            if key.value in seen:
                raise ConfigError(f"line {line}: the key '{key.value}' stands twice; remove one")
            seen.add(key.value)
        return node


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(f"{where}:{line} {problem}") from None


def plain(value: Any, where: str = "", depth: int = 0) -> Any:
    """The settings without what JSON cannot tell, and without YAML aliases: each place gets its own copy."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where[:80]}...: is nested too deeply; does it contain itself?")
    if isinstance(value, dict):
        return {
            str(key): plain(inner, f"{where}.{key}".removeprefix("."), depth + 1)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [plain(inner, f"{where}.{i}", depth + 1) for i, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value} is not a finite number; give one")
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ConfigError(f"{where}: {value} is a {type(value).__name__}; put it in quotes to make it text")


def _override(settings: dict[str, Any], argument: str) -> None:
    """Apply one `a.b.c=value`; the value is YAML."""
    path, separator, text = argument.partition("=")
    if not separator or not path:
        raise ConfigError(f"'{argument}': an override reads key=value, such as optim.base_lr=3e-4")
    *parents, last = path.split(".")
    target = settings
    for parent in parents:
        inner = target.get(parent)
        if inner is None:
            inner = target[parent] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{path}: '{parent}' is a single value, it holds no '{last}'")
        target = inner
    target[last] = plain(parse_yaml(text, path), path)


def _describe(error: ValidationError, model: type[BaseModel]) -> str:
    """All problems of a validation error in one line."""
    problems = []
    for detail in error.errors():
        location = [part for part in detail["loc"] if not str(part).startswith(("function-", "literal"))]
        where = ".".join(str(part) for part in location)
        if detail["type"] == "extra_forbidden":
            problems.append(
                f"{where}: unknown setting; {nearest(str(location[-1]), _known_keys(model, location[:-1]))}"
            )
        elif detail["type"] == "missing":
            problems.append(f"{where}: is required")
        else:
            got = detail.get("input")
            value = f" (got {got!r})" if isinstance(got, (str, int, float, bool, list)) or got is None else ""
            problems.append(
                f"{where}: {detail['msg'].removeprefix('Value error, ')}{value}".removeprefix(": ")
            )
    return "; ".join(problems)


def _in_one_line(text: str) -> str:
    """A key or value may hold line breaks and the like."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _known_keys(model: Any, location: Sequence[Any]) -> list[str]:
    """Field names of the settings at a place of the config."""
    for part in location:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = model_in(field.annotation) if field else model_in(model)
        if model is None:
            return []
    return list(model.model_fields)


def model_in(annotation: Any) -> Any:
    """The settings class inside an annotation such as `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = model_in(inner)
        if found is not None:
            return found
    return None
