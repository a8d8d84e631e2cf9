from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from pretrain.metrics import meter as meter_module
from pretrain.metrics.exporter import Exporter
from pretrain.metrics.meter import Goodput, JsonLines, Meter, Work

NAN = math.nan


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, resumed_at=0)
    lines.write({"step": 1, "loss": 0.5, "missing": None})
    lines.write({"step": 2, "loss": 0.25})
    assert records(path) == [{"step": 1, "loss": 0.5, "missing": None}, {"step": 2, "loss": 0.25}]


def test_resuming_drops_lines_beyond_the_step_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 8))
    path.write_text(whole + '{"step": 3, "lo')
    lines = JsonLines(path, resumed_at=4)
    assert [record["step"] for record in records(path)] == [1, 2, 3, 4]
    lines.write({"step": 5})
    assert [record["step"] for record in records(path)] == [1, 2, 3, 4, 5]
    JsonLines(path, resumed_at=0)
    assert path.read_text() == ""


@pytest.mark.parametrize("junk", ["[]", "3", "null", '{"other": 1}', '{"step": "x"}', "", "\x00\x00"])
def test_a_line_that_is_not_a_record_is_dropped(junk: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{junk}\n{{"step": 2}}\n')
    JsonLines(path, resumed_at=9)
    assert [record["step"] for record in records(path)] == [1, 2]


def test_a_file_damaged_by_a_crash_is_mended_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\x80\n{"step": 2}\n')
    JsonLines(path, resumed_at=9)
    assert [record["step"] for record in records(path)] == [1, 2]


def test_a_write_error_is_reported_once_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pretrain"), "propagate", True)
    folder = tmp_path / "gone"
    folder.mkdir()
    lines = JsonLines(folder / "metrics.jsonl", resumed_at=0)
    folder.rmdir()
    for step in range(3):
        lines.write({"step": step})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "training goes on" in caplog.text
    folder.mkdir()
    lines.write({"step": 9})  # and it is tried again
    assert [record["step"] for record in records(folder / "metrics.jsonl")] == [9]


def test_a_file_that_cannot_be_read_at_the_start_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    JsonLines(tmp_path / "metrics.jsonl", resumed_at=3).write({"step": 4})


def values(loss: float, **more: float) -> dict[str, float]:
    return {
        "total": loss,
        "loss/rotation": loss / 2,
        "weight/rotation": 1.0,
        "rotation/accuracy": 0.5,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "samples": 7.0,
        **more,
    }


@pytest.fixture
def exporter() -> Exporter:
    return Exporter(CollectorRegistry())


def meter_for(folder: Path, exporter: Exporter, every_steps: int = 3, num_steps: int = 10) -> Meter:
    return Meter(
        JsonLines(folder / "metrics.jsonl", resumed_at=0),
        exporter,
        {"rotation": "accuracy"},
        every_steps=every_steps,
        num_steps=num_steps,
        global_batch=8,
        images_per_epoch=32,
    )


def record(
    meter: Meter, step: int, loss: float, skipped: bool = False, seconds: float = 0.5, **more: float
) -> None:
    meter.record(step, values(loss, **more), skipped=skipped, seconds=seconds, wait_seconds=0.1)


def test_lines_are_written_at_the_first_step_every_few_and_at_the_last(
    tmp_path: Path, exporter: Exporter
) -> None:
    meter = meter_for(tmp_path, exporter)
    for step in range(1, 11):
        record(meter, step, float(step))
    assert [line["step"] for line in records(tmp_path / "metrics.jsonl")] == [1, 3, 6, 9, 10]


def test_a_line_holds_the_means_since_the_line_before(tmp_path: Path, exporter: Exporter) -> None:
    meter = meter_for(tmp_path, exporter)
    for step, loss, seconds in (
        (1, 9.0, 4.0),
        (2, 1.0, 0.5),
        (3, 2.0, 1.5),
        (4, 3.0, 1.0),
        (5, 4.0, 1.0),
        (6, 8.0, 1.0),
    ):
        record(meter, step, loss, seconds=seconds, samples=float(step))
    first, second, third = records(tmp_path / "metrics.jsonl")
    assert [line["total"] for line in (first, second, third)] == [9.0, 1.5, 5.0]
    assert second["loss/rotation"] == 0.75
    assert [line["step_seconds"] for line in (first, second, third)] == [4.0, 1.0, 1.0]
    assert second["images_per_second"] == 8.0  # 16 images in 2 s
    assert second["data_wait_seconds"] == 0.1
    assert (second["images"], second["epoch"]) == (24, 0.75)
    assert (second["bad_samples"], second["backbone_calls"]) == (None, None)
    assert second["samples"] == 3.0  # of the last step itself: a mean of digests says nothing
    assert second["unix_time"] > 0


def test_values_that_are_not_finite_are_left_out_of_means_and_null_if_none_is(
    tmp_path: Path, exporter: Exporter
) -> None:
    meter = meter_for(tmp_path, exporter)
    record(meter, 1, 1.0)
    record(meter, 2, NAN, skipped=True, grad_norm=math.inf)
    record(meter, 3, 3.0, grad_norm=NAN)
    for step in (4, 5, 6):
        record(meter, step, NAN, skipped=True)
    _, second, third = records(tmp_path / "metrics.jsonl")
    assert (second["total"], second["grad_norm"], second["skipped_steps"]) == (3.0, None, 1)
    assert (third["total"], third["loss/rotation"], third["grad_norm"], third["skipped_steps"]) == (
        None,
        None,
        1.0,
        3,
    )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


@pytest.mark.parametrize("name", ["samples", "grad_norm", "loss/rotation"])
def test_no_single_value_that_is_not_finite_can_stop_a_run(
    name: str, tmp_path: Path, exporter: Exporter
) -> None:
    meter = meter_for(tmp_path, exporter, every_steps=1)
    for step, value in ((1, NAN), (2, math.inf)):
        record(meter, step, 1.0, **{name: value})
    assert [line[name] for line in records(tmp_path / "metrics.jsonl")] == [None, None]


def test_a_value_that_only_some_steps_have_is_averaged_over_those(tmp_path: Path, exporter: Exporter) -> None:
    meter = meter_for(tmp_path, exporter)
    record(meter, 1, 1.0, momentum=0.9)
    record(meter, 2, 1.0, momentum=0.8)
    record(meter, 3, 1.0, skipped=True)  # the teacher was not updated
    first, second = records(tmp_path / "metrics.jsonl")
    assert first["momentum"] == 0.9
    assert second["momentum"] == 0.8


def test_steps_images_skips_and_waits_are_counted(tmp_path: Path, exporter: Exporter) -> None:
    meter = meter_for(tmp_path, exporter, every_steps=1)
    for step in range(1, 5):
        record(meter, step, float(step), skipped=step == 2, backbone_calls=2.0 * step)

    def published(name: str, **labels: str) -> float | None:
        return exporter.registry.get_sample_value(name, labels)

    assert published("pretrain_steps_total") == 4
    assert published("pretrain_images_total") == 32
    assert published("pretrain_nonfinite_steps_total") == 1
    assert published("pretrain_step") == 4
    assert published("pretrain_planned_steps") == 10
    assert published("pretrain_epoch") == 1.0
    assert published("pretrain_loss", task="total") == 4.0
    assert published("pretrain_loss", task="rotation") == 2.0
    assert published("pretrain_task_metric", task="rotation", metric="accuracy") == 0.5
    assert records(tmp_path / "metrics.jsonl")[-1]["backbone_calls"] == 8.0  # so far, not their mean


def test_the_log_line_shows_losses_headlines_speed_and_time_left(
    tmp_path: Path, exporter: Exporter, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pretrain"), "propagate", True)
    caplog.set_level(logging.INFO, "pretrain")
    meter = meter_for(tmp_path, exporter, every_steps=2, num_steps=7202)
    record(meter, 1, 9.0, seconds=60.0)
    record(meter, 2, 4.0, seconds=1.0)
    first, second = caplog.messages
    assert "eta" not in first  # the first step compiles and warms up
    assert second.startswith(
        "step 2/7202 | loss 4.000 | rotation 2.000 (accuracy 0.500) | lr 1.00e-03 | 8 images/s"
    )
    assert second.endswith("eta 2:00:00")
    record(meter, 3, NAN, skipped=True)
    record(meter, 4, NAN, skipped=True)
    assert "loss nan" in caplog.messages[-1]
    assert "2 skipped" in caplog.messages[-1]


def test_what_is_not_published_at_once_is_not_lost(
    tmp_path: Path, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(meter_module.time, "monotonic", lambda: now[0])
    meter = meter_for(tmp_path, exporter, every_steps=100, num_steps=100)

    def steps() -> float | None:
        return exporter.registry.get_sample_value("pretrain_steps_total")

    record(meter, 1, 1.0)
    assert steps() == 1
    for step in range(2, 11):
        now[0] += 0.05
        record(meter, step, 1.0)
    assert steps() == 1
    now[0] += 0.6
    record(meter, 11, 1.0)
    assert steps() == 11
    assert exporter.registry.get_sample_value("pretrain_images_total") == 88


def test_the_seconds_of_sections_are_averaged_like_values(tmp_path: Path, exporter: Exporter) -> None:
    meter = meter_for(tmp_path, exporter)
    for step, data in ((1, 9.0), (2, 1.0), (3, 2.0)):
        sections = {"data": data, "forward": 4.0}
        meter.record(step, values(1.0), skipped=False, seconds=0.5, wait_seconds=0.1, sections=sections)
    assert [line["seconds/data"] for line in records(tmp_path / "metrics.jsonl")] == [9.0, 1.5]


def test_utilisation_is_flops_per_second_over_the_peak(tmp_path: Path, exporter: Exporter) -> None:
    meter = Meter(
        JsonLines(tmp_path / "metrics.jsonl", resumed_at=0),
        exporter,
        {"rotation": "accuracy"},
        every_steps=1,
        num_steps=9,
        global_batch=8,
        images_per_epoch=32,
        work=Work(flops_per_image=1e9, peak_flops_per_second=1e11, source="a table"),
    )
    record(meter, 1, 1.0, seconds=0.5)  # 8 images of 1 GFLOP in half a second: 16 GFLOP/s of 100
    assert records(tmp_path / "metrics.jsonl")[0]["mfu_ratio"] == pytest.approx(0.16)
    sample = exporter.registry.get_sample_value
    assert sample("pretrain_mfu_ratio") == pytest.approx(0.16)
    assert sample("pretrain_peak_flops_per_second", {"source": "a table"}) == 1e11
    assert sample("pretrain_model_flops_total") == 8e9


def test_goodput_counts_steps_that_stay_over_all_starts(
    tmp_path: Path, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(meter_module.time, "time", lambda: now[0])
    meter = meter_for(tmp_path, exporter, every_steps=1)
    for step in (1, 2, 3):
        now[0] += 10.0
        record(meter, step, 1.0, seconds=8.0, skipped=step == 3)
    assert records(tmp_path / "metrics.jsonl")[-1]["goodput_ratio"] == pytest.approx(16 / 30, abs=1e-4)
    # killed after step 3, started again from step 1 half an hour later
    now[0] += 1770.0
    lines = JsonLines(tmp_path / "metrics.jsonl", resumed_at=1)
    goodput = Goodput(lines.last)
    assert goodput.useful_seconds == 8.0
    assert goodput.ratio == pytest.approx(8 / 1800)


def test_anomalies_are_counted_by_kind(tmp_path: Path, exporter: Exporter) -> None:
    meter = meter_for(tmp_path, exporter)
    for kind in ("loss spike", "loss spike", "collapse"):
        meter.publish_anomaly(kind)
    assert exporter.registry.get_sample_value("pretrain_anomalies_total", {"kind": "loss spike"}) == 2


def test_the_teachers_entropy_is_published_as_a_share_of_its_bound(exporter: Exporter) -> None:
    exporter.publish_step({"dino/teacher_entropy": 2.0, "dino/entropy_bound": 8.0, "similarity/same": 0.9})
    sample = exporter.registry.get_sample_value
    assert sample("pretrain_teacher_entropy_ratio", {"task": "dino"}) == 0.25
    assert sample("pretrain_feature_similarity", {"images": "same"}) == 0.9
    assert sample("pretrain_task_metric", {"task": "similarity", "metric": "same"}) is None
