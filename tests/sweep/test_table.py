from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_study import STUDY, write_study

from pretrain.errors import UserError
from pretrain.sweep.runs import DONE, FAILED, Run, Sweep, asked, open_sweep, plan_runs, write_json
from pretrain.sweep.table import format_table, summarise, table_of, write_table

SEEDS = "[0, 1, 2]"


def small_sweep(folder: Path) -> tuple[Sweep, dict[str, Run]]:
    sweep = open_sweep(write_study(folder, STUDY.replace("[0, 1]", SEEDS)), folder / "out")
    return sweep, {run.name: run for run in plan_runs(sweep)}


def finish(
    run: Run, top1: float | None, accuracy: float | None, seconds: float = 2.0, commit: str = "c0ffee"
) -> None:
    left = {"knn": {"asked": asked(run, run.read_outs[0]), "result": {"top1_ratio": top1, "k": {"best": 3}}}}
    content = {"variant": run.variant, "seed": run.seed, "config_hash": run.config_hash, "steps": 3}
    content |= {"train_seconds": seconds, "hardware": "2 CPU cores", "commit": commit, "read_outs": left}
    write_json(run.folder / DONE, {**content, "metrics": {"rotation/accuracy": accuracy}})


def test_mean_and_sample_standard_deviation_are_those_worked_by_hand() -> None:
    """40, 44, 45: mean 43; squared distances 9 + 1 + 4 = 14, over n - 1 = 2 gives 7, whose root is 2.6458."""
    value = summarise({0: 0.40, 1: 0.44, 2: 0.45}, is_percent=True)
    assert value["mean"] == pytest.approx(43.0)
    assert value["std"] == pytest.approx(7**0.5)
    assert (value["n"], value["unit"]) == (3, "%")
    one = summarise({5: 0.25, 6: None})
    assert (one["mean"], one["std"], one["n"], one["by_seed"]) == (0.25, None, 1, {"5": 0.25})
    assert summarise({})["mean"] is None


def test_a_table_says_mean_spread_and_how_many_runs_there_are(tmp_path: Path) -> None:
    sweep, runs = small_sweep(tmp_path)
    for seed, (top1, accuracy) in enumerate([(0.40, 0.5), (0.44, 0.25), (0.45, None)]):
        finish(runs[f"both/seed-{seed}"], top1, accuracy, seconds=2.0 + seed)
    finish(runs["rotation/seed-1"], 0.3, 0.5)
    write_json(runs["rotation/seed-2"].folder / FAILED, {"stage": "train"})
    lines = format_table(table_of(sweep, list(runs.values()))).splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[:4]]
    assert rows[0] == ["variant", "runs", "steps", "train s", "knn %", "rotation/accuracy"]
    # 0.5 and 0.25: each 0.125 from the mean, so the root of 2 x 0.125 ^ 2 is 0.1768
    assert rows[2] == ["both", "3 of 3", "3", "3.0", "43.00 ± 2.65", "0.375 ± 0.18 (n=2)"]
    assert rows[3] == ["rotation", "1 of 3 (failed)", "3", "2.0", "30.00", "0.5"]
    assert "Failed: rotation/seed-2." in lines
    assert "Hardware: 2 CPU cores." in lines


def test_what_is_not_there_is_left_out_and_several_commits_are_told(tmp_path: Path) -> None:
    sweep, runs = small_sweep(tmp_path)
    finish(runs["both/seed-0"], 0.4, 0.5)
    assert "Commit: c0ffee." in format_table(table_of(sweep, list(runs.values())))
    done = runs["both/seed-0"].folder / DONE
    write_json(done, {**json.loads(done.read_text()), "uncommitted": True})
    told = "Commit: c0ffee, with changes that are in no commit."
    assert told in format_table(table_of(sweep, list(runs.values())))
    finish(runs["both/seed-0"], 0.4, 0.5)
    finish(runs["both/seed-1"], 0.4, 0.5, commit="other")
    text = format_table(table_of(sweep, list(runs.values())))
    assert "Commit: c0ffee, other (several" in text
    assert text.splitlines()[3].split("|")[5].strip() == "–"  # noqa: RUF001


def test_a_read_out_that_the_study_has_changed_since_is_not_counted(tmp_path: Path) -> None:
    sweep, runs = small_sweep(tmp_path)
    finish(runs["both/seed-0"], 0.4, 0.5)
    assert table_of(sweep, list(runs.values()))["rows"][0]["columns"]["knn"]["n"] == 1
    changed = open_sweep(
        write_study(tmp_path, STUDY.replace("--feature, class", "--feature, mean_patch")), tmp_path / "out"
    )
    assert table_of(changed, plan_runs(changed))["rows"][0]["columns"]["knn"]["n"] == 0


def test_a_value_that_is_null_is_none(tmp_path: Path) -> None:
    """Such as the accuracy on images that two test sets share: a study goes on where they share none."""
    sweep, runs = small_sweep(tmp_path)
    for seed, top1 in enumerate((0.4, None)):
        finish(runs[f"both/seed-{seed}"], top1, 0.5)
    column = table_of(sweep, list(runs.values()))["rows"][0]["columns"]["knn"]
    assert (column["n"], column["mean"]) == (1, 40.0)


def test_a_value_is_found_with_dots_and_one_that_is_not_there_is_told(tmp_path: Path) -> None:
    sweep, runs = small_sweep(tmp_path)
    finish(runs["both/seed-0"], 0.4, 0.5)

    def column(value: str) -> float:
        text = STUDY.replace("kind: knn,", f"kind: knn, value: {value},")
        found = open_sweep(write_study(tmp_path, text), tmp_path / "out")
        return table_of(found, plan_runs(found))["rows"][0]["columns"]["knn"]["mean"]

    assert column("k.best") == 3  # no ratio, so no percent
    with pytest.raises(UserError, match="'top5_ratio' is not in its result, which has top1_ratio, k"):
        column("top5_ratio")
    with pytest.raises(UserError, match="'k' is not a number"):
        column("k")
    assert sweep.study.evaluate[0].value == "top1_ratio"


def test_a_metric_of_a_task_that_a_variant_lacks_is_left_out(tmp_path: Path) -> None:
    """Subsets of tasks share one read-out; a name that no task has is still told."""
    read_out = STUDY.split("evaluate:\n")[1].split("metrics")[0]

    def means(value: str) -> list[float | None]:
        asks = f"  - {{name: contrast, kind: pretext, test: others, value: {value}}}\n"
        sweep = open_sweep(write_study(tmp_path, STUDY.replace(read_out, asks)), tmp_path / "out")
        runs = {run.name: run for run in plan_runs(sweep)}
        for name, values in (
            ("both/seed-0", {"contrastive/accuracy": 0.5, "rotation/accuracy": 0.4}),
            ("rotation/seed-0", {"rotation/accuracy": 0.3}),
        ):
            run = runs[name]
            left = {"contrast": {"asked": asked(run, run.read_outs[0]), "result": {"values": values}}}
            content = {"variant": run.variant, "seed": 0, "config_hash": run.config_hash, "steps": 3}
            content |= {"train_seconds": 1.0, "hardware": "2 CPU cores", "commit": "c0ffee"}
            write_json(run.folder / DONE, {**content, "read_outs": left, "metrics": {}})
        return [row["columns"]["contrast"]["mean"] for row in table_of(sweep, list(runs.values()))["rows"]]

    assert means("values.contrastive/accuracy") == [0.5, None]
    assert means("values.rotation/accuracy") == [0.4, 0.3]
    with pytest.raises(UserError, match=r"'values.rotation/error' is not in its result"):
        means("values.rotation/error")


def test_one_read_out_can_give_several_columns(tmp_path: Path) -> None:
    text = STUDY.replace("kind: knn,", "kind: knn, more: {best k: k.best},")
    sweep = open_sweep(write_study(tmp_path, text), tmp_path / "out")
    runs = plan_runs(sweep)
    finish(runs[0], 0.4, 0.5)
    columns = table_of(sweep, runs)["rows"][0]["columns"]
    assert {name: column["mean"] for name, column in columns.items()} == {
        "knn": 40.0,
        "best k": 3,
        "rotation/accuracy": 0.5,
    }


def test_the_files_of_a_table_hold_the_same_numbers(tmp_path: Path) -> None:
    sweep, runs = small_sweep(tmp_path)
    finish(runs["both/seed-0"], 0.4, 0.5)
    write_table(sweep, list(runs.values()))
    kept = json.loads((sweep.folder / "table.json").read_text())
    assert kept["rows"][0]["columns"]["knn"]["by_seed"] == {"0": 40.0}
    assert format_table(kept) in (sweep.folder / "table.md").read_text()
    assert sorted(path.name for path in sweep.folder.glob("*table*")) == ["table.json", "table.md"]
