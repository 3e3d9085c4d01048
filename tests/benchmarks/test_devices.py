"""What the rows share about the machine."""

from __future__ import annotations

import math

import pytest

from benchmarks import devices
from benchmarks.harness import Missing


def test_memory_is_read_whole_by_every_way_of_reading() -> None:
    """A way that reads something else than was written gives no bandwidth, and that is Missing."""
    assert math.isfinite(devices.read_bandwidth(1 << 20, 2))


def test_without_memory_or_compiler_the_bandwidth_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Missing, match="MiB of memory to read"):
        devices.read_bandwidth(1 << 60, 1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Missing, match=r"no C\+\+ compiler 'no-such-compiler'"):
        devices.read_bandwidth(1 << 20, 1)
