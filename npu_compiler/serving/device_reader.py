"""Reads counters from the device now and then, never waited for in a step.

After a step they are copied to host memory, in the device's order; a later step that finds the copy done takes them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch_npu import npu

INTERVAL = 1.0
"""Seconds between two copies."""


class HostCopies:
    """Copies of tensors on the device, one set at a time."""

    def __init__(self) -> None:
        self._host: list[Tensor] = []
        self._done: npu.Event | None = None

    @property
    def asked(self) -> bool:
        """Whether copies were asked for and not taken yet."""
        return self._done is not None

    def ask(self, memory: Sequence[Tensor]) -> None:
        """Has the values copied that the tensors have in the stream's order."""
        self._host = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in memory]
        for host, one in zip(self._host, memory, strict=True):
            host.copy_(one, non_blocking=True)
        self._done = npu.Event()
        self._done.record()

    def take(self, wait: bool = False) -> list[Tensor] | None:
        """The copies, in host memory; None where there are none, or where they are not done and `wait` is False."""
        if self._done is None:
            return None
        if wait:
            self._done.synchronize()
        elif not self._done.query():
            return None
        self._done = None
        return self._host


class TimedCopies(HostCopies):
    """The same, INTERVAL seconds apart at least."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def ask(self, memory: Sequence[Tensor]) -> None:
        """Has the values copied, if it is time to and the last copies were taken."""
        if memory and not self.asked and time.monotonic() >= self._next:
            self._next = time.monotonic() + INTERVAL
            super().ask(memory)
