"""`pretrain report` as its user meets it: whole runs, unfinished ones, wrong input, hostile names."""

from __future__ import annotations

import builtins
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ALL, Element, read_report, section_ids, section_of
from report_runs import MULTITASK, write_photographs

from pretrain.checkpoint import list_checkpoints
from pretrain.cli import main
from pretrain.data.decode import decode
from pretrain.evaluate.encoder import open_encoder
from pretrain.evaluate.shards import find_split

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture
def run(multitask_run: Path, tmp_path: Path) -> Path:
    """A copy that may be written into."""
    return Path(shutil.copytree(multitask_run, tmp_path / "run"))


def report(run: Path, *more: str) -> Element:
    assert main(["report", str(run), *more]) == 0
    out = Path(more[more.index("--out") + 1]) if "--out" in more else run / "report.html"
    return read_report(out)


def test_a_run_with_everything_has_every_section(complete: Path) -> None:
    page = read_report(complete / "report.html")
    assert section_ids(page) == ALL
    header = page.all("header")[0].text
    assert "six tasks" in header
    assert re.search(r"Finished at step 8 of 8 in 2 attempts; ", header)
    assert "contrastive, rotation, colorization, inpainting, relative_position, jigsaw" in header
    assert "class + rotation (register) + 64 patches (8 \N{MULTIPLICATION SIGN} 8)" in header
    assert (
        "1 rank \N{MULTIPLICATION SIGN} 8 images \N{MULTIPLICATION SIGN} 1 = 8 a step; local, fp32" in header
    )
    assert "step-00000008.2" in header
    assert (complete / "report.html").stat().st_size < 3 * 2**20


def test_every_picture_has_words_and_every_section_says_how_to_read_it(complete: Path) -> None:
    page = read_report(complete / "report.html")
    pictures = page.all("img")
    assert len(pictures) > 100
    assert all(len(picture.attributes["alt"]) > 3 for picture in pictures)
    drawings = [svg for svg in page.all("svg") if svg.attributes.get("role") == "img"]
    assert all(len(drawing.attributes["aria-label"]) > 5 for drawing in drawings)
    for slug in ALL:
        reading = [p.text for p in section_of(page, slug).all("p") if p.attributes.get("class") == "reading"]
        assert any("Good:" in words for words in reading), slug


def test_the_resumed_run_is_marked_where_it_went_on(complete: Path) -> None:
    page = read_report(complete / "report.html")
    tasks = section_of(page, "tasks")
    charts = [svg for svg in tasks.all("svg") if svg.attributes.get("class") == "chart"]
    assert len(charts) >= 7
    for chart in charts:
        assert "attempt 2" in [text.text for text in chart.all("text")]
    rows = [[cell.text for cell in row.children] for row in section_of(page, "attempts").all("tr")][1:]
    assert [(row[0], row[2], row[3], row[4]) for row in rows] == [
        ("1", "0", "done", "4"),
        ("2", "4", "done", "8"),
    ]


def test_the_tokens_of_tasks_are_named_with_who_reads_them(complete: Path) -> None:
    page = read_report(complete / "report.html")
    rows = [[cell.text for cell in row.children][:2] for row in section_of(page, "attention").all("tr")]
    assert rows[1:] == [["class", "contrastive"], ["rotation", "rotation"]]


def test_the_plane_names_the_classes(complete: Path) -> None:
    plane = section_of(read_report(complete / "report.html"), "plane")
    assert "24 images of shapes:test" in plane.text
    assert [entry.text for entry in plane.all("li")] == [f"{name} (6)" for name in COLOURS]
    assert [text.text for text in plane.all("text")] == list(COLOURS)


def test_neighbours_are_those_of_a_slow_search(complete: Path, photographs: Path) -> None:
    """Every pair of images compared, one image at a time; the page is read back."""
    encoder = open_encoder(complete)
    features, classes = {}, {}
    for role in ("train", "test"):
        samples = list(find_split(f"{photographs}:{role}", role).samples())
        crops = [encoder.crop(decode(sample.image)) for sample, _ in samples]
        vectors = torch.cat([encoder.encode(crop[None]) for crop in crops]).double()
        features[role] = vectors / vectors.norm(dim=1, keepdim=True)
        classes[role] = [label for _, label in samples]
    near = section_of(read_report(complete / "report.html"), "neighbours")
    assert "among 40 of shapes:train" in near.text
    captions = [caption.text for caption in near.all("figcaption")]
    right = 0
    for number, place in enumerate((2, 6, 10, 14, 18, 22)):  # the middles of six parts of 24
        query, *found = captions[6 * number : 6 * number + 6]
        assert query == f"query {COLOURS[classes['test'][place]]}"
        cosines = features["train"] @ features["test"][place]
        for words, bank in zip(found, cosines.argsort(descending=True)[:5].tolist(), strict=True):
            is_right = classes["train"][bank] == classes["test"][place]
            right += is_right
            name, value, verdict = re.fullmatch(r"(\w+), (\d\.\d{3})(right|wrong)", words).groups()  # type: ignore[union-attr]
            assert float(value) == pytest.approx(float(cosines[bank]), abs=6e-4)
            assert verdict == ("right" if is_right else "wrong")
            assert name == COLOURS[classes["train"][bank]]
    assert f"Here {right} of 30 are of the query's class." in near.text


def test_the_same_run_gives_the_same_file(complete: Path, photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.html"
    shards = str(photographs)
    assert main(["report", str(complete), "--eval", shards, "--train", shards, "--out", str(out)]) == 0
    assert out.read_bytes() == (complete / "report.html").read_bytes()


def test_without_an_evaluation_set_its_sections_are_left_out_with_the_remedy(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = report(run)
    assert section_ids(page) == [*(slug for slug in ALL if slug not in ALL[-4:]), "absent"]
    absent = section_of(page, "absent").text
    assert "t-SNE): no evaluation set was named; give --eval SHARDS" in absent
    assert "`pretrain evaluate` writes them" in absent
    assert "`pretrain export" in absent
    told = capsys.readouterr().out
    assert "9 sections" in told
    assert told.count("left out:") == 4


def test_neighbours_of_a_set_in_itself_are_not_the_queries_themselves(run: Path, photographs: Path) -> None:
    near = section_of(report(run, "--eval", f"{photographs}:test"), "neighbours")
    assert "among 23 of shapes:test" in near.text
    sources = [image.attributes["src"] for image in near.all("img")]
    assert len(sources) == 36
    for start in range(0, 36, 6):
        assert sources[start] not in sources[start + 1 : start + 6]


def test_pictures_may_come_from_other_shards(run: Path, photographs: Path, tmp_path: Path) -> None:
    named = report(run, "--images", f"{photographs}:test", "--out", str(tmp_path / "report.html"))
    assert "Images of shapes:test" in section_of(named, "views").text
    assert not (run / "report.html").exists()


def test_a_run_killed_while_it_wrote_is_told_as_far_as_it_got(run: Path) -> None:
    """No checkpoint is whole, the last line is half a line, and nobody wrote down how it ended."""
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    (run / "quarantine.jsonl").write_text('{"reason": "damaged"}\n{"rea')
    (run / "anomalies.jsonl").write_text(
        '{"step": 3, "kind": "loss spike", "loss": 9.0, "sample_ids": [4]}\n{"st'
    )
    newest = run / "attempts" / "0002.json"
    newest.write_text(json.dumps({**json.loads(newest.read_text()), "outcome": None, "step": None}))
    for folder in list_checkpoints(run):
        (folder / "weights" / "student.safetensors").write_bytes(b"half")
    (run / "eval").mkdir()
    (run / "eval" / "knn.json").write_text('{"method": "knn", "top1')
    page = report(run)
    header = page.all("header")[0].text
    assert "Still going or killed at step 7 of 8 in 2 attempts" in header
    assert "1 damaged image was replaced" in header
    assert section_ids(page) == ["tasks", "views", "weights", "training", "health", "attempts", "absent"]
    assert "no checkpoint of the run is whole" in section_of(page, "absent").text
    assert "loss spike" in section_of(page, "health").text


def test_a_run_that_has_just_begun_has_a_report(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    page = report(run)
    assert section_ids(page) == ["views", "absent"]
    absent = section_of(page, "absent").text
    assert "has written no record into metrics.jsonl yet" in absent
    assert "has not written a checkpoint yet" in absent


def test_a_checkpoint_that_is_pruned_while_it_is_read_is_no_end(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.illustrate import run_files

    real, calls = run_files.read_weights, []

    def pruned_once(folder: Path) -> Any:
        calls.append(folder)
        if len(calls) == 1:
            shutil.rmtree(folder)
        return real(folder)

    monkeypatch.setattr(run_files, "read_weights", pruned_once)
    header = report(run).all("header")[0].text
    assert [folder.name for folder in calls] == ["step-00000008.2", "step-00000006.2"]
    assert "step-00000006.2" in header


def test_without_its_shards_a_run_is_told_without_pictures(
    tmp_path: Path, photographs: Path, run: Path
) -> None:
    for path in (run / "config.yaml", *run.glob("checkpoints/*/config.yaml")):
        path.write_text(path.read_text().replace(str(photographs), str(tmp_path / "gone")))
    for folder in list_checkpoints(run):
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        manifest["files"]["config.yaml"] = hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest()
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    page = report(run)
    assert section_ids(page) == ["tasks", "weights", "training", "health", "attempts", "absent"]
    absent = section_of(page, "absent")
    told = [entry.text for entry in absent.all("li") if "gone" in entry.text]
    assert len(told) == 4
    assert all("name images with --images SHARDS" in line for line in told)
    assert "attention" in section_ids(report(run, "--images", f"{photographs}:test"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], r"nowhere: there is no such folder"),
        (["{empty}"], r"is not the folder of a run, for it has no config.yaml"),
        (["{checkpoint}"], r"is one checkpoint; give the folder of its run"),
        (["{run}", "--out", "{empty}"], r"is a folder; --out names the file"),
        (["{run}", "--out", "{empty}/no/report.html"], r"its folder is not there"),
        (["{run}", "--train", "{shards}"], r"give --eval too"),
        (["{run}", "--eval", "{empty}"], r"there is no index.json"),
        (["{run}", "--eval", "{shards}:validation"], r"there is no split 'validation'"),
        (["{run}", "--images", "{empty}"], r"there is no index.json"),
        (["{run}", "--eval", "{shards}", "--train", "nowhere"], r"there is no index.json"),
        (["{broken}"], r"schedule: is required"),
    ],
)
def test_wrong_input_ends_in_one_line_before_any_work(
    arguments: list[str],
    said: str,
    multitask_run: Path,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "run": multitask_run,
        "shards": photographs,
        "empty": tmp_path / "empty",
        "checkpoint": list_checkpoints(multitask_run)[0],
        "broken": tmp_path / "broken",
    }
    places["empty"].mkdir()
    places["broken"].mkdir()
    (places["broken"] / "config.yaml").write_text("seed: 0\n")
    assert main(["report", *(word.format(**places) for word in arguments)]) == 2
    told = capsys.readouterr()
    assert re.search(said, told.err)
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not (multitask_run / "report.html").exists()


@pytest.fixture
def no_sklearn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("sklearn", "matplotlib"):
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real(name, *arguments, **more)

    with monkeypatch.context() as context:
        context.setattr(builtins, "__import__", absent)
        yield


@pytest.mark.usefixtures("no_sklearn")
def test_without_the_optional_library_only_the_evaluation_set_is_refused(
    run: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run), "--eval", str(photographs)]) == 2
    assert "pip install 'pretrain[report]'" in capsys.readouterr().err
    assert "attention" in section_ids(report(run))


HOSTILE = "<script>alert(1)</script>"
HOSTILE_ATTRIBUTE = '" onload="alert(1)'


def test_names_from_configs_shards_and_files_are_only_text(tmp_path: Path) -> None:
    """Views, classes, folders, evaluations and anomalies carry markup; read_report refuses a script."""
    shards = write_photographs(tmp_path / "<b>shards", (HOSTILE, HOSTILE_ATTRIBUTE, "&amp;", "</td></table>"))
    config = tmp_path / "run.yaml"
    config.write_text(
        MULTITASK.replace("  one: &view", f"  '{HOSTILE}': &view").replace("  two: *view", "  '</h1>': *view")
    )
    run = tmp_path / f"run {HOSTILE_ATTRIBUTE} <i>"
    assert main(["train", str(config), "--output-dir", str(run), f"data.shards={shards}"]) == 0
    (run / "eval").mkdir()
    result = {
        "method": HOSTILE,
        "top1_ratio": 0.5,
        "encoder": {"feature": HOSTILE},
        "note": HOSTILE_ATTRIBUTE,
    }
    (run / "eval" / "<u>.json").write_text(json.dumps(result))
    (run / "eval" / "other.json").write_text(json.dumps({HOSTILE: {"deep": HOSTILE}}))
    (run / "anomalies.jsonl").write_text(json.dumps({"step": 2, "kind": HOSTILE, HOSTILE: HOSTILE}) + "\n")
    page = report(run, "--eval", str(shards))
    assert {element.name for element in _all(page)} & {"script", "i", "u"} == set()
    assert HOSTILE in section_of(page, "views").text
    assert HOSTILE in section_of(page, "plane").text
    assert HOSTILE in section_of(page, "evaluation").text
    assert HOSTILE in section_of(page, "health").text
    title = page.all("title")[0].text
    assert HOSTILE_ATTRIBUTE in title


def _all(element: Element) -> list[Element]:
    return [element] + [inner for child in element.children for inner in _all(child)]


def test_the_command_line_stays_light() -> None:
    """Help and parsing load neither torch nor what draws."""
    script = (
        "import sys; from pretrain.cli import parse; parse(['report', 'run']); "
        "heavy = {'torch', 'timm', 'sklearn', 'PIL'} & sys.modules.keys(); sys.exit(str(heavy or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
