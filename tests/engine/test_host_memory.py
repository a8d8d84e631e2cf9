"""Memory of copies that nobody holds any more is used again, and only that."""

from __future__ import annotations

import pytest
import torch
from small_module import ACCUMULATION, knobs, patches, small_module
from small_run import tally

from pretrain.engine.host_memory import HostMemory
from pretrain.engine.local import LocalEngine
from pretrain.optim import OptimConfig


def test_a_copy_that_is_held_keeps_its_values() -> None:
    host, value = HostMemory(), torch.arange(6.0).reshape(2, 3)
    first = host.copy("a", value)
    value.mul_(2.0)
    second = host.copy("a", value)
    value.mul_(2.0)
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert second.tolist() == [[0, 2, 4], [6, 8, 10]]
    assert host.num_bytes == 2 * 24


def test_memory_is_taken_again_once_the_copy_is_gone() -> None:
    host = HostMemory()
    first = host.copy("a", torch.ones(4))
    place = first.data_ptr()
    other = host.copy("b", torch.ones(4))
    del first
    again = host.copy("a", torch.full((4,), 2.0))
    assert again.data_ptr() == place != other.data_ptr()
    assert again.tolist() == [2.0] * 4
    assert other.tolist() == [1.0] * 4
    assert host.num_bytes == 2 * 16


def test_a_value_of_another_shape_or_type_gets_memory_of_its_own() -> None:
    host = HostMemory()
    for value in (torch.ones(4), torch.ones(2, 2), torch.ones(4, dtype=torch.int64), torch.tensor(3)):
        copy = host.copy("a", value)
        assert copy.dtype == value.dtype
        assert torch.equal(copy, value)
        del copy
    assert host.num_bytes == 8  # of the last one; nothing is kept for shapes that are gone


def test_a_copy_of_a_transposed_parameter_is_contiguous_and_apart() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    copy = HostMemory().copy("a", parameter.T)
    assert copy.is_contiguous()
    assert not copy.requires_grad
    assert torch.equal(copy, parameter.T)
    with torch.no_grad():
        parameter.zero_()
    assert copy.any()


def test_checkpoint_after_checkpoint_needs_the_memory_of_one() -> None:
    """And of two while one is still being written."""
    engine, host = LocalEngine(small_module(), OptimConfig(), ACCUMULATION, "fp32"), HostMemory()
    held = {}
    for step in range(4):
        engine.train_step(patches(step), knobs(step), tally).read()
        held = {**engine.weights(host), **engine.optimizer_state(host).tensors}
        fresh = {**engine.weights(), **engine.optimizer_state().tensors}
        assert held.keys() == fresh.keys()
        assert all(torch.equal(held[name], value) for name, value in fresh.items())
        if step == 0:
            num_bytes = host.num_bytes
            held = {}
        if step == 1:
            assert host.num_bytes == num_bytes
    assert num_bytes == sum(value.nbytes for value in held.values())
    assert host.num_bytes == 2 * num_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_from_a_gpu_are_complete_and_pinned() -> None:
    host, value = HostMemory(), torch.randn(1 << 20, device="cuda")
    copy = host.copy("a", value)
    expected = value.cpu()
    value.zero_()
    assert copy.is_pinned()
    assert torch.equal(copy, expected)
