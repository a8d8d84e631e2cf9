"""Datasheet facts of GPUs: the dense peak of their matrix units, memory, and links.

Peaks are those of dense matrices with sums in float32. Datasheets print twice as much, with a footnote, for
matrices that are half zeros in a 2:4 pattern; nothing here trains with such.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pretrain.errors import UserError

TERA = 1e12


@dataclass(frozen=True)
class Peak:
    """The denominator of a model FLOP utilisation."""

    name: str  # such as "H200 dense bf16 datasheet 989.4e12"
    flops_per_second: float


@dataclass(frozen=True)
class Gpu:
    """One model of GPU; numbers of its maker's datasheet or architecture paper."""

    name: str
    pattern: str  # of what torch.cuda.get_device_name gives, in lower case
    dense_flops_per_second: float
    memory_gib: float  # that torch sees as total, about
    memory_bytes_per_second: float
    nvlink_bytes_per_second: float  # each way, of all links together; 0: over PCIe
    precision: str = "bf16"  # of the matrix products; fp16 where there is no bf16 unit
    bus_bytes_per_second: float = 0.0  # of a ring inside a node, measured; 0: follows from the links

    @property
    def peak(self) -> Peak:
        number = f"{self.dense_flops_per_second / TERA:g}e12"
        return Peak(f"{self.name} dense {self.precision} datasheet {number}", self.dense_flops_per_second)

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * 2**30


# The first pattern that is found holds, so a variant stands before what its name begins with.
GPUS = (
    Gpu("GB200", r"\bgb200\b", 2500e12, 184, 8.0e12, 900e9),
    Gpu("B200", r"\bb200\b", 2250e12, 178, 8.0e12, 900e9),
    Gpu("GH200", r"\bgh200\b", 989.4e12, 94, 4.0e12, 450e9),
    Gpu("H200 NVL", r"\bh200 nvl\b", 835.5e12, 139, 4.8e12, 450e9),
    Gpu("H200", r"\bh200\b", 989.4e12, 139, 4.8e12, 450e9),
    Gpu("H100 PCIe", r"\bh100 pcie\b", 756.0e12, 79, 2.0e12, 0),
    Gpu("H100 NVL", r"\bh100 nvl\b", 835.5e12, 93, 3.9e12, 300e9),
    Gpu("H100", r"\bh100\b", 989.4e12, 79, 3.35e12, 450e9),
    Gpu("H800", r"\bh800\b", 989.4e12, 79, 3.35e12, 200e9),
    Gpu("A800", r"\ba800\b", 312e12, 79, 2.0e12, 200e9),
    Gpu("A100 80GB", r"\ba100.*80 ?gb\b", 312e12, 79, 2.0e12, 300e9),
    Gpu("A100", r"\ba100\b", 312e12, 39, 1.555e12, 300e9),
    Gpu("L40S", r"\bl40s\b", 362.05e12, 44, 0.864e12, 0),
    Gpu("L40", r"\bl40\b", 181.05e12, 44, 0.864e12, 0),
    Gpu("L4", r"\bl4\b", 121e12, 22, 0.3e12, 0),
    Gpu("A40", r"\ba40\b", 149.7e12, 44, 0.696e12, 0),
    Gpu("A10G", r"\ba10g\b", 70e12, 22, 0.6e12, 0),
    Gpu("A10", r"\ba10\b", 125e12, 22, 0.6e12, 0),
    Gpu("RTX 5090", r"\brtx 5090\b(?! (d|laptop)\b)", 209.5e12, 31, 1.792e12, 0),
    Gpu("RTX 4090", r"\brtx 4090\b(?! (d|laptop)\b)", 165.2e12, 23, 1.008e12, 0),
    Gpu("RTX 3090", r"\brtx 3090\b(?! ti\b)", 71e12, 23, 0.936e12, 0),
    Gpu("V100 16GB", r"\bv100.*16 ?gb\b", 125e12, 15, 0.9e12, 150e9, "fp16"),
    Gpu("V100", r"\bv100\b", 125e12, 31, 0.9e12, 150e9, "fp16"),
    Gpu("T4", r"\bt4\b", 65e12, 15, 0.32e12, 0, "fp16"),
)


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU of a name as torch prints it ("NVIDIA H100 80GB HBM3") or as people write it ("h100")."""
    name = re.sub(r"[-_]+", " ", device_name.strip().lower())
    if re.search(r"\bmig\b", name):  # a part of a GPU, which its name does not tell the size of
        return None
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, name)), None)


def peak_flops(device_name: str) -> Peak | None:
    """What a device could do at most, by the name that torch gives it; None if it is not known here."""
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.peak


def gpu_named(name: str) -> Gpu:
    """UserError with all names for one that is not known."""
    gpu = find_gpu(name)
    if gpu is None:
        names = ", ".join(gpu.name.lower() for gpu in GPUS)
        raise UserError(f"--gpu {name}: is not in the table; known: {names}")
    return gpu
