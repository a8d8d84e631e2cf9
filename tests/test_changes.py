"""What may differ between a run and the checkpoint it continues from, and what may not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel
from safetensors.torch import save_file
from small_config import small_config
from small_shards import make_shards

from pretrain import build, checkpoint
from pretrain.changes import (
    ALLOWED_KEYS,
    DATA_KEYS,
    SETTINGS,
    Changes,
    check_allowed,
    check_fit,
    compare,
    num_bytes,
    outline,
    setting_of,
)
from pretrain.config import RunConfig
from pretrain.data.loader import open_splits
from pretrain.errors import CheckpointError, ConfigError
from pretrain.optim import build_optimizer
from pretrain.peers import ALONE
from pretrain.preflight import identity


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    make_shards(folder, [12, 12])
    return folder


def changed(shards: Path, folder: Path, *overrides: str, before: tuple[str, ...] = ()) -> Changes:
    """Between a run and the same with overrides, the first read back as it is from a checkpoint."""
    old, new = (small_config(folder, f"data.shards={shards}", *settings) for settings in (before, overrides))
    identities = [identity(config, open_splits(config.data)) for config in (old, new)]
    return compare(yaml.safe_load(old.to_yaml()), identities[0], new, identities[1])


def fields_of(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Paths of all settings, as deep as the sections are given by name."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields_of(inner, f"{path}{name}.")
        else:
            yield path + name


def test_every_setting_is_either_bound_to_the_checkpoint_or_safe_for_a_reason(
    shards: Path, tmp_path: Path
) -> None:
    """A new setting has to be put into SETTINGS; one that is gone has to leave it."""
    config = small_config(tmp_path, f"data.shards={shards}")
    known = set(identity(config, open_splits(config.data)))
    paths = list(fields_of(RunConfig))
    assert len(paths) > 40
    for path in paths:
        setting = setting_of(path)
        assert setting is not None, f"{path}: put it into SETTINGS, as safe or as part of the identity"
        assert setting.seen_as or setting.why, path
        assert set(setting.seen_as) <= known, path
    for path in SETTINGS:
        assert any(f"{field}.".startswith(f"{path}.") for field in paths), f"{path}: there is none any more"
    bound = {key for setting in SETTINGS.values() for key in setting.seen_as}
    assert bound == known, "a key of the identity that no setting is told to show in"
    allowed = [key for keys in ALLOWED_KEYS.values() for key in keys]
    assert sorted([*allowed, *DATA_KEYS]) == sorted(known), "each key is allowed by exactly one flag"


OTHERS: dict[type, Any] = {
    bool: lambda value: not value,
    int: lambda value: value + 1,
    float: lambda value: value + 0.125,
}


def test_every_single_setting_that_is_changed_is_told_once(shards: Path, tmp_path: Path) -> None:
    """Fault row 7: nothing changes silently. Sections of one number each, found by walking the settings."""
    config = small_config(tmp_path, f"data.shards={shards}")
    splits, told = open_splits(config.data), []
    own = identity(config, splits)
    saved = yaml.safe_load(config.to_yaml())

    def walk(settings: BaseModel, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in type(settings).model_fields:
            value = getattr(settings, name)
            if isinstance(value, BaseModel):
                for inner, update in walk(value, f"{path}{name}."):
                    yield inner, {name: value.model_copy(update=update)}
            elif type(value) in OTHERS:
                yield path + name, {name: OTHERS[type(value)](value)}

    for path, update in walk(config, ""):
        new = config.model_copy(update=update)
        found = compare(saved, own, new, identity(new, splits))
        lines = [*found.safe, *found.unsafe]
        assert len(lines) == 1, f"{path}: {lines}"
        setting = setting_of(path)
        assert setting is not None
        assert bool(found.unsafe) == bool(setting.seen_as), path
        assert ": was " in lines[0]
        told.append(path)
    assert len(told) > 60


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.base_lr=5e-4", "optim.base_lr: was 0.001, now 0.0005"),
        ("schedule.steps=20", "schedule.steps: was 10, now 20"),
        ("engine.precision=bf16", "engine.precision: was 'fp32', now 'bf16'"),
        ("data.decode_threads=0", "data.decode_threads: was 2, now 0"),
        ("checkpoint.every_steps=7", "checkpoint.every_steps: was 1000, now 7"),
    ],
)
def test_a_safe_change_is_told_and_let_through(
    override: str, line: str, shards: Path, tmp_path: Path
) -> None:
    """Fault row 7: safe settings are told."""
    found = changed(shards, tmp_path, override, before=("optim.base_lr=1e-3",) * ("lr" in override))
    assert found == Changes([line], [], ())
    assert not found.moves_data
    check_allowed(tmp_path, found)


@pytest.mark.parametrize(
    ("override", "flag", "lines"),
    [
        ("tasks.jigsaw.ratio=0.2", "tasks", ["tasks.jigsaw.ratio: was 0.1275, now 0.2"]),
        ("views.one.gray_prob=0.5", "views", ["views.one.gray_prob: was 0.2, now 0.5"]),
        ("balance.kind=fixed", "balance", ["balance.kind: was 'uncertainty', now 'fixed'"]),
        ("batch.global_size=32", "batch", ["global_batch: was 16, now 32"]),
        ("batch.accumulation_steps=1", "batch", ["accumulation_steps: was 2, now 1"]),
        ("seed=4", "seed", ["seed: was 3, now 4"]),
        ("model.drop_path_ratio=0.1", "model", ["model.drop_path_ratio: was 0.0, now 0.1"]),
        ("optim={name: sgd}", "optimizer", ["optimizer: was 'adamw', now 'sgd'"]),
        ("data.max_pixels=1000000", "max_pixels", None),
        ("normalization.mean=[0.5, 0.5, 0.5]", "normalization", None),
        ("teacher={momentum: 0.9}", "teacher", None),
    ],
)
def test_an_unsafe_change_is_refused_with_the_flag_that_lets_it_through(
    override: str, flag: str, lines: list[str] | None, shards: Path, tmp_path: Path
) -> None:
    """Fault row 7: unsafe settings are refused unless allowed by name."""
    found = changed(shards, tmp_path, override)
    assert lines is None or found.unsafe == lines
    with pytest.raises(CheckpointError, match=re.escape(found.unsafe[0])) as caught:
        check_allowed(tmp_path, found)
    assert f"; --allow-change {flag} with the new settings; restore them" in str(caught.value)
    assert "\n" not in str(caught.value)
    other = "tasks" if flag != "tasks" else "views"
    with pytest.raises(CheckpointError, match=f"--allow-change {flag} "):
        check_allowed(tmp_path, found, (other,), allow_new_data=True)
    check_allowed(tmp_path, found, (other, flag))


def test_changed_data_need_their_own_flag_and_are_read_from_their_beginning(
    shards: Path, tmp_path: Path
) -> None:
    """Fault row 8, and what else gives a step another place in the data."""
    make_shards(tmp_path / "others", [12, 11, 1])
    found = changed(shards, tmp_path, f"data.shards={tmp_path / 'others'}", "tasks.rotation.weight=2")
    assert found.keys == ("manifest_hash", "tasks")
    assert found.moves_data
    for flags in ((("tasks",), False), ((), True)):
        with pytest.raises(CheckpointError, match="other settings"):
            check_allowed(tmp_path, found, *flags)
    with pytest.raises(
        CheckpointError, match=r"manifest_hash: was .*--allow-new-data goes on with the new data"
    ):
        check_allowed(tmp_path, found, ("tasks",))
    check_allowed(tmp_path, found, ("tasks",), allow_new_data=True)
    moved = {
        override: changed(shards, tmp_path, override).moves_data
        for override in ("seed=4", "batch.global_size=32", "data.lanes=8", "batch.accumulation_steps=1")
    }
    # a step is as many images in one micro step as in two, so the last changes no place
    assert list(moved.values()) == [True, True, True, False]


def test_the_same_shards_elsewhere_are_no_other_data(shards: Path, tmp_path: Path) -> None:
    make_shards(tmp_path / "copy", [12, 12])
    found = changed(shards, tmp_path, f"data.shards={tmp_path / 'copy'}")
    assert found.unsafe == []
    assert found.safe == [f"data.shards: was '{shards}', now '{tmp_path / 'copy'}'"]


def test_a_checkpoint_of_an_older_version_is_compared_with_the_defaults_of_what_it_lacks(
    shards: Path, tmp_path: Path
) -> None:
    config = small_config(tmp_path, f"data.shards={shards}")
    own, saved = identity(config, open_splits(config.data)), yaml.safe_load(config.to_yaml())
    del saved["log"], saved["guard"]
    assert compare(saved, own, config, own) == Changes([], [], ())
    saved["gone"] = 3  # a setting that this version does not have any more
    assert "gone: was 3, now None" in compare(saved, own, config, own).safe
    assert compare({}, {}, config, own).unsafe, "without an identity nothing is known to be the same"


@pytest.mark.parametrize(
    ("name", "told"),
    [("task", "did you mean 'tasks'?"), ("lanes", "--allow-new-data"), ("what", "known: balance, ")],
)
def test_a_flag_that_names_no_bound_setting_is_refused(name: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        check_allowed(tmp_path, Changes([], [], ()), (name,))


def written(folder: Path, config: RunConfig) -> Path:
    """A checkpoint's tensors as a run with these settings has them."""
    module = build.module(config, ALONE, torch.device("cpu"), 24)
    keys = build_optimizer(module, config.optim, module.parameter_rules()).state_keys
    files = {
        checkpoint.STUDENT: {name: value.contiguous() for name, value in module.state_dict().items()},
        checkpoint.OPTIMIZER: {
            f"{key}.{name}": torch.zeros_like(p)
            for key in keys
            for name, p in module.named_parameters()
            if p.requires_grad
        },
    }
    if config.teacher:
        files[checkpoint.TEACHER] = module.make_teacher().state_dict()
    for name, tensors in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    return folder


@pytest.mark.parametrize("override", ["seed=3", "optim={name: lars}", "teacher={momentum: 0.9}"])
def test_the_outline_of_a_checkpoint_has_the_tensors_and_bytes_of_a_real_one(
    override: str, shards: Path, tmp_path: Path
) -> None:
    config = small_config(tmp_path, f"data.shards={shards}", override)
    folder = written(tmp_path / "saved", config)
    files = outline(config, 24)
    assert all(tensor.is_meta for tensors in files.values() for tensor in tensors.values())
    check_fit(folder, Changes([], [], ()), files)
    on_disk = sum((folder / name).stat().st_size for name in files)
    headers = 200 * sum(len(tensors) for tensors in files.values())
    assert on_disk - headers < num_bytes(files) <= on_disk


def test_a_model_that_cannot_be_outlined_is_built_instead(shards: Path, tmp_path: Path) -> None:
    """Bins of colours are computed from values, which the outline does not have."""
    config = small_config(tmp_path, f"data.shards={shards}", "tasks={colorization: {target: ab_cls}}")
    files = outline(config, 24)
    check_fit(written(tmp_path / "saved", config), Changes([], [], ()), files)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.args.depth=1", "model is not enough: .*student.* 'backbone.blocks.1"),
        ("model.args.embed_dim=36", r"\[1, 1, 24\] there, \[1, 1, 36\] here"),
        ("tasks.jigsaw=null", "tasks is not enough: .*such as '.*jigsaw"),
        ("optim={name: sgd}", "optimizer is not enough: .*optimizer.safetensors.*momentum_buffer"),
        ("tasks.rotation.weight=2", None),
        ("model.drop_path_ratio=0.2", None),
        ("optim={name: lars}", "optimizer is not enough: .*such as 'momentum_buffer"),
        ("teacher={momentum: 0.9}", None),
    ],
)
def test_an_allowed_change_is_refused_where_the_tensors_would_not_fit(
    override: str, told: str | None, shards: Path, tmp_path: Path
) -> None:
    """Fault row 7: another model or optimizer cannot be let through."""
    folder = written(tmp_path / "saved", small_config(tmp_path, f"data.shards={shards}"))
    found = changed(shards, tmp_path, override)
    check_allowed(folder, found, tuple(ALLOWED_KEYS))
    files = outline(small_config(tmp_path, f"data.shards={shards}", override), 24)
    if told is None:
        check_fit(folder, found, files)
        return
    with pytest.raises(CheckpointError, match=told) as caught:
        check_fit(folder, found, files)
    assert "\n" not in str(caught.value)
