"""Merges equal calls with equal arguments.

Before::

    a = aten.cos.default(x)
    b = aten.cos.default(x)
    c = aten.add.Tensor(a, b)

After::

    a = aten.cos.default(x)
    c = aten.add.Tensor(a, a)

Never merged: random draws, uninitialised tensors, anything with an effect, and calls whose results the caller gets as
separate tensors. A call before a write is not the same as one after it.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import fx
from torch._inductor.pattern_matcher import compute_mutation_region_ids
from torch.utils._pytree import tree_flatten

from npu_compiler.graph.effects import is_pure, storage, tensors
from npu_compiler.passes.record import PassRecord

NAME = "common"


def run(module: fx.GraphModule, record: PassRecord) -> None:
    graph = module.graph
    compute_mutation_region_ids(graph)
    kept_apart = _output_storages(graph)
    seen: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes):
        if not is_pure(node) or any(storage(tensor) in kept_apart for tensor in tensors(node)):
            continue
        key = _key(node)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is not node:
            record.fire(f"{NAME}: {node.target}", node, [node])
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _output_storages(graph: fx.Graph) -> set[int]:
    return {storage(tensor) for node in graph.output_node().all_input_nodes for tensor in tensors(node)}


def _key(node: fx.Node) -> Hashable | None:
    """What makes two calls equal, or None where an argument can't be compared. 1, 1.0 and True are told apart."""
    leaves, spec = tree_flatten((node.args, node.kwargs))
    if any(isinstance(leaf, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in leaves):
        return None
    typed = tuple((type(leaf), leaf) for leaf in leaves)
    key = (node.target, typed, str(spec), node.meta.get("mutation_region_id"))
    try:
        hash(key)
    except TypeError:
        return None
    return key
