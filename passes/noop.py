"""Removes calls that return their argument unchanged, and size assertions that were checked when the graph was traced.

Before::

    a = aten.clone.default(x)
    b = aten.view.default(a, [4, 8])     # a is already [4, 8]
    c = aten.add.Tensor(b, 1)

After::

    c = aten.add.Tensor(x, 1)

What counts as a no-op is Inductor's table (`remove_noop_ops`). No output comes to share memory with an input or another
output: `_keep_apart` clones what would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from npu_compiler.facts.sizes import same_layout
from npu_compiler.graph.build import call
from npu_compiler.graph.effects import storage, tensors
from npu_compiler.passes.record import PassRecord

NAME = "noop"


def run(module: fx.GraphModule, record: PassRecord) -> None:
    from torch._inductor.fx_passes.post_grad import remove_assert_ops, remove_noop_ops

    before = {node: _snapshot(node) for node in module.graph.nodes}
    memory = _output_memory(module.graph)
    remove_assert_ops(module.graph)
    remove_noop_ops(module.graph)
    _drop_empty_parts(module.graph)
    _keep_apart(module.graph, memory)
    left = set(module.graph.nodes)
    for node, text in before.items():
        if node not in left:
            record.fire(f"{NAME}: {text}", node, [node])


def _drop_empty_parts(graph: fx.Graph) -> None:
    """cat of a tensor with nothing is that tensor: vLLM's rotary embedding appends the unrotated part, often empty."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        parts = node.args[0]
        full = [part for part in parts if part.meta["val"].numel() != 0]
        if len(full) != 1 or not same_layout(node.meta["val"], full[0].meta["val"], "cat") or node in _returned(graph):
            continue
        node.replace_all_uses_with(full[0])
        graph.erase_node(node)


def _output_memory(graph: fx.Graph) -> list[set[int]]:
    return [{storage(tensor) for tensor in tensors(item)} for item in graph.output_node().args[0]]  # type: ignore[union-attr]


def _keep_apart(graph: fx.Graph, memory: list[set[int]]) -> None:
    """Clones an output that has come to share memory with an input or another output: where one operator that does
    nothing follows another one, Inductor looks at the first alone when it takes it out."""
    taken = {storage(tensor): set[int]() for node in graph.find_nodes(op="placeholder") for tensor in tensors(node)}
    returned: list[Any] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    for index, (was, now) in enumerate(zip(memory, _output_memory(graph), strict=True)):
        if any(found in taken and not was & (taken[found] | {found}) for found in now):
            node = returned[index]
            last = node if node.op != "placeholder" else graph.find_nodes(op="placeholder")[-1]
            with graph.inserting_after(last):
                returned[index] = call(graph, torch.ops.aten.clone.default, (node,), replaces=[node], made_by=NAME)
        else:
            for found in now:
                taken.setdefault(found, set()).update(was)
    graph.output_node().args = (tuple(returned),)


def _returned(graph: fx.Graph) -> list[fx.Node]:
    return graph.output_node().all_input_nodes


def _snapshot(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.name
