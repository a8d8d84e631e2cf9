"""Where the ranks of a run answer, in a file that Prometheus watches (`file_sd_configs`).

Slurm gives a job other nodes each time, so the job writes down where it is and takes it away at its end. The
labels that tell ranks apart stand here, and not in what is scraped.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TARGETS = "targets.json"

logger = logging.getLogger("pretrain")


@dataclass(frozen=True)
class Target:
    """A rank that answers."""

    rank: int
    host: str  # the node's name
    address: str  # it listens at
    port: int

    @property
    def reached_at(self) -> str:
        """HOST:PORT for Prometheus: the node's name where the rank listens at every address of it."""
        try:
            listens_everywhere = ipaddress.ip_address(self.address).is_unspecified
        except ValueError:
            listens_everywhere = not self.address
        host = self.host if listens_everywhere else self.address
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


def target_files(run_dir: Path, targets_dir: Path | None) -> list[Path]:
    """Where the list goes: into the run folder, and into a folder for many runs if there is one."""
    files = [run_dir / TARGETS]
    if targets_dir is not None:
        whole = run_dir.resolve()  # two runs may have folders of one name
        files.append(targets_dir / f"{whole.name}-{hashlib.sha256(str(whole).encode()).hexdigest()[:8]}.json")
    return files


def write_targets(path: Path, run: str, targets: Sequence[Target]) -> str | None:
    """Put a list in place at once, and return its text; a disk that is full or gone is told, no more."""
    text = json.dumps(
        [
            {
                "targets": [target.reached_at],
                "labels": {"run": run, "rank": str(target.rank), "node": target.host},
            }
            for target in targets
        ],
        indent=1,
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.chmod(0o644)  # Prometheus is another user
        temporary.replace(path)
    except OSError as error:
        logger.warning("%s cannot be written (%s); Prometheus will not find this run", path, error.strerror)
        return None
    return text


def remove_targets(path: Path, text: str) -> None:
    """Take the list away, unless a newer start of the run has put its own there."""
    with suppress(OSError):
        if path.read_text() == text:
            path.unlink()
