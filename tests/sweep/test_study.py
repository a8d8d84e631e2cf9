from __future__ import annotations

from pathlib import Path

import pytest
from small_study import STUDY, write_study

from pretrain.errors import ConfigError
from pretrain.sweep.study import Study, Subsets, load_study

STUDIES = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml"))


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_study(write_study(folder, text))
    assert "\n" not in str(caught.value)
    assert "study.yaml: " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ("seeds:", "seed:", "seed: unknown setting; did you mean 'seeds'?"),
        ("kind: knn", "kinds: knn", "evaluate.0.kinds: unknown setting; did you mean 'kind'?"),
        ("base: run.yaml", "", "base: is required"),
        ("[0, 1]", "[0, 0]", "names one twice"),
        ("[0, 1]", "[]", "at least 1 item"),
        ("[0, 1]", "[0.5]", "seeds.0: Input should be a valid integer (got 0.5)"),
        ("[tasks.jigsaw=null]", "[tasks.jigsaw]", "reads key=value (got 'tasks.jigsaw')"),
        ("[tasks.jigsaw=null]", "[seed=3]", "'seed=3': every run has a seed of its own"),
        ("both:", "a/b:", "'a/b' cannot name a folder"),
        ("both:", "..:", "'..' cannot name a folder"),
        ("{name: knn", "{name: rotation/accuracy", "evaluate.0.name"),
        ("{name: knn", "{name: steps", "two columns are called 'steps'"),
        ("{name: knn", "{variants: [botth], name: knn", "no variant 'botth'; did you mean 'both'?"),
        ("test: others", "data: scenes", "'knn': kind knn reads shards, not `data`"),
        ("kind: knn, test: others", "kind: dense", "reads a folder of images and masks; name it with `data`"),
        ("kind: knn", "kind: dense, data: scenes", "reads `data`, not shards; remove `train` and `test`"),
        ("kind: knn, test: others", "kind: dense, data: scenes", "no top1_ratio; set `value: miou_ratio`"),
        ("metrics:", "cost: {both: 1}\nmetrics:", "belong to budget: compute"),
        ("metrics:", "budget: compute\ncost: {both: 1}\nmetrics:", "'rotation' has none"),
        ("metrics:", "budget: compute\ncost: {both: -1, rotation: 1}\nmetrics:", "greater than 0"),
        ("metrics:", "budget: compute\nreference: bot\nmetrics:", "did you mean 'both'?"),
        ("metrics:", "budget: time\nmetrics:", "'images', 'compute' or 'as_given' (got 'time')"),
        ("metrics:", "base: other.yaml\nmetrics:", "the key 'base' stands twice"),
        ("metrics:", "subsets: {of: [rotation]}\nmetrics:", "two variants are called 'rotation'"),
        ("metrics:", "expected: [{variant: both, column: knn}]\nmetrics:", "give `published`, `at_least`"),
        (
            "metrics:",
            "expected: [{variant: bot, column: knn, at_least: 1}]\nmetrics:",
            "did you mean 'both'?",
        ),
        (
            "metrics:",
            "expected: [{variant: both, column: knn, minus: {column: kn}, at_least: 1}]\nmetrics:",
            "expected: no column 'kn'; did you mean 'knn'?",
        ),
        ("metrics:", "subsets: {of: [a, b], only: [[c]]}\nmetrics:", "`only` has 'c'"),
    ],
)
def test_a_wrong_study_is_refused_with_what_and_where(was: str, now: str, told: str, tmp_path: Path) -> None:
    assert STUDY.count(was) == 1
    assert told in refusal(tmp_path, STUDY.replace(was, now))


def test_a_study_without_variants_and_one_that_is_missing_are_told(tmp_path: Path) -> None:
    assert "nothing to compare" in refusal(tmp_path, "base: run.yaml")
    assert "expected a mapping" in refusal(tmp_path, "[]")
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read"):
        load_study(tmp_path / "absent.yaml")


def test_all_subsets_are_all_that_are_not_empty_each_with_the_other_tasks_removed() -> None:
    found = dict(Subsets(of=("a", "b", "c")).variants())
    assert list(found) == ["a", "b", "c", "a+b", "a+c", "b+c", "all"]
    assert found["a+c"] == ("tasks.b=null",)
    assert found["b"] == ("tasks.a=null", "tasks.c=null")
    assert found["all"] == ()
    for name, overrides in found.items():
        removed = {override.split(".")[1].split("=")[0] for override in overrides}
        kept = {"a", "b", "c"} if name == "all" else set(name.split("+"))
        assert removed | kept == {"a", "b", "c"}
        assert not removed & kept


def test_listed_subsets_are_run_once_plain_and_once_with_each_addition() -> None:
    subsets = Subsets(
        of=("a", "b"), only=(("b",), ("b", "a")), also={"learned": ("balance.kind=uncertainty",)}
    )
    assert dict(subsets.variants()) == {
        "b": ("tasks.a=null",),
        "b-learned": ("tasks.a=null", "balance.kind=uncertainty"),
        "all": (),
        "all-learned": ("balance.kind=uncertainty",),
    }


# rows of each published grid: METHODS C6
ROWS = {
    "sit_table4": 8,
    "relvit_table4": 15,
    "repre_table4": 3,
    "repre_table5": 7,
    "core_question": 17,
    "core_question_compute": 8,
    "core_cpu_compute": 3,
    "core_cpu": 16,
    "relvit_control": 5,
    "cpu_relvit": 4,
    "cpu_sit": 1,
    "cpu_mae": 1,
}
ON_A_LAPTOP = ("cpu_relvit", "cpu_sit", "cpu_mae")  # demonstrations: one seed


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_that_comes_along_can_be_read_and_has_the_rows_of_its_grid(path: Path) -> None:
    study: Study = load_study(path)
    assert len(study.all_variants()) == ROWS[path.stem]
    assert len(study.seeds) >= 3 or path.stem in ON_A_LAPTOP
    assert study.evaluate
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")


def test_there_is_a_study_for_every_grid() -> None:
    assert {path.stem for path in STUDIES} == ROWS.keys()
