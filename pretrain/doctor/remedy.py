"""What to do, as exact commands and settings of the run at hand."""

from __future__ import annotations

import shlex
from pathlib import PurePath

from pretrain.doctor.run_files import RunFiles


def resume_command(files: RunFiles, *settings: str) -> str:
    """The command that goes on with the run, as it was started last; settings replace or join its own."""
    record = files.newest.record if files.newest else None
    command = record.about.get("command") if record else None
    if not isinstance(command, list) or "train" not in command:
        words = ["train", "CONFIG", "--output-dir", str(files.run)]
    else:
        words = [str(word) for word in command[command.index("train") :]]
    new = {setting.partition("=")[0] for setting in settings}
    kept, skip = [], False
    for word in words:
        if skip or word == "--resume":
            skip = word == "--resume"
        elif not word.startswith("--resume=") and word.partition("=")[0] not in new:
            kept.append(word)
    return f"pretrain {shlex.join([*kept, *settings, '--resume', 'auto'])}"


def go_on(files: RunFiles) -> str:
    """Who continues: the scheduler that started it, or `resume_command`, which is to follow."""
    record = files.newest.record if files.newest else None
    if record and record.owner.job:
        return f"submit the same job again ({record.owner.job}), or"
    return "continue"


def lower_lr(files: RunFiles) -> str:
    """A learning rate to try after one that was too high, beside the one it replaces."""
    lower = lower_lr_setting(files)
    if not lower:
        return "a lower optim.base_lr"
    return f"{lower[0]} (now {files.setting('optim.base_lr'):.3g})"


def lower_lr_setting(files: RunFiles) -> tuple[str, ...]:
    """The same as a setting of the command; a resume allows it to change."""
    now = files.setting("optim.base_lr")
    return (f"optim.base_lr={now / 10:.3g}",) if isinstance(now, (int, float)) else ()


def shard_folders(files: RunFiles) -> list[str]:
    """Where the run reads its data."""
    sources = files.setting("data.sources", [])
    many = [source.get("shards") for source in sources if isinstance(source, dict)]
    found = [str(folder) for folder in (files.setting("data.shards"), *many) if folder]
    return found or ["SHARDS"]


def verify_shards(files: RunFiles, repair: bool = False) -> str:
    """The command that finds, or mends, every bad sample."""
    commands = []
    for folder in shard_folders(files):
        words = ["pretrain", "shards", "verify", folder]
        if repair:
            words += ["--repair", f"{PurePath(folder)}-clean"]
        commands.append(shlex.join(words))
    return "; ".join(commands)
