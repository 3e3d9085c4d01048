"""Memory that a program returns without having written it: vLLM makes what attention will write in the piece before."""

from __future__ import annotations

import torch
from torch import fx

from npu_compiler.graph.effects import value

aten = torch.ops.aten


def fill(module: fx.GraphModule) -> None:
    """Lets what is made as `empty` be zeros, so that runs of a program that returns it, or a view, can be compared."""
    changed = False
    for node in module.graph.find_nodes(op="call_function", target=aten.empty.memory_format):
        with module.graph.inserting_before(node):
            keep = {name: given for name, given in node.kwargs.items() if name != "memory_format"}
            zeros = module.graph.call_function(aten.zeros.default, node.args, keep)
        zeros.meta = dict(node.meta, val=value(node))
        node.replace_all_uses_with(zeros)
        module.graph.erase_node(node)
        changed = True
    if changed:
        module.recompile()
