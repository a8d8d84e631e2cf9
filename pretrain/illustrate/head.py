"""The facts that stand above the report: what ran, on what, how far, and how it went."""

from __future__ import annotations

from datetime import timedelta

from pretrain import build
from pretrain.config import RunConfig
from pretrain.data.manifest import Split
from pretrain.illustrate.run_files import RunFiles
from pretrain.report.curves import TaskKind, progress, series
from pretrain.report.overview import Facts, Overview
from pretrain.report.results import accuracies
from pretrain.tasks import TASKS
from pretrain.tasks.multitask import BACKBONE_PREFIX
from pretrain.views.plan import encoder_calls

# tasks that read the class token where there is one; the others read patches or a register of their own
CLASS_TOKEN_READERS = frozenset(
    {"byol", "classification", "cluster_labels", "contrastive", "dino", "exemplar", "mae", "moby", "moco_v2"}
    | {"moco_v3", "simsiam"}
)
TIMES = "\N{MULTIPLICATION SIGN}"
LAST_RECORDS = 10  # whose mean spread of features the verdict looks at


def task_kinds(config: RunConfig) -> list[TaskKind]:
    return [
        TaskKind(name, TASKS[name].headline, TASKS[name].higher_is_better) for name in config.tasks.enabled()
    ]


def readers_of(config: RunConfig) -> dict[str, str]:
    """The tasks that read each prefix token; a token that none reads is not there."""
    of_image = [
        name
        for name, settings in config.tasks.enabled().items()
        if name in CLASS_TOKEN_READERS and getattr(settings, "feature", "class") == "class"
    ]
    own = {name: name for name in build.registers(config)}
    is_read = bool(of_image) and build.token_layout(config).has_class_token
    return ({"class": ", ".join(of_image)} if is_read else {}) | own


def total_steps(files: RunFiles, data: Split | None) -> int | None:
    """Of the whole run; None where it depends on data that are not here."""
    config = files.config
    if config.schedule.steps is not None:
        return config.schedule.steps
    if files.saved is not None and "num_samples" in files.saved.state:
        return build.num_steps(config, int(files.saved.state["num_samples"]))
    of_run = data is not None and not config.data.sources and str(data.manifest.folder) == config.data.shards
    return build.num_steps(config, data.num_samples) if data is not None and of_run else None


def overview_of(files: RunFiles, data: Split | None) -> Overview:
    records = files.records
    saved_step = int(files.saved.state["step"]) if files.saved else 0
    step = max(int(records[-1]["step"]) if records else 0, saved_step)
    losses = series(records, "total")
    spread = series(records[-LAST_RECORDS:], "feature_std")
    newest = files.attempts[-1] if files.attempts else None
    facts = Facts(
        step=step,
        num_steps=total_steps(files, data),
        num_attempts=len(files.attempts),
        outcome=newest.outcome if newest else None,
        progress=tuple(progress(records, task_kinds(files.config))) if records else (),
        first_loss=losses.known[0] if losses else None,
        last_loss=losses.known[-1] if losses else None,
        feature_std=sum(spread.known) / len(spread.known) if spread else None,
        num_skipped=sum(int(record.get("skipped_steps") or 0) for record in records),
        num_rollbacks=sum(one.get("kind") == "went back" for one in files.anomalies),
        num_bad_samples=len(files.bad_samples),
        accuracies=accuracies(files.results),
    )
    return Overview(files.folder.resolve().name, facts, tuple(_rows(files, facts)))


def _rows(files: RunFiles, facts: Facts) -> list[tuple[str, str]]:
    config, saved = files.config, files.saved
    rows = [("Methods", ", ".join(config.tasks.enabled()))]
    named = [word for word in files.command if word.endswith((".yaml", ".yml"))]
    if named:
        rows.append(("Config", named[0]))
    rows.append(("Model", _model(files)))
    rows.append(("Tokens", _tokens(config)))
    calls = encoder_calls(config.views)
    sizes = sorted({view.size_px for view in config.views.values()}, reverse=True)
    rows.append(
        (
            "Views",
            f"{len(config.views)} of {' and '.join(map(str, sizes))} px in {len(calls)} encoder "
            f"{'pass' if len(calls) == 1 else 'passes'}",
        )
    )
    rows.append(("Data", _data(files)))
    of_all = f" of {facts.num_steps}" if facts.num_steps else ""
    epoch = files.records[-1].get("epoch") if files.records else None
    rows.append(
        ("Step", f"{facts.step}{of_all}" + (f", epoch {epoch:.1f}" if isinstance(epoch, float) else ""))
    )
    rows.append(("Checkpoint", saved.folder.name if saved else files.why_not_saved))
    rows.append(("Layout", _layout(files)))
    rows.append(
        ("Optimizer", f"{config.optim.name}, base rate {config.optim.base_lr:g}, {config.schedule.kind}")
    )
    rows.append(("Balance", config.balance.kind))
    if config.teacher is not None:
        rows.append(("Teacher", f"average of the student, momentum from {config.teacher.momentum:g}"))
    times = [
        record["unix_time"] for record in files.records if isinstance(record.get("unix_time"), int | float)
    ]
    if len(times) > 1:
        took = str(timedelta(seconds=round(times[-1] - times[0])))
        rows.append(("From first to last record", f"{took} (hours:minutes:seconds)"))
    rows.append(("Machine", _machine(files)))
    rows.append(("Seed", str(config.seed)))
    return [(name, value) for name, value in rows if value]


def _model(files: RunFiles) -> str:
    model = files.config.model
    told = f"{model.name}, {model.img_px} px in patches of {model.patch_px} px"
    if files.saved is None:
        return told
    own = [value.numel() for name, value in files.saved.student.items() if name.startswith(BACKBONE_PREFIX)]
    count = sum(own)
    return f"{told}, " + (f"{count / 1e6:.1f} M parameters" if count >= 1e5 else f"{count:,} parameters")


def _tokens(config: RunConfig) -> str:
    layout = build.token_layout(config)
    parts = ["class"] if layout.has_class_token else []
    parts += [f"{name} (register)" for name in layout.registers]
    parts.append(f"{layout.num_patches} patches ({layout.grid[0]} {TIMES} {layout.grid[1]})")
    return " + ".join(parts)


def _data(files: RunFiles) -> str:
    named = ", ".join(f"{source.shards}:{source.split}" for source in files.config.data.all_sources)
    if files.saved is not None and "num_samples" in files.saved.state:
        return f"{named}, {int(files.saved.state['num_samples']):,} images"
    return named


def _layout(files: RunFiles) -> str:
    config = files.config
    engine = f"{config.engine.kind}, {config.engine.precision}"
    accumulation = config.batch.accumulation_steps
    if files.saved is None or "world_size" not in files.saved.state:
        return f"{config.batch.global_size} images a step; {engine}"
    world = int(files.saved.state["world_size"])
    sizes = build.sizes(config, world)
    return (
        f"{world} rank{'s' if world > 1 else ''} {TIMES} {sizes.micro_batch} images {TIMES} {accumulation} = "
        f"{config.batch.global_size} a step; {engine}"
    )


def _machine(files: RunFiles) -> str:
    gpus = files.environment.get("gpus")
    packages = files.environment.get("packages")
    where = f"{len(gpus)} {TIMES} {gpus[0]}" if isinstance(gpus, list) and gpus else "CPU"
    torch_version = packages.get("torch") if isinstance(packages, dict) else None
    commit = files.environment.get("commit")
    parts = [
        where,
        f"torch {torch_version}" if torch_version else "",
        f"commit {str(commit)[:10]}" if commit else "",
    ]
    return ", ".join(part for part in parts if part)
