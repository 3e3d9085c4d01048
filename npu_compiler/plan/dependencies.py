"""Which launches of a program have to stay behind which: true for every shape and every choice of streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from npu_compiler.graph.effects import storage, tensors
from npu_compiler.graph.traffic import launches
from npu_compiler.plan.accesses import HIDDEN, Accesses, accesses, is_pinned


@dataclass(frozen=True)
class Dependencies:
    """The launches of a program, by index in program order.

    Attributes:
        calls: the nodes. `position`: of each in the whole program.
        before: the calls that each one has to be behind, latest first: those that wrote what it touches, and those that
            read what it writes.
        pinned: calls that must stay on the main stream.
        touches: for each call, the buffers made inside the program that it reads or writes.
        holders: for each such buffer, the nodes of the program whose values lie in it.
    """

    graph: fx.Graph
    calls: tuple[fx.Node, ...]
    position: tuple[int, ...]
    before: tuple[tuple[int, ...], ...]
    pinned: frozenset[int]
    touches: tuple[frozenset[int], ...]
    holders: Mapping[int, tuple[fx.Node, ...]]

    @classmethod
    def of(cls, graph: fx.Graph) -> Dependencies:
        """Reads them off a program whose recorded aliases are true (graph/spec.py)."""
        placed = [(index, node) for index, node in enumerate(graph.nodes) if launches(node)]
        calls = [node for _, node in placed]
        touched = [accesses(node) for node in calls]
        holders = _holders(graph)
        return cls(
            graph,
            tuple(calls),
            tuple(index for index, _ in placed),
            _before(touched),
            frozenset(index for index, node in enumerate(calls) if is_pinned(node)),
            tuple(frozenset((entry.reads | entry.writes) & holders.keys()) for entry in touched),
            holders,
        )


@dataclass
class _History:
    """The accesses of one buffer that a later one has to be behind."""

    write: list[int] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)


def _before(touched: list[Accesses]) -> tuple[tuple[int, ...], ...]:
    histories: dict[int, _History] = {}
    found = []
    for index, entry in enumerate(touched):
        before: set[int] = set()
        for buffer in entry.reads | entry.writes:
            history = histories.setdefault(buffer, _History())
            before.update(history.write)
            if buffer in entry.writes:
                before.update(history.reads)
                histories[buffer] = _History([index])
            else:
                history.reads.append(index)
        found.append(tuple(sorted(before, reverse=True)))
    return tuple(found)


def _holders(graph: fx.Graph) -> dict[int, tuple[fx.Node, ...]]:
    """The values in each buffer that the program makes and does not return."""
    kept = [*graph.find_nodes(op="placeholder"), *graph.find_nodes(op="get_attr"), *graph.output_node().all_input_nodes]
    outside = {storage(tensor) for node in kept for tensor in tensors(node)} | HIDDEN
    found: dict[int, dict[fx.Node, None]] = {}
    for node in graph.nodes:
        for tensor in tensors(node):
            if storage(tensor) not in outside:
                found.setdefault(storage(tensor), {})[node] = None
    return {buffer: tuple(nodes) for buffer, nodes in found.items()}
