"""Numbers of `make bench-gpu` in the place of assumed ones, and which of a plan's numbers are which.

A folder of results holds a JSON file for each slice of the benchmark. `links.json` may lie beside them, where
somebody has measured what one GPU cannot: bus rates, as nccl-tests prints them,
`{"source": "...", "inside_node_bytes_per_second": N, "between_nodes_bytes_per_second": N}`, the second of a
whole node.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.plan.hardware import Gpu, find_gpu
from pretrain.plan.network import Network
from pretrain.plan.recipe import Settings

CEILINGS, MEMORY, LINKS = "ceilings", "memory", "links"
NO_RESULT = "holds no results of a GPU; `make bench-gpu` on one writes them"


@dataclass(frozen=True)
class Figure:
    """A number that a prediction rests on."""

    name: str
    value: str  # with its unit
    is_measured: bool
    source: str


@dataclass(frozen=True)
class Results:
    """What was measured on one kind of GPU."""

    gpu: Gpu
    slices: dict[str, dict[str, Any]]  # contents of the files, by name

    def utilisation_curve(self, settings: Settings) -> tuple[tuple[tuple[int, float], ...], str]:
        """Images of a micro step and the share of the datasheet's peak, growing, and the file; else nothing.

        Of the same backbone, compiled as the config says, nothing computed twice: that is counted by itself.
        """
        name = settings["model"]["name"]
        is_eager = settings["engine"]["compile"] == "off"
        for file, content in self.slices.items():
            best: dict[int, float] = {}
            for variant in content.get("variants", {}).values():
                if variant.get("model") != name or "mfu_of_datasheet_ratio" not in variant:
                    continue
                said = " ".join(variant.get("settings", ()))
                if ("'off'" in said) != is_eager or "recompute=true" in said:
                    continue
                batch = int(variant["batch"])
                best[batch] = max(best.get(batch, 0.0), float(variant["mfu_of_datasheet_ratio"]))
            if best:
                return tuple(sorted(best.items())), f"{file}.json"
        return (), ""

    def rate(self, variant: str) -> float | None:
        """Bytes/s of a kind of copy."""
        found = self.slices.get(CEILINGS, {"variants": {}})["variants"].get(variant, {})
        rate = found.get("bytes_per_second")
        return None if rate is None else float(rate)

    @property
    def memory_error_ratio(self) -> float | None:
        """How far a predicted peak was from a measured one, at most."""
        summary = self.slices.get(MEMORY, {}).get("summary", {})
        error = summary.get("peak_error_ratio")
        return None if error is None else float(error)

    def machine_parts(self, gpu: Gpu, network: Network) -> tuple[Gpu, Network]:
        """The GPU and the network with their rates as measured."""
        copied = self.rate("copy, device to device")
        if copied:  # a copy reads and writes
            gpu = replace(gpu, memory_bytes_per_second=2 * copied)
        links = self.slices.get(LINKS, {})
        if links.get("inside_node_bytes_per_second"):
            gpu = replace(gpu, bus_bytes_per_second=float(links["inside_node_bytes_per_second"]))
        if links.get("between_nodes_bytes_per_second"):
            rate = float(links["between_nodes_bytes_per_second"])
            network = replace(network, name="between nodes, measured", bytes_per_second_per_node=rate)
        return gpu, network


def read(path: Path) -> Results:
    """Of a folder or of one file. UserError where that holds nothing that a plan could rest on."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    slices = {file.stem: content for file in files if (content := _content(file)) is not None}
    measured = {name: content for name, content in slices.items() if name != LINKS}
    if not measured:
        raise UserError(f"--measured {path}: {NO_RESULT}")
    names = set()
    for name, content in measured.items():
        if content["is_toy"] or content["place"].get("device") != "cuda":
            raise UserError(f"--measured {path}: {name}.json is of toy size or of a CPU, which tells nothing")
        names.add(content["place"]["gpu"])
    if len(names) > 1:
        raise UserError(
            f"--measured {path}: is of several GPUs ({', '.join(sorted(names))}); use a folder each"
        )
    device = names.pop()
    gpu = find_gpu(device)
    if gpu is None:
        raise UserError(f"--measured {path}: no datasheet of {device} is known here; give --mfu by hand")
    return Results(gpu, slices)


def _content(file: Path) -> dict[str, Any] | None:
    """None for a JSON file that is something else."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--measured {file}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        return None
    if file.stem == LINKS:
        _check_links(file, content)
        return content
    has_all = isinstance(content.get("variants"), dict) and isinstance(content.get("place"), dict)
    return content if has_all and "is_toy" in content else None


def _check_links(file: Path, content: dict[str, Any]) -> None:
    for key, value in content.items():
        if key != "source" and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise UserError(f"--measured {file}: {key}: {value!r} is no number of bytes/s")


def between(curve: tuple[tuple[int, float], ...], images: float) -> float:
    """Of a curve over the images of a micro step: linear in their logarithm, constant beyond its ends."""
    if images <= curve[0][0]:
        return curve[0][1]
    for (low, at_low), (high, at_high) in pairwise(curve):
        if images <= high:
            share = math.log(images / low) / math.log(high / low)
            return at_low + share * (at_high - at_low)
    return curve[-1][1]
