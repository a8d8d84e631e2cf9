"""The schema of a RunConfig, kept beside the code so that a plan need not import what makes it.

`python -m pretrain.plan.schema` writes it anew after a setting was added or changed; a test tells when that
was forgotten. Importing RunConfig brings torch and timm, which takes longer than everything a plan does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("run_schema.json")
NEEDS_CLASS = "needs_class"  # marks settings that code of their class checks or completes
# classes whose own check `settings.fits` repeats
REPEATED = ("DataConfig", "OptimConfig")
_NOT_NEEDED = ("title", "description")


def run_schema() -> dict[str, Any]:
    """As it has to be: pydantic's JSON schema of RunConfig, without prose."""
    from pydantic import BaseModel

    from pretrain.config import RunConfig

    schema: dict[str, Any] = _without_prose(RunConfig.model_json_schema())
    found: list[type[BaseModel]] = [RunConfig]
    for model in found:
        for field in model.model_fields.values():
            found += [inner for inner in _models_in(field.annotation) if inner not in found]
    for model in found[1:]:
        _mark(schema["$defs"][model.__name__], model)
    return schema


def _mark(schema: dict[str, Any], model: Any) -> None:
    """Where code of a class has a say: about the whole, or about fields that are given."""
    decorators = model.__pydantic_decorators__
    if (decorators.model_validators or decorators.model_serializers) and model.__name__ not in REPEATED:
        schema[NEEDS_CLASS] = True
    of_fields = (*decorators.field_validators.values(), *decorators.field_serializers.values())
    checked = {name for decorator in of_fields for name in decorator.info.fields}
    for name, field in model.model_fields.items():
        if name in checked or any(hasattr(note, "func") for note in field.metadata):
            schema["properties"][name][NEEDS_CLASS] = True


def to_text(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=1) + "\n"


def _without_prose(value: Any, names_fields: bool = False) -> Any:
    """names_fields: the keys are names of settings, of which one may be called `title`."""
    if isinstance(value, dict):
        return {
            key: _without_prose(inner, names_fields=key in ("properties", "$defs", "default"))
            for key, inner in value.items()
            if names_fields or key not in _NOT_NEEDED
        }
    return [_without_prose(inner) for inner in value] if isinstance(value, list) else value


def _models_in(annotation: Any) -> list[Any]:
    """The settings classes inside an annotation such as `X | None`, `dict[str, X]` or `tuple[X, ...]`."""
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]


if __name__ == "__main__":
    PATH.write_text(to_text(run_schema()))
