"""Everything that is wrong with a run is told in one pass, a line each, before anything is started."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file
from small_config import CONFIG, small_config, write_config
from small_shards import make_shards
from test_changes import written

from pretrain import checkpoint, preflight
from pretrain.cli import main
from pretrain.cluster import Cluster, free_port
from pretrain.config import load_config
from pretrain.data.loader import open_splits
from pretrain.errors import CheckpointError, ConfigError, DataError, UserError
from pretrain.metrics.exporter import PrometheusConfig
from pretrain.preflight import (
    OLDEST,
    Problem,
    Request,
    busy_port,
    check_disk,
    check_open_files,
    check_rendezvous,
    check_version,
    find_problems,
    find_problems_of_machine,
    identity,
    inspect,
    small_cache,
)

QUIET = "log={prometheus: {enabled: false}}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    make_shards(folder, [12, 12])
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("pretrain")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


def request_for(shards: Path, folder: Path, *overrides: str, **asked: Any) -> Request:
    config = small_config(folder, f"data.shards={shards}", QUIET, *overrides)
    return Request(config, **{"output_dir": folder / "run", "resume": "none", **asked})


def lines_of(problems: list[Problem]) -> list[str]:
    for problem in problems:
        assert "\n" not in problem.line
    return [problem.line for problem in problems]


def saved_run(request: Request, step: int = 4) -> Path:
    """The request's run folder with one whole checkpoint."""
    tensors_at = written(request.output_dir / "tensors", request.config)
    splits = open_splits(request.config.data)
    state = {"step": step, "optimizer_steps": step, "identity": identity(request.config, splits)}
    names = (checkpoint.STUDENT, checkpoint.OPTIMIZER)
    tensors = {name: load_file(tensors_at / name) for name in names}
    return checkpoint.write_checkpoint(request.output_dir, step, tensors, state, request.config.to_yaml())


def test_a_sound_run_has_no_problems(shards: Path, tmp_path: Path) -> None:
    assert find_problems(request_for(shards, tmp_path), Cluster()) == []
    assert not (tmp_path / "run").exists()
    assert find_problems_of_machine(Cluster()) == []


def test_problems_of_all_kinds_are_found_in_one_pass(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One look tells of settings, tasks, batch, schedule, shards, labels, machine and run folder."""
    folder = tmp_path / "own"
    manifest = make_shards(folder, [12, 12])
    (folder / manifest.shard(1).name).unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    monkeypatch.setitem(OLDEST, "timm", (99, 1))
    request = request_for(
        folder,
        tmp_path,
        "tasks.contrastive.views=[one, tow]",
        "views.two.scale=[0.5, 0.1]",
        "batch.global_size=18",
        "schedule.warmup_steps=10",
        "tasks.classification={num_classes: 3}",
        "data.prefetch_batches=1",
        allow_changes=("tsks",),
    )
    problems = find_problems(request, Cluster(0, 3, 0, 3, "--nproc"))
    expected = [
        "views.two.scale: [0.5, 0.1] is not a range",
        "tasks.contrastive.views: no view is named 'tow'",
        "data.lanes: 4 lanes cannot be shared equally by 3 ranks",
        "batch.global_size: 18 is not divisible",
        "schedule.warmup_steps: 10 is not below",
        "timm: ",
        "1 of 2 shards do not match the index",
        "tasks.classification.num_classes: 3, but the data have label 9; set it to 10 or more",
        "--allow-change tsks: no checkpoint depends on a setting called so; did you mean 'tasks'?",
        "run: is not empty",
    ]
    lines = lines_of(problems)
    for part in expected:
        assert [line for line in lines if part in line], f"{part}\n{lines}"
    assert len(lines) == len(expected), lines
    assert not any(problem.is_warning for problem in problems)
    with pytest.raises(UserError) as caught:
        inspect(request, Cluster(0, 3, 0, 3, "--nproc"))
    assert str(caught.value) == "\npretrain: ".join(lines)


def test_a_single_problem_is_raised_as_it_is(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.lanes: 4 lanes") as caught:
        inspect(request_for(shards, tmp_path, "engine.kind=deepspeed"), Cluster(0, 3, 0, 3, "srun"))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"there is no index\.json"):
        inspect(request_for(tmp_path, tmp_path), Cluster())


def test_several_problems_are_a_line_each_on_the_command_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, CONFIG.replace("shards: shards", f"shards: {shards}"))
    wrong = ["batch.global_size=18", "schedule.warmup_steps=10", "--dry-run"]
    assert main(["train", str(path), "--output-dir", str(tmp_path / "run"), *wrong]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert all(line.startswith(("pretrain: batch.", "pretrain: schedule.")) for line in told)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.base_lr=.nan", "finite"),
        ("optim.base_lr=1e999", "finite"),
        ("batch.global_size=-4", "batch.global_size: .*greater than 0"),
        ("batch.global_size=many", "batch.global_size: .*valid integer .got 'many'."),
        ("seeed=1", "seeed: unknown setting; did you mean 'seed'?"),
        ("seed=!!python/object/apply:os.getpid []", "seed"),
        ("seed=[1", "seed"),
        ("model.name.x=1", "'name' is a single value"),
        ("schedule.steps=1e400", "schedule.steps: inf is not a finite number"),
    ],
)
def test_a_malformed_setting_is_one_line_that_names_it(override: str, told: str, tmp_path: Path) -> None:
    """Fault row 38; all wrong settings are named together."""
    path = write_config(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert "\n" not in str(caught.value)
    assert re.search(told.replace("?", r"\?"), str(caught.value))
    with pytest.raises(ConfigError, match=r"engine\.kind.*; .*data\.lanes|data\.lanes.*; .*engine\.kind"):
        load_config(path, ["engine.kind=x", "data.lanes=0"])


def test_each_bad_shard_is_named_at_once_and_the_rest_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault row 26: empty, missing, shrunk and forbidden shards, before anything starts."""
    manifest = make_shards(tmp_path / "shards", [2] * 30)
    names = [shard.name for shard in manifest.shards]
    paths = [tmp_path / "shards" / name for name in names]
    paths[0].write_bytes(b"")
    paths[1].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:-512])
    may_read = os.access  # root may read anything
    monkeypatch.setattr(
        os, "access", lambda path, mode, **how: Path(path) != paths[3] and may_read(path, mode, **how)
    )
    request = request_for(tmp_path / "shards", tmp_path)
    (line,) = lines_of(find_problems(request, Cluster()))
    whole = manifest.shard(0).num_bytes
    assert f"{names[0]}: 0 bytes instead of {whole}" in line
    assert f"{names[1]}: no such file or directory" in line
    assert f"{names[2]}: {manifest.shard(2).num_bytes - 512} bytes instead of" in line
    assert f"{names[3]}: no permission to read" in line
    assert "4 of 30 shards" in line
    assert names[4] not in line
    for path in paths[5:]:
        path.unlink()
    (line,) = lines_of(find_problems(request, Cluster()))
    assert "29 of 30 shards" in line
    assert "; and 9 more" in line
    assert find_problems(request, Cluster(1, 2, 1, 2, "srun")) == [], "rank 0 alone looks at shards"


def test_too_few_samples_for_the_lanes_are_told_even_if_the_batch_is_wrong_too(
    shards: Path, tmp_path: Path
) -> None:
    few = request_for(shards, tmp_path, "data.lanes=32", "batch.global_size=63")
    lines = lines_of(find_problems(few, Cluster()))
    assert len(lines) == 2
    assert "batch.global_size: 63 is not divisible" in lines[0]
    assert "32 lanes cannot share 24 samples; use 24 or fewer" in lines[1]


@pytest.mark.parametrize(("world_size", "sound"), [(1, True), (2, True), (4, True), (3, False), (8, False)])
def test_a_run_goes_on_with_other_ranks_where_these_share_the_lanes(
    world_size: int, sound: bool, shards: Path, tmp_path: Path
) -> None:
    """Fault row 6: the same global batch on another number of ranks, or a line that says which do."""
    request = request_for(shards, tmp_path, resume="auto")
    saved_run(request)
    place = Cluster(0, world_size, 0, world_size, "srun")
    if sound:
        inspected = inspect(request, place)
        assert inspected.sizes.global_batch == 16 == inspected.sizes.micro_batch * 2 * world_size
        assert inspected.changes is not None
        assert inspected.changes.unsafe == []
        return
    with pytest.raises(ConfigError, match=f"4 lanes cannot be shared equally by {world_size} ranks; nearest"):
        inspect(request, place)


def test_safe_changes_are_handed_on_and_unsafe_ones_refused_unless_named(
    shards: Path, tmp_path: Path
) -> None:
    """Fault row 7."""
    saved_run(request_for(shards, tmp_path))
    resume: dict[str, Any] = {"resume": "auto"}
    faster = request_for(shards, tmp_path, "optim.base_lr=0.5", **resume)
    inspected = inspect(faster, Cluster())
    assert inspected.changes is not None
    assert [line for line in inspected.changes.safe if line.startswith("optim.base_lr: was")]
    heavier = "tasks.rotation.weight=2"
    with pytest.raises(
        CheckpointError, match=r"tasks\.rotation\.weight: was 1\.0, now 2\.0.*--allow-change tasks"
    ):
        inspect(request_for(shards, tmp_path, heavier, **resume), Cluster())
    allowed = request_for(shards, tmp_path, heavier, **resume, allow_changes=("tasks",))
    inspected = inspect(allowed, Cluster())
    assert inspected.changes is not None
    assert inspected.changes.keys == ("tasks",)
    assert inspected.data_start_step == 0
    other = request_for(shards, tmp_path, "model.args.depth=1", **resume, allow_changes=("model",))
    with pytest.raises(CheckpointError, match="--allow-change model is not enough"):
        inspect(other, Cluster())
    twice = request_for(shards, tmp_path, "batch.global_size=8", **resume, allow_changes=("batch",))
    assert inspect(twice, Cluster()).data_start_step == 4, "a step has another place in the data"


def test_other_shards_are_refused_on_resume_or_read_from_their_beginning(
    shards: Path, tmp_path: Path
) -> None:
    """Fault row 8."""
    saved_run(request_for(shards, tmp_path))
    make_shards(tmp_path / "others", [12, 11, 1])
    with pytest.raises(CheckpointError, match=r"manifest_hash: was .*--allow-new-data"):
        inspect(request_for(tmp_path / "others", tmp_path, resume="auto"), Cluster())
    allowed = request_for(tmp_path / "others", tmp_path, resume="auto", allow_new_data=True)
    assert inspect(allowed, Cluster()).data_start_step == 4


def test_resuming_before_the_first_checkpoint_at_the_end_and_twice(shards: Path, tmp_path: Path) -> None:
    """Fault row 45: nothing yet is step 0, the last step is no error, and a second time is as the first."""
    request = request_for(shards, tmp_path, resume="auto")
    assert inspect(request, Cluster()).resume_from is None
    request.output_dir.mkdir()
    (request.output_dir / "train.log").write_text("killed at once")
    assert inspect(request, Cluster()).resume_from is None
    end = saved_run(request, step=10)
    first, second = (inspect(request, Cluster()) for _ in range(2))
    assert first.resume_from == second.resume_from == end
    assert first.num_steps == second.num_steps == 10
    assert first.data_start_step == second.data_start_step == 0
    state = json.loads((end / checkpoint.STATE).read_text())
    assert state["step"] == first.num_steps


def test_a_metrics_port_in_use_is_a_warning(shards: Path, tmp_path: Path) -> None:
    """Fault row 39: the next one is taken; a run is never kept from starting."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        on = f"log.prometheus={{enabled: true, port: {port}}}"
        request = request_for(shards, tmp_path, on)
        (problem,) = find_problems(request, Cluster())
        assert problem.is_warning
        assert f"127.0.0.1:{port} cannot be had (address already in use)" in problem.line
        inspect(request, Cluster())
        assert find_problems(request, Cluster(1, 2, 1, 2, "srun")) == [], "rank 0 alone serves them"
    assert busy_port(PrometheusConfig(port=port)) is None
    assert busy_port(PrometheusConfig(port=0)) is None
    nowhere = busy_port(PrometheusConfig(address="192.0.2.1"))  # kept for examples (RFC 5737)
    assert nowhere is not None
    assert "metrics will not be served" in nowhere


def test_too_few_open_files_are_told(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault row 44: with RLIMIT_NOFILE=64 a run does not start; more ranks and lanes need more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        lines = lines_of(find_problems(request_for(shards, tmp_path), Cluster()))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(lines) == 1
    assert lines[0].startswith("open files: 64 are allowed (`ulimit -n`), and a rank needs up to 130; raise")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 1024))
    check_open_files(world_size=448, num_lanes=960)
    for world_size, num_lanes, told in ((449, 1, "ulimit -n"), (1, 961, "ulimit -Hn")):
        with pytest.raises(UserError, match=told):
            check_open_files(world_size, num_lanes)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    check_open_files(10**6, 10**6)


def test_too_little_shared_memory_is_told(shards: Path, tmp_path: Path) -> None:
    """Fault row 44: the batches of all ranks of a node must fit."""
    request = request_for(shards, tmp_path, "data.prefetch_batches=1000000000")
    assert "MiB of shared memory" in lines_of(find_problems(request, Cluster()))[0]


class Disk(NamedTuple):
    f_bavail: int
    f_frsize: int = 1


def test_room_for_two_checkpoints_is_asked_for_and_for_one_where_one_is_there(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, free = tmp_path / "not" / "yet" / "there", [2000]
    asked: list[Path] = []

    def statvfs(path: Path) -> Disk:
        asked.append(Path(path))
        return Disk(free[0])

    monkeypatch.setattr(os, "statvfs", statvfs)
    check_disk(run, 1000)
    assert asked == [tmp_path], "the file system that the folder will be on"
    free[0] = 1999
    with pytest.raises(UserError, match="must be room for 2; free some, or choose another --output-dir"):
        check_disk(run, 1000)
    monkeypatch.setattr(os, "statvfs", lambda path: Disk(10**12 if str(path) == "/dev/shm" else 10_000))
    (line,) = lines_of(find_problems(request_for(shards, tmp_path), Cluster()))
    assert "a checkpoint takes" in line
    monkeypatch.undo()
    request = request_for(shards, tmp_path, resume="auto")
    num_bytes = sum(f.stat().st_size for f in saved_run(request).rglob("*") if f.is_file())
    monkeypatch.setattr(os, "statvfs", lambda path: Disk(num_bytes if path == request.output_dir else 10**12))
    inspect(request, Cluster())


def test_old_and_missing_packages_are_told_with_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.1+cu128", "deepspeed": "0.19.3", "timm": "1.0.16.dev0"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    with pytest.raises(UserError, match=r"^torch: 2\.9\.1\+cu128 is installed, .*; install torch>=2\.10$"):
        check_version("torch")
    check_version("deepspeed")
    check_version("timm")
    for found, sound in (("2.10.0", True), ("2.10", True), ("3.0", True), ("2.9.99", False), ("a", False)):
        versions["torch"] = found
        if sound:
            check_version("torch")
        else:
            with pytest.raises(UserError, match="install torch"):
                check_version("torch")

    def absent(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", absent)
    lines = lines_of(find_problems_of_machine(Cluster()))
    assert [line.partition(":")[0] for line in lines] == list(OLDEST)


def test_the_oldest_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(preflight.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for package, version in OLDEST.items():
        assert f"{package}>={'.'.join(map(str, version))}" in project["dependencies"]


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, None),
        (
            {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500"},
            "MASTER_ADDR: 'no-such-host.invalid'",
        ),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "TAKEN"}, "MASTER_PORT: TAKEN cannot be had"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, None),
    ],
)
def test_an_address_that_has_no_meaning_and_a_port_in_use_are_told(
    variables: dict[str, str], told: str | None
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {name: value.replace("TAKEN", port) for name, value in variables.items()}
        place = Cluster(0, 2, 0, 2, "srun")
        if told is None:
            check_rendezvous(place, variables)
            return
        with pytest.raises(UserError, match=re.escape(told.replace("TAKEN", port))):
            check_rendezvous(place, variables)
        if "TAKEN" in told:  # rank 0 itself, or the agent of torchrun, listens there
            check_rendezvous(Cluster(1, 2, 1, 2, "srun"), variables)
            check_rendezvous(Cluster(0, 2, 0, 2, "torchrun"), variables)


def test_a_cache_that_holds_fewer_shards_than_are_read_at_one_time_is_a_warning(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [4] * 8)
    num_bytes = [shard.num_bytes for shard in manifest.shards]
    assert len(set(num_bytes)) == 1
    one = num_bytes[0]

    def found(room: int, share: float = 1.0, lanes: int = 4) -> str | None:
        cache = f"data.cache={{folder: {tmp_path / 'cache'}, max_gib: {room / 2**30!r}}}"
        request = request_for(tmp_path / "shards", tmp_path, f"data.lanes={lanes}", cache)
        return small_cache(request.config.data, open_splits(request.config.data), share)

    assert found(4 * one) is None
    told = found(4 * one - 1)
    assert told is not None
    assert "the 4 shards that the lanes of a node read at one time" in told
    assert found(2 * one, share=0.5) is None, "a node of two reads half of the lanes"
    assert found(8 * one, lanes=16) is None, "there are no more than eight"
    assert found(8 * one - 1, lanes=16) is not None
    with pytest.raises(UserError, match="cannot hold the largest shard"):
        found(one - 1)
    small = f"data.cache={{folder: {tmp_path / 'cache'}, max_gib: {3 * one / 2**30!r}}}"
    inspected = inspect(request_for(tmp_path / "shards", tmp_path, small), Cluster())
    assert [line for line in inspected.warnings if line.startswith("data.cache.max_gib")]
    assert not (tmp_path / "cache").exists()


def test_a_check_looks_past_settings_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One pass tells all: of the settings, and of the shards that the readable ones name."""
    make_shards(tmp_path / "shards", [8] * 4, height=32, width=32)
    next((tmp_path / "shards").glob("*.tar")).unlink()
    wrong = ["optim.base_lr=-1", "optim.beta1=0.9", "schedule.steps=no", f"data.shards={tmp_path / 'shards'}"]
    assert main(["check", str(write_config(tmp_path)), *wrong, "--nproc", "3"]) == 2
    told = capsys.readouterr().out
    for setting in ("optim.base_lr", "optim.beta1", "schedule.steps", "data.lanes: 4 lanes cannot be shared"):
        assert setting in told
    assert "1 of 4 shards do not match the index" in told


def check_as_rank(rank: int, port: int, config: Path, *more: str) -> subprocess.Popen[str]:
    """`pretrain check` as a launcher starts it on one of two ranks."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", "check", str(config), *more],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.distributed
def test_a_check_on_every_rank_proves_that_they_reach_each_other(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", [8] * 4, height=32, width=32)
    path = write_config(tmp_path)
    settings = [f"data.shards={tmp_path / 'shards'}", "log.prometheus.enabled=false"]
    port = free_port()
    ranks = [check_as_rank(rank, port, path, *settings) for rank in (0, 1)]
    told = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    assert told[0].splitlines()[-1] == "0 errors, 0 warnings"
    alone = check_as_rank(0, port, path, *settings, "cluster.rendezvous_seconds=1")
    told = [alone.communicate(timeout=120)[0]]
    assert alone.returncode == 2
    assert "error: absent after 1 s: rank 1 of 2" in told[0]
    assert "1 errors, 0 warnings" in told[0]
