"""Records of finished runs: complete, small, and without anything of the machine but what it is."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_study import STUDY, write_study

from pretrain.cli import main
from pretrain.run_folder import environment
from pretrain.sweep.record import MAX_POINTS, curves_of, portable, thinned
from pretrain.sweep.study import load_study

ONE_SEED = STUDY.replace("[0, 1]", "[0]")


def sweep(*arguments: object) -> int:
    return main(["sweep", "study.yaml", "--output-dir", "out", "--results", "kept", *map(str, arguments)])


def record(variant: str, seed: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"kept/study/{variant}/seed-{seed}.json").read_text())
    return found


def test_a_run_that_is_done_has_its_record_though_others_are_not(calls: Path, tmp_path: Path) -> None:
    write_study(tmp_path)
    assert sweep("--index", 1) == 0
    assert sorted(path.name for path in Path("kept").rglob("*.*")) == ["seed-0.json", "study.yaml"]
    found = record("rotation")
    assert (found["study"], found["budget"], found["variant"], found["seed"]) == (
        "study", "images", "rotation", 0,
    )  # fmt: skip
    assert (found["command"], found["base"]) == ("pretrain sweep study.yaml", "run.yaml")
    assert found["config"]["tasks"]["contrastive"] is None
    assert found["read_outs"]["knn"]["result"]["top1_ratio"] == pytest.approx(0.4)
    assert found["date"][10] == "T"
    # the stand-in takes three steps, and the last has no value
    assert found["curves"] == {"rotation/accuracy": {"steps": [1, 2], "values": [0.1, 0.2]}}
    assert (found["commit"], found["hardware"], found["processes"]) == ("c0ffee", "2 x H1", 1)


def test_records_of_what_was_done_before_are_written_when_they_are_asked_for(
    calls: Path, tmp_path: Path
) -> None:
    """Also of runs whose done.json is of an earlier version."""
    write_study(tmp_path, ONE_SEED)
    assert main(["sweep", "study.yaml", "--output-dir", "out"]) == 0
    assert not Path("kept").exists()
    path = Path("out/both/seed-0/done.json")
    done = json.loads(path.read_text())
    new = ("curves", "versions", "threads", "uncommitted", "processes", "unix_time")
    path.write_text(json.dumps({name: value for name, value in done.items() if name not in new}))
    assert sweep("--table-only") == 0
    assert record("both")["curves"] == record("rotation")["curves"] == done["curves"]
    assert record("both")["date"] is None
    before = {path: path.stat().st_mtime_ns for path in Path("kept").rglob("*.*")}
    assert len(before) == 3
    assert sweep() == 0
    assert {path: path.stat().st_mtime_ns for path in Path("kept").rglob("*.*")} == before


def test_a_read_out_may_be_left_for_later(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, ONE_SEED)
    assert sweep("--skip", "knn") == 0
    assert record("both")["read_outs"] == {}
    assert record("both")["command"] == "pretrain sweep study.yaml --skip knn"
    assert "evaluate" not in calls.read_text()
    assert sweep() == 0
    assert record("both")["read_outs"]["knn"]["result"]["top1_ratio"] == 0.5
    assert record("both")["command"] == "pretrain sweep study.yaml"
    assert calls.read_text().count("train run.yaml") == 2
    assert sweep("--skip", "kn") == 2
    assert "--skip kn: the study has no such read-out; did you mean 'knn'?" in capsys.readouterr().err


def test_a_run_that_has_a_record_is_not_run_again_elsewhere(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, ONE_SEED)
    assert sweep("--index", 0) == 0
    kept, text = Path("kept/study/both/seed-0.json"), calls.read_text()
    before = kept.read_text()
    shutil.rmtree("out")
    capsys.readouterr()
    assert sweep("--dry-run") == 0
    states = [line.rpartition(", ")[2] for line in capsys.readouterr().out.splitlines()[:2]]
    assert states == ["has a record", "to run"]
    assert sweep() == 0
    more = calls.read_text().removeprefix(text)
    assert "tasks.contrastive=null" in more
    assert "both" not in more
    assert kept.read_text() == before
    table = json.loads(Path("out/table.json").read_text())
    assert [row["finished"] for row in table["rows"]] == [1, 1]
    assert table["rows"][0]["columns"]["knn"]["mean"] is not None

    shutil.rmtree("out")
    assert sweep("optim.weight_decay=0.3", "--dry-run") == 0
    assert sweep("optim.weight_decay=0.3") == 0  # with other settings it is another run
    assert "both" in calls.read_text().removeprefix(text + more)


def test_a_record_holds_no_path_of_the_machine(calls: Path, tmp_path: Path) -> None:
    shards = tmp_path / "elsewhere" / "pictures"
    write_study(tmp_path, ONE_SEED.replace("test: others", "test: /mnt/of some one/cifar10:test"))
    assert sweep(f"data.shards={shards}") == 0
    kept = [path.read_text() for path in Path("kept").rglob("*.*")]
    assert len(kept) == 3
    assert not any(str(tmp_path) in text or "/mnt" in text for text in kept)
    found = record("both")
    assert found["config"]["data"]["shards"] == "elsewhere/pictures"
    assert found["read_outs"]["knn"]["asked"]["test"] == "cifar10:test"
    assert "data.shards=elsewhere/pictures" in found["overrides"]
    assert found["command"] == "pretrain sweep study.yaml data.shards=elsewhere/pictures"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/me/work/data/a", "data/a"),
        ("untrained:/home/me/work/runs/x", "untrained:runs/x"),
        ("/home/me/work", "."),
        ("/other/b:test", "b:test"),
        ("data.shards=/other/deep/b", "data.shards=b"),
        ("sources=[{shards: /other/b, ratio: 1.0}]", "sources=[{shards: b, ratio: 1.0}]"),
        ("file:///other/b", "b"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("https://host.org/a/b", "https://host.org/a/b"),
        ("../shared/a", "../shared/a"),
        ("images/s, 3 / 4, Wilson", "images/s, 3 / 4, Wilson"),
    ],
)
def test_paths_become_relative_or_a_bare_name(text: str, kept: str) -> None:
    assert portable({"a": [text]}, Path("/home/me/work")) == {"a": [kept]}


def test_the_study_is_kept_as_it_was_run_and_can_be_read(calls: Path, tmp_path: Path) -> None:
    write_study(tmp_path, ONE_SEED)
    assert sweep("optim.weight_decay=0.1", "--nproc", 1) == 0
    first = Path("kept/study/study.yaml").read_text().splitlines()[0]
    assert first == "# As run: pretrain sweep study.yaml optim.weight_decay=0.1 --nproc 1"
    assert load_study(Path("kept/study/study.yaml")) == load_study(Path("study.yaml"))


def test_an_equal_compute_study_keeps_its_costs(calls: Path, tmp_path: Path) -> None:
    write_study(tmp_path, f"{ONE_SEED}budget: compute\nmeasure_steps: 12\n")
    assert sweep() == 0
    costs = json.loads(Path("kept/study/cost.json").read_text())
    assert {name: cost["seconds_per_step"] for name, cost in costs.items()} == {"both": 0.4, "rotation": 0.1}
    write_study(tmp_path, f"{ONE_SEED}budget: compute\ncost: {{both: 2.0, rotation: 1.0}}\n")
    assert main(["sweep", "study.yaml", "--output-dir", "other", "--results", "given", "--index", "0"]) == 0
    assert json.loads(Path("given/study/cost.json").read_text())["both"] == {
        "seconds_per_step": 2.0,
        "is_given": True,
    }


def test_a_place_that_cannot_hold_records_is_refused_before_anything_runs(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path)
    Path("kept").write_text("")
    assert sweep() == 2
    assert "--results kept: kept is a file; name a folder" in capsys.readouterr().err
    assert not calls.exists()


def test_an_array_keeps_its_records_too(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path)
    assert sweep("--array") == 0
    assert "--output-dir out --results kept --index" in capsys.readouterr().out


def test_a_curve_keeps_its_ends_and_no_more_points_than_are_wanted() -> None:
    steps = list(range(10, 5010, 10))
    kept = thinned(steps)
    assert len(kept) == MAX_POINTS == len(set(kept))
    assert (kept[0], kept[-1]) == (10, 5000)
    gaps = {after - before for before, after in itertools.pairwise(kept)}
    assert gaps <= {80, 90}  # 499 / 59 is 8.46
    assert thinned(steps[:MAX_POINTS]) == steps[:MAX_POINTS]


def test_curves_hold_what_is_asked_about_and_nothing_that_is_not_a_number() -> None:
    records = [
        {
            "step": step,
            "total": 1 / step,
            "loss/rotation": math.nan if step == 2 else 2.0,
            "gradient_cosine/contrastive:rotation": None if step % 2 else -0.123456789,
            "rotation/accuracy": step / 4,
            "other/accuracy": 1.0,
            "step_seconds": 0.1,
        }
        for step in (1, 2, 3, 4)
    ]
    assert curves_of(records, ["rotation"]) == {
        "total": {"steps": [1, 2, 3, 4], "values": [1.0, 0.5, 0.333333, 0.25]},
        "loss/rotation": {"steps": [1, 4], "values": [2.0, 2.0]},  # straight, so its ends say it all
        "gradient_cosine/contrastive:rotation": {"steps": [2, 4], "values": [-0.123457, -0.123457]},
        "rotation/accuracy": {"steps": [1, 2, 3, 4], "values": [0.25, 0.5, 0.75, 1.0]},
    }


def test_a_long_run_of_many_tasks_stays_below_forty_kilobytes(calls: Path, tmp_path: Path) -> None:
    """Six tasks with three metrics each, ten thousand steps, and a read-out that lists every rate."""
    tasks = ("contrastive", "rotation", "a", "b", "c", "d")
    names = [f"{kind}/{task}" for kind in ("loss", "weight") for task in tasks] + ["total"]
    names += [f"{task}/{kind}" for task in tasks[:2] for kind in ("accuracy", "error", "information")]
    names += [f"gradient_cosine/{one}:{two}" for one in tasks for two in tasks if one < two]
    program = tmp_path / "program.py"
    long = (
        "value = 0.3\nnames = %r\nrates = [{'rate': i / 7, 'top1_ratio': 0.123456789} for i in range(400)]\n"
    )
    text = program.read_text().replace("command, *rest =", f"{long % names}command, *rest =")
    text = text.replace("int(settings.get", "300 + 0 * int(settings.get")
    curves = "{**record, **{name: step / 7 + i for i, name in enumerate(names)}}"
    text = text.replace("json.dumps(record)", f"json.dumps({curves})")
    program.write_text(text.replace('{"top1_ratio": value}', '{"top1_ratio": value, "heads": rates}'))
    write_study(tmp_path, ONE_SEED)
    assert sweep("--index", 0) == 0
    path = Path("kept/study/both/seed-0.json")
    assert path.stat().st_size < 40_000
    found = record("both")
    assert set(found["curves"]) >= set(names)
    assert found["curves"]["total"]["steps"][-1] == 300
    assert set(found["read_outs"]["knn"]["result"]) == {"top1_ratio"}


def test_an_environment_says_whether_its_commit_is_all_of_the_code() -> None:
    found = environment()
    assert (found["uncommitted"] is None) == (found["commit"] is None)
    assert found["threads"] >= 1


def test_a_record_that_lacks_a_read_out_is_replaced_with_a_word_and_a_fuller_one_is_taken_over(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, ONE_SEED)
    assert sweep() == 0
    kept, text = Path("kept/study/both/seed-0.json"), calls.read_text()
    full = kept.read_text()
    kept.write_text(json.dumps({**json.loads(full), "read_outs": {}}))
    shutil.rmtree("out")
    told = "both/seed-0.json: has no read-out knn as the study asks for it; for that both/seed-0 is run again"
    assert sweep("--table-only") == 0
    assert told in capsys.readouterr().out
    kept.write_text(full)  # such as by a `git pull`
    assert sweep() == 0
    assert calls.read_text() == text  # nothing was run
    assert kept.read_text() == full
    assert json.loads(Path("out/table.json").read_text())["rows"][0]["columns"]["knn"]["mean"] == 50.0

    kept.write_text(json.dumps({**json.loads(full), "read_outs": {}}))
    shutil.rmtree("out")
    assert sweep("--index", 0) == 0
    assert calls.read_text().removeprefix(text).startswith("train run.yaml")
    assert set(record("both")["read_outs"]) == {"knn"}


def test_a_run_without_a_read_out_does_not_replace_a_record_that_has_it(calls: Path, tmp_path: Path) -> None:
    write_study(tmp_path, ONE_SEED)
    assert sweep() == 0
    kept = Path("kept/study/both/seed-0.json")
    full = kept.read_text()
    for folder in ("out", "kept"):
        shutil.rmtree(folder)
    assert sweep("--skip", "knn") == 0
    assert record("both")["read_outs"] == {}
    kept.write_text(full)  # of another machine
    assert sweep("--skip", "knn", "--table-only") == 0
    assert kept.read_text() == full
    assert sweep() == 0  # with all of its read-outs the own run counts
    assert kept.read_text() != full
    assert set(record("both")["read_outs"]) == {"knn"}


def test_a_record_of_other_settings_or_of_none_is_told(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, ONE_SEED)
    assert sweep() == 0
    shutil.rmtree("out")
    assert sweep("optim.weight_decay=0.3", "--index", 0) == 0
    said = capsys.readouterr().out
    assert "both/seed-0.json: was made with other settings (optim.weight_decay: was " in said
    assert "now 0.3); both/seed-0 is run again, and replaces it" in said
    shutil.rmtree("out")
    Path("kept/study/both/seed-0.json").write_text("<<<<<<< HEAD\n")
    assert sweep() == 2
    assert "remove kept/study/both/seed-0.json to run it again" in capsys.readouterr().err


def test_costs_that_were_given_once_are_not_taken_for_measured_ones(calls: Path, tmp_path: Path) -> None:
    given = f"{ONE_SEED}budget: compute\ncost: {{both: 2.0, rotation: 1.0}}\n"
    write_study(tmp_path, given)
    assert sweep("--index", 0) == 0
    shutil.rmtree("out")
    write_study(tmp_path, f"{ONE_SEED}budget: compute\nmeasure_steps: 12\n")
    assert sweep("--measure-only") == 0
    assert json.loads(Path("out/cost.json").read_text())["both"]["seconds_per_step"] == 0.4
