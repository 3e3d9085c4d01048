"""Removes calls whose result nobody uses.

Before::

    unused = aten.mul.Tensor(x, 2)
    y = aten.add.Tensor(x, 1)
    return (y,)

After::

    y = aten.add.Tensor(x, 1)
    return (y,)

Calls with an effect (a write, a random number drawn, a print) stay.
"""

from __future__ import annotations

from torch import fx

from npu_compiler.passes.record import PassRecord

NAME = "dead_code"


def run(module: fx.GraphModule, record: PassRecord) -> None:
    """Walks backwards once, so that a chain of unused calls goes in one run."""
    for node in reversed(module.graph.nodes):
        if node.op in ("placeholder", "output") or node.users or node.is_impure():
            continue
        record.fire(NAME, node, [node])
        module.graph.erase_node(node)
