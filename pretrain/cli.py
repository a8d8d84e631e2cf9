"""The command line: arguments in, exit code out. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain import __version__
from pretrain.data.build.arguments import add_arguments as build_arguments
from pretrain.doctor import arguments as doctor_arguments
from pretrain.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    ConfigError,
    PreemptedError,
    TrainingError,
    UserError,
)
from pretrain.evaluate import arguments as evaluate_arguments
from pretrain.export import arguments as export_arguments
from pretrain.parser import Parser
from pretrain.plan import arguments as plan_arguments
from pretrain.report import arguments as report_arguments
from pretrain.transfer.detection import arguments as detection_arguments
from pretrain.transfer.segmentation import arguments as segmentation_arguments

EXIT_CODES = (
    "exit codes: 0 done, 2 wrong input (one line says what and the remedy), 75 stopped on request, saved and "
    "resumable, 1 anything else"
)


_GOALS: dict[str, tuple[Any, str]] = {
    "detection": (detection_arguments, "objects and instance masks in COCO's format (Mask R-CNN)"),
    "segmentation": (segmentation_arguments, "classes of all pixels: Cityscapes, or images and masks"),
}


def _parser() -> Parser:
    parser = Parser(
        prog="pretrain",
        description="Self-supervised pretraining of Vision Transformers: shards in, timm weights out.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"pretrain {__version__}")
    # the deepspeed launcher says it this way too; LOCAL_RANK tells the same
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run a pretraining described by a YAML file", epilog=EXIT_CODES)
    _add_run_arguments(train)
    train.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this machine")
    train.add_argument(
        "--dry-run", action="store_true", help="build everything, take one step as rank 0, write nothing"
    )
    train.add_argument("--world-size", type=_positive, metavar="N", help="with --dry-run: as rank 0 of N")
    check = commands.add_parser(
        "check", help="find everything that is wrong with a run before it starts", epilog=EXIT_CODES
    )
    _add_run_arguments(check)
    check.add_argument("--nproc", type=_positive, metavar="N", help="ranks on this machine")

    plan_arguments.add_arguments(
        commands.add_parser("plan", help="predict memory, time and cost of a run on GPUs", epilog=EXIT_CODES)
    )
    _add_sweep(commands)
    listing = commands.add_parser("list", help="list the methods, tasks and backbones there are")
    listing.add_argument("what", nargs="?", choices=("methods", "tasks", "backbones"), metavar="WHAT")
    listing.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="such as 'swin*'")

    shards = commands.add_parser("shards", help="work on folders of tar shards")
    actions = shards.add_subparsers(dest="action", required=True, metavar="ACTION")
    index = actions.add_parser("index", help="write index.json for tar shards made by anyone")
    index.add_argument("folder", metavar="DIR", help="a folder, or the address of one")
    index.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write the index (default: beside the shards)"
    )

    build_arguments(
        actions.add_parser("build", help="write shards from images, tars or tables", epilog=EXIT_CODES)
    )
    verify = actions.add_parser(
        "verify", help="find everything that is wrong with a folder of shards", epilog=EXIT_CODES
    )
    verify.add_argument("folder", metavar="DIR", help="a folder, or the address of one")
    verify.add_argument("--repair", type=Path, metavar="OUT", help="write clean shards into a new folder")
    verify.add_argument("--out", type=Path, metavar="FILE", help="write all findings as JSON")
    verify.add_argument("--no-decode", action="store_true", help="do not decode the images")
    verify.add_argument("--workers", type=_positive, metavar="N", help="default: one per CPU core")
    verify.add_argument("--lanes", type=_positive, metavar="N", help="is there enough for data.lanes=N?")
    verify.add_argument("--world-size", type=_positive, default=1, metavar="N", help="ranks, with --lanes")
    verify.add_argument("--split", default="train", metavar="NAME", help="of the run, with --lanes")

    bench = actions.add_parser("bench", help="images/s of this machine, and the settings to use")
    bench.add_argument("folder", metavar="DIR")
    bench.add_argument("--split", default="train", metavar="NAME")
    bench.add_argument("--view-px", type=_positive, default=224, metavar="PX")
    bench.add_argument("--views", type=_positive, default=2, metavar="N")
    bench.add_argument("--batch-size", type=_positive, default=64, metavar="N")
    bench.add_argument("--seconds", type=float, default=4.0, metavar="S", help="for each setting")
    bench.add_argument(
        "--threads", type=_positive, nargs="+", metavar="N", help="default: 1, 2, 4, ... cores"
    )

    export_arguments.add_arguments(
        commands.add_parser(
            "export", help="write the backbone as a folder that stock timm loads", epilog=EXIT_CODES
        )
    )

    transfer = commands.add_parser("transfer", help="train a detector or a segmenter on the weights")
    goals = transfer.add_subparsers(dest="goal", required=True, metavar="GOAL")
    for goal, (module, text) in _GOALS.items():
        module.add_arguments(goals.add_parser(goal, help=text, epilog=EXIT_CODES))
    evaluate_arguments.add_arguments(
        commands.add_parser("evaluate", help="measure what features are worth", epilog=EXIT_CODES)
    )
    report_arguments.add_arguments(
        commands.add_parser("report", help="draw a run as one HTML file", epilog=EXIT_CODES)
    )
    doctor_arguments.add_arguments(
        commands.add_parser(
            "doctor", help="say what is wrong with a run, and what to do", epilog=doctor_arguments.EXIT_CODES
        )
    )
    return parser


def _add_run_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the file"
    )
    command.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="run folder (default: runs/<name of CONFIG>)"
    )
    command.add_argument(
        "--resume",
        default="none",
        metavar="auto|none|PATH",
        help="auto: continue the run folder from its newest valid checkpoint; PATH: a checkpoint or a run",
    )
    command.add_argument(
        "--allow-new-data",
        action="store_true",
        help="resume though the shards have changed: read the new ones from their beginning",
    )
    command.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="resume though this setting has changed, such as 'tasks'; may be given several times",
    )


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep", help="run and compare the variants of a study", epilog=f"{EXIT_CODES}; 75 not finished yet"
    )
    sweep.add_argument("study", type=Path, metavar="STUDY")
    sweep.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of every run"
    )
    sweep.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="of all runs (default: runs/<name of STUDY>)"
    )
    sweep.add_argument(
        "--results", type=Path, metavar="DIR", help="also keep a record of each finished run here, to commit"
    )
    sweep.add_argument(
        "--skip", action="append", metavar="NAME", help="leave this read-out out for now; repeatable"
    )
    sweep.add_argument("--nproc", type=_positive, metavar="N", help="ranks of each run on this machine")
    sweep.add_argument(
        "--max-minutes", type=_minutes, metavar="M", help="stop after this time; the same command goes on"
    )
    modes = sweep.add_mutually_exclusive_group()
    modes.add_argument("--index", type=int, metavar="I", help="run only number I, from 0")
    modes.add_argument("--array", action="store_true", help="print how many runs, and the sbatch line")
    modes.add_argument("--measure-only", action="store_true", help="measure what budget: compute needs")
    modes.add_argument("--table-only", action="store_true", help="write the table of what is done")
    modes.add_argument("--dry-run", action="store_true", help="check everything, list the runs, start none")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, or exit code 2 and one line on stderr."""
    return _parser().read(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse(arguments)
    _set_up_logging()
    try:
        return _COMMANDS[parsed.command](parsed)
    except UserError as error:
        rank = _own_rank() if parsed.command == "train" else 0
        print(f"pretrain: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)  # noqa: T201
        return EXIT_USER_ERROR
    except PreemptedError as error:
        logging.getLogger("pretrain").info("stopped: %s; continue with --resume auto", error)
        return EXIT_PREEMPTED
    except TrainingError as error:
        logging.getLogger("pretrain").error("stopped: %s", error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read what is printed, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def _own_rank() -> int:
    from pretrain import cluster

    try:
        return cluster.detect().rank
    except UserError:  # what the launcher says is what is wrong
        return 0


def _set_up_logging() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("pretrain")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _train(arguments: argparse.Namespace) -> int:
    from pretrain.preempt import held_back

    num_processes = arguments.nproc
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--nproc {num_processes}: at least one rank is needed")
    is_launcher = num_processes is not None and num_processes > 1 and "RANK" not in os.environ
    if is_launcher:  # which passes signals on
        return _train_as_told(arguments, num_processes)
    with held_back():
        return _train_as_told(arguments, None)


def _train_as_told(arguments: argparse.Namespace, num_processes: int | None) -> int:
    """num_processes: to be started by this one; None if it is a rank itself."""
    from pretrain import cluster
    from pretrain.preflight import inspect
    from pretrain.train import run

    place = cluster.detect()
    if not place.is_first:
        logging.getLogger("pretrain").setLevel(logging.WARNING)  # rank 0 speaks; the others only warn
    request = _run_request(arguments)
    if num_processes is not None:
        place = cluster.Cluster(0, num_processes, 0, num_processes, "--nproc")
    if arguments.dry_run:
        return _rehearse(request, place, arguments.world_size)
    if arguments.world_size is not None:
        raise UserError(
            f"--world-size {arguments.world_size}: goes with --dry-run only; a run counts its ranks"
        )
    if num_processes is not None:
        inspect(request, place)
        command = [sys.executable, "-m", "pretrain", *sys.argv[1:]]
        return cluster.launch_local(command, num_processes)
    run(request, place)
    return EXIT_DONE


def _run_request(arguments: argparse.Namespace, config: Any = None) -> Any:
    from pretrain.config import load_config
    from pretrain.preflight import Request

    config = config or load_config(arguments.config, arguments.overrides)
    output_dir = arguments.output_dir or Path("runs") / arguments.config.stem
    allowed = tuple(arguments.allow_change)
    return Request(config, output_dir, arguments.resume, arguments.allow_new_data, allowed)


def _rehearse(request: Any, place: Any, world_size: int | None) -> int:
    from pretrain import cluster
    from pretrain.rehearsal import describe_rehearsal, rehearse

    if world_size is not None:
        place = cluster.Cluster(0, world_size, 0, min(world_size, place.local_world_size), "rehearsal")
    if place.is_first:
        _say(describe_rehearsal(request, rehearse(request, place), place))
    return EXIT_DONE


def _check(arguments: argparse.Namespace) -> int:
    from pretrain import cluster
    from pretrain.config import readable_config
    from pretrain.preflight import Problem, find_problems, find_problems_of_machine

    place = cluster.detect()
    was_launched = place.world_size > 1
    if arguments.nproc is not None and not was_launched:
        place = cluster.Cluster(0, arguments.nproc, 0, arguments.nproc, "--nproc")
    wait_seconds = cluster.ClusterConfig().rendezvous_seconds
    try:
        request = _run_request(arguments)
        wait_seconds = request.config.cluster.rendezvous_seconds
        problems = find_problems(request, place)
    except ConfigError as error:  # what can be read of the settings is looked at, and else the machine
        rest = readable_config(arguments.config, arguments.overrides)
        further = (
            find_problems(_run_request(arguments, rest), place) if rest else find_problems_of_machine(place)
        )
        problems = [Problem(error), *further]
    if was_launched and not any(problem.line.startswith("MASTER_") for problem in problems):
        try:
            cluster.find_peers(place, wait_seconds)
        except (UserError, TrainingError) as error:
            problems.append(Problem(UserError(str(error))))
    rank = "" if place.is_first else f"rank {place.rank}: "
    for problem in problems:
        if place.is_first or not problem.is_warning:  # which the ranks of a node have in common
            _say(f"{rank}{'warning' if problem.is_warning else 'error'}: {problem.line}")
    num_errors = sum(not problem.is_warning for problem in problems)
    if place.is_first:
        _say(f"{num_errors} errors, {len(problems) - num_errors} warnings")
    return EXIT_USER_ERROR if num_errors else EXIT_DONE


def _plan(arguments: argparse.Namespace) -> int:
    from pretrain.plan.command import run

    run(arguments, _say)
    return EXIT_DONE


def _sweep(arguments: argparse.Namespace) -> int:
    from pretrain.sweep import execute
    from pretrain.sweep.processes import Processes
    from pretrain.sweep.runs import open_sweep

    sweep = open_sweep(
        arguments.study,
        arguments.output_dir,
        arguments.nproc,
        arguments.overrides,
        results=arguments.results,
        skip=arguments.skip or (),
    )
    if arguments.dry_run:
        _say(execute.describe(sweep))
        return EXIT_DONE
    if arguments.array:
        _say(execute.describe_array(sweep))
        return EXIT_DONE
    if arguments.table_only:
        execute.show_table(sweep, execute.resolved_runs(sweep))
        return EXIT_DONE
    minutes = arguments.max_minutes
    processes = Processes(None if minutes is None else 60 * minutes)
    return execute.run_sweep(sweep, processes, arguments.index, measure_only=arguments.measure_only)


def _list(arguments: argparse.Namespace) -> int:
    from pretrain.listing import list_choices

    _say(list_choices(arguments.what, arguments.pattern))
    return EXIT_DONE


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _minutes(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of minutes above 0")
    return number


def _shards(arguments: argparse.Namespace) -> int:
    return _SHARDS[arguments.action](arguments)


def _build(arguments: argparse.Namespace) -> int:
    from pretrain.data.build.arguments import request_from
    from pretrain.data.build.run import build_shards

    build_shards(request_from(arguments), _say)
    return EXIT_DONE


def _verify(arguments: argparse.Namespace) -> int:
    from pretrain.data.audit.repair import format_report, repair_folder
    from pretrain.data.audit.verify import Layout, format_audit, verify_folder

    settings: dict[str, Any] = {
        "decode_images": not arguments.no_decode,
        "num_workers": arguments.workers,
        "report_progress": _tell_progress,
    }
    if arguments.repair:
        _say(format_report(repair_folder(arguments.folder, arguments.repair, **settings)))
        return EXIT_DONE
    layout = Layout(arguments.lanes, arguments.world_size, split=arguments.split) if arguments.lanes else None
    audit = verify_folder(arguments.folder, layout=layout, **settings)
    if arguments.out:
        arguments.out.write_text(audit.to_json(), encoding="utf-8")
    _say(format_audit(audit))
    return EXIT_USER_ERROR if audit.num_errors else EXIT_DONE


def _tell_progress(num_done: int, num_shards: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{num_done} of {num_shards} shards", end="", file=sys.stderr, flush=True)  # noqa: T201
        if num_done == num_shards:
            print(file=sys.stderr)  # noqa: T201


def _bench(arguments: argparse.Namespace) -> int:
    from pretrain.data.bench import BenchRequest, advice, measure

    request = BenchRequest(
        shards=arguments.folder,
        split=arguments.split,
        view_px=arguments.view_px,
        num_views=arguments.views,
        batch_size=arguments.batch_size,
        seconds=arguments.seconds,
        threads=tuple(arguments.threads or ()),
    )
    _say(advice(measure(request, _say)))
    return EXIT_DONE


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _index(arguments: argparse.Namespace) -> int:
    from pretrain.data.indexing import index_folder

    manifest = index_folder(arguments.folder, arguments.out)
    for name in manifest.split_names:
        split = manifest.split(name)
        print(f"{name}: {split.num_samples} samples in {split.num_shards} shards")  # noqa: T201
    print(f"index written to {arguments.out or arguments.folder}")  # noqa: T201
    return EXIT_DONE


def _export(arguments: argparse.Namespace) -> int:
    export_arguments.run(arguments, _say)
    return EXIT_DONE


def _report(arguments: argparse.Namespace) -> int:
    from pretrain.illustrate.command import run

    run(arguments, _say)
    return EXIT_DONE


def _doctor(arguments: argparse.Namespace) -> int:
    return doctor_arguments.run(arguments, _say)


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.kind == "pretext":  # needs the heads of the run, so the wiring
        return _evaluate_pretext(arguments)
    if arguments.kind == "dense":  # reads masks, so a transfer's
        return _evaluate_dense(arguments)
    evaluate_arguments.run(arguments, _say)
    return EXIT_DONE


def _transfer(arguments: argparse.Namespace) -> int:
    _GOALS[arguments.goal][0].run(arguments, _say)
    return EXIT_DONE


def _evaluate_dense(arguments: argparse.Namespace) -> int:
    from pretrain.transfer.dense.run import DenseRequest, format_dense, run_dense

    _say(format_dense(run_dense(DenseRequest.of(arguments))))
    return EXIT_DONE


def _evaluate_pretext(arguments: argparse.Namespace) -> int:
    from pretrain.pretext import run_pretext

    result = run_pretext(arguments.weights, arguments.test, arguments.batch_size, arguments.device)
    run = arguments.weights
    is_checkpoint = (run / "MANIFEST.json").is_file()
    result.save(arguments.out or (run.parent.parent if is_checkpoint else run))
    _say(str(result))
    return EXIT_DONE


_SHARDS = {"build": _build, "index": _index, "verify": _verify, "bench": _bench}
_COMMANDS = {
    "train": _train,
    "check": _check,
    "plan": _plan,
    "sweep": _sweep,
    "list": _list,
    "shards": _shards,
    "export": _export,
    "evaluate": _evaluate,
    "transfer": _transfer,
    "report": _report,
    "doctor": _doctor,
}
