"""RunConfig: the sum of the parts' settings, read strictly from YAML and `key=value` overrides."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from pretrain.checkpoint_writer import CheckpointConfig
from pretrain.cluster import ClusterConfig
from pretrain.data.loader import DataConfig
from pretrain.engine.engine import EngineConfig
from pretrain.errors import ConfigError, nearest
from pretrain.guard import GuardConfig
from pretrain.metrics.exporter import PrometheusConfig
from pretrain.models.backbone import BackboneConfig
from pretrain.optim import NotNegative, OptimConfig, Positive
from pretrain.preempt import PreemptConfig
from pretrain.tasks import TASKS
from pretrain.tasks.balance import BalanceConfig
from pretrain.views.plan import ViewConfig
from pretrain.watchdog import WatchdogConfig

Count = Annotated[int, Field(gt=0)]
MAX_DEPTH = 32  # of nested settings
MAX_WRONG_SETTINGS = 20  # after which it is another sort of file


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NormalizationConfig(_Settings):
    """Per-channel mean and standard deviation of the pixels in [0, 1]; ImageNet's by default."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)


class BatchConfig(_Settings):
    """The global batch is over all ranks; the micro batch follows from the number of ranks."""

    global_size: Count
    accumulation_steps: Count = 1


class ScheduleConfig(_Settings):
    """How long, in steps or in epochs, and how the learning rate moves after its linear warm-up.

    cosine: half a cosine from the end of the warm-up on; cosine_over_all: half a cosine over the whole
    length, the warm-up included (timm's, as MoBY and SiT use it); quarter_cosine: RelViT's.
    """

    kind: Literal["cosine", "cosine_over_all", "quarter_cosine", "constant"] = "cosine"
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_epochs: NotNegative | None = None
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None  # of the length
    length_epochs: Annotated[float, Field(gt=0.0)] | None = None  # of the schedule, if longer than the run
    start_lr: NotNegative = 0.0  # where the warm-up begins
    final_lr: NotNegative = 1e-6
    scale_ends: bool = False  # start and final rate grow with the batch, as the base rate does


class TeacherConfig(_Settings):
    """An averaged copy of the backbone, and of the heads that tasks want it to have."""

    momentum: Annotated[float, Field(ge=0.0, le=1.0)] = 0.996  # at the start
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # to 1 along half a cosine, or a line
    update: Literal["after", "before"] = "after"  # the optimizer step, or the keys of a step (MoCo, MoBY)


class LogConfig(_Settings):
    every_steps: Count = 10
    prometheus: PrometheusConfig = PrometheusConfig()


class _AnyTasks(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def enabled(self) -> dict[str, Any]:
        """The settings of the tasks that are named, in the order of the TASKS table."""
        return {name: getattr(self, name) for name in TASKS if getattr(self, name) is not None}


_FIELDS: dict[str, Any] = {name: (spec.config | None, None) for name, spec in TASKS.items()}
TasksConfig: Any = create_model("TasksConfig", __base__=_AnyTasks, **_FIELDS)


class RunConfig(_Settings):
    """A run, completely."""

    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    model: BackboneConfig = BackboneConfig()
    normalization: NormalizationConfig = NormalizationConfig()
    data: DataConfig
    views: dict[str, ViewConfig]
    tasks: TasksConfig
    balance: BalanceConfig = BalanceConfig()
    teacher: TeacherConfig | None = None
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig
    batch: BatchConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    guard: GuardConfig = GuardConfig()
    preempt: PreemptConfig = PreemptConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    cluster: ClusterConfig = ClusterConfig()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


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


def _parse_yaml(text: str, where: str) -> Any:
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


def _plain(value: Any, where: str = "", depth: int = 0) -> Any:
    """The settings without what JSON cannot tell, and without YAML aliases: each place gets its own copy."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where[:80]}...: is nested too deeply; does it contain itself?")
    if isinstance(value, dict):
        return {
            str(key): _plain(inner, f"{where}.{key}".removeprefix("."), depth + 1)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_plain(inner, f"{where}.{i}", depth + 1) for i, inner in enumerate(value)]
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
    target[last] = _plain(_parse_yaml(text, path), path)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, and what it `extends`, and apply the overrides.

    Raises ConfigError with one line that names each wrong key, what is expected and the nearest known name.
    """
    try:
        # by way of JSON: strict types, yet lists for tuples and text for paths
        return validate(json.dumps(_settings(path, overrides)), str(path))
    except ConfigError as error:
        raise ConfigError(_in_one_line(str(error))) from None


def readable_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig | None:
    """The config without its wrong settings, to look for further problems with; None if that is no config."""
    try:
        settings = _settings(path, overrides)
    except ConfigError:
        return None
    for _ in range(MAX_WRONG_SETTINGS):
        try:
            return RunConfig.model_validate_json(json.dumps(settings), strict=True)
        except ValidationError as error:
            removed = [_remove(settings, problem["loc"]) for problem in error.errors()]
            if not any(removed):
                return None
    return None


def _settings(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    settings = _read_settings(path)
    for argument in overrides:
        _override(settings, argument)
    _inline_deepspeed(settings, path)
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


def _read_settings(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a file, put over those of the file that its key `extends` names, relative to it."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file") from None
    settings = _parse_yaml(text, str(path))
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, such as `seed: 0`")
    try:
        settings = _plain(settings)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    _inline_deepspeed(settings, path)  # so that an override can reach into it
    if "extends" not in settings:
        return settings  # type: ignore[no-any-return]
    base = settings.pop("extends")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: {base!r} is not the path of another config")
    chain = (*below, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise ConfigError(f"{path}: extends: {base} extends this file in turn; one of them must stand alone")
    return _put_over(_read_settings(path.parent / base, chain), settings)


def _put_over(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Mappings are joined, key by key; everything else is replaced."""
    joined = dict(base)
    for key, value in settings.items():
        inner = joined.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = _put_over(inner, value)
        joined[key] = value
    return joined


def validate(settings_json: str, where: str) -> RunConfig:
    try:
        return RunConfig.model_validate_json(settings_json, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_describe(error, json.loads(settings_json))}") from None


def _inline_deepspeed(settings: Mapping[str, Any], config_path: Path) -> None:
    """`engine.deepspeed` may name a JSON file, relative to the config; its content takes its place."""
    engine = settings.get("engine")
    if not isinstance(engine, dict) or not isinstance(engine.get("deepspeed"), str):
        return
    path = config_path.parent / engine["deepspeed"]
    try:
        engine["deepspeed"] = _plain(json.loads(path.read_text()), "engine.deepspeed")
    except OSError as error:
        raise ConfigError(f"engine.deepspeed: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"engine.deepspeed: {path} is not valid JSON ({error})") from None


def _describe(error: ValidationError, settings: Any) -> str:
    """All problems of a validation error in one line."""
    problems = []
    for detail in error.errors():
        location = [part for part in detail["loc"] if not str(part).startswith(("function-", "literal"))]
        where = ".".join(str(part) for part in location)
        if detail["type"] == "extra_forbidden":
            problems.append(
                f"{where}: unknown setting; {nearest(str(location[-1]), _known_keys(location[:-1]))}"
            )
        elif detail["type"] == "missing":
            problems.append(f"{where}: is required")
        else:
            got = detail.get("input")
            value = f" (got {got!r})" if isinstance(got, (str, int, float, bool, list)) or got is None else ""
            problems.append(f"{where}: {detail['msg'].removeprefix('Value error, ')}{value}")
    return "; ".join(problems)


def _in_one_line(text: str) -> str:
    """A key or value may hold line breaks and the like."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _known_keys(location: Sequence[Any]) -> list[str]:
    """Field names of the settings at a place of the config."""
    model: Any = RunConfig
    for part in location:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = _model_in(field.annotation) if field else _model_in(model)
        if model is None:
            return []
    return list(model.model_fields)


def _model_in(annotation: Any) -> Any:
    """The settings class inside an annotation such as `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
