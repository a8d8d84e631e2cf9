"""The command line: exit codes, and one line for what the user got wrong."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_config import CONFIG, small_config, write_config
from small_shards import make_shards

from pretrain import build, checkpoint, cluster
from pretrain.cli import main
from pretrain.config import RunConfig
from pretrain.data.loader import open_splits
from pretrain.loop import samples_digest
from pretrain.preflight import Inspected, Request, describe, identity, inspect
from pretrain.train import load_weights

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    make_shards(folder, [12, 12])
    return folder


@pytest.fixture(autouse=True)
def _alone_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("pretrain")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


def config_for(shards: Path, folder: Path) -> Path:
    return write_config(folder, CONFIG.replace("shards: shards", f"shards: {shards}"))


def saved_run(shards: Path, folder: Path, *overrides: str, step: int = 4) -> Path:
    """A run folder with one checkpoint that verifies, of a run with these settings."""
    (folder / "saved").mkdir()
    config = small_config(folder / "saved", f"data.shards={shards}", *overrides)
    state = {"step": step, "optimizer_steps": step, "identity": identity(config, open_splits(config.data))}
    tensors = {name: {"w": torch.zeros(2)} for name in (checkpoint.STUDENT, checkpoint.OPTIMIZER)}
    checkpoint.write_checkpoint(folder / "saved", step, tensors, state, config.to_yaml())
    return folder / "saved"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What is printed for wrong input: exit code 2, one line on stderr, nothing on stdout."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("pretrain: ")
    assert printed.out == ""
    return lines[0]


def test_a_config_that_is_missing_or_wrong_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    assert "absent.yaml: cannot be read" in refusal(capsys, "train", "absent.yaml")
    path = config_for(shards, tmp_path)
    assert "did you mean 'seed'?" in refusal(capsys, "train", path, "seeed=1")
    assert "did you mean 'seed'?" in refusal(capsys, "train", path, "--resume", "none", "seeed=1")
    assert "data.lanes" in refusal(capsys, "train", path, "--nproc", "3")
    assert "--nproc 0" in refusal(capsys, "train", path, "--nproc", "0")
    assert list(tmp_path.iterdir()) == [path]


def test_shards_that_are_missing_or_not_indexed_are_told_with_the_remedy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = config_for(tmp_path / "absent", tmp_path)
    assert "absent" in refusal(capsys, "train", path)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "train-0.tar").write_bytes(b"")
    assert "pretrain shards index" in refusal(capsys, "train", path, f"data.shards={tmp_path / 'bare'}")
    assert "absent" in refusal(capsys, "shards", "index", tmp_path / "absent")
    assert not (tmp_path / "runs").exists()


def test_a_split_or_lanes_that_the_data_cannot_give_are_told(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    path = config_for(shards, tmp_path)
    assert "no split 'trian'; did you mean 'train'?" in refusal(capsys, "train", path, "data.split=trian")
    too_much = refusal(capsys, "train", path, "data.prefetch_batches=1000000000", "--dry-run")
    assert "MiB of shared memory" in too_much
    assert "use 24 or fewer" in refusal(capsys, "train", path, "data.lanes=32", "batch.global_size=64")


def test_an_output_folder_that_holds_something_is_not_touched(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    path = config_for(shards, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for flags in ([], ["--dry-run"], ["--nproc", "2"]):
        assert "not empty" in refusal(capsys, "train", path, "--output-dir", "out", *flags)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refusal(capsys, "train", path, "--output-dir", "file")
    assert "is a file" in refusal(capsys, "train", path, "--output-dir", "file", "--resume", "auto")
    assert "cannot be written" in refusal(capsys, "train", path, "--output-dir", "file/below")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_that_cannot_be_continued_is_never_a_fresh_start(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    path = config_for(shards, tmp_path)
    resume = ["train", path, "--output-dir", "new", "--resume"]
    assert "--resume absent: no such folder" in refusal(capsys, *resume, "absent")
    assert "no such folder" in refusal(capsys, *resume, path)
    (tmp_path / "empty").mkdir()
    assert "it holds no checkpoints" in refusal(capsys, *resume, "empty")
    run = saved_run(shards, tmp_path)
    step = checkpoint.step_folder(run, 4)
    (step / checkpoint.STUDENT).write_bytes(b"")
    assert "is damaged" in refusal(capsys, *resume, step)
    assert main([str(argument) for argument in (*resume, run)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "all 1 checkpoints are damaged" in line]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=4", "seed"),
        ("data.lanes=8", "lanes"),
        ("data.shuffle_block=5", "shuffle_block"),
        ("batch.global_size=32", "global_batch"),
        ("model.args.depth=1", "model.args.depth"),
        ("tasks.jigsaw.ratio=0.2", "tasks.jigsaw.ratio"),
        ("tasks.jigsaw=null", "tasks.jigsaw"),
        ("views.one.gray_prob=0.5", "views.one.gray_prob"),
        ("balance.kind=fixed", "balance.kind"),
        ("teacher={momentum: 0.9}", "teacher"),
        ("normalization.mean=[0.5, 0.5, 0.5]", "normalization.mean"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(
    override: str, key: str, capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    run = saved_run(shards, tmp_path)
    path = config_for(shards, tmp_path)
    line = refusal(capsys, "train", path, override, "--resume", run, "--output-dir", "new", "--dry-run")
    assert f"{key}: was " in line
    assert "now " in line
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_of_other_data_is_refused(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    run = saved_run(shards, tmp_path)
    make_shards(tmp_path / "others", [12, 11, 1])
    path = config_for(tmp_path / "others", tmp_path)
    assert "manifest_hash: was " in refusal(capsys, "train", path, "--resume", run, "--output-dir", "new")


@pytest.mark.parametrize("override", ["checkpoint.every_steps=7", "log.every_steps=1", "schedule.steps=20"])
def test_settings_that_do_not_change_the_data_or_the_model_may_change_on_resume(
    override: str, shards: Path, tmp_path: Path
) -> None:
    run = saved_run(shards, tmp_path)
    path = config_for(shards, tmp_path)
    assert main(["check", str(path), override, "--resume", str(run), "--output-dir", "new"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "run.yaml", "--resum-from", "x"],
        ["train", "run.yaml", "--nproc", "two"],
        ["shards", "index", "x", "seed=1"],
        ["export", "x", "--grid", "4"],
        ["trian", "run.yaml"],
        [],
    ],
    ids=" ".join,
)
def test_wrong_arguments_end_with_code_2_and_one_line_that_says_why(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("pretrain")
    assert told.count("\n") == 1
    assert "--help` lists what it takes" in told


def _forbid_starting(monkeypatch: pytest.MonkeyPatch, *, group: bool) -> None:
    def forbidden(*arguments: object, **settings: object) -> None:
        pytest.fail("something was started")

    if group:
        monkeypatch.setattr(cluster, "connected", forbidden)
    monkeypatch.setattr(cluster, "launch_local", forbidden)
    monkeypatch.setattr(subprocess, "Popen", forbidden)


def test_a_check_starts_nothing_and_counts_what_it_found(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _forbid_starting(monkeypatch, group=True)
    path = config_for(shards, tmp_path)
    arguments = ["check", str(path), "log.prometheus.enabled=false"]
    assert main([*arguments, "--nproc", "2"]) == 0
    assert capsys.readouterr().out == "0 errors, 0 warnings\n"
    assert main([*arguments, "--nproc", "3"]) == 2
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("error: ") and "3 ranks" in line for line in printed), printed
    assert list(tmp_path.iterdir()) == [path]


# what stands in place of `seed: 3`, and an override
REFUSED = [
    ("seed: 3", "seeed=1"),
    ("seed: 3", "seed=1" + 400 * "0"),
    ("seed: 3", "optim.base_lr=.nan"),
    ("seed: 3", "batch.global_size=-16"),
    ("seed: 3", "batch.global_size=18"),
    ("seed: 3", "model.img_px=30"),
    ("seed: 3", "tasks.rotation='yes'"),
    ("seed: 3", "data.lanes=-4"),
    ("seed: three", "data.lanes=4"),
    ("seed: [3", "data.lanes=4"),
    ("seed: !!python/object/apply:os.system ['exit 1']", "data.lanes=4"),
]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_config_that_is_refused_starts_neither_ranks_nor_a_process_group(
    num_ranks: int,
    capsys: pytest.CaptureFixture[str],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row 38 of the fault catalogue."""
    _forbid_starting(monkeypatch, group=True)
    monkeypatch.setattr(torch.cuda, "init", lambda: pytest.fail("the GPU was touched"))
    good = config_for(shards, tmp_path).read_text()
    command = ["train", tmp_path / "run.yaml", "--output-dir", "new", "--nproc", num_ranks]
    for line, override in REFUSED:
        write_config(tmp_path, good.replace("seed: 3", line))
        refusal(capsys, *command, override)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    write_config(tmp_path, good)
    with pytest.raises(pytest.fail.Exception, match="something was started"):
        main([str(argument) for argument in command])


def test_a_dry_run_takes_a_step_as_rank_0_prints_the_layout_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain torch: DeepSpeed can be started once in a process, and test_rehearsal does that."""
    engine = build.engine

    def local(config: RunConfig, *parts: Any) -> Any:
        settings = config.engine.model_copy(update={"kind": "local"})
        return engine(config.model_copy(update={"engine": settings}), *parts)

    monkeypatch.setattr(build, "engine", local)
    monkeypatch.setattr(cluster, "connected", lambda place: contextlib.nullcontext())
    _forbid_starting(monkeypatch, group=False)
    path = config_for(shards, tmp_path)
    for num_ranks, micro in ((1, 8), (2, 4), (4, 2)):
        arguments = ["train", str(path), "data.decode_threads=0", "--dry-run", "--nproc", str(num_ranks)]
        assert main(arguments) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        assert f"1 node x {num_ranks} ranks" in printed.out
        assert f"global batch 16 = micro {micro} x accumulation 2 x ranks {num_ranks}" in printed.out
        assert "24 images in 2 shards" in printed.out
        assert "10 steps = 6.67 epochs" in printed.out
        assert "contrastive, rotation, jigsaw" in printed.out
        assert "first step" in printed.out
    assert list(tmp_path.iterdir()) == [path]


def test_the_layout_counts_nodes_and_every_rank_sees_the_same(shards: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, f"data.shards={shards}")
    request = Request(config, tmp_path / "new", "none")
    told = set()
    for rank in range(4):
        place = cluster.Cluster(rank, 4, rank % 2, 2, "srun")
        inspected: Inspected = inspect(request, place)
        assert inspected.num_steps == 10
        assert inspected.resume_from is None
        told.add(describe(request, inspected, place))
    assert len(told) == 1
    assert "2 nodes x 2 ranks" in told.pop()


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--version"], 0), (["train", "absent.yaml"], 2), (["--what"], 2)]
)
def test_python_m_pretrain_ends_with_the_same_codes(arguments: list[str], code: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if arguments[0] == "train":
        assert len(done.stderr.splitlines()) == 1


def test_the_same_identity_is_read_back_from_json(shards: Path, tmp_path: Path) -> None:
    """A value that JSON changes, such as a tuple, would make every resume a refusal."""
    config = small_config(tmp_path, f"data.shards={shards}")
    found = identity(config, open_splits(config.data))
    assert json.loads(json.dumps(found)) == found


class Batch:
    def __init__(self, ids: torch.Tensor, epochs: torch.Tensor) -> None:
        self.sample_ids, self.epochs = ids, epochs


def test_the_digest_of_samples_is_the_same_however_many_ranks_share_them() -> None:
    ids, epochs = torch.randint(0, 1 << 24, (64,)), torch.randint(0, 300, (64,))

    def digest(ids: torch.Tensor, epochs: torch.Tensor, micro_step: int = 5, world_size: int = 1) -> float:
        parts = zip(ids.chunk(world_size), epochs.chunk(world_size), strict=True)
        return sum(
            float(samples_digest(Batch(*part), micro_step, rank))  # type: ignore[arg-type]
            for rank, part in enumerate(parts)
        )

    whole = digest(ids, epochs)
    assert whole == digest(ids, epochs, world_size=2) == digest(ids, epochs, world_size=8)
    assert whole == int(whole) < 1 << 53  # exact in float64
    other_id, swapped, other_epoch = ids.clone(), ids.clone(), epochs.clone()
    other_id[9] += 1
    other_epoch[9] += 1
    swapped[[3, 40]] = ids[[40, 3]]
    assert (
        len(
            {
                whole,
                digest(other_id, epochs),
                digest(ids, other_epoch),
                digest(swapped, epochs),
                digest(ids, epochs, 6),
            }
        )
        == 5
    )


def damaged(change: Callable[[dict[str, torch.Tensor]], object]) -> checkpoint.Checkpoint:
    student = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    change(student)
    return checkpoint.Checkpoint(Path("saved"), {}, student, None, {})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda student: student.pop("bias"), "1 missing, 0 unexpected, 0 of another shape, such as 'bias'"),
        (lambda student: student.update(more=torch.ones(1)), "0 missing, 1 unexpected"),
        (lambda student: student.update(bias=torch.ones(3)), "1 of another shape, such as 'bias'"),
    ],
)
def test_weights_of_another_model_are_refused_and_leave_the_module_as_it_was(
    change: Callable[[dict[str, torch.Tensor]], object], told: str
) -> None:
    module = torch.nn.Linear(3, 2)
    before = module.weight.detach().clone()
    with pytest.raises(checkpoint.CheckpointError, match="holds the weights of another model") as caught:
        load_weights(module, damaged(change))
    assert told in str(caught.value)
    assert torch.equal(module.weight, before)
    load_weights(module, damaged(lambda student: None))
    assert module.weight.eq(1).all()
