"""RunConfig: the sum of the parts' settings, read strictly from YAML and `key=value` overrides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, create_model

from pretrain.checkpoint_writer import CheckpointConfig
from pretrain.cluster import ClusterConfig
from pretrain.conflict import GradientsConfig
from pretrain.data.loader import DataConfig
from pretrain.engine.engine import EngineConfig
from pretrain.engine.monitors import WandbConfig
from pretrain.errors import ConfigError
from pretrain.final_export import FinalExportConfig
from pretrain.guard import GuardConfig
from pretrain.metrics.exporter import PrometheusConfig
from pretrain.models.backbone import BackboneConfig
from pretrain.online_knn import OnlineKnnConfig
from pretrain.optim import NotNegative, OptimConfig, Positive
from pretrain.preempt import PreemptConfig
from pretrain.settings import Settings, plain, read_settings, readable_settings, validated
from pretrain.tasks import TASKS
from pretrain.tasks.balance import BalanceConfig
from pretrain.views.plan import ViewConfig
from pretrain.watchdog import WatchdogConfig

Count = Annotated[int, Field(gt=0)]


class NormalizationConfig(Settings):
    """Per-channel mean and standard deviation of the pixels in [0, 1]; ImageNet's by default."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)


class BatchConfig(Settings):
    """The global batch is over all ranks; the micro batch follows from the number of ranks."""

    global_size: Count
    accumulation_steps: Count = 1


class ScheduleConfig(Settings):
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


class TeacherConfig(Settings):
    """An averaged copy of the backbone, and of the heads that tasks want it to have."""

    momentum: Annotated[float, Field(ge=0.0, le=1.0)] = 0.996  # at the start
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # to 1 along half a cosine, or a line
    update: Literal["after", "before"] = "after"  # the optimizer step, or the keys of a step (MoCo, MoBY)


class LogConfig(Settings):
    """What is told of a run, and how often."""

    every_steps: Count = 10
    health_every_steps: Count = 50  # effective rank of the features, which is too dear for every step
    gradients: GradientsConfig | None = GradientsConfig()  # of several tasks; null: never
    prometheus: PrometheusConfig = PrometheusConfig()
    tensorboard: bool = False  # into tensorboard/ of the run folder
    wandb: WandbConfig | None = None


class _AnyTasks(Settings):
    def enabled(self) -> dict[str, Any]:
        """The settings of the tasks that are named, in the order of the TASKS table."""
        return {name: getattr(self, name) for name in TASKS if getattr(self, name) is not None}


_FIELDS: dict[str, Any] = {name: (spec.config | None, None) for name, spec in TASKS.items()}
TasksConfig: Any = create_model("TasksConfig", __base__=_AnyTasks, **_FIELDS)


class RunConfig(Settings):
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
    export: FinalExportConfig = FinalExportConfig()
    log: LogConfig = LogConfig()
    online_knn: OnlineKnnConfig | None = None
    guard: GuardConfig = GuardConfig()
    preempt: PreemptConfig = PreemptConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    cluster: ClusterConfig = ClusterConfig()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, and what it `extends`, and apply the overrides.

    Raises ConfigError with one line that names each wrong key, what is expected and the nearest known name.
    """
    return read_settings(RunConfig, path, overrides, inline=_inline_deepspeed)


def readable_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig | None:
    """The config without its wrong settings, to look for further problems with; None if that is no config."""
    return readable_settings(RunConfig, path, overrides, inline=_inline_deepspeed)


def validate(settings_json: str, where: str) -> RunConfig:
    return validated(RunConfig, settings_json, where)


def _inline_deepspeed(settings: Mapping[str, Any], config_path: Path) -> None:
    """`engine.deepspeed` may name a JSON file, relative to the config; its content takes its place."""
    engine = settings.get("engine")
    if not isinstance(engine, dict) or not isinstance(engine.get("deepspeed"), str):
        return
    path = config_path.parent / engine["deepspeed"]
    try:
        engine["deepspeed"] = plain(json.loads(path.read_text()), "engine.deepspeed")
    except OSError as error:
        raise ConfigError(f"engine.deepspeed: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"engine.deepspeed: {path} is not valid JSON ({error})") from None
