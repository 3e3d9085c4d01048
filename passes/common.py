"""Merges equal calls with equal arguments.

Before::

    a = aten.cos.default(x)
    b = aten.cos.default(x)
    c = aten.add.Tensor(a, b)

After::

    a = aten.cos.default(x)
    c = aten.add.Tensor(a, a)

Never merged: random draws, uninitialised tensors, anything with an effect. A call before a write to what it reads is
not the same as one after it, and two results that the caller gets stay two tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from torch import SymBool, SymFloat, SymInt, Tensor, fx

from npu_compiler.graph.effects import is_pure, may_write, storage, tensors
from npu_compiler.graph.merged import Merged
from npu_compiler.graph.source import operator_name
from npu_compiler.passes.record import PassRecord

NAME = "common"
_INCOMPARABLE = (Tensor, SymInt, SymFloat, SymBool)


def run(module: fx.GraphModule, record: PassRecord) -> None:
    graph = module.graph
    memory = _Memory(graph)
    seen: dict[Hashable, tuple[fx.Node, Hashable]] = {}
    for node in list(graph.nodes):
        memory.note_writes(node)
        if not is_pure(node):
            continue
        key = _key(node)
        if key is None:
            continue
        state = memory.state(node.all_input_nodes)
        first, before = seen.setdefault(key, (node, state))
        if first is node:
            continue
        if before != state:
            record.refuse(NAME, node, f"what it reads is written between it and the equal call {first.name}")
            seen[key] = (node, state)
        elif memory.both_returned(first, node):
            record.refuse(NAME, node, f"the caller gets it and the equal {first.name} as separate tensors")
        else:
            record.fire(f"{NAME}: {operator_name(node.target)}", node, [node])
            memory.merge(first, node)
            node.replace_all_uses_with(first)
            graph.erase_node(node)


class _Memory:
    """The memory of a program whose equal calls are being merged: how often it was written, what the caller gets."""

    def __init__(self, graph: fx.Graph) -> None:
        self._returned = set(graph.output_node().all_input_nodes)
        self._handed_out = {storage(tensor) for node in self._returned for tensor in tensors(node)}
        self._merged = Merged()
        self._writes: dict[int, int] = {}

    def note_writes(self, node: fx.Node) -> None:
        for key in may_write(node):
            now = self._merged.now(key)
            self._writes[now] = self._writes.get(now, 0) + 1

    def state(self, nodes: Iterable[fx.Node]) -> Hashable:
        """Changes when a value among `nodes` is written."""
        if not self._writes:
            return frozenset()
        keys = {key for node in nodes for key in self._merged.of(node)}
        return frozenset((key, self._writes[key]) for key in keys if key in self._writes)

    def both_returned(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether the caller gets two results, or views of two, that one merged call could not give apart."""
        ours, theirs = self._merged.of(one), self._merged.of(other)
        if ours == theirs:  # two views of one tensor
            return one in self._returned and other in self._returned
        return not self._handed_out.isdisjoint(ours) and not self._handed_out.isdisjoint(theirs)

    def merge(self, first: fx.Node, node: fx.Node) -> None:
        """`first` takes the place of `node`."""
        if node in self._returned:
            self._returned.add(first)
        for ours, theirs in zip(self._merged.of(first), self._merged.of(node), strict=True):
            if ours != theirs:
                self._merged.merge(theirs, ours)
                if theirs in self._handed_out:
                    self._handed_out.add(ours)


def _key(node: fx.Node) -> Hashable | None:
    """What makes two calls equal, or None where an argument can't be compared."""
    try:
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(item: Any) -> Hashable:
    """An argument as a key: 1, 1.0 and True are three, and so are 0.0 and -0.0.

    Raises:
        TypeError: it can't be compared.
    """
    if isinstance(item, (list, tuple)):
        return tuple(map(_frozen, item))
    if isinstance(item, dict):
        return tuple(sorted((name, _frozen(value)) for name, value in item.items()))
    if isinstance(item, slice):
        return slice, _frozen((item.start, item.stop, item.step))
    if isinstance(item, _INCOMPARABLE):
        raise TypeError(f"{type(item)} has no value yet")
    return type(item), repr(item) if isinstance(item, (float, complex)) else item
