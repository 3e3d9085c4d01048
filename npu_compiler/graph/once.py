"""The part of a program that is computed once: split off, run at the first call, its values kept.

Which calls these are, passes/constant_folding.py decides. The values become inputs of the rest, with lasting addresses:
a captured graph reads them where they lie. Where they come from frozen weights, every call compares the weights with
those of the last time, and computes the values anew, into the same memory, where one was written or replaced.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from npu_compiler.graph import running
from npu_compiler.graph.traffic import Amount, size_in_bytes

ONCE = "npu_once"
"""Metadata of a call whose value is to be computed once."""
LASTING = "npu_lasting"
"""Metadata of an input that lies at the same address at every call: a parameter, say."""
FROZEN = "npu_frozen"
"""Metadata of an input that counts as a constant."""


def is_lasting(node: object) -> bool:
    """Whether a value is an input that lies at the same address at every call."""
    return isinstance(node, fx.Node) and node.op == "placeholder" and bool(node.meta.get(LASTING))


def note_lasting(graph: fx.Graph, stable: Sequence[int]) -> None:
    """Marks the inputs at the positions `stable` (lowering.functional.Functional)."""
    placeholders = graph.find_nodes(op="placeholder")
    for position in stable:
        placeholders[position].meta[LASTING] = True


def freeze(graph: fx.Graph, stable: Sequence[int]) -> None:
    """Marks the inputs with lasting addresses (parameters, buffers, marked tensors) as constants."""
    placeholders = graph.find_nodes(op="placeholder")
    for position in stable:
        placeholders[position].meta[FROZEN] = True


@dataclass(frozen=True)
class Split:
    """A program in two parts.

    Attributes:
        first: computes the values, from the inputs at the positions `sources`.
        values: the inputs that the program now has behind its own, one a value.
    """

    first: fx.GraphModule
    sources: tuple[int, ...]
    values: tuple[fx.Node, ...]

    @property
    def size(self) -> Amount:
        """Bytes of the values."""
        return sum((size_in_bytes(node.meta["val"]) for node in self.values), 0)


def split(program: fx.GraphModule) -> Split | None:
    """Takes the marked calls, and what only they need, out of `program`; None if there are none."""
    graph = program.graph
    marked = [node for node in graph.nodes if node.meta.get(ONCE)]
    if not marked:
        return None
    needed = _needed(marked)
    sources = [position for position, node in enumerate(graph.find_nodes(op="placeholder")) if node in needed]
    first = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed:
            copies[node] = first.node_copy(node, copies.__getitem__)
    first.output(tuple(copies[node] for node in marked))
    made = fx.GraphModule(program, first)  # before the program changes: it copies the constants that `first` names
    values = tuple(_as_input(graph, node) for node in marked)
    for node in sorted(needed, reverse=True):
        if node.op != "placeholder" and not node.users:
            graph.erase_node(node)
    program.recompile()
    return Split(made, tuple(sources), values)


def _needed(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _as_input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A new last input with the value of `node`, which takes its place."""
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1] if _has_inputs(graph) else graph._root):
        value = graph.placeholder(f"{node.name}_once")
    value.meta.update({key: item for key, item in node.meta.items() if key != ONCE})
    node.replace_all_uses_with(value)
    return value


def _has_inputs(graph: fx.Graph) -> bool:
    return bool(graph.find_nodes(op="placeholder"))


class Once:
    """The values of a Split, for the program's arguments.

    Attributes:
        runs: how often the values were computed.
    """

    def __init__(self, part: Split) -> None:
        self.runs = 0
        self._compute: Callable[..., tuple[Tensor, ...]] = running.caller(part.first)
        self._sources = part.sources
        self._on_device = any(node.meta["val"].device.type != "cpu" for node in part.values)
        self._values: tuple[Tensor, ...] | None = None
        self._state: list[tuple[Any, ...]] = []
        self._lock = threading.Lock()

    def __call__(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        values = self._values
        if values is not None and all(map(_unchanged, self._state, (args[position] for position in self._sources))):
            return values
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return self._anew([args[position] for position in self._sources])

    def _anew(self, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
        state = [_state(source) for source in sources]
        values = self._compute(*sources)
        if self._on_device and torch.npu.is_current_stream_capturing():
            return values  # nothing has run yet: these belong to the caller's graph, which computes them itself
        self.runs += 1
        if self._values is not None:
            for kept, value in zip(self._values, values, strict=True):
                kept.copy_(value)
            values = self._values
        for device in {value.device for value in values if value.device.type != "cpu"}:
            torch.accelerator.current_stream(device).synchronize()  # the next call may come on another stream
        self._values, self._state = values, state
        return values


def _state(source: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor is written or replaced."""
    return weakref.ref(source), source.data_ptr(), None if source.is_inference() else source._version


def _unchanged(state: tuple[Any, ...], source: Tensor) -> bool:
    """Whether a tensor is the one of that state, unwritten. A tensor made in inference mode counts no writes."""
    reference, address, version = state
    return version is not None and reference() is source and source.data_ptr() == address and source._version == version
