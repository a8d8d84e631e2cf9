"""The document about the core method says what the stored records say, by a rule that is worked by hand here.

study_results/ holds records of real, very short runs: three variants with three seeds, and two with two.
"""

from __future__ import annotations

import itertools
import json
import re
import runpy
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from study import figures, progress
from study.compare import difference
from study.document import TEMPLATE, Document
from study.origin import RESULTS
from study.records import Results, read, read_study
from study.records import _columns as columns_of_study
from study.report import write

from pretrain.config import RunConfig
from pretrain.errors import UserError
from pretrain.plan.flops import train_flops
from pretrain.sweep.study import load_study

ROOT = Path(__file__).parents[2]
STORED = Path(__file__).with_name("study_results")
PAGE = ROOT / "docs" / "study.md"
FIGURE = re.compile(r"\((study/[^)]+\.svg)\)")
# digits that are no results: names, also of columns, sources, an interval, and how the data was made
ALLOWED = r"arXiv:\d{4}\.\d{5}|CIFAR-10|ViT-[A-Z]/\d+|95 %|\.md\.j2|quality 75, 4:2:0|fewshot_\d+pct"


@pytest.fixture(scope="module")
def results() -> dict[str, Results]:
    return read(STORED)


@pytest.fixture
def document(results: dict[str, Results], tmp_path: Path) -> Document:
    return Document(results, tmp_path / "study")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("docs") / "study.md"
    write(STORED, page)
    return page


def stored(variant: str, study: str = "core_cpu") -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((STORED / study / variant).glob("*.json"))]


def knn(variant: str, study: str = "core_cpu") -> list[float]:
    return [100 * record["read_outs"]["knn"]["result"]["top1_ratio"] for record in stored(variant, study)]


def test_the_page_is_what_the_stored_records_give(tmp_path: Path) -> None:
    write(ROOT / RESULTS, tmp_path / "study.md")
    assert (tmp_path / "study.md").read_text() == PAGE.read_text(), "run make study-report"
    shown = set(FIGURE.findall(PAGE.read_text()))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "study").glob("*.svg")}
    assert there == shown


def test_every_sentence_of_the_conclusion_is_borne_out_by_the_stored_records() -> None:
    leads = re.findall(r"^- (\*\*.+?\*\*)", TEMPLATE.read_text(), re.MULTILINE)
    assert len(leads) > 10
    assert [lead for lead in leads if lead not in PAGE.read_text()] == []


def test_a_sentence_that_the_records_no_longer_bear_out_is_not_printed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / RESULTS, tmp_path / "results")
    for path in (tmp_path / "results" / "core_cpu_compute" / "all").glob("*.json"):
        record = json.loads(path.read_text())
        record["read_outs"]["linear"]["result"]["class_mean_patch"]["linear"]["100pct"]["top1_ratio"] -= 0.1
        path.write_text(json.dumps(record))
    for path in (tmp_path / "results" / "core_cpu" / "all").glob("*.json"):
        record = json.loads(path.read_text())
        record["metrics"]["contrastive/accuracy"] += 0.5
        path.write_text(json.dumps(record))
    write(tmp_path / "results", tmp_path / "study.md")
    told = (tmp_path / "study.md").read_text()
    gone = [
        "At equal compute, one pass beats",
        "With half as much training again",
        "the contrastive task is harder",
    ]
    for words in gone:
        assert words in PAGE.read_text()
        assert words not in told
    assert "The hope is not borne out" in told


def typed_numbers(template: str) -> list[str]:
    """Lines with digits that the template holds itself, outside expressions and blocks."""
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", "", template, flags=re.DOTALL)
    return [line for line in re.sub(ALLOWED, "", text).splitlines() if re.search(r"\d", line)]


def test_no_result_is_typed_into_the_template() -> None:
    assert typed_numbers(TEMPLATE.read_text()) == []


def test_a_result_that_is_typed_is_found() -> None:
    assert typed_numbers("It wins by 1.3 points, {{ value('core_cpu', 'all', 'knn') }}.")
    assert typed_numbers("Seven of 16 variants on CIFAR-10.")
    assert not typed_numbers("{{ table('sit_table4') }} on CIFAR-10 (arXiv:2104.03602)")


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        # mean 2.5, std 0.5; t of two degrees of freedom is 4.3027, and that x 0.5 / 3 ** 0.5 is 1.2421
        ([2.0, 2.5, 3.0], "wins"),
        ([-2.0, -2.5, -3.0], "loses"),
        # mean 2, std 1: 2.4841 to each side, which takes in zero
        ([1.0, 2.0, 3.0], "no difference shown"),
        # sure, but too little
        ([0.40, 0.41, 0.42], "no difference shown"),
        ([-0.40, -0.41, -0.42], "no difference shown"),
        ([0.5, 0.5, 0.5], "wins"),
        ([5.0, 5.1], "too few seeds"),
        ([5.0], "too few seeds"),
    ],
)
def test_a_win_needs_seeds_an_interval_without_zero_and_half_a_point(
    pairs: list[float], verdict: str
) -> None:
    first = {seed: 40.0 + seed + value for seed, value in enumerate(pairs)}
    found = difference(first, {seed: 40.0 + seed for seed in range(len(pairs))})
    assert found is not None
    assert found.verdict == verdict
    assert found.mean == pytest.approx(statistics.fmean(pairs))


def test_an_interval_is_that_of_the_paired_differences() -> None:
    found = difference({0: 42.0, 1: 52.5, 2: 33.0, 7: 90.0}, {0: 40.0, 1: 50.0, 2: 30.0, 8: 1.0})
    assert found is not None
    assert found.n == 3  # only seeds that both have
    assert (found.low, found.high) == (pytest.approx(2.5 - 1.2421, abs=1e-4), pytest.approx(3.7421, abs=1e-4))
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_tables_hold_mean_and_spread_of_the_records(written: Path, document: Document) -> None:
    told = f"{statistics.fmean(knn('all')):.2f} ± {statistics.stdev(knn('all')):.2f}"
    assert document.value("core_cpu", "all", "knn") == f"{told} %"
    row = next(line for line in written.read_text().splitlines() if line.startswith("| all | 3 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[4] == told
    gap = statistics.fmean(knn("all")) - statistics.fmean(knn("contrastive"))
    assert document.difference("core_cpu", "all", "contrastive", "knn").startswith(f"{gap:+.2f} (")
    assert f"| all against contrastive | {gap:+.2f} (" in written.read_text()


def test_headings_and_tables_stand_apart(written: Path) -> None:
    for page in (written, PAGE):
        lines = page.read_text().splitlines()
        for before, after in itertools.pairwise(lines):
            assert not (after.startswith("#") and before and not before.startswith("```")), after
            assert not (before.startswith("|") and after and not after.startswith("|")), after
            assert not (after.startswith("|") and before and not before.startswith("|")), after


def test_a_sentence_stands_only_while_every_verdict_is_as_it_says(
    results: dict[str, Results], document: Document, tmp_path: Path
) -> None:
    assert document.says("core_cpu", "all", "contrastive")  # no difference shown, on any
    assert not document.says("core_cpu", "all", "contrastive", wins=["knn"])
    assert not document.says("core_cpu_compute", "all", "contrastive")  # too few seeds
    assert not document.says("core_cpu", "all", "all-separate")  # which was not run
    assert not document.says("core_question", "all", "contrastive")
    assert document.mean("core_cpu", "all", "knn") == pytest.approx(statistics.fmean(knn("all")))
    assert not document.mean("core_question", "all", "knn") > 0  # not a number
    assert not document.largest_cosine("core_question") < 1
    found = [abs(statistics.fmean(values)) for values in figures.cosines(results["core_cpu"]).values()]
    assert document.largest_cosine("core_cpu") == max(found)
    shutil.copytree(STORED / "core_cpu", tmp_path / "core_cpu")
    for path in (tmp_path / "core_cpu" / "all").glob("*.json"):
        record = json.loads(path.read_text())
        record["read_outs"]["knn"]["result"]["top1_ratio"] += 0.2
        path.write_text(json.dumps(record))
    better = Document(read(tmp_path), tmp_path / "study")
    assert better.says("core_cpu", "all", "contrastive", wins=["knn"])
    assert better.says("core_cpu", "contrastive", "all", loses=["knn"])
    assert not better.says("core_cpu", "all", "contrastive")
    assert not better.says("core_cpu", "all", "contrastive", wins=["knn", "knn_patches"])
    assert not better.says("core_cpu", "all", "contrastive", loses=["knn"])
    row = better.comparisons("core_cpu", [("all", "contrastive")]).splitlines()[-1]
    assert row.count("**wins**") == 1


def test_all_tasks_are_held_against_every_other_variant(results: dict[str, Results]) -> None:
    variants = ["contrastive", "contrastive+jigsaw", "rotation", "all", "all-fixed"]
    runs: dict[str, dict[int, Any]] = {name: {} for name in variants}
    assert figures.pairs(replace(results["core_cpu"], runs=runs)) == [
        ("all", "contrastive"),
        ("all", "rotation"),
        ("all", "all-fixed"),
        ("contrastive+jigsaw", "contrastive"),
    ]


def test_a_comparison_of_two_seeds_is_no_verdict(document: Document) -> None:
    assert document.num_seeds("core_cpu_compute") == 2
    assert document.verdict("core_cpu_compute", "all", "contrastive", "knn") == "too few seeds"
    asked = [("all or one", "core_cpu_compute", "all", "contrastive")]
    row = cells(document.summary(asked, first="knn"))["all or one"]
    assert re.fullmatch(r"[+-]\d+\.\d\d \(n = 2\)", row[1])
    assert row[2:] == ["too few seeds", ""]
    told = document.summary([*asked, ("one or all", "core_question", "contrastive", "all")])
    assert told.endswith("Not measured yet: `core_question`.")


def test_what_was_not_measured_is_said_and_what_is_absent_left_out(document: Document) -> None:
    assert not document.measured("core_question")
    assert document.not_measured("core_question") == (
        "Not measured yet: `pretrain sweep configs/studies/core_question.yaml "
        "--results benchmarks/results/study`"
    )
    assert document.value("core_question", "all", "knn") == "not measured"
    assert document.value("core_cpu", "all", "finetune") == "not measured"
    assert document.measured("core_cpu", "all", "contrastive")
    assert not document.measured("core_cpu", "all-overlapping")
    heads = document.table("core_cpu", ["knn", "finetune"]).splitlines()[0]
    assert heads == "| variant | seeds | steps | train s | knn % |"
    own = document.table("core_cpu", ["knn", "images", "train_seconds"]).splitlines()
    assert own[0] == "| variant | seeds | steps | train s | knn % | images | train_seconds |"
    assert "| 768 ± 0 |" in own[2]
    assert document.comparisons("core_cpu", [("all", "all-overlapping")]) == ""
    assert "`core_cpu`, `core_question`" in document.versus(
        ["core_cpu", "core_question"], [("all", "all-overlapping")]
    )


def test_an_untrained_network_is_the_baseline_of_the_read_out_that_asks_the_same(
    results: dict[str, Results],
) -> None:
    found = results["core_cpu"]
    measured = [
        100 * record["read_outs"]["knn_untrained"]["result"]["top1_ratio"] for record in stored("all")
    ]
    assert found.untrained("knn") == pytest.approx(statistics.fmean(measured))
    assert found.untrained("knn_patches") is None  # other arguments
    assert figures.columns_of(found) == ["knn", "knn_patches"]


def test_the_seed_of_fresh_weights_makes_no_other_read_out(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(
        "base: run.yaml\nvariants: {all: []}\nevaluate:\n"
        "  - {name: knn, kind: knn, args: [--k, 5]}\n"
        '  - {name: fresh, kind: knn, weights: untrained, args: [--k, 5, --weights-seed, "{seed}"]}\n'
        '  - {name: other, kind: knn, weights: untrained, args: [--k, 9, --weights-seed, "{seed}"]}\n'
    )
    assert columns_of_study(load_study(tmp_path / "study.yaml"))["knn"].untrained == "fresh"


def test_trained_is_held_against_untrained_where_both_were_measured(document: Document) -> None:
    fresh = [100 * record["read_outs"]["knn_untrained"]["result"]["top1_ratio"] for record in stored("all")]
    gap = statistics.fmean(knn("all")) - statistics.fmean(fresh)
    rows = document.above_untrained("core_cpu").splitlines()[2:]
    assert len(rows) == 1
    assert rows[0].startswith("| all | knn against knn_untrained | ")
    assert f" {gap:+.2f} (" in rows[0]


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_a_step_costs_what_was_given_beforehand_else_what_the_fastest_run_took(document: Document) -> None:
    # the study of equal compute gives 1.0 and 0.5 s
    given = cells(document.step_costs("core_cpu_compute"))
    assert {name: row[2:] for name, row in given.items()} == {
        "all": ["1", "2.00"],
        "contrastive": ["0.5", "1.00"],
    }
    measured = {
        name: min(record["train_seconds"] / record["steps"] for record in stored(name))
        for name in ("all", "contrastive")
    }
    row = cells(document.step_costs("core_cpu"))["all"]
    assert row[2:] == [f"{measured['all']:.4g}", f"{measured['all'] / measured['contrastive']:.2f}"]


def test_compute_is_what_the_plan_counts_for_the_images_of_a_run(
    results: dict[str, Results], document: Document
) -> None:
    counted = {}
    for name in ("all", "contrastive"):
        record = stored(name)[0]
        config = RunConfig.model_validate(record["config"])
        counted[name] = train_flops(config).train
        assert results["core_cpu"].values(name, "train_flops")[0] == counted[name] * record["images"]
    row = cells(document.step_costs("core_cpu"))["all"]
    assert row[:2] == [f"{counted['all'] / 1e6:.4g}", f"{counted['all'] / counted['contrastive']:.2f}"]
    assert counted["all"] > counted["contrastive"]


def test_what_tasks_measure_stands_below_what_chance_gives(document: Document) -> None:
    table = document.own_measures("core_cpu")
    assert table.splitlines()[0] == "| variant | seeds | rotation/accuracy |"
    assert cells(table)["by chance"] == ["", "0.25"]
    assert cells(table)["contrastive"] == ["3", "–"]  # noqa: RUF001
    found = [record["metrics"]["rotation/accuracy"] for record in stored("all")]
    assert cells(table)["all"][1].startswith(f"{statistics.fmean(found):.4g} ± ")
    assert progress.is_better_lower("inpainting/error")
    assert not progress.is_better_lower("rotation/accuracy")


def test_a_learned_weight_stands_beside_where_it_would_come_to_rest(document: Document) -> None:
    rows = cells(document.weights("core_cpu"))
    assert set(rows) == {"contrastive", "rotation", "jigsaw"}
    curves = [record["curves"] for record in stored("all")]
    ends = [one["weight/rotation"]["values"][-1] for one in curves]
    products = [end * one["loss/rotation"]["values"][-1] for end, one in zip(ends, curves, strict=True)]
    first, last, reached, settles = rows["rotation"]
    assert float(first.split(" ")[0]) == pytest.approx(1.0, abs=0.02)
    assert last.startswith(f"{statistics.fmean(ends):.3g} ± ")
    assert reached.startswith(f"{statistics.fmean(products):.3g} ± ")
    assert settles.split(" ")[0] == "0.5"  # cross-entropy


def test_a_published_value_stands_beside_the_measured_one_and_a_missed_bound_is_told(
    tmp_path: Path,
) -> None:
    shutil.copytree(STORED / "core_cpu", tmp_path / "core_cpu")
    study = tmp_path / "core_cpu" / "study.yaml"
    study.write_text(
        study.read_text()
        + "expected:\n"
        + "  - {variant: all, column: knn, published: 81.2, at_least: 1, at_most: 99}\n"
        + "  - {variant: all, column: knn, minus: {variant: contrastive}, at_least: 50}\n"
        + "  - {variant: all, column: knn, minus: {column: knn_patches}, published: 1.5}\n"
    )
    document = Document(read(tmp_path), tmp_path / "study")
    rows = cells(document.expected("core_cpu"))
    mean = statistics.fmean(knn("all"))
    assert rows["all: knn"] == [f"{mean:.4g} (n = 3)", "81.2", "at least 1, at most 99", "yes"]
    gap = mean - statistics.fmean(knn("contrastive"))
    assert rows["all: knn minus contrastive"] == [f"{gap:.4g} (n = 3)", "–", "at least 50", "**no**"]  # noqa: RUF001
    assert rows["all: knn minus knn_patches"][1:] == ["1.5", "", ""]


def test_copies_are_held_against_the_images_that_they_are_of(tmp_path: Path) -> None:
    shutil.copytree(STORED / "core_cpu", tmp_path / "core_cpu")
    study = tmp_path / "core_cpu" / "study.yaml"
    key = "also.lossless.class.linear"
    read_out = f"  - {{name: lossless, kind: probes, value: {key}.top1_ratio, variants: [all]}}\n"
    study.write_text(study.read_text().replace("metrics:", f"{read_out}metrics:"))
    for place, path in enumerate(sorted((tmp_path / "core_cpu" / "all").glob("*.json"))):
        one = {"own_same_keys_top1_ratio": 0.40 + place / 100, "same_keys_top1_ratio": 0.41}
        one |= {"agreement_ratio": 0.84, "num_same_keys": 1000}
        result = {"also": {"lossless": {"class": {"linear": one}}}}
        record = json.loads(path.read_text())
        record["read_outs"]["lossless"] = {"asked": {}, "result": result, "seconds": 1.0}
        path.write_text(json.dumps(record))
    document = Document(read(tmp_path), tmp_path / "study")
    # 1.96 x 100 x (0.16 / 1000) ^ 0.5 is 2.48
    assert cells(document.of_copies("core_cpu")) == {
        "all": ["3", "1,000", "41.00", "41.00", "+0.00", "84.0", "2.5"]
    }


def test_settings_hardware_commit_and_cost_are_those_of_the_records(document: Document) -> None:
    assert document.setting("core_cpu", "schedule.steps") == "24"
    assert document.setting("core_cpu", "balance.kind") == "uncertainty (all-fixed: fixed)"
    records = [record for name in ("contrastive", "all", "all-fixed") for record in stored(name)]
    assert document.commit("core_cpu") == f"`{records[0]['commit'][:12]}`"
    assert document.hardware("core_cpu") == records[0]["hardware"]
    seconds = sum(record["stage_seconds"]["train"] for record in records)
    assert all(record["stage_seconds"]["train"] > record["train_seconds"] for record in records)
    seconds += sum(one["seconds"] for record in records for one in record["read_outs"].values())
    place = f"{records[0]['hardware']}, 1 thread each"
    assert document.cost("core_cpu").startswith(f"{seconds / 60:.1f} process minutes on {place}: ")
    setup = document.setup("core_cpu")
    assert "| tokens | 64 patches of 4 px of a view of 32 px |" in setup
    assert "| images in all | 768 |" in setup  # 24 steps of 32


def changed(folder: Path, variant: str, seed: int, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the records of which one is another."""
    shutil.copytree(STORED / "core_cpu", folder / "core_cpu")
    path = folder / "core_cpu" / variant / f"seed-{seed}.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return folder


def test_a_read_out_with_other_arguments_than_the_study_has_is_not_counted(tmp_path: Path) -> None:
    def otherwise(record: dict[str, Any]) -> None:
        record["read_outs"]["knn"]["asked"]["args"] = ["--batch-size", "64", "--k", "1"]

    found = read(changed(tmp_path, "all", 1, otherwise))["core_cpu"]
    assert list(found.values("all", "knn")) == [0, 2]
    assert list(found.values("all", "knn_patches")) == [0, 1, 2]
    document = Document({"core_cpu": found}, tmp_path / "study")
    assert document.verdict("core_cpu", "all", "contrastive", "knn") == "too few seeds"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda one: one["config"]["optim"].update(base_lr=9.0),
            r"all: seed 1 has other settings than seed 0 ",
        ),
        (lambda one: one["config"]["schedule"].update(steps=48), r"\(schedule.steps: was 24, now 48\)"),
    ],
)
def test_seeds_of_a_variant_that_differ_in_more_are_refused(
    change: Callable[[dict[str, Any]], object], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        read(changed(tmp_path, "all", 1, change))


def test_records_of_an_earlier_length_are_refused_at_equal_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(STORED / "core_cpu", tmp_path / "core_cpu")
    for path in (tmp_path / "core_cpu" / "contrastive").glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "images": 1536}))
    script = str(ROOT / "benchmarks" / "study" / "report.py")
    monkeypatch.setattr(
        sys, "argv", [script, "--results", str(tmp_path), "--page", str(tmp_path / "page.md")]
    )
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.search(
        r"'\S+' saw \d+ images, 'contrastive' 1536, though the study is one of equal images", said
    )
    assert not (tmp_path / "page.md").exists()
    (tmp_path / "core_cpu" / "all" / "seed-0.json").write_text("")
    with pytest.raises(UserError, match=r"all/seed-0.json: cannot be read"):
        read(tmp_path)


def test_code_that_is_in_no_commit_is_told(tmp_path: Path) -> None:
    shutil.copytree(STORED / "core_cpu", tmp_path / "core_cpu")
    path = tmp_path / "core_cpu" / "all" / "seed-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "uncommitted": True}))
    assert "with changes" in Document(read(tmp_path), tmp_path / "study").commit("core_cpu")


def test_the_mean_of_curves_holds_where_a_seed_has_only_the_ends_of_a_straight_line() -> None:
    straight = {"steps": [2, 10], "values": [1.0, 1.0]}
    bent = {"steps": [2, 4, 6, 8, 10, 12], "values": [3.0, 5.0, 7.0, 3.0, 1.0, 9.0]}
    assert figures.mean_curve([straight, bent]) == ([2, 4, 6, 8, 10], [2.0, 3.0, 4.0, 2.0, 1.0])
    assert figures.mean_curve([bent]) == (bent["steps"], bent["values"])


def test_a_conflict_is_the_mean_of_the_second_half_of_every_seed(results: dict[str, Results]) -> None:
    by_hand = []
    for record in stored("all"):
        curve = record["curves"]["gradient_cosine/contrastive:rotation"]
        assert curve["steps"] == [4, 8, 12, 16, 20, 24]
        by_hand.append(statistics.fmean(curve["values"][3:]))
    found = figures.cosines(results["core_cpu"])
    assert found["contrastive", "rotation"] == pytest.approx(by_hand)
    assert len(found) == 3


def test_figures_are_drawn_shown_and_the_same_every_time(written: Path, tmp_path: Path) -> None:
    shown = FIGURE.findall(written.read_text())
    kinds = {"compute", "differences", "weights", "conflict", "conflict-time", "read-outs"}
    assert {f"study/core_cpu-{kind}.svg" for kind in kinds} == set(shown)
    left_over = tmp_path / "study" / "of-an-earlier-time.svg"
    left_over.parent.mkdir()
    left_over.write_text("")
    write(STORED, tmp_path / "study.md")
    assert (tmp_path / "study.md").read_text() == written.read_text()
    assert not left_over.exists()
    for path in shown:
        drawn = (written.parent / path).read_bytes()
        assert drawn == (tmp_path / path).read_bytes()
        assert b"<dc:date>" not in drawn


def test_a_picture_beside_the_records_is_shown(tmp_path: Path) -> None:
    shutil.copytree(STORED / "core_cpu", tmp_path / "core_cpu")
    Image.new("RGB", (4, 4)).save(tmp_path / "core_cpu" / "masked_patches.png")
    told = Document(read(tmp_path), tmp_path / "study").pictures()
    assert told.startswith("![masked patches (core_cpu)](")
    assert told.endswith("core_cpu/masked_patches.png)")


def test_a_study_without_a_finished_run_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "core_cpu").mkdir()
    shutil.copy(STORED / "core_cpu" / "study.yaml", tmp_path / "core_cpu")
    assert read(tmp_path) == {}
    assert read_study(tmp_path / "core_cpu").runs == {}
