"""Removes calls that return their argument unchanged, and size assertions that were checked when the graph was traced.

Before::

    a = aten.clone.default(x)
    b = aten.view.default(a, [4, 8])     # a is already [4, 8]
    c = aten.add.Tensor(b, 1)

After::

    c = aten.add.Tensor(x, 1)

What counts as a no-op is Inductor's table (`remove_noop_ops`); it introduces no new alias between inputs and outputs.
"""

from __future__ import annotations

import torch
from torch import fx

from npu_compiler.facts.sizes import same_layout
from npu_compiler.passes.record import PassRecord

NAME = "noop"


def run(module: fx.GraphModule, record: PassRecord) -> None:
    from torch._inductor.fx_passes.post_grad import remove_assert_ops, remove_noop_ops

    before = {node: _snapshot(node) for node in module.graph.nodes}
    remove_assert_ops(module.graph)
    remove_noop_ops(module.graph)
    _drop_empty_parts(module.graph)
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


def _returned(graph: fx.Graph) -> list[fx.Node]:
    return graph.output_node().all_input_nodes


def _snapshot(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.name
