"""What a served model drops (docs/token_drop.md): read from the device now and then, never waited for in a step.

After a step the counters are copied to host memory, in the device's order; a later step that finds the copy done takes
its values. Rank 0 counts for all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch_npu import npu

from npu_compiler.backend import DropCounts, Dropped

INTERVAL = 1.0
"""Seconds between two copies."""


class DropReader:
    """Reads the counters of an engine's compiled pieces.

    Attributes:
        latest: by layer, in the model's order; as of the last copy that is done.
    """

    def __init__(self) -> None:
        self.latest: list[Dropped] = []
        self._copies: list[tuple[DropCounts, Tensor]] = []
        self._done: npu.Event | None = None
        self._next = 0.0

    def ask(self, counters: Sequence[DropCounts]) -> None:
        """Has the counters copied, if it is time to and the last copy was taken."""
        if not counters or self._done is not None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + INTERVAL
        self._copies = []
        for entry in counters:
            host = torch.empty(entry.memory.shape, dtype=entry.memory.dtype, pin_memory=True)
            host.copy_(entry.memory, non_blocking=True)
            self._copies.append((entry, host))
        self._done = npu.Event()
        self._done.record()

    def take(self) -> list[Dropped]:
        """The layers that have changed since the last time, if a copy is done. Waits for nothing."""
        if self._done is None or not self._done.query():
            return []
        self._done = None
        found = by_layer(entry for counts, host in self._copies for entry in counts.of(host.tolist()))
        known = {entry.layer: entry for entry in self.latest}
        self.latest = found
        return [entry for entry in found if known.get(entry.layer) != entry]

    def wait(self, counters: Sequence[DropCounts]) -> None:
        """Brings `latest` up to date. Waits for the device."""
        self.latest = by_layer(entry for counts in counters for entry in counts.read())


def by_layer(entries: Iterable[Dropped]) -> list[Dropped]:
    """One entry a layer: a model may be compiled more than once, for ranges of sizes."""
    found: dict[str, Dropped] = {}
    for entry in entries:
        other = found.get(entry.layer, Dropped(entry.layer, 0, 0, 0.0))
        found[entry.layer] = Dropped(
            entry.layer, entry.routed + other.routed, entry.dropped + other.dropped, max(entry.needed, other.needed)
        )
    return list(found.values())
