"""A plan takes what was measured, says so of each number, and refuses what was measured elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.errors import EXIT_DONE, EXIT_USER_ERROR
from pretrain.plan.measured import between

CORE = Path(__file__).parents[2] / "configs" / "imagenet_vitb16_multitask.yaml"
H100 = "NVIDIA H100 80GB HBM3"


def write(folder: Path, name: str, variants: dict[str, Any], **more: Any) -> None:
    place = {"device": "cuda", "gpu": H100, **more.pop("place", {})}
    content = {"slice": name, "is_toy": False, "place": place, "variants": variants, **more}
    (folder / f"{name}.json").write_text(json.dumps(content))


def step(batch: int, mfu: float, settings: str = "engine.compile='on'") -> dict[str, Any]:
    return {
        "model": "vit_base_patch16_224",
        "batch": batch,
        "settings": [settings],
        "mfu_of_datasheet_ratio": mfu,
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """As `make bench-gpu` would leave them, with made-up numbers."""
    folder = tmp_path / "gpu"
    folder.mkdir()
    write(
        folder,
        "mfu-vitb16",
        {
            "batch 32, compiled": step(32, 0.2),
            "batch 128, compiled": step(128, 0.4),
            "batch 128, compiled, max-autotune": step(128, 0.38),
            "batch 512, compiled": {"problem": "out of memory"},
            "batch 128, eager": step(128, 0.1, "engine.compile='off'"),
            "batch 128, compiled, recomputing": step(128, 0.9, "engine.recompute=true"),
        },
    )
    write(
        folder,
        "ceilings",
        {
            "copy, device to device": {"bytes_per_second": 1.2e12},
            "copy, device to pinned host": {"bytes_per_second": 50e9},
        },
    )
    write(folder, "memory", {}, summary={"peak_error_ratio": 0.04})
    return folder


def plan(capsys: pytest.CaptureFixture[str], *more: str, nodes: int = 1) -> tuple[str, dict[str, Any]]:
    asked = ["plan", str(CORE), "--nodes", str(nodes), "--gpus-per-node", "8", "--images", "1281167", *more]
    assert main(asked) == EXIT_DONE
    text = capsys.readouterr().out
    assert main([*asked, "--json"]) == EXIT_DONE
    return text, json.loads(capsys.readouterr().out)


def test_a_step_takes_as_long_as_the_measured_share_of_the_peak_says(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, numbers = plan(capsys, "--measured", str(results))
    assert numbers["layout"]["micro_batch"] == 128
    assert numbers["gpu"] == "H100"  # nobody asked for another
    expected = 128 * numbers["flops"]["train"] / (0.4 * 989.4e12)
    assert numbers["step"]["compute"] == pytest.approx(expected)
    assert numbers["step"]["optimizer"] == 0.0  # is part of what was measured
    assert text.startswith("PREDICTION, from numbers of which some were measured")
    assert re.search(r"utilisation +40\.0 % +measured: mfu-vitb16.json", text)
    assert re.search(r"ring inside a node +450 GB/s +ASSUMED", text)
    assert re.search(r"copy to the host +50 GB/s +measured: ceilings.json", text)
    assert "peaks within 4 % on a GPU" in text
    assert numbers["saving"]["pause_seconds"] == pytest.approx(numbers["checkpoint_bytes"] / 50e9)


def test_small_micro_batches_have_their_own_share(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, numbers = plan(capsys, "--measured", str(results), nodes=8)
    assert "a lower bound" not in text  # launches are in what was measured
    _, numbers = plan(capsys, "--measured", str(results), nodes=4)
    assert numbers["layout"]["micro_batch"] == 32
    assert numbers["utilisation"] == pytest.approx(0.2)
    assert between(((32, 0.2), (128, 0.4)), 64) == pytest.approx(0.3)
    assert between(((32, 0.2), (128, 0.4)), 1) == 0.2
    assert between(((32, 0.2), (128, 0.4)), 1024) == 0.4
    strong = numbers["scaling"][6]  # 64 GPUs with 16 images each
    assert strong["strong_efficiency"] < 0.6


def test_what_is_not_compiled_is_planned_by_what_was_not(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, numbers = plan(capsys, "engine.compile=off", "--measured", str(results))
    assert numbers["utilisation"] == pytest.approx(0.1)


def test_links_that_others_measured_replace_those_of_datasheets(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, before = plan(capsys, "--measured", str(results), nodes=2)
    links = {"source": "nccl-tests, all_reduce", "inside_node_bytes_per_second": 400e9}
    (results / "links.json").write_text(json.dumps({**links, "between_nodes_bytes_per_second": 100e9}))
    text, numbers = plan(capsys, "--measured", str(results), nodes=2)
    assert before["communication"]["rate"] == pytest.approx(360e9)
    assert numbers["communication"]["rate"] == pytest.approx(100e9)
    assert re.search(r"ring inside a node +400 GB/s +measured: links.json: nccl-tests", text)


def test_what_no_file_tells_stays_assumed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "mfu-vitb16.json").unlink()
    text, numbers = plan(capsys, "--measured", str(results))
    assert numbers["utilisation"] == 0.35
    assert re.search(r"utilisation +35\.0 % +ASSUMED", text)
    assert re.search(r"memory of the GPU +2,400 GB/s +measured", text)
    assert {figure["is_measured"] for figure in numbers["basis"]} == {True, False}


def test_without_results_every_number_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    text, numbers = plan(capsys)
    assert not any(figure["is_measured"] for figure in numbers["basis"])
    assert "nothing here was measured" in text
    assert "rests on" not in text


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda folder: [file.unlink() for file in folder.iterdir()], "no results of a GPU; `make"),
        (lambda folder: write(folder, "memory", {}, place={"device": "cpu"}), "memory.json is of toy size"),
        (lambda folder: write(folder, "heads", {}, place={"gpu": "NVIDIA H200"}), "of several GPUs"),
        (lambda folder: (folder / "heads.json").write_text("{"), "heads.json: cannot be read"),
        (lambda folder: (folder / "links.json").write_text('{"inside_node_bytes_per_second": "fast"}'),
         "inside_node_bytes_per_second: 'fast' is no number"),
    ],
)  # fmt: skip
def test_results_that_tell_nothing_are_refused_in_one_line(
    spoil: Any, line: str, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(results)
    asked = ["plan", str(CORE), "--nodes", "1", "--gpus-per-node", "8", "--images", "9"]
    assert main([*asked, "--measured", str(results)]) == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert re.search(line, told), told
    assert told.count("\n") == 1


def test_results_of_another_gpu_than_asked_for_are_refused(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", str(CORE), "--nodes", "1", "--gpus-per-node", "8", "--images", "9", "--gpu", "a100"]
    assert main([*asked, "--measured", str(results)]) == EXIT_USER_ERROR
    assert "--gpu a100: --measured holds results of H100" in capsys.readouterr().err
