from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_config import small_config
from small_scenes import write_folder
from small_study import STUDY, write_study

from pretrain.config import load_config
from pretrain.errors import ConfigError, UserError
from pretrain.sweep.execute import known_costs
from pretrain.sweep.runs import (
    PROGRESS,
    Run,
    Sweep,
    differences,
    mixed_protocols,
    open_sweep,
    plan_runs,
    refuse_changed,
    scaled_schedule,
    write_json,
    write_text,
)


def small_sweep(folder: Path, text: str = STUDY, *overrides: str) -> Sweep:
    return open_sweep(write_study(folder, text), folder / "out", overrides=overrides)


def by_name(runs: list[Run]) -> dict[str, Run]:
    return {run.name: run for run in runs}


def test_every_variant_runs_with_every_seed_and_whole_seeds_come_first(tmp_path: Path) -> None:
    runs = plan_runs(small_sweep(tmp_path))
    names = ["both/seed-0", "rotation/seed-0", "both/seed-1", "rotation/seed-1"]
    assert [run.name for run in runs] == names
    assert [run.config.seed for run in runs] == [0, 0, 1, 1]
    assert len({run.folder for run in runs}) == len({run.config_hash for run in runs}) == 4


def test_the_overrides_that_train_is_given_make_the_config_that_is_hashed(tmp_path: Path) -> None:
    sweep = small_sweep(tmp_path, STUDY, "optim.weight_decay=0.01")
    for run in plan_runs(sweep):
        assert load_config(sweep.base_of(run.variant), run.overrides) == run.config
        assert run.config.optim.weight_decay == 0.01
        assert run.config.tasks.jigsaw is None
        assert (run.config.tasks.contrastive is None) == (run.variant == "rotation")


def test_a_variant_may_start_from_a_config_of_its_own(tmp_path: Path) -> None:
    small_sweep(tmp_path)
    (tmp_path / "other.yaml").write_text("extends: run.yaml\noptim: {weight_decay: 0.5}\n")
    text = STUDY.replace(
        "variants:\n",
        "variants:\n  other: {base: other.yaml, overrides: [tasks.jigsaw=null, optim.base_lr=0.25]}\n",
    )
    sweep = small_sweep(tmp_path, text)
    first, *_ = plan_runs(sweep)
    assert first.variant == "other"
    assert (first.config.optim.weight_decay, first.config.optim.base_lr) == (0.5, 0.25)
    assert load_config(sweep.base_of("other"), first.overrides) == first.config
    assert sweep.base_of("both").name == "run.yaml"
    assert len(plan_runs(sweep)) == 6
    fewer = text.replace("optim.base_lr=0.25]}", "optim.base_lr=0.25], seeds: [1]}")
    assert [run.seed for run in plan_runs(small_sweep(tmp_path, fewer)) if run.variant == "other"] == [1]
    with pytest.raises(ConfigError, match=r"variants.other.seeds: has \[2\]; name some of \[0, 1\]"):
        small_sweep(tmp_path, text.replace("optim.base_lr=0.25]}", "optim.base_lr=0.25], seeds: [2]}"))
    (tmp_path / "other.yaml").unlink()
    with pytest.raises(ConfigError, match=r"variant 'other': .*other\.yaml: cannot be read"):
        plan_runs(sweep)


def test_counted_flops_make_compute_equal_on_any_machine(tmp_path: Path) -> None:
    text = STUDY.replace("variants:\n", "budget: compute\ncost: flops\nreference: rotation\nvariants:\n")
    sweep = small_sweep(tmp_path, text, "schedule.steps=100000")
    costs = known_costs(sweep)
    assert costs is not None
    assert costs["both"] > costs["rotation"]  # a head more
    steps = {run.variant: run.config.schedule.steps for run in plan_runs(sweep, costs)}
    assert steps == {"rotation": 100000, "both": round(100000 * costs["rotation"] / costs["both"])}


def test_a_wrong_variant_is_told_by_name_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"variant 'both': .*did you mean 'jigsaw'"):
        plan_runs(small_sweep(tmp_path, STUDY.replace("both: [tasks.jigsaw", "both: [tasks.jigsw")))
    with pytest.raises(ConfigError, match=r"variant 'both': batch.global_size: "):
        plan_runs(small_sweep(tmp_path, STUDY, "batch.global_size=18"))
    with pytest.raises(ConfigError, match="seed of its own"):
        small_sweep(tmp_path, STUDY, "seed=4")


def test_a_subset_holds_exactly_its_tasks_and_one_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    text = "base: run.yaml\nsubsets: {of: [contrastive, rotation, jigsaw]}\n"
    runs = plan_runs(small_sweep(tmp_path, text))
    assert len(runs) == 7
    for run in runs:
        named = ["contrastive", "rotation", "jigsaw"] if run.variant == "all" else run.variant.split("+")
        assert list(run.config.tasks.enabled()) == named
    absent = text.replace("jigsaw", "inpainting")
    with pytest.raises(ConfigError, match=r"no task 'inpainting' .*add 'tasks.inpainting=\{\}'"):
        plan_runs(small_sweep(tmp_path, absent))
    added = plan_runs(
        small_sweep(tmp_path, f"{absent}overrides: ['tasks.inpainting={{}}', tasks.jigsaw=null]\n")
    )
    assert [len(run.config.tasks.enabled()) for run in added] == [1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("override", ["schedule.steps=6", "batch.global_size=32"])
def test_variants_that_see_other_numbers_of_images_need_a_budget_that_says_so(
    override: str, tmp_path: Path
) -> None:
    text = STUDY.replace("both: [", f"both: [{override}, ")
    with pytest.raises(ConfigError, match=r"variant 'rotation': .*make them equal, or set budget: as_given"):
        plan_runs(small_sweep(tmp_path, text))
    assert len(plan_runs(small_sweep(tmp_path, f"{text}budget: as_given\n"))) == 4


@pytest.mark.parametrize(("reference", "steps"), [("", (90, 360)), ("reference: rotation", (22, 90))])
def test_a_compute_budget_gives_all_variants_the_same_steps_times_seconds(
    reference: str, steps: tuple[int, int], tmp_path: Path
) -> None:
    """By hand: 90 steps of 0.4 s are 360 steps of 0.1 s; 90 of 0.1 s are 22.5, so 22, of 0.4 s."""
    cost = {"both": 0.4, "rotation": 0.1}
    text = f"{STUDY}budget: compute\n{reference}\n"
    sweep = small_sweep(tmp_path, text, "schedule.steps=90", "schedule.warmup_steps=10")
    runs = by_name(plan_runs(sweep, cost))
    both, rotation = (runs[f"{name}/seed-1"].config.schedule for name in cost)
    assert (both.steps, rotation.steps) == steps
    assert both.warmup_steps is not None
    assert rotation.warmup_steps is not None
    assert rotation.warmup_steps == 4 * both.warmup_steps + 2 * (reference != "")  # round(10 / 4) is 2
    seconds = [cost[name] * runs[f"{name}/seed-0"].config.schedule.steps for name in cost]  # type: ignore[operator]
    assert seconds[0] == pytest.approx(seconds[1], abs=0.4)  # within a step


def test_epochs_are_scaled_like_steps_and_the_schedule_keeps_its_shape(tmp_path: Path) -> None:
    config = small_config(tmp_path, "schedule={epochs: 10, warmup_epochs: 2, final_lr: 1e-5}")
    longer = small_config(tmp_path, "schedule={final_lr: 1e-5}", *scaled_schedule(config, 1.25)).schedule
    assert (longer.epochs, longer.warmup_epochs, longer.final_lr) == (12.5, 2.5, 1e-5)
    none = small_config(tmp_path, "schedule={steps: 4, warmup_steps: 0}")
    assert scaled_schedule(none, 0.1) == ("schedule.steps=1", "schedule.warmup_steps=0")


def test_a_folder_that_other_settings_began_is_refused_with_what_differs_and_the_remedy(
    tmp_path: Path,
) -> None:
    (run, *_) = plan_runs(small_sweep(tmp_path))
    refuse_changed(run)  # nothing is there
    write_json(run.folder / PROGRESS, {"config_hash": run.config_hash, "config": run.settings})
    refuse_changed(run)
    (changed, *_) = plan_runs(small_sweep(tmp_path, STUDY, "optim.base_lr=0.7"))
    with pytest.raises(UserError, match=r"optim.base_lr: was 0.0005, now 0.7\); .*another --output-dir"):
        refuse_changed(changed)


def test_differences_name_changed_added_and_removed_settings() -> None:
    was = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": 4}
    assert differences(was, json.loads(json.dumps(was))) == []
    now = {"a": {"b": 2, "c": [1, 2]}, "d": {"x": 1}, "f": 5}
    assert differences(was, now) == [
        "a.b: was 1, now 2",
        "d: was None, now {'x': 1}",
        "e: was 4, now None",
        "f: was None, now 5",
    ]


@pytest.mark.parametrize(
    ("read_out", "told"),
    [
        ("{name: a, kind: knnn}", "evaluate 'a': .*invalid choice: 'knnn'"),
        ("{name: a, kind: knn, args: [--feature, x]}", "evaluate 'a': .*invalid choice: 'x'"),
        (
            "{name: a, kind: knn, args: [--featur, class]}",
            "evaluate 'a': .*unknown arguments: --featur class",
        ),
        (
            "{name: a, kind: finetune, args: [--recipe, deitt]}",
            "evaluate 'a': .*--recipe: invalid choice: 'deitt'",
        ),
        (
            "{name: a, kind: dense, data: absent, value: miou_ratio}",
            "evaluate 'a': --data absent: no such fol",
        ),
        (
            "{name: a, kind: dense, data: absent, value: miou_ratio, args: [--size-px, 32]}",
            "evaluate 'a': .*--size-px: expected 2 arguments",
        ),
        (
            "{name: a, kind: probes, train: others, test: others, args: [--also-test, nowhere]}",
            "evaluate 'a': nowhere",
        ),
        ("{name: a, kind: head}", "evaluate 'a': variant 'both' trains no classification head"),
    ],
)
def test_a_read_out_that_could_not_run_is_refused_before_anything_does(
    read_out: str, told: str, tmp_path: Path
) -> None:
    text = STUDY.replace(STUDY.split("evaluate:\n")[1].split("metrics")[0], f"  - {read_out}\n")
    with pytest.raises(ConfigError, match=told) as caught:
        plan_runs(open_sweep(write_study(tmp_path, text), tmp_path / "out"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("read_out", "is_told"),
    [
        ("{name: a, kind: linear, test: others}", True),
        ("{name: a, kind: knn, test: others}", True),
        ("{name: a, kind: knn, test: others, args: [--feature, class]}", False),
        ("{name: a, kind: linear, test: others, args: [--feature, class]}", True),
        ("{name: a, kind: probes, test: others, args: [--protocol, generic]}", False),
        ("{name: a, kind: linear, test: others, variants: [both]}", False),
    ],
)
def test_variants_that_are_read_out_by_different_protocols_are_told(
    read_out: str, is_told: bool, tmp_path: Path
) -> None:
    """Contrastive alone is read as MoCo v3 is, several tasks by the generic protocol."""
    asks = STUDY.replace(STUDY.split("evaluate:\n")[1].split("metrics")[0], f"  - {read_out}\n")
    asks = asks.replace("both: [tasks.jigsaw=null]", "both: []").replace(
        "tasks.contrastive=null", "tasks.rotation=null"
    )
    told = mixed_protocols(open_sweep(write_study(tmp_path, asks), tmp_path / "out"))
    expected = "evaluate 'a': variants are read out by different protocols (generic: both; moco_v3: rotation)"
    assert [line.startswith(expected) for line in told] == ([True] if is_told else [])


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("[--test-split, vall]", "evaluate 'a': .*no split 'vall'; did you mean 'val'"),
        ("[--size-px, 33, 48]", "evaluate 'a': --size-px 33 48: not whole patches of 4 px; use 32 48"),
    ],
)
def test_a_dense_read_out_that_could_not_run_is_refused_before_anything_does(
    args: str, told: str, tmp_path: Path
) -> None:
    read_out = f"{{name: a, kind: dense, data: {write_folder(tmp_path / 'scenes')}, value: miou_ratio"
    line = STUDY.split("  - ")[1].split("\n")[0]
    fine = STUDY.replace(line, f"{read_out}}}")
    plan_runs(open_sweep(write_study(tmp_path, fine), tmp_path / "out"))
    wrong = fine.replace(read_out, f"{read_out}, args: {args}")
    with pytest.raises(ConfigError, match=told):
        plan_runs(open_sweep(write_study(tmp_path, wrong), tmp_path / "out"))


@pytest.mark.real_shards
def test_shards_that_are_not_there_are_told_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate 'knn': .*shards"):
        plan_runs(open_sweep(write_study(tmp_path), tmp_path / "out"))


def test_a_metric_of_no_task_is_refused(tmp_path: Path) -> None:
    text = STUDY.replace("metrics: [rotation/accuracy]", "metrics: [rotatoin/accuracy]")
    with pytest.raises(ConfigError, match="metrics: 'rotatoin/accuracy' is of no task of the study; did you"):
        plan_runs(open_sweep(write_study(tmp_path, text), tmp_path / "out"))


@pytest.mark.parametrize("kind", ["cosine", "cosine_over_all", "quarter_cosine", "constant"])
def test_only_lengths_grow_with_a_schedule(kind: str, tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        f"schedule={{kind: {kind}, epochs: 10, warmup_epochs: 1, length_epochs: 30, scale_ends: true}}",
    )
    assert scaled_schedule(config, 1.5) == (
        "schedule.epochs=15.0",
        "schedule.warmup_epochs=1.5",
        "schedule.length_epochs=45.0",
    )


def test_sweeps_side_by_side_write_one_file_each_whole(tmp_path: Path) -> None:
    """Which one writes last is all that is left to chance: a file on the way is never another one's."""
    texts = [str(number) * 50_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(tmp_path / "a.json", text), 20 * texts))
    assert (tmp_path / "a.json").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
