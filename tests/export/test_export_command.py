"""`pretrain export` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from run_folder import seal, tiny_config, write_checkpoint

from pretrain import attempts
from pretrain.cli import main

FILES = ["README.md", "config.json", "export_report.json", "model.safetensors"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    code = main(["export", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def make_run(folder: Path, *, age_seconds: float, finished: bool) -> None:
    checkpoint = write_checkpoint(folder, tiny_config(), ("rotation",))
    os.utime(checkpoint, (2e9 - age_seconds, 2e9 - age_seconds))
    attempts.begin(folder, attempts.this_process()).finish("done" if finished else "failed", 1000)


def test_without_a_run_the_newest_finished_one_is_exported_beside_its_checkpoints(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(here / "runs" / "new", age_seconds=0, finished=False)
    make_run(here / "runs" / "study" / "a" / "seed-0", age_seconds=10, finished=True)
    make_run(here / "runs" / "old", age_seconds=20, finished=True)
    code, told, _ = export(capsys)
    chosen = here / "runs" / "study" / "a" / "seed-0"
    assert code == 0
    assert "runs/study/a/seed-0 (the newest finished one of 3 below runs)" in told
    assert "runs/study/a/seed-0/exported: written" in told
    assert "timm.create_model('local-dir:runs/study/a/seed-0/exported', pretrained=True)" in told
    assert sorted(path.name for path in (chosen / "exported").iterdir()) == FILES
    code, told, _ = export(capsys)
    assert code == 0
    assert "exported: is up to date" in told


def test_where_no_run_has_finished_the_newest_is_taken(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(here / "runs" / "old", age_seconds=20, finished=False)
    write_checkpoint(here / "runs" / "new", tiny_config())  # of a version without attempts
    code, told, _ = export(capsys)
    assert code == 0
    assert "(the newest one, none has finished of 2 below runs)" in told
    assert (here / "runs" / "new" / "exported").is_dir() != (here / "runs" / "old" / "exported").is_dir()


def test_without_any_run_it_is_said_in_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "runs" / "empty").mkdir(parents=True)
    code, told, error = export(capsys)
    assert (code, told) == (2, "")
    assert error == "pretrain: runs: no run with a checkpoint below it; name one: pretrain export RUN\n"


def test_one_checkpoint_is_exported_into_its_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(here / "run", tiny_config(), step=1000)
    write_checkpoint(here / "run", tiny_config(), step=2000)
    code, told, _ = export(capsys, "run/checkpoints/step-00001000")
    assert code == 0
    assert "student of step 1000" in told
    assert (here / "run" / "exported").is_dir()


def test_the_lines_tell_what_was_matched_and_what_was_changed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(here / "run", tiny_config(), ("rotation",))
    code, told, _ = export(
        capsys, "run", "--img-px", "48", "--global-pool", "avg", "--drop-registers", "--tag", "mine"
    )
    assert code == 0
    assert "30 of 30 tensors matched, 0 missing, 0 unexpected; features within" in told
    assert "without the registers rotation: class feature changed by" in told
    assert "on 16 images of seeded noise" in told
    assert "48 x 48 px instead of 32 x 32, 6 x 6 tokens instead of 4 x 4; resampled: pos_embed" in told
    assert "pooled by avg instead of token, behind the trained norm" in told
    report = json.loads((here / "run" / "exported" / "export_report.json").read_text())
    assert len(report["matched"]) == 30
    assert (report["missing"], report["unexpected"], report["left_out"]) == ([], [], {})
    assert [change["change"] for change in report["changes"]] == [
        "registers dropped",
        "image size",
        "global pool",
    ]
    config = json.loads((here / "run" / "exported" / "config.json").read_text())
    assert config["pretrained_cfg"]["tag"] == "mine"
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 48]
    model = timm.create_model("local-dir:run/exported", pretrained=True)
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 24)


def test_several_formats_go_into_folders_of_their_own_and_a_table_compares_them(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(here / "run", tiny_config(), ("rotation",))
    code, told, _ = export(capsys, "run", "--format", "hf-hub", "timm", "--out", "out")
    assert code == 0
    for name in ("timm", "hf-hub"):
        assert sorted(path.name for path in (here / "out" / name).iterdir()) == FILES
    rows = [line.split() for line in told.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["format", "timm", "hf-hub"]
    assert rows[1][1:4] == ["31", "of", "31"]
    code, told, _ = export(capsys, "run", "--format", "hf-hub")
    assert code == 0
    assert (here / "run" / "exported-formats" / "hf-hub" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--format", "tim"], "--format tim: did you mean 'timm'?"),
        (["run", "--img-px", "30"], "--img-px 30: is not a whole number of 8 px patches; use 24 or 32"),
        (["run", "--out", "mine"], "exists and is not an export of ours"),
        (["run", "--weights", "teacher"], "no teacher weights here"),
        (["nowhere"], "neither a run folder"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(
    arguments: list[str], told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(here / "run", tiny_config())
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").touch()
    code, out, error = export(capsys, *arguments)
    assert (code, out) == (2, "")
    assert told in error
    assert error.count("\n") == 1
    assert not (here / "run" / "exported").exists()


def spoil(checkpoint: Path, how: str) -> None:
    """Damage a checkpoint, or make another's of it, manifest and all."""
    weights, config = checkpoint / "weights" / "student.safetensors", checkpoint / "config.yaml"
    if how == "a byte of the weights":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        return
    if how == "no manifest":
        (checkpoint / "MANIFEST.json").unlink()
        return
    if how == "no weights":
        weights.unlink()
        return
    values = yaml.safe_load(config.read_text())
    if how == "another depth":
        values["model"]["args"]["depth"] = 3
    elif how == "no such architecture":
        values["model"]["name"] = "vit_smol_patch16_224"
    elif how == "another family":
        values["model"] |= {"name": "resnet18", "args": {}}
    config.write_text("- not a run" if how == "not a run" else yaml.safe_dump(values))
    if how == "fewer registers":
        (checkpoint / "state.json").write_text(json.dumps({"step": 1000, "registers": []}))
    if how == "not tensors":
        weights.write_bytes(b"PK")
    seal(checkpoint)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("a byte of the weights", "the file is damaged, use another checkpoint"),
        ("no manifest", "MANIFEST.json is missing or damaged"),
        ("no weights", "No such file or directory"),
        ("another depth", "fit the model of config.yaml in 31 of 43 tensors; missing: blocks.2."),
        ("fewer registers", "unexpected: reg_token"),
        ("no such architecture", "timm has no architecture 'vit_smol_patch16_224'; did you mean"),
        ("another family", "'resnet18' is of no family that is supported"),
        ("not a run", "config.yaml or state.json is not a run's"),
        ("not tensors", "is not in the format safetensors"),
    ],
)
def test_a_checkpoint_that_is_damaged_or_of_something_else_is_one_line_and_code_2(
    how: str, told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(here / "run", tiny_config(), ("rotation",))
    spoil(checkpoint, how)
    code, out, error = export(capsys, str(checkpoint))
    assert (code, out) == (2, "")
    assert told in error
    assert error.count("\n") == 1
    assert not (here / "run" / "exported").exists()


@pytest.mark.parametrize("license", ["a b", "mit\nx: y", ""])
def test_a_license_that_is_no_word_is_refused(license: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", "run", "--license", license])
    assert caught.value.code == 2
    assert "is not a plain word" in capsys.readouterr().err


def test_an_export_that_is_not_right_ends_with_code_1_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.export import timm_folder

    write_checkpoint(here / "run", tiny_config(), ("rotation",))
    right = timm_folder.timm_config

    def without_register(*arguments: Any) -> dict[str, Any]:
        config = right(*arguments)
        del config["model_args"]["reg_tokens"]
        return config

    monkeypatch.setattr(timm_folder, "timm_config", without_register)
    with pytest.raises(SystemExit) as caught:
        main(["export", "run"])
    assert caught.value.code == 1
    assert "export failed, and nothing was written" in capsys.readouterr().out
    assert sorted(path.name for path in (here / "run").iterdir()) == ["checkpoints"]


HUB = """
import json, sys
from pathlib import Path
import timm, torch
images, expected = torch.load(sys.argv[1])
model = timm.create_model("hf-hub:someone/weights", pretrained=True).eval()
with torch.inference_mode():
    print((model(images) - expected).abs().max().item())
"""


@pytest.mark.slow
def test_what_was_uploaded_to_the_hub_opens_from_a_download_of_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache as the hub's library leaves it, read by a process that has no network."""
    write_checkpoint(here / "run", tiny_config(), ("rotation",))
    assert export(capsys, "run", "--format", "timm", "hf-hub", "--out", "out")[0] == 0
    images = torch.randn(2, 3, 32, 32)
    model = timm.create_model("local-dir:out/timm", pretrained=True).eval()
    with torch.inference_mode():
        torch.save((images, model(images)), here / "expected.pt")
    repository = here / "cache" / "models--someone--weights"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    (here / "out" / "hf-hub").rename(repository / "snapshots" / ("a" * 40))
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(here / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", HUB, "expected.pt"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) <= 1e-5


def test_a_folder_for_the_hub_names_no_path_of_this_machine(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    write_checkpoint(here / "run", tiny_config(), ("rotation",))
    assert export(capsys, "run", "--format", "hf-hub", "--license", "mit", "--out", "out")[0] == 0
    for file in (here / "out").iterdir():
        assert str(here).encode() not in file.read_bytes(), file.name
    assert (here / "out" / "README.md").read_text().startswith("---\nlibrary_name: timm\nlicense: mit\n")
    assert before == constants.HF_HUB_OFFLINE
