"""Verdict, tables and the scatter: what is said follows from the numbers, whoever wrote them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from pages import Element, parse

from pretrain.report.curves import Progress, TaskKind, parse_records
from pretrain.report.overview import Facts, verdict
from pretrain.report.page import Section, left_out, page, section, table
from pretrain.report.results import accuracies, evaluation_section, export_section
from pretrain.report.scatter import Points, densest, scatter
from pretrain.report.training import Attempt, Training, training_sections

ROTATION = TaskKind("rotation", "accuracy", higher_is_better=True)
MAE = TaskKind("mae", "error", higher_is_better=False)
GOOD, BAD = Progress(ROTATION, 0.25, 0.7, 0.25), Progress(MAE, 1.3, 1.1, 1.0)


def facts(**changes: Any) -> Facts:
    fields: dict[str, Any] = {
        "step": 80,
        "num_steps": 100,
        "num_attempts": 1,
        "outcome": "done",
        "progress": (GOOD,),
    }
    return Facts(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "said", "is_good"),
    [
        ({}, "Finished at step 80 of 100; rotation is solved better than by chance.", True),
        ({"outcome": None, "num_steps": None}, "Still going or killed at step 80; rotation is", True),
        ({"outcome": "failed"}, "Failed at step 80 of 100", False),
        (
            {"outcome": "preempted", "num_attempts": 3},
            "can be continued, at step 80 of 100 in 3 attempts",
            True,
        ),
        ({"progress": (BAD,)}, "mae is not solved better than by chance.", False),
        ({"progress": (GOOD, BAD)}, "1 of 2 tasks are solved better than by chance, not mae.", False),
        ({"progress": ()}, "Finished at step 80 of 100.", True),
        ({"first_loss": 9.0, "last_loss": 2.5}, "the total loss fell from 9 to 2.5", True),
        ({"feature_std": 0.004}, "features of different images are nearly the same", False),
        ({"feature_std": 0.3}, "better than by chance.", True),
        ({"num_skipped": 1}, "1 step was not finite and skipped", False),
        ({"num_rollbacks": 2}, "2 returns to an earlier checkpoint", False),
        ({"num_bad_samples": 3}, "3 damaged images were replaced", False),
        ({"accuracies": ("k-NN 37.4 %",)}, "; k-NN 37.4 %.", True),
    ],
)
def test_the_verdict_tells_how_far_how_well_and_what_to_look_into(
    changes: dict[str, Any], said: str, is_good: bool
) -> None:
    words, good = verdict(facts(**changes))
    assert said in words
    assert good == is_good


def text_of(part: Section) -> Element:
    assert part.body is not None
    return parse(part.body)


def cells(root: Element) -> list[list[str]]:
    return [[cell.text for cell in row.children] for row in root.all("tr")]


KNN = {
    "method": "knn",
    "top1_ratio": 0.374,
    "reported_k": 20,
    "best_k": 10,
    "best_top1_ratio": 0.38,
    "encoder": {"feature": "class", "step": 720},
    "num_bank": 4000,
}
LINEAR = {
    "method": "linear",
    "top1_ratio": 0.506,
    "top1_ratio_95": [0.47, 0.54],
    "protocol": "generic",
    "runs": [{"chosen": {"lr_factor": 3.0, "inputs": "raw", "held_out_top1_ratio": 0.49}}],
    "encoder": {"feature": "class", "step": 720},
}
SUMMARY = {
    "method": "summary",
    "features": {
        "trained": {"knn": KNN, "linear": LINEAR},
        "untrained": {"knn": {"top1_ratio": 0.225}, "linear": {"top1_ratio": 0.316}},
        "pixels": {"knn": {"top1_ratio": 0.472}, "linear": {"top1_ratio": 0.486}},
    },
}
FINETUNE = {
    "method": "finetune",
    "recipe_name": "deit",
    "top1_ratio": 0.9,
    "top1_ratio_std": 0.01,
    "top1_ratio_95": None,
    "seeds": [0, 1, 2],
    "fraction_ratio": 0.1,
    "is_scratch": False,
    "linear_top1_ratio": 0.88,
}
PRETEXT = {
    "values": {"rotation/accuracy": 0.88, "rotation/chance": 0.25},
    "headlines": {"rotation": "accuracy"},
    "num_images": 800,
    "shards": "sample",
    "step": 720,
}


def test_evaluations_stand_in_tables_with_interval_and_how() -> None:
    results = {
        "knn": KNN,
        "linear": LINEAR,
        "finetune_deit_10pct": FINETUNE,
        "summary": SUMMARY,
        "pretext": PRETEXT,
    }
    rows = cells(text_of(evaluation_section(results)))
    assert ["untrained", "22.5 %", "31.6 %"] in rows
    assert ["knn", "class", "720", "37.4 %", "", "k = 20, best 38.0 % at k = 10; bank 4000"] in rows
    assert [
        "linear",
        "class",
        "720",
        "50.6 %",
        "47.0 to 54.0",
        "protocol generic; lr factor 3.0, inputs raw",
    ] in rows
    (finetuned,) = [row for row in rows if row[0] == "finetune_deit_10pct"]
    assert finetuned[3:5] == ["90.0 %", ""]
    plus_minus = "\N{PLUS-MINUS SIGN} 1.00 of 3 seeds"
    assert finetuned[5] == f"{plus_minus}; recipe deit; 10 % of the labels; then linear 88.0 %"
    assert ["rotation", "accuracy", "0.88", "0.25"] in rows
    assert accuracies(results) == (
        "k-NN 37.4 % (untrained 22.5 %, raw pixels 47.2 %)",
        "linear probe 50.6 % (untrained 31.6 %, raw pixels 48.6 %)",
    )
    assert accuracies({"knn": KNN}) == ("k-NN 37.4 %",)
    assert accuracies({}) == ()


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"method": "summary"},
        {"method": "summary", "features": {"trained": None}},
        {"method": ["<b>"], "top1_ratio": "high"},
        {"values": {}, "headlines": {"rotation": "accuracy"}},
        {"box": {"AP": 0.31, "deep": {"deeper": {"deepest": 1}}}, "versions": {"x": "1"}, "long": "x" * 999},
        {"top1_ratio": 0.5, "encoder": None, "chosen": None, "top1_ratio_95": [1]},
    ],
)  # fmt: skip
def test_results_that_others_wrote_are_shown_as_they_are(result: dict[str, Any]) -> None:
    part = evaluation_section({"<i>detection</i>": result})
    root = text_of(part)
    assert root.all("i") == []
    accuracies({"x": result})
    if "box" in result:
        assert ["box AP", "0.31"] in cells(root)
        assert not any("xxx" in cell for row in cells(root) for cell in row)


def test_few_labels_detectors_and_segmenters_have_tables_of_their_own() -> None:
    fewshot = {
        "method": "fewshot",
        "rows": {
            "0pct": {"fraction_ratio": 0.0, "num_train": 0, "finetuned": None, "linear": {"top1_ratio": 0.5}},
            "1pct": {
                "fraction_ratio": 0.01,
                "num_train": 40,
                "finetuned": {"top1_ratio": 0.3, "top1_ratio_std": 0.02},
                "linear": {"top1_ratio": 0.55, "top1_ratio_std": None},
            },
        },
    }
    scores = dict(
        zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), (31.25, 50.0, 33.0, None, 20, 40), strict=True)
    )
    detection = {
        "method": "detection",
        "step": 300,
        "scores": {"bbox": scores},
        "initial": {"bbox": scores},
        "baselines": {"mean_box": {"bbox": scores}},
    }
    means = {"miou": 0.4, "macc": 0.5, "pixel_accuracy": 0.9}
    segmentation = {
        "method": "segmentation",
        **means,
        "classes": [{"name": "<road>", "iou": 0.8, "accuracy": None}],
        "baselines": {"majority": {"class": "sky", **means}, "initial": means},
    }
    results = {"fewshot": fewshot, "transfer/detection": detection, "transfer/segmentation": segmentation}
    rows = cells(text_of(evaluation_section(results)))
    dash = "\N{EN DASH}"
    assert ["0 %", "0", dash, "50.0 %"] in rows
    assert ["1 %", "40", "30.0 % \N{PLUS-MINUS SIGN} 2.0", "55.0 %"] in rows
    assert ["boxes", "after 300 steps", "31.2", "50.0", "33.0", dash, "20.0", "40.0"] in rows
    assert ["boxes", "one box: mean box", "31.2", "50.0", "33.0", dash, "20.0", "40.0"] in rows
    assert ["all classes", "trained", "40.0 %", "50.0 %", "90.0 %"] in rows
    assert ["all classes", "always 'sky'", "40.0 %", "50.0 %", "90.0 %"] in rows
    assert ["<road>", "trained", "80.0 %", dash, ""] in rows
    # of another version: what can be read is shown all the same
    for broken in (
        {"method": "detection", "AP": 12.5},
        {"method": "fewshot", "rows": []},
        {"method": "segmentation"},
    ):
        assert evaluation_section({"x": broken}).body is not None


def test_an_export_tells_what_matched_and_who_read_it() -> None:
    report = {"format": "timm", "architecture": "vit", "source_weights": "student", "source_step": 720}
    report |= {"matched": ["a", "b"], "missing": [], "unexpected": ["c"], "left_out": {}, "consumer": "timm"}
    report |= {"max_abs_difference": 0.0, "tolerance": 4e-5, "model_sha256": "0123456789abcdef"}
    other = {"matched": ["a"], "left_out": {"mask": "why"}, "max_abs_difference": None}
    rows = cells(text_of(export_section({"exported": report, "exported-formats/<x>": other})))
    matched = "2 matched, 0 missing, 1 unexpected"
    assert rows[1] == [
        *(
            "exported",
            "timm",
            "vit",
            "student, step 720",
            "timm",
            matched,
            "0 (limit 4.00e-05)",
            "0123456789ab",
        ),
    ]
    assert rows[2][0] == "exported-formats/<x>"
    assert rows[2][5:7] == ["1 matched, 1 left out", "not compared"]


def training(lines: list[str], **changes: Any) -> Training:
    return Training(tuple(parse_records(lines)), (ROTATION,), None, **changes)


def test_sections_without_input_say_why_and_one_record_is_enough() -> None:
    empty = training_sections(training([]))
    assert [part.body for part in empty] == [None, None]
    assert all("no record" in part.missing for part in empty)
    sections = {
        part.slug: part for part in training_sections(training(['{"step": 1, "total": 2.5, "lr": 0.1}']))
    }
    assert sections["tasks"].body is not None
    assert "Not recorded: rotation." in text_of(sections["tasks"]).text
    assert sections["health"].body is None
    assert "never resumed" in sections["attempts"].missing


def test_what_is_measured_now_and_then_is_one_line() -> None:
    lines = [f'{{"step": {step}, "total": 1.0}}' for step in range(1, 10)]
    lines[2] = '{"step": 3, "total": 1.0, "knn_top1_ratio": 0.2}'
    lines[7] = '{"step": 8, "total": 1.0, "knn_top1_ratio": 0.4}'
    (tasks, *_) = training_sections(training(lines))
    (figure,) = [one for one in text_of(tasks).all("figure") if "k-NN" in one.text]
    (path, *_) = [one for one in figure.all("path") if one.attributes["class"] == "line s0"]
    assert re.fullmatch(r"M[\d.]+ [\d.]+L[\d.]+ [\d.]+", path.attributes["d"])


def test_learned_weights_are_drawn_and_fixed_ones_only_told() -> None:
    line = '{"step": %d, "loss/rotation": 1.0, "weight/rotation": 2.0, "loss/mae": 3.0, "weight/mae": 1.0}'
    lines = [line % step for step in (1, 2)]
    both = Training(tuple(parse_records(lines)), (ROTATION, MAE), None, learns_weights=True)
    (weights,) = [part for part in training_sections(both) if part.slug == "weights"]
    told = [entry.text for entry in text_of(weights).all("li")]
    assert told == ["rotation 2", "mae 1", "rotation 40 %", "mae 60 %"]
    fixed = Training(tuple(parse_records(lines)), (ROTATION, MAE), None)
    (weights,) = [part for part in training_sections(fixed) if part.slug == "weights"]
    assert weights.missing == "they are fixed, not learned: rotation 2, mae 1"


def test_attempts_anomalies_and_bad_images_are_listed_and_marked() -> None:
    lines = [
        f'{{"step": {step}, "attempt": {1 + step // 3}, "total": 1.0, "grad_norm": 2.0}}'
        for step in range(1, 6)
    ]
    anomalies = [
        {"step": 4, "kind": "<b>spike</b>", "score": 12.345678, "sample_ids": [1, 2]},
        {"kind": "odd"},
    ]
    attempts = (Attempt(1, "monday", 0, "failed", 2), Attempt(2, "tuesday", 2, None, None))
    parts = {
        part.slug: part
        for part in training_sections(
            training(
                lines,
                anomalies=tuple(anomalies),
                bad_samples=({"reason": "damaged"}, {"reason": "damaged"}, {}),
                attempts=attempts,
            )
        )
    }
    health = text_of(parts["health"])
    assert "2 damaged, 1 unknown" in health.text
    assert ["4", "<b>spike</b>", "score 12.35, 2 samples"] in cells(health)
    assert [one.text for one in health.all("path") if one.attributes.get("class") == "alarm"] == [
        "step 4: <b>spike</b>"
    ]
    rows = cells(text_of(parts["attempts"]))
    assert rows[1:] == [
        ["1", "monday", "0", "failed", "2"],
        ["2", "tuesday", "2", "still going, or killed", "\N{EN DASH}"],
    ]
    upright = [one for one in text_of(parts["tasks"]).all("text") if one.text == "attempt 2"]
    assert upright


def test_the_page_names_every_section_once_and_what_is_left_out_with_its_reason() -> None:
    parts = [section("one", "First <1>", "text & more"), left_out("two", "Second", "there is no input <b>")]
    root = parse(page("A <title>", table(("a",), [("b",)]), parts, "footer"))
    assert [a.text for a in root.all("nav")[0].all("a")] == ["First <1>", "Not in this report"]
    targets = {a.attributes["href"].removeprefix("#") for a in root.all("a")}
    ids = [element.attributes["id"] for name in ("section", "main") for element in root.all(name)]
    assert targets <= set(ids)
    assert len(ids) == len(set(ids))
    assert "Second: there is no input <b>" in root.text
    (language,) = root.all("html")
    assert language.attributes["lang"] == "en"
    metas = {meta.attributes.get("name", meta.attributes.get("http-equiv", "")) for meta in root.all("meta")}
    assert {"viewport", "Content-Security-Policy"} <= metas


def test_points_keep_their_proportions_and_every_class_its_looks() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 10)
    places = rng.normal(size=(120, 2)) * [3, 1] + labels[:, None]
    names = {label: f"class <{label}>" for label in range(12)}
    root = parse(scatter(Points(places, labels, names)))
    paths = [path for path in root.all("path") if path.attributes.get("stroke-width") == "5"]
    looks = {(path.attributes["stroke"], path.attributes["stroke-linecap"]) for path in paths}
    assert len(paths) == len(looks) == 12
    drawn = np.array(
        [pair for path in paths for pair in re.findall(r"M([\d.]+) ([\d.]+)", path.attributes["d"])], float
    )
    apart = np.linalg.norm(drawn[:50, None] - drawn[None, :50], axis=2)
    true = np.linalg.norm(places[:50, None] - places[None, :50], axis=2)
    scale = apart[true > 0] / true[true > 0]
    assert np.ptp(scale) / scale.mean() < 0.2  # rounded to a tenth of a unit
    width, height = map(float, root.all("svg")[0].attributes["viewbox"].split()[2:])
    assert (drawn > 0).all()
    assert (drawn < [width, height]).all()
    assert [text.text for text in root.all("text")] == list(names.values())
    assert root.all("li")[0].text == "class <0> (10)"


def test_names_do_not_write_over_each_other_and_stay_inside() -> None:
    labels = np.repeat(np.arange(10), 5)
    places = np.random.default_rng(1).normal(size=(50, 2)) * 0.01 + [[0, 0]]
    places[0], places[-1] = (-5, -5), (5, 5)
    root = parse(scatter(Points(places, labels, dict.fromkeys(range(10), "elephant"))))
    spots = sorted(float(text.attributes["y"]) for text in root.all("text"))
    assert min(np.diff(spots)) > 11
    height = float(root.all("svg")[0].attributes["viewbox"].split()[3])
    assert spots[0] >= 11
    assert spots[-1] <= height - 3


def test_a_name_stands_where_its_class_is_densest_not_between_its_parts() -> None:
    close, wide = np.random.default_rng(0).normal(size=(2, 30, 2))
    places = np.concatenate([0.1 * close + np.array([10, 0]), 3 * wide - np.array([10, 0])])
    x, _ = densest(places)
    assert x == pytest.approx(10, abs=1)
    assert densest(np.array([[1.0, 2.0]])) == (1.0, 2.0)


def test_points_without_classes_are_drawn_in_one_colour() -> None:
    root = parse(scatter(Points(np.eye(4, 2), np.full(4, -1), {})))
    assert [entry.text for entry in root.all("li")] == ["images (4)"]
    assert root.all("text") == []
