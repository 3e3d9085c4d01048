"""What a served model drops (docs/token_drop.md), read by the way of device_reader.py. Rank 0 counts for all ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from npu_compiler.backend import DropCounts, Dropped
from npu_compiler.serving.device_reader import TimedCopies


class DropReader:
    """Reads the counters of an engine's compiled pieces.

    Args:
        layers: names that vLLM has for the model's layers of experts. Pieces know a layer by its path in the module
            that is compiled, which is a part of the model.

    Attributes:
        latest: by layer, in the model's order; as of the last copy that is done.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self._layers = layers
        self.latest: list[Dropped] = []
        self._copies = TimedCopies()
        self._asked: list[DropCounts] = []

    def ask(self, counters: Sequence[DropCounts]) -> None:
        """Has the counters copied, if it is time to and the last copy was taken."""
        if not self._copies.asked:
            self._asked = list(counters)
            self._copies.ask([entry.memory for entry in counters])

    def take(self) -> list[Dropped]:
        """The layers that have changed since the last time, if a copy is done. Waits for nothing."""
        copies = self._copies.take()
        if copies is None:
            return []
        found = self._by_layer(
            entry for counts, host in zip(self._asked, copies, strict=True) for entry in counts.of(host.tolist())
        )
        known = {entry.layer: entry for entry in self.latest}
        self.latest = found
        return [entry for entry in found if known.get(entry.layer) != entry]

    def wait(self, counters: Sequence[DropCounts]) -> None:
        """Brings `latest` up to date. Waits for the device."""
        self.latest = self._by_layer(entry for counts in counters for entry in counts.read())

    def _by_layer(self, entries: Iterable[Dropped]) -> list[Dropped]:
        return by_layer(dataclasses.replace(entry, layer=full_name(entry.layer, self._layers)) for entry in entries)


def full_name(path: str, layers: Sequence[str]) -> str:
    """The one of `layers` whose end is this path; the path where there is none."""
    return next((name for name in layers if name == path or name.endswith(f".{path}")), path)


def by_layer(entries: Iterable[Dropped]) -> list[Dropped]:
    """One entry a layer: a model may be compiled more than once, for ranges of sizes."""
    found: dict[str, Dropped] = {}
    for entry in entries:
        other = found.get(entry.layer, Dropped(entry.layer, 0, 0, 0.0))
        found[entry.layer] = Dropped(
            entry.layer, entry.routed + other.routed, entry.dropped + other.dropped, max(entry.needed, other.needed)
        )
    return list(found.values())
