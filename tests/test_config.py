from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_config import CONFIG, small_config, write_config

from pretrain.check import check
from pretrain.config import RunConfig, load_config
from pretrain.engine.deepspeed_engine import zero_stage
from pretrain.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"


def refusal(path: Path, *overrides: str, world_size: int = 1) -> str:
    """The one line with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        check(load_config(path, overrides), world_size)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def test_the_small_config_is_accepted(tmp_path: Path) -> None:
    for world_size in (1, 2, 4):
        check(small_config(tmp_path), world_size)


# override -> the key and the remedy that the refusal names
UNKNOWN = {
    "modle.name=x": ("modle", "did you mean 'model'?"),
    "seeed=1": ("seeed", "did you mean 'seed'?"),
    "views.one.sise_px=32": ("views.one.sise_px", "did you mean 'size_px'?"),
    "views.one.jitter.hu=0.1": ("views.one.jitter.hu", "did you mean 'hue'?"),
    "tasks.jigsaw.ration=0.1": ("tasks.jigsaw.ration", "did you mean 'ratio'?"),
    "tasks.rotation.wieght=2": ("tasks.rotation.wieght", "did you mean 'weight'?"),
    "tasks.rotatoin={}": ("tasks.rotatoin", "did you mean 'rotation'?"),
    "tasks.zzz={}": ("tasks.zzz", "clustering, colorization, contrastive"),
    "data.lane=4": ("data.lane", "did you mean 'lanes'?"),
    "data.shard=4": ("data.shard", "did you mean 'shards'?"),
    "log.prometheus.prot=1": ("log.prometheus.prot", "did you mean 'port'?"),
    "schedule.step=1": ("schedule.step", "did you mean 'steps'?"),
    "teacher.momentun=0.9": ("teacher.momentun", "did you mean 'momentum'?"),
}
TYPES = {
    "seed=abc": ("seed", "valid integer (got 'abc')"),
    "seed=1.5": ("seed", "valid integer (got 1.5)"),
    "seed=1.0": ("seed", "valid integer (got 1.0)"),
    "seed=true": ("seed", "valid integer (got True)"),
    "seed='1'": ("seed", "valid integer (got '1')"),
    "seed=": ("seed", "valid integer (got None)"),
    "seed.x=1": ("seed.x", "is a single value"),
    "seed=2001-01-01": ("seed", "put it in quotes"),
    "model.name=5": ("model.name", "valid string (got 5)"),
    "model.class_token=1": ("model.class_token", "valid boolean (got 1)"),
    "model.class_token='yes'": ("model.class_token", "valid boolean (got 'yes')"),
    "optim.base_lr=fast": ("optim.base_lr", "valid number (got 'fast')"),
    "optim.base_lr=true": ("optim.base_lr", "valid number (got True)"),
    "optim.betas=[0.9]": ("optim.betas.1", "is required"),
    "optim.betas=0.9": ("optim.betas", "(got 0.9)"),
    "model={}": ("", ""),  # all defaults: refused for what the views then are
    "data=none": ("data", "object (got 'none')"),
    "views=[one, two]": ("views", "object (got ['one', 'two'])"),
    "tasks.rotation=true": ("tasks.rotation", "object (got True)"),
    "engine.kind=deepsped": ("engine.kind", "'deepspeed' or 'local' (got 'deepsped')"),
    "model.name.x=3": ("model.name.x", "'name' is a single value"),
    "seed": ("seed", "an override reads key=value"),
    "=3": ("=3", "an override reads key=value"),
}
RANGES = {
    "seed=-1": ("seed", "greater than or equal to 0 (got -1)"),
    "optim.base_lr=-1": ("optim.base_lr", "greater than 0 (got -1)"),
    "optim.base_lr=nan": ("optim.base_lr", "valid number (got 'nan')"),
    "optim.base_lr=.nan": ("optim.base_lr", "finite"),
    "optim.base_lr=.inf": ("optim.base_lr", "finite"),
    "optim.base_lr=1e999": ("optim.base_lr", "finite"),
    "optim.betas=[0.9, 1.5]": ("optim.betas.1", "less than 1 (got 1.5)"),
    "optim.betas=[.nan, 0.9]": ("optim.betas.0", "finite"),
    "optim.weight_decay=-0.1": ("optim.weight_decay", "(got -0.1)"),
    "tasks.rotation.weight=.nan": ("tasks.rotation.weight", "finite"),
    "tasks.rotation.weight=-1": ("tasks.rotation.weight", "use 0 or more"),
    "tasks.contrastive.temperature=.inf": ("tasks.contrastive.temperature", "finite"),
    "tasks.contrastive.temperature=0": ("tasks.contrastive.temperature", "greater than 0"),
    "balance.clamp=.inf": ("balance.clamp", "finite"),
    "balance.initial_log_variance=-.inf": ("balance.initial_log_variance", "finite"),
    "teacher.momentum=1.5": ("teacher.momentum", "less than or equal to 1"),
    "teacher.momentum=.nan": ("teacher.momentum", "finite"),
    "normalization.std=[0, 1, 1]": ("normalization.std.0", "greater than 0"),
    "normalization.mean=[1, 1]": ("normalization.mean.2", "is required"),
    "views.one.scale=[0.5, 0.2]": ("views.one.scale", "low to high"),
    "views.one.scale=[0, 1]": ("views.one.scale", "above 0"),
    "views.one.scale=[0.2, 2]": ("views.one.scale", "at most 1.0"),
    "views.one.aspect=[1, .inf]": ("views.one.aspect.1", "finite"),
    "views.one.blur.sigma_px=[-1, 2]": ("views.one.blur.sigma_px", "above 0"),
    "views.one.flip_prob=2": ("views.one.flip_prob", "less than or equal to 1"),
    "views.one.jitter.hue=0.7": ("views.one.jitter.hue", "less than or equal to 0.5"),
    "batch.global_size=0": ("batch.global_size", "greater than 0"),
    "data.lanes=0": ("data.lanes", "greater than 0"),
    "schedule.steps=0": ("schedule.steps", "greater than 0"),
    "checkpoint.every_steps=0": ("checkpoint.every_steps", "greater than 0"),
    "checkpoint.keep_last=-1": ("checkpoint.keep_last", "greater than 0"),
    "log.prometheus.port=70000": ("log.prometheus.port", "65535"),
    "model.drop_path_ratio=1": ("model.drop_path_ratio", "less than 1"),
}
ACROSS = {
    "model.img_px=30": ("model.img_px", "use 28 or 32"),
    "model.img_px=3": ("model.img_px", "use 4"),
    "model.name=vit_tinny_patch16_224": ("model.name", "did you mean 'vit_tiny_patch16_224'?"),
    "model.name=deit_tiny_distilled_patch16_224": ("model", "dist_token; choose a plain ViT"),
    "model.args.dephth=3": ("model.args", "unexpected keyword argument 'dephth'"),
    "model.args.depth=x": ("model.args", "timm refuses them"),
    "model.args.embed_dim=25": ("model.args", "divisible by num_heads"),
    "model.args.img_size=64": ("model.args.img_size", "set that"),
    "model.args.reg_tokens=4": ("model.args.reg_tokens", "follows from 'tasks'"),
    "model.args.global_pool=map": ("model", "attn_pool; choose a plain ViT"),
    "views.one.size_px=64": ("views.one.size_px", "model.img_px, 32"),
    "views={}": ("views", "such as `one: {}`"),
    "views={one: {size_px: 32, turn: true}}": ("tasks.contrastive", "add a view"),
    "views.one.turn=false": ("tasks.rotation", "`turn: true`"),
    "views.one.corrupt=false": ("tasks.jigsaw", "`corrupt` is false"),
    "tasks={}": ("tasks", "name one or more of contrastive, rotation"),
    "tasks={rotation: null}": ("tasks", "name one or more of"),
    "tasks.contrastive.views=[one, tow]": ("tasks.contrastive.views", "known: one, two"),
    "tasks.contrastive.views=[one, one]": ("tasks.contrastive.views", "one or more different views"),
    "tasks.jigsaw.ratio=0.9": ("tasks", "lower their ratios"),
    "batch.global_size=18": ("batch.global_size", "nearest legal values: 16 and 24"),
    "batch.global_size=4": ("batch.global_size", "nearest legal value: 8"),
    "batch.accumulation_steps=3": ("batch.global_size", "nearest legal values: 12 and 24"),
    "schedule.epochs=2": ("schedule", "either `steps` or `epochs`"),
    "schedule={}": ("schedule", "either `steps` or `epochs`"),
    "schedule={steps: 10, warmup_steps: 1, warmup_epochs: 1}": ("schedule", "give one of"),
    "engine.deepspeed=absent.json": ("engine.deepspeed", "cannot be read"),
    "engine.deepspeed=broken.json": ("engine.deepspeed", "is not valid JSON"),
    "engine.deepspeed=list.json": ("engine.deepspeed", "object (got [1])"),
    "engine.deepspeed={zero_optimization: {stage: 7}}": (
        "engine.deepspeed.zero_optimization.stage",
        "0, 1, 2, 3",
    ),
    "engine.deepspeed={zero_optimization: {stage: true}}": (
        "engine.deepspeed.zero_optimization.stage",
        "0, 1, 2, 3",
    ),
    "engine.deepspeed={zero_optimization: {stage: '2'}}": (
        "engine.deepspeed.zero_optimization.stage",
        "0, 1, 2, 3",
    ),
    "engine.deepspeed={train_batch_size: 64}": ("engine.deepspeed.train_batch_size", "'batch.global_size'"),
    "engine.deepspeed={gradient_clipping: 1}": ("engine.deepspeed.gradient_clipping", "'optim.clip_norm'"),
    "engine.deepspeed={bf16: {enabled: true}}": ("engine.deepspeed.bf16", "'engine.precision'"),
    "engine.deepspeed={optimizer: {type: Adam}}": ("engine.deepspeed.optimizer", "'optim'"),
    "engine.deepspeed={scheduler: {}}": ("engine.deepspeed.scheduler", "'schedule'"),
}


@pytest.mark.parametrize(
    ("override", "told"), [*UNKNOWN.items(), *TYPES.items(), *RANGES.items(), *ACROSS.items()]
)
def test_a_bad_setting_is_refused_in_one_line_that_names_it_and_the_remedy(
    override: str, told: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "broken.json").write_text('{"zero_optimization": ')
    (tmp_path / "list.json").write_text("[1]")
    path = write_config(tmp_path)
    message = refusal(path, override).removeprefix(f"{path}: ")
    assert message.startswith((told[0], f"'{told[0]}'"))
    assert told[1] in message


def test_what_depends_on_the_number_of_ranks_is_refused_with_what_would_do(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    message = refusal(path, world_size=3)
    assert message.startswith("data.lanes: 4 ")
    assert "nearest legal values: 3 and 6" in message
    message = refusal(path, "engine.kind=local", world_size=2)
    assert message.startswith("engine.kind: ")
    assert "'deepspeed'" in message
    check(load_config(path, ["engine.kind=local"]), world_size=1)


TEXTS = {
    "": "expected a mapping",
    "# nothing\n": "expected a mapping",
    "- seed\n- 1\n": "expected a mapping",
    "just words\n": "expected a mapping",
    CONFIG + "seed: 4\n": "line 14: the key 'seed' stands twice; remove one",
    CONFIG.replace(
        "rotation: {}", "rotation: {}\n  rotation: {}"
    ): "line 10: the key 'rotation' stands twice",
    CONFIG.replace("  rotation: {}", "\trotation: {}"): r"line 9: found character '\t'",
    CONFIG.replace("  rotation: {}", " rotation: {}"): "line 9: ",
    CONFIG.replace("{steps: 10}", "{steps: 10"): "line ",
    CONFIG + "x: !!python/object/apply:os.system ['exit 1']\n": "line 14: could not determine a constructor",
    CONFIG + "x: !!python/object:os.system {}\n": "line 14: could not determine a constructor",
    CONFIG + "? [a, b]\n: 1\n": "line 14: a key must be a plain word",
    CONFIG + "model2: &me {inner: *me}\n": "does it contain itself?",
    CONFIG + "x: *nobody\n": "line 14: found undefined alias",
    CONFIG + "x: 2001-99-99\n": "not valid YAML",
    CONFIG + "---\nseed: 1\n": "but found another document",
    CONFIG + "x: \x07\n": "not valid YAML",
    CONFIG.replace("data: {shards: shards, lanes: 4}\n", ""): "data: is required",
    CONFIG.replace("shards: shards, ", ""): "data: give either 'shards' or 'sources'",
    CONFIG.replace("schedule: {steps: 10}\n", ""): "schedule: is required",
}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_file_that_is_not_a_plain_run_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert TEXTS[text] in message


def refusal_of(path: Path) -> str | None:
    try:
        load_config(path)
    except ConfigError as error:
        return str(error)
    return None


def assert_read_or_refused_in_one_line(path: Path) -> None:
    message = refusal_of(path)
    if message is not None:
        assert message.startswith((f"{path}:", "engine.deepspeed: "))
        assert len(message.splitlines()) == 1, repr(message)


# of what YAML gives a meaning to, and of what is only text
PIECES = st.text(alphabet=" \n\t:,-?&*!|>'\"%@`#{}[]<=~.0159einafxX_\\\0\x1b\x85\u2028ü", max_size=12)
TEXT = st.one_of(
    PIECES, st.sampled_from(["<<: *view", "!!python/name:os.system ", "\n---\n", "1e999", "0x_"])
)


@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(CONFIG)), st.integers(0, 12), TEXT), min_size=1, max_size=3)
)
def test_a_file_in_which_characters_were_changed_is_read_or_refused_in_one_line(
    changes: list[tuple[int, int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Row 38. Each change: where it begins, how many characters go, and what comes in their place."""
    text = CONFIG
    for place, num_characters, new in changes:
        text = text[:place] + new + text[place + num_characters :]
    path = tmp_path_factory.getbasetemp() / "characters.yaml"
    path.write_text(text, newline="")
    assert_read_or_refused_in_one_line(path)


SINGLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.dates(),
)
VALUES = st.recursive(
    SINGLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(section: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The keys that lead to every setting and to every section."""
    inner = section if isinstance(section, dict) else {}
    found = [place for key, value in inner.items() for place in places(value, (*path, key))]
    return [path, *found] if path else found


PLACES = places(yaml.safe_load(CONFIG))


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=2))
@example(changes=[(("model",), {"a\nb": 1})])
def test_a_file_with_other_values_is_read_or_refused_in_one_line(
    changes: list[tuple[tuple[str, ...], Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Row 38: of every type and size, in place of any setting or section."""
    content = copy.deepcopy(yaml.safe_load(CONFIG))
    for (*sections, last), value in changes:
        section = content
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[last] = value
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    assert_read_or_refused_in_one_line(path)


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in refusal(tmp_path / "absent.yaml")
    assert "cannot be read (Is a directory" in refusal(tmp_path)
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    assert "is not a text file" in refusal(tmp_path / "image.yaml")


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(write_config(tmp_path), "seeed=1", "batch.global_size=-4", "views.one.sise_px=3")
    assert all(key in message for key in ("seeed: ", "batch.global_size: ", "views.one.sise_px: "))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "1.0e-4", "0.0001", "+1e-04"])
def test_a_number_in_exponent_form_is_a_number(text: str, tmp_path: Path) -> None:
    assert small_config(tmp_path, f"optim.base_lr={text}").optim.base_lr == 1e-4
    path = write_config(tmp_path, CONFIG + f"optim: {{base_lr: {text}}}\n")
    assert load_config(path).optim.base_lr == 1e-4


def test_an_override_of_one_view_leaves_views_written_as_its_alias_alone(tmp_path: Path) -> None:
    config = small_config(tmp_path, "views.one.gray_prob=0.75")
    assert config.views["one"].gray_prob == 0.75
    assert config.views["two"].gray_prob == 0.2


def test_merged_yaml_mappings_may_replace_what_they_take_over(tmp_path: Path) -> None:
    text = CONFIG.replace(
        "two: *view", "two: &second {<<: *view, gray_prob: 0.5}\n  three: {<<: *second, gray_prob: 0.1}"
    )
    config = load_config(write_config(tmp_path, text))
    assert [view.gray_prob for view in config.views.values()] == [0.2, 0.5, 0.1]
    assert all(view.turn for view in config.views.values())


def test_overrides_reach_any_depth_and_the_last_one_counts(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, "teacher.momentum=0.5", "seed=1", "seed=2", "tasks.rotation=null", "views.one.jitter.prob=0"
    )
    assert config.teacher is not None
    assert config.teacher.momentum == 0.5
    assert config.seed == 2
    assert list(config.tasks.enabled()) == ["contrastive", "jigsaw"]
    assert config.views["one"].jitter.prob == 0


def test_a_setting_cannot_be_changed_after_it_was_read(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 5  # type: ignore[misc]


def test_the_deepspeed_file_is_found_beside_the_config_and_written_out_in_full(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    config = small_config(tmp_path, "engine.deepspeed=zero.json")
    assert config.engine.deepspeed == {"zero_optimization": {"stage": 2}}
    assert "zero.json" not in config.to_yaml()


SHIPPED = sorted(  # of runs: studies and recipes of detectors and segmenters are settings of another kind
    path
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name not in ("studies", "transfer") or path.stem.endswith("_pretrain")
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_shipped_config_passes_the_checks(path: Path, world_size: int) -> None:
    check(load_config(path), world_size)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_resolved_config_reads_back_as_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["teacher.momentum=0.99", "optim.base_lr=1e-4"])
    copy = tmp_path / "config.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(copy) == config
    assert isinstance(config, RunConfig)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_config_begins_with_how_to_run_it_and_on_what(path: Path) -> None:
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header
    assert path.name in header.group() or f"make {path.stem}" in header.group()
    assert "Hardware" in header.group()


def test_shipped_deepspeed_files_hold_only_what_is_not_set_elsewhere(tmp_path: Path) -> None:
    files = sorted((CONFIGS / "deepspeed").glob("*.json"))
    assert len(files) >= 4
    for file in files:
        check(small_config(tmp_path, f"engine.deepspeed={file}"), 1)


def test_an_override_reaches_into_the_deepspeed_file_that_a_config_names() -> None:
    path = Path(__file__).parents[1] / "configs" / "demo.yaml"
    config = load_config(path, ["engine.deepspeed.zero_optimization.stage=3"])
    assert zero_stage(config.engine) == 3


def test_nothing_that_is_shipped_holds_a_placeholder() -> None:
    root = Path(__file__).parents[1]
    for path in (root / "README.md", *(root / "configs").rglob("*.yaml")):
        assert not re.findall(r"@[A-Z_]+@", path.read_text()), path
