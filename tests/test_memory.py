from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError

from pretrain.memory import (
    describe_cuda,
    host_memory,
    is_out_of_memory,
    next_accumulation,
    out_of_memory_report,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
OF_CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 1125899906842624 bytes. Error code 12 (Cannot allocate memory)"
)
OF_CUDA = (
    "CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total capacity of 79.11 GiB of which 3.12 "
    "MiB is free."
)
OF_NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error, NCCL version 2.30.7\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)


def report(error: BaseException, **changes: Any) -> str:
    sizes: dict[str, Any] = {
        "device": CPU,
        "global_batch": 256,
        "accumulation_steps": 2,
        "world_size": 4,
        "lanes": 16,
        "recompute": False,
        "zero_stage": 1,
    }
    return out_of_memory_report(error, **{**sizes, **changes})


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(OF_CUDA),
        torch.cuda.OutOfMemoryError("anything"),
        MemoryError(),
        RuntimeError(OF_CPU),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        DistBackendError(OF_NCCL + "Cuda failure 'out of memory'"),
        DistBackendError(OF_NCCL + "Cuda failure 2 'out of memory'"),
        DistBackendError(OF_NCCL + "Failed to CUDA calloc async 608 bytes"),
        DistBackendError(OF_NCCL + "Failed to CUDA host alloc 33554432 bytes"),
    ],
    ids=lambda error: f"{type(error).__name__}: {str(error)[-30:]}",
)
def test_memory_that_ran_out_is_recognised(error: BaseException) -> None:
    """Row 23."""
    assert is_out_of_memory(error)


def test_the_allocator_of_the_cpu_says_what_is_looked_for() -> None:
    """Row 23: the words are torch's own, of this version."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                     "dataloader's workers are out of shared memory."),
        RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"),
        RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904]"),
        DistBackendError(OF_NCCL + "Cuda failure 1 'invalid argument'"),
        ValueError("the disk is full; CUDA out of memory is a text here"),
        OSError(28, "No space left on device"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: f"{type(error).__name__}: {str(error)[:30]}",
)  # fmt: skip
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    """Row 23."""
    assert not is_out_of_memory(error)


def test_the_report_is_one_line_with_what_was_asked_for_the_sizes_and_the_ways_out() -> None:
    """Row 23: 256 images in 16 lanes and 2 micro steps; 3 does not divide them, 4 does."""
    line = report(RuntimeError(OF_CPU))
    assert "\n" not in line
    assert line.startswith("host memory ran out (RuntimeError, tried to allocate 1048576.0 GiB); process ")
    assert line.endswith(
        "; micro batch 32 = global batch 256 / accumulation 2 / ranks 4; set batch.accumulation_steps=4 "
        "(micro batch 16), or engine.recompute=true, or engine.deepspeed.zero_optimization.stage=2"
    )


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"recompute": True}, "set batch.accumulation_steps=4 (micro batch 16), or engine.deepspeed"),
        (
            {"zero_stage": 3},
            "set batch.accumulation_steps=4 (micro batch 16), or engine.recompute=true",
        ),
        (
            {"zero_stage": None},
            "set batch.accumulation_steps=4 (micro batch 16), or engine.recompute=true",
        ),
        (
            {"world_size": 1},  # which ZeRO has nothing to share with
            "set batch.accumulation_steps=4 (micro batch 64), or engine.recompute=true",
        ),
        ({"accumulation_steps": 16, "zero_stage": 0}, "set engine.recompute=true, or engine.deepspeed"),
        (
            {"accumulation_steps": 16, "recompute": True, "zero_stage": 3},
            "set a smaller batch.global_size or smaller views.*.size_px, or use more ranks",
        ),
    ],
)
def test_only_what_is_left_to_change_is_advised(changes: dict[str, Any], remedy: str) -> None:
    """Row 23."""
    line = report(torch.OutOfMemoryError(OF_CUDA), **changes)
    advice = line.rpartition("; ")[2]
    assert advice.startswith(remedy)
    if "engine.deepspeed" not in remedy:
        assert advice == remedy


def test_the_host_of_a_gpu_is_relieved_by_a_smaller_loader() -> None:
    """Row 23: the batch is on the device, so another micro batch would change nothing."""
    line = report(MemoryError(), device=CUDA)
    assert line.startswith("host memory ran out (MemoryError); ")
    assert "data.prefetch_batches" in line
    assert "accumulation_steps=" not in line


def test_a_gpu_that_can_tell_nothing_leaves_the_report_whole() -> None:
    if torch.cuda.is_available():
        pytest.skip("this device can tell")
    line = report(torch.OutOfMemoryError(OF_CUDA), device=CUDA)
    assert line.startswith(
        "memory of cuda:0 ran out (OutOfMemoryError, tried to allocate 20.50 MiB); micro batch 32 ="
    )


@pytest.mark.parametrize(
    ("global_batch", "accumulation", "lanes"),
    [(256, 1, 16), (256, 2, 16), (768, 2, 64), (96, 1, 32), (1000, 1, 8), (64, 1, 64), (16, 16, 1)],
)
def test_the_next_accumulation_is_the_first_that_a_config_accepts(
    global_batch: int, accumulation: int, lanes: int
) -> None:
    """Row 23: as the check of a config sees it, the lanes times the micro steps divide the global batch."""
    legal = [a for a in range(1, global_batch + 1) if global_batch % (lanes * a) == 0 and a > accumulation]
    assert next_accumulation(global_batch, accumulation, lanes) == (legal[0] if legal else None)


def test_the_breakdown_of_a_gpu_tells_ours_from_what_others_use() -> None:
    """Row 23."""
    gib = 2**30
    stats = {
        "allocated_bytes.all.peak": 70 * gib,
        "reserved_bytes.all.peak": 75 * gib,
        "reserved_bytes.all.current": 74 * gib,
        "num_alloc_retries": 2,
    }
    assert describe_cuda(stats, free=1 * gib, total=80 * gib) == (
        "peak 70.0 GiB allocated and 75.0 GiB reserved of 80.0 GiB, 5.0 GiB used outside torch's allocator, "
        "2 allocation retries"
    )


def test_the_breakdown_of_the_host_is_read_from_proc(tmp_path: Path) -> None:
    """Row 23."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("Name:\tx\nVmHWM:\t 3145728 kB\nVmRSS:\t    2048 kB\n")
    (tmp_path / "meminfo").write_text("MemTotal:       9 kB\nMemAvailable:    512 kB\n")
    assert host_memory(tmp_path) == "process 2.0 MiB, its peak 3.0 GiB, available 512.0 KiB"
    assert host_memory(tmp_path / "absent") == ""
    assert "process" in host_memory()
