"""Counting what a layer of experts drops, on the device: a replay counts what it drops, and no step waits for it.

A program's counters are bound to memory of their own (`DropCounts`), which lives as long as the program is kept.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from npu_compiler.fusion_kernels.expert_capacity import FINE
from npu_compiler.graph.source import place, where

OPERATOR = "all_to_all_dispatch"


@dataclass(frozen=True)
class Dropped:
    """What a layer of experts dropped so far.

    Attributes:
        layer: module path, or the source line. `routed`: rows that had an expert, padding not counted.
        dropped: how many of them went nowhere.
        needed: the capacity factor at which nothing would have been dropped.
    """

    layer: str
    routed: int
    dropped: int
    needed: float

    @property
    def ratio(self) -> float:
        """`dropped` as a part of `routed`."""
        return self.dropped / self.routed if self.routed else 0.0

    def __str__(self) -> str:
        return (
            f"{self.layer}: {self.dropped} of {self.routed} rows dropped ({self.ratio:.2%}); "
            f"none from capacity_factor {self.needed:.4g}"
        )


class Counter:
    """Of one layer. `memory`: int64 [3]: routed, dropped, needed factor in parts of FINE. `real`: int64 [1], how many
    rows of all ranks are no padding; None: all."""

    def __init__(self, memory: Tensor, real: Tensor | None) -> None:
        self._sums, self._largest, self.real = memory[:2], memory[2:], real

    def add(self, sent: Tensor, room: int, rows: int) -> None:
        """Counts one call; runs while it is made, or captured.

        Args:
            sent: [sources, ranks], rows of each source for each rank. `room`: for so many of them. `rows`: of a source.
        """
        dropped = (sent - room).clamp(min=0).sum()
        self._sums.add_(torch.stack([sent.sum(), dropped]))
        needed = (sent.max() * (sent.shape[1] * FINE) + (rows - 1)).div(max(rows, 1), rounding_mode="floor")
        self._largest.copy_(torch.maximum(self._largest, needed))


class DropCounts:
    """The counters of one compiled program. Whoever keeps the program keeps this.

    Args:
        graph: the program, in which each dispatch is given a counter.
        batch: int64 on the device, written before each call by who knows: how many rows are no padding comes first.
    """

    def __init__(self, graph: fx.Graph, batch: Tensor | None = None) -> None:
        nodes, number = dispatches(graph), next(_numbers)
        self._layers = [place(node).module or where(node) for node in nodes]
        with lasting():
            self.memory = torch.zeros(len(nodes), 3, dtype=torch.int64, device=nodes[0].args[0].meta["val"].device)
            real = None if batch is None else batch[:1]
            self._counters = [Counter(row, real) for row in self.memory.unbind()]
        for position, (node, counter) in enumerate(zip(nodes, self._counters, strict=True)):
            name = f"dropped_{number}_{position}"
            _counters[name] = counter
            node.args = (*node.args[:-1], name)

    def read(self) -> list[Dropped]:
        """By layer, in order. Waits for the device."""
        return self.of(self.memory.tolist())

    def of(self, values: list[list[int]]) -> list[Dropped]:
        """What the memory's values say."""
        return [
            Dropped(layer, routed, dropped, needed / FINE)
            for layer, (routed, dropped, needed) in zip(self._layers, values, strict=True)
        ]

    def clear(self) -> None:
        """Starts counting again."""
        self.memory.zero_()


_counters: weakref.WeakValueDictionary[str, Counter] = weakref.WeakValueDictionary()
"""Of the programs that are alive, by what each program calls its own."""
_numbers = itertools.count()


def find(name: str) -> Counter | None:
    """The counter of that name, while its program is kept."""
    return _counters.get(name)


def dispatches(graph: fx.Graph) -> list[fx.Node]:
    """The calls of a program that may drop something, in order."""
    packet = getattr(torch.ops.npu_fused, OPERATOR, None)
    return graph.find_nodes(op="call_function", target=packet.default) if packet is not None else []


@contextlib.contextmanager
def lasting() -> Iterator[Any]:
    """Tensors made in it are real ones that may be written in any mode, whoever compiles or calls just now."""
    with unset_fake_temporarily(), torch.inference_mode(False):
        yield
