"""`pretrain report`: what can be wrong is looked at first, then each section is made, then the page."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain import __version__
from pretrain.config import RunConfig
from pretrain.data.manifest import Split
from pretrain.errors import UserError
from pretrain.illustrate.features import (
    Network,
    attention_of,
    bank_rows,
    encode_rows,
    neighbours_of,
    open_network,
    patch_colors_of,
    plane_of,
    plane_rows,
)
from pretrain.illustrate.head import overview_of, readers_of, task_kinds, total_steps
from pretrain.illustrate.images import Picked, pick, split_of, split_of_run
from pretrain.illustrate.predictions import WITHOUT_PIXELS, restorations_of, restored_tasks
from pretrain.illustrate.run_files import RunFiles, config_of_run, open_run
from pretrain.illustrate.shown_views import samples_of
from pretrain.report.attention_maps import attention_section
from pretrain.report.feature_maps import neighbours_section, patch_colors_section, plane_section
from pretrain.report.overview import header
from pretrain.report.page import Section, left_out, page
from pretrain.report.projection import require_tsne
from pretrain.report.restorations import restorations_section
from pretrain.report.results import evaluation_section, export_section
from pretrain.report.samples import samples_section
from pretrain.report.training import Training, training_sections

NUM_PICTURES = 8  # images that the pictures are made of
NUM_SAMPLES = 4  # of them with views and plans, and with attention
NUM_RESTORED = 5
FEWEST_IN_PLANE = 8

VIEWS, RESTORED, ATTENTION, PATCHES = (
    ("views", "Views and patch plans"),
    ("restorations", "Reconstructions and colorizations"),
    ("attention", "Attention of the last block"),
    ("patches", "Patch features as colours"),
)
PLANE, NEAR = ("plane", "The evaluation set in a plane (t-SNE)"), ("neighbours", "Nearest neighbours")


@dataclass(frozen=True)
class Sources:
    """Where images come from."""

    pictures: Split | None
    why_no_pictures: str
    evaluation: Split | None
    bank: Split | None


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Write the report of a run. A UserError, before any work, says what is wrong."""
    config = config_of_run(arguments.run)
    out = _place(arguments.out or arguments.run / "report.html")
    if arguments.train and not arguments.eval:
        raise UserError("--train is where neighbours of --eval are looked for; give --eval too")
    if arguments.eval:
        require_tsne()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave it out, or use cpu")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sources = _sources(config, arguments)
    files = open_run(arguments.run, config)
    sections = _sections(files, sources, device, say)
    title = f"{files.folder.resolve().name}: pretraining report"
    footer = (
        f"Made by pretrain {__version__} from {files.folder}. One file: no scripts, nothing from a network."
    )
    text = page(title, header(overview_of(files, sources.pictures)), sections, footer)
    num_bytes = _write(out, text)
    shown = [part.title for part in sections if part.body is not None]
    say(f"{out}: {len(shown)} sections, {num_bytes / 2**20:.1f} MiB")
    for part in sections:
        if part.body is None:
            say(f"  left out: {part.title}: {part.missing}")


def _sources(config: RunConfig, arguments: argparse.Namespace) -> Sources:
    evaluation = split_of(arguments.eval, "test") if arguments.eval else None
    bank = split_of(arguments.train, "train") if arguments.train else evaluation
    if arguments.images:
        return Sources(split_of(arguments.images, "test"), "", evaluation, bank)
    split, why = split_of_run(config)
    if split is None and evaluation is not None:
        return Sources(evaluation, "", evaluation, bank)
    return Sources(split, why, evaluation, bank)


def _sections(
    files: RunFiles, sources: Sources, device: torch.device, say: Callable[[str], None]
) -> list[Section]:
    config = files.config
    training = Training(
        files.records,
        tuple(task_kinds(config)),
        total_steps(files, sources.pictures),
        files.attempts,
        files.anomalies,
        files.bad_samples,
        learns_weights=config.balance.kind == "uncertainty",
    )
    picked = None
    if sources.pictures is not None:
        picked = pick(sources.pictures, NUM_PICTURES)
        say(f"pictures of {picked.source}: {len(picked.pixels)} images")
    network = None
    if files.saved is not None:
        network = open_network(str(files.saved.folder), config, device, readers_of(config))
    sections = training_sections(training)
    sections.insert(1, _views(files, sources, picked, device))
    sections.insert(2, _restored(files, sources, picked, device))
    sections += _looks(files, sources, picked, network)
    sections += _of_evaluation_set(files, sources, network, say)
    if files.results:
        sections.append(evaluation_section(files.results))
    else:
        sections.append(
            left_out("evaluation", "Evaluation", "eval/ holds no result; `pretrain evaluate` writes them")
        )
    if files.exports:
        sections.append(export_section(files.exports))
    else:
        remedy = f"`pretrain export {files.folder} --out {files.folder / 'exported'}` makes it"
        why = f"exported/ is not there; {remedy}"
        sections.append(left_out("export", "Export", why))
    return sections


def _views(files: RunFiles, sources: Sources, picked: Picked | None, device: torch.device) -> Section:
    if picked is None:
        return left_out(*VIEWS, sources.why_no_pictures)
    return samples_section(samples_of(files.config, picked, NUM_SAMPLES, device))


def _restored(files: RunFiles, sources: Sources, picked: Picked | None, device: torch.device) -> Section:
    if not restored_tasks(files.config):
        special = [why for name, why in WITHOUT_PIXELS.items() if name in files.config.tasks.enabled()]
        return left_out(*RESTORED, *(special or ["no task of this run gives pixels or colours"]))
    if files.saved is None:
        return left_out(*RESTORED, files.why_not_saved)
    if picked is None:
        return left_out(*RESTORED, sources.why_no_pictures)
    tasks = restorations_of(files.config, files.saved, picked, NUM_RESTORED, device)
    return restorations_section(tasks, picked.source)


def _looks(
    files: RunFiles, sources: Sources, picked: Picked | None, network: Network | None
) -> list[Section]:
    if network is None or picked is None:
        why = files.why_not_saved if network is None else sources.why_no_pictures
        return [left_out(*ATTENTION, why), left_out(*PATCHES, why)]
    attention, why = attention_of(network, picked, NUM_SAMPLES, readers_of(files.config))
    return [
        left_out(*ATTENTION, why) if attention is None else attention_section(attention),
        patch_colors_section(patch_colors_of(network, picked)),
    ]


def _of_evaluation_set(
    files: RunFiles, sources: Sources, network: Network | None, say: Callable[[str], None]
) -> list[Section]:
    if sources.evaluation is None:
        why = "no evaluation set was named; give --eval SHARDS"
        return [left_out(*PLANE, why), left_out(*NEAR, why)]
    if network is None:
        return [left_out(*PLANE, files.why_not_saved), left_out(*NEAR, files.why_not_saved)]
    rows = plane_rows(sources.evaluation, files.config.seed)
    say(f"encoding {len(rows)} images of the evaluation set")
    encoded = encode_rows(network, sources.evaluation, rows)
    bank = encoded
    assert sources.bank is not None
    if sources.bank is not sources.evaluation:
        of_bank = bank_rows(sources.bank)
        say(f"encoding {len(of_bank)} images to look for neighbours among")
        bank = encode_rows(network, sources.bank, of_bank)
    if len(encoded.rows) < FEWEST_IN_PLANE:
        why = f"{len(encoded.rows)} images are too few; give --eval at least {FEWEST_IN_PLANE}"
        return [left_out(*PLANE, why), left_out(*NEAR, why)]
    return [
        plane_section(plane_of(network, encoded, files.config.seed)),
        neighbours_section(neighbours_of(network, encoded, bank)),
    ]


def _place(out: Path) -> Path:
    if out.is_dir():
        raise UserError(f"{out}: is a folder; --out names the file to write, such as {out / 'report.html'}")
    if not out.parent.is_dir():
        raise UserError(f"{out}: its folder is not there; make it, or choose another --out")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: its folder cannot be written; choose another --out")
    return out


def _write(out: Path, text: str) -> int:
    """Complete or not at all; the number of bytes."""
    data = text.encode("utf-8", "replace")  # a path may hold what is no text
    new = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        new.write_bytes(data)
        new.replace(out)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    return len(data)
