"""What the schema beside the code makes of a config is what the classes make of it, and fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from method_configs import METHODS, PATHS
from small_config import write_config

from pretrain.config import load_config
from pretrain.errors import ConfigError
from pretrain.plan import schema
from pretrain.plan.settings import _NotPlainError, plan_settings, read_plainly

CONFIGS = METHODS.parent
ALL = [*sorted(CONFIGS.glob("*.yaml")), *PATHS]
IMAGENET = sorted(CONFIGS.glob("imagenet_*.yaml"))


def test_the_schema_beside_the_code_is_that_of_the_classes() -> None:
    assert schema.PATH.read_text() == schema.to_text(schema.run_schema()), (
        "a setting was changed; run `python -m pretrain.plan.schema`"
    )


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_config_reads_as_the_classes_read_it(path: Path) -> None:
    settings = plan_settings(path, ["batch.global_size=4096"])
    loaded = load_config(path, ["batch.global_size=4096"]).model_dump(mode="json")
    assert settings == loaded
    assert list(settings["tasks"]) == list(loaded["tasks"])


def test_configs_without_masks_need_no_classes() -> None:
    for path in [*IMAGENET, METHODS / "dino_vitb16.yaml", METHODS / "moby_swin_t.yaml"]:
        assert read_plainly(path)["seed"] == 0
    with pytest.raises(_NotPlainError):
        read_plainly(METHODS / "mae_vitb16.yaml")


@pytest.mark.parametrize(
    "overrides",
    [
        ["batch.global_size=0"],
        ["batch.global_size=1.5"],
        ["batch.global_size=true"],
        ["tasks.rotatoin={}"],
        ["optim.name=adam"],
        ["optim={nesterov: true, momentum: 0.0}"],
        ["data.sources=[{shards: elsewhere}]"],
        ["views.one.mask={kind: block, how: drop}"],
        ["checkpoint.mirror=ftp://somewhere"],
        ["normalization.mean=[0.5, 0.5]"],
        ["engine.deepspeed=absent.json"],
        ["no-override"],
        ["schedule.epochs=soon"],
    ],
)
def test_what_a_run_would_refuse_is_refused_in_the_same_words(tmp_path: Path, overrides: list[str]) -> None:
    path = write_config(tmp_path)
    with pytest.raises(ConfigError) as of_run:
        load_config(path, overrides)
    with pytest.raises(ConfigError) as of_plan:
        plan_settings(path, overrides)
    assert str(of_plan.value) == str(of_run.value)


def test_what_a_class_completes_is_completed(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    settings = plan_settings(path, ["views.one.mask={kind: block}"])
    assert (settings["views"]["one"]["mask"]["how"], settings["views"]["one"]["mask"]["ratio"]) == (
        "token",
        0.4,
    )


def test_a_schema_that_does_not_know_a_setting_leaves_the_word_to_the_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = json.loads(schema.PATH.read_text())
    del old["$defs"]["BatchConfig"]["properties"]["accumulation_steps"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    monkeypatch.setattr("pretrain.plan.settings.PATH", tmp_path / "old.json")
    path = write_config(tmp_path)
    assert plan_settings(path) == load_config(path).model_dump(mode="json")
    monkeypatch.setattr("pretrain.plan.settings.PATH", tmp_path / "none.json")
    assert plan_settings(path) == load_config(path).model_dump(mode="json")


def test_a_plan_of_the_imagenet_configs_takes_seconds_and_no_torch() -> None:
    program = """
import json, resource, sys
from pretrain.cli import main
codes = [main(["plan", path, "--nodes", "8", "--gpus-per-node", "8", "--images", "1281167"])
         for path in sys.argv[1:]]
used = resource.getrusage(resource.RUSAGE_SELF)
told = [codes, used.ru_utime + used.ru_stime, [name for name in ("torch", "timm") if name in sys.modules]]
print(json.dumps(told), file=sys.stderr)
"""
    paths = [str(CONFIGS / f"imagenet_{name}_multitask.yaml") for name in ("vitb16", "vitl16")]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, timeout=60, check=True
    )
    codes, seconds, imported = json.loads(done.stderr.splitlines()[-1])
    assert codes == [0, 0]
    assert imported == []
    assert seconds < 3.0  # of the processor, both together: no matter what else it does
    assert done.stdout.count("PREDICTION") == 2
