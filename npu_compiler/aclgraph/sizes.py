"""Sizes of a program: which of them decide what is captured, and the numbers among its outputs.

A size that only numbers are computed from (a cache's count of tokens, say, which a model keeps in Python) changes with
every call. Were it part of the key, every call would be a capture; so it is not, and what is returned of it is computed
anew at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from npu_compiler.graph.effects import tensors, value


def deciding(graph: fx.Graph) -> set[int]:
    """Positions of the inputs that are sizes and that a tensor's layout or an operator depends on."""
    placeholders = graph.find_nodes(op="placeholder")
    if all(isinstance(node.meta.get("val"), torch.Tensor) for node in placeholders):
        return set()
    in_layouts: set[Any] = set()
    reached: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for tensor in tensors(node) if node.op != "output" else ():
            for size in (*tensor.shape, *tensor.stride(), tensor.storage_offset()):
                in_layouts |= _symbols(size)
        if node.op == "call_function" and (not _is_number(node) or any(user in reached for user in node.users)):
            reached.add(node)
    found = set()
    for position, node in enumerate(placeholders):
        number = node.meta.get("val")
        if isinstance(number, torch.Tensor):
            continue
        if not isinstance(number, torch.SymInt) or _symbols(number) & in_layouts or reached.intersection(node.users):
            found.add(position)
    return found


class NumberOutputs:
    """The outputs of a program that are computed from sizes that are not part of the key."""

    def __init__(self, graph: fx.Graph, key: set[int]) -> None:
        placeholders = graph.find_nodes(op="placeholder")
        free = {node for i, node in enumerate(placeholders) if _is_number(node) and i not in key}
        computed: set[fx.Node] = set()
        for node in graph.nodes if free else ():
            if node.op == "call_function" and any(item in free or item in computed for item in node.all_input_nodes):
                computed.add(node)
        returned = graph.output_node().args[0]
        assert isinstance(returned, (list, tuple))
        wanted = {index: node for index, node in enumerate(returned) if node in computed}
        self._positions = list(wanted)
        self._compute = _arithmetic(graph, list(wanted.values())) if wanted else None

    def fill(self, outputs: list[Any], args: Sequence[Any]) -> list[Any]:
        """Replaces these numbers in `outputs`, which a captured graph gave, by those that `args` make; returns it."""
        if self._compute is not None:
            for position, number in zip(self._positions, self._compute(*args), strict=True):
                outputs[position] = number
        return outputs


def _is_number(node: fx.Node) -> bool:
    return isinstance(value(node), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)) and not any(
        isinstance(value(argument), torch.Tensor) for argument in node.all_input_nodes
    )


def _arithmetic(graph: fx.Graph, wanted: Sequence[fx.Node]) -> fx.GraphModule:
    """The part of the program that computes the wanted numbers, with the program's own arguments."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    needed: set[fx.Node] = set()
    pending = list(wanted)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    for node in graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in wanted))
    return fx.GraphModule({}, part)


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()
