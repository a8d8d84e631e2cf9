"""A run's settings as plain data: read by the schema beside the code, not by classes, where that does.

The schema knows keys, types, limits and defaults. Whatever it does not accept, and what code of a class
checks or completes, is read by `load_config`, which says in the usual words what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import RootModel

from pretrain.errors import ConfigError
from pretrain.plan.schema import NEEDS_CLASS, PATH
from pretrain.settings import read_settings

Values = dict[str, Any]


class _NotPlainError(Exception):
    """Something that only the classes can judge."""


def plan_settings(path: Path, overrides: Sequence[str] = ()) -> Values:
    """What `load_config(path, overrides).model_dump(mode="json")` gives, without torch where possible."""
    try:
        return read_plainly(path, overrides)
    except (_NotPlainError, ConfigError, OSError, ValueError):
        from pretrain.config import load_config

        return load_config(path, overrides).model_dump(mode="json")


def read_plainly(path: Path, overrides: Sequence[str] = ()) -> Values:
    schema = json.loads(PATH.read_text())
    given = read_settings(RootModel[Values], path, overrides, inline=_inline_deepspeed).root
    values: Values = _Reader(schema["$defs"]).read(given, schema)
    return values


def _inline_deepspeed(settings: Values, config_path: Path) -> None:
    """As `load_config`: a JSON file's content in the place of its name."""
    engine = settings.get("engine")
    if isinstance(engine, dict) and isinstance(engine.get("deepspeed"), str):
        engine["deepspeed"] = json.loads((config_path.parent / engine["deepspeed"]).read_text())


_LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda value, limit: value >= limit,
    "maximum": lambda value, limit: value <= limit,
    "exclusiveMinimum": lambda value, limit: value > limit,
    "exclusiveMaximum": lambda value, limit: value < limit,
    "minItems": lambda value, limit: len(value) >= limit,
    "maxItems": lambda value, limit: len(value) <= limit,
    "enum": lambda value, limit: value in limit,
    "const": lambda value, limit: value == limit,
}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}
_UNDERSTOOD = {
    *_LIMITS,
    *("type", "default", "anyOf", "$ref", "$defs", "properties", "required", "additionalProperties"),
    *("items", "prefixItems", "format"),
}


class _Reader:
    """Accepts what the schema does, and completes it with defaults; _NotPlainError for all else."""

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self.definitions = definitions

    def read(self, value: Any, schema: Mapping[str, Any]) -> Any:
        if schema.get(NEEDS_CLASS):
            raise _NotPlainError
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            read = self.read(value, self.definitions[name])
            if not fits(name, read):
                raise _NotPlainError
            return read
        if "anyOf" in schema:
            return self._first_of(value, schema["anyOf"])
        if not schema.keys() <= _UNDERSTOOD:
            raise _NotPlainError
        kind = schema.get("type")
        if kind is not None and (
            not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")
        ):
            raise _NotPlainError
        if not all(holds(value, schema[name]) for name, holds in _LIMITS.items() if name in schema):
            raise _NotPlainError
        if kind == "object":
            return self._object(value, schema)
        if kind == "array":
            kinds = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
            return [self.read(item, of_item) for item, of_item in zip(value, kinds, strict=True)]
        return value

    def _first_of(self, value: Any, choices: Sequence[Mapping[str, Any]]) -> Any:
        for choice in choices:
            try:
                return self.read(value, choice)
            except _NotPlainError:
                continue
        raise _NotPlainError

    def _object(self, value: Values, schema: Mapping[str, Any]) -> Values:
        known = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        if (others is False and not value.keys() <= known.keys()) or not set(
            schema.get("required", ())
        ) <= value.keys():
            raise _NotPlainError
        read = {
            key: self.read(value[key], of_key) if key in value else of_key["default"]
            for key, of_key in known.items()
        }
        of_other = others if isinstance(others, dict) else {}
        return read | {key: self.read(value[key], of_other) for key in value.keys() - known.keys()}


def fits(name: str, values: Values) -> bool:
    """What the code of a class checks beyond types, for those of `schema.REPEATED`."""
    if name == "DataConfig":
        return bool(values["shards"]) != bool(values["sources"])
    if name == "OptimConfig":
        return not values["nesterov"] or values["momentum"] > 0
    return True
