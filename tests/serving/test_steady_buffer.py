"""Inputs that most steps leave as they are: the device has what the host has, and is given it once."""

from __future__ import annotations

import pytest
import torch
import torch_npu  # noqa: F401  # the device

from npu_compiler.runtime import counters
from npu_compiler.serving.steady_buffer import SteadyBuffer


@pytest.fixture
def buffer() -> SteadyBuffer:
    made = SteadyBuffer(8, dtype=torch.int32, device=torch.device("npu"))
    torch.npu.synchronize()
    return made


def tasks(buffer: SteadyBuffer, n: int | None = None) -> int:
    """How many tasks the device is given by a copy of the first `n` elements; they are right afterwards."""
    before = counters.read()
    given = buffer.copy_to_gpu(n)
    count = counters.difference(before)["tasks"]
    assert torch.equal(given.cpu(), buffer.cpu[:n])
    return count


def test_what_stays_is_copied_once(buffer: SteadyBuffer) -> None:
    assert tasks(buffer) == 0  # zeros, as on the device
    buffer.np[:4] = [1, 2, 3, 4]
    assert (tasks(buffer, 4), tasks(buffer, 4), tasks(buffer)) == (1, 0, 0)
    buffer.np[:4] = [1, 2, 3, 4]  # written again
    assert tasks(buffer, 4) == 0


def test_what_changes_is_copied(buffer: SteadyBuffer) -> None:
    buffer.np[:] = range(8)
    assert tasks(buffer, 3) == 1
    assert tasks(buffer) == 1  # five elements are new to the device
    buffer.np[6] = 77
    assert tasks(buffer, 6) == 0  # it lies behind them
    assert buffer.gpu.tolist() == list(range(8))
    assert (tasks(buffer, 7), tasks(buffer)) == (1, 0)
    assert buffer.gpu.tolist() == [0, 1, 2, 3, 4, 5, 77, 7]
