from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from pretrain.metrics.exporter import Exporter
from pretrain.metrics.meter import JsonLines, Meter

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
    meter = meter_for(tmp_path, exporter)
    for step in range(1, 5):
        record(meter, step, float(step), skipped=step == 2, bad_samples=3.0, backbone_calls=2.0 * step)

    def published(name: str, **labels: str) -> float | None:
        return exporter.registry.get_sample_value(name, labels)

    assert published("pretrain_steps_total") == 4
    assert published("pretrain_images_total") == 32
    assert published("pretrain_nonfinite_steps_total") == 1
    assert published("pretrain_data_wait_seconds_total") == pytest.approx(0.4)
    assert published("pretrain_step_seconds_count") == 4
    assert published("pretrain_epoch") == 1.0
    assert published("pretrain_loss", task="total") == 4.0
    assert published("pretrain_loss", task="rotation") == 2.0
    assert published("pretrain_task_metric", task="rotation", metric="accuracy") == 0.5
    assert published("pretrain_bad_samples_total") == 3
    assert published("pretrain_backbone_calls_total") == 8
    assert records(tmp_path / "metrics.jsonl")[-1]["backbone_calls"] == 6.0  # so far, not their mean


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
