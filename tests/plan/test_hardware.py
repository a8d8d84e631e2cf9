"""The denominator of a utilisation: right by device name, and never the figure for half-empty matrices."""

from __future__ import annotations

import pytest

from pretrain.errors import UserError
from pretrain.plan.hardware import GPUS, find_gpu, gpu_named, peak_flops

# what datasheets print beside the dense figure, for matrices with two zeros in four
SPARSE = {"H100": 1978.9e12, "H200": 1978.9e12, "A100": 624e12, "L40S": 733e12, "B200": 4500e12}


@pytest.mark.parametrize(
    ("device_name", "name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", 989.4),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756),
        ("NVIDIA H100 NVL", "H100 NVL", 835.5),
        ("NVIDIA H200", "H200", 989.4),
        ("NVIDIA H200 NVL", "H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", "GH200", 989.4),
        ("NVIDIA B200", "B200", 2250),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", 312),
        ("NVIDIA A100 80GB PCIe", "A100 80GB", 312),
        ("NVIDIA A100-SXM4-40GB", "A100", 312),
        ("NVIDIA L40S", "L40S", 362.05),
        ("NVIDIA L4", "L4", 121),
        ("Tesla V100-SXM2-32GB", "V100", 125),
        ("Tesla V100-SXM2-16GB", "V100 16GB", 125),
        ("Tesla T4", "T4", 65),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", "RTX 3090", 71),
    ],
)
def test_a_device_is_known_by_the_name_that_torch_gives_it(device_name: str, name: str, tera: float) -> None:
    gpu, peak = find_gpu(device_name), peak_flops(device_name)
    assert gpu is not None
    assert peak is not None
    assert gpu.name == name
    assert peak.flops_per_second == pytest.approx(tera * 1e12)
    assert f"{name} dense " in peak.name


def test_what_is_not_in_the_table_has_no_peak() -> None:
    for name in (
        *("AMD Instinct MI300X", "NVIDIA GeForce GTX 1080", "cpu", "", "NVIDIA L400", "NVIDIA H20"),
        *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"),
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    ):
        assert peak_flops(name) is None
    with pytest.raises(UserError, match=r"--gpu h300: is not in the table; known: .*h200, .*a100"):
        gpu_named("h300")


@pytest.mark.parametrize("name", SPARSE)
def test_no_peak_is_that_of_half_empty_matrices(name: str) -> None:
    peak = gpu_named(name).peak
    assert peak.flops_per_second == pytest.approx(SPARSE[name] / 2, rel=0.02)


def test_people_find_every_gpu_by_its_name() -> None:
    for gpu in GPUS:
        assert gpu_named(gpu.name.lower()) is gpu
        assert gpu_named(f"NVIDIA {gpu.name}") is gpu
        assert gpu.peak.flops_per_second <= 2.6e15
        assert gpu.precision == ("fp16" if gpu.name in ("V100", "V100 16GB", "T4") else "bf16")
