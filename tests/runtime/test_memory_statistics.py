"""torch.npu's memory statistics and snapshots, and what the profiler says, on the unmodified torch_npu."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

MIB = 1 << 20


@pytest.fixture(autouse=True)
def device() -> None:
    """The statistics belong to the current device, and a process has none before it chose one."""
    torch.npu.set_device(0)
    torch.empty(1, device="npu")


def allocated() -> int:
    return int(torch.npu.memory_stats()["allocated_bytes.all.current"])


def test_statistics_follow_allocations() -> None:
    before = allocated()
    torch.npu.reset_peak_memory_stats()
    first = torch.empty(5 * MIB, dtype=torch.uint8, device="npu")
    assert 5 * MIB <= allocated() - before < 6 * MIB
    assert torch.npu.memory_allocated() == allocated() <= torch.npu.memory_reserved()
    second = torch.empty(9 * MIB, dtype=torch.uint8, device="npu")
    del first, second
    assert allocated() == before
    assert 14 * MIB <= torch.npu.max_memory_allocated() - before < 16 * MIB


def test_reserved_memory_is_the_devices() -> None:
    """What the allocator reserves is what the device loses, and emptying the cache gives it back."""
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()
    reserved = torch.npu.memory_reserved()
    held = torch.empty(100 * MIB, dtype=torch.uint8, device="npu")
    grown = torch.npu.memory_reserved() - reserved
    assert grown >= 100 * MIB
    assert torch.npu.mem_get_info() == (free - grown, total)
    del held
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info() == (free, total)


def test_snapshot_shows_live_blocks_and_history() -> None:
    torch.npu.memory._record_memory_history(stacks="python")
    try:
        held = torch.empty(3 * MIB, dtype=torch.uint8, device="npu")
        snapshot = torch.npu.memory._snapshot()
    finally:
        torch.npu.memory._record_memory_history(enabled=None)
    blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    [mine] = [block for block in blocks if block["address"] == held.data_ptr()]
    assert mine["state"] == "active_allocated" and mine["requested_size"] == 3 * MIB
    allocations = [e for trace in snapshot["device_traces"] for e in trace if e["action"] == "alloc"]
    [event] = [e for e in allocations if e["addr"] == held.data_ptr()]
    assert any(frame["filename"] == __file__ for frame in event["frames"])
    assert torch.npu.memory_summary().startswith("|===")


PROFILE = """
import torch, torch_npu
with torch_npu.profiler.profile() as profiler:
    torch.empty(8, device="npu").cpu()
print("went on")
"""


def test_profiler_says_what_is_missing(tmp_path: Path) -> None:
    """The host runtime has no aclprof: torch_npu reports the missing call, and the profiled program goes on."""
    command = [sys.executable, "-c", PROFILE]
    # It writes its folders into the current one.
    ended = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120, check=True)
    assert "went on" in ended.stdout
    assert "Failed to find function aclprofInit" in ended.stdout + ended.stderr
