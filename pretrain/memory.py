"""Running out of memory: how it is recognised, and what is told about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

# what a RuntimeError says that is one in truth; anything else, such as a full /dev/shm, is not
_HOST_TEXTS = (
    re.compile(r"DefaultCPUAllocator: (can't allocate memory|not enough memory)"),  # Linux, Windows
    re.compile(r"Failed to CUDA host alloc"),  # NCCL's pinned memory
)
_DEVICE_TEXTS = (
    re.compile(r"CUDA out of memory"),
    re.compile(r"CUDA error: out of memory"),  # the driver's, outside torch's allocator
    re.compile(r"CUBLAS_STATUS_ALLOC_FAILED"),
    re.compile(r"CUDNN_STATUS_ALLOC_FAILED"),
    re.compile(r"Cuda failure (\d+ )?'out of memory'"),  # NCCL
    re.compile(r"Failed to CUDA [mc]alloc"),  # NCCL's last word after the line above
)
_ASKED_FOR = re.compile(r"tried to allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or of a device ran out, told by the type or by the library's own words."""
    return _is_of_host(error) or _is_of_device(error)


def _is_of_host(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text.search(str(error)) for text in _HOST_TEXTS)
    )


def _is_of_device(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text.search(str(error)) for text in _DEVICE_TEXTS)
    )


def out_of_memory_report(
    error: BaseException,
    *,
    device: torch.device,
    global_batch: int,
    accumulation_steps: int,
    world_size: int,
    lanes: int,
    recompute: bool,
    zero_stage: int | None,
) -> str:
    """One line: what ran out, how much was in use, and which settings need less.

    lanes: of the data; each gives the same number of images to a micro step.
    zero_stage: None for an engine or an optimizer that can have no other.
    """
    of_device = device.type == "cuda" and not _is_of_host(error)
    what = f"memory of {device}" if of_device else "host memory"
    asked = _ASKED_FOR.search(str(error))
    tried = f", tried to allocate {_readable(asked[1])}" if asked else ""
    micro_batch = global_batch // accumulation_steps // world_size
    told = [
        f"{what} ran out ({type(error).__name__}{tried})",
        cuda_memory(device) if of_device else host_memory(),
        f"micro batch {micro_batch} = global batch {global_batch} / accumulation {accumulation_steps} / "
        f"ranks {world_size}",
    ]
    if device.type == "cuda" and not of_device:
        # the batch lives on the device; on the host it is the loader that grows with its settings
        told.append(
            "set a smaller data.prefetch_batches, data.decode_threads or data.shuffle_block, or ask for more "
            "memory"
        )
    else:
        told.append(_remedy(global_batch, accumulation_steps, world_size, lanes, recompute, zero_stage))
    return "; ".join(part for part in told if part)


def next_accumulation(global_batch: int, accumulation_steps: int, lanes: int) -> int | None:
    """The smallest larger number of micro steps that divides the global batch, if there is one."""
    return next(
        (
            steps
            for steps in range(accumulation_steps + 1, global_batch // lanes + 1)
            if global_batch % (lanes * steps) == 0
        ),
        None,
    )


def _remedy(
    global_batch: int,
    accumulation_steps: int,
    world_size: int,
    lanes: int,
    recompute: bool,
    zero_stage: int | None,
) -> str:
    ways = []
    steps = next_accumulation(global_batch, accumulation_steps, lanes)
    if steps:
        ways.append(f"batch.accumulation_steps={steps} (micro batch {global_batch // steps // world_size})")
    if not recompute:
        ways.append("engine.recompute=true")
    if zero_stage is not None and zero_stage < 3 and world_size > 1:
        ways.append(f"engine.deepspeed.zero_optimization.stage={zero_stage + 1}")
    if not ways:
        return "set a smaller batch.global_size or smaller views.*.size_px, or use more ranks"
    return f"set {', or '.join(ways)}"


def cuda_memory(device: torch.device) -> str:
    """What this process used at its peak and what the device has: 'peak 70.1 GiB allocated, ...'."""
    try:
        free, total = torch.cuda.mem_get_info(device)
        stats = torch.cuda.memory_stats(device)
    except RuntimeError:  # a context that is broken can tell nothing, and must not hide the first error
        return ""
    return describe_cuda(stats, free, total)


def describe_cuda(stats: Mapping[str, int], free: int, total: int) -> str:
    """stats: of torch.cuda.memory_stats; free, total: bytes of the device, whoever uses them."""
    allocated, reserved = (stats.get(f"{kind}_bytes.all.peak", 0) for kind in ("allocated", "reserved"))
    now = stats.get("reserved_bytes.all.current", 0)
    others = max(0, total - free - now)
    return (
        f"peak {_size(allocated)} allocated and {_size(reserved)} reserved of {_size(total)}, "
        f"{_size(others)} used outside torch's allocator, "
        f"{stats.get('num_alloc_retries', 0)} allocation retries"
    )


def host_memory(proc: Path = Path("/proc")) -> str:
    """What this process has and had at its peak, and what the machine has left: 'process 1.2 GiB, ...'."""
    parts = [
        f"{label} {_size(found)}"
        for label, file, key in (
            ("process", "self/status", "VmRSS"),
            ("its peak", "self/status", "VmHWM"),
            ("available", "meminfo", "MemAvailable"),
        )
        if (found := _proc_bytes(proc / file, key)) is not None
    ]
    return ", ".join(parts)


def _proc_bytes(path: Path, key: str) -> int | None:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    except OSError:  # a system without /proc
        return None
    return int(found[1]) * 1024 if found else None


def _readable(asked: str) -> str:
    """'8796093022208 bytes' -> '8192.0 GiB'; what already has a larger unit stays."""
    number, _, unit = asked.partition(" ")
    return _size(int(number)) if unit == "bytes" and number.isdigit() else asked


def _size(num_bytes: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"
