"""A program as bytes, so that another process can go on where this one stopped.

torch's GraphPickler writes the calls. The fake values of the nodes are not written: read back, the program is run once
on the reader's fake inputs, which gives them anew, aliases and symbols included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._graph_pickler import GraphPickler, Options
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from npu_compiler.graph.once import ONCE

KEPT = frozenset({"stack_trace", "npu_origin", ONCE})
"""What is written of a node's metadata. Module paths are not among it: they hold live objects."""


def why_not(program: fx.GraphModule) -> str:
    """Why `program` can't be written; empty if it can."""
    for node in program.graph.nodes:
        if node.op == "get_attr":
            return f"it holds the constant {node.target}"
        if node.op in ("call_module", "call_method"):
            return f"it calls {node.target}, which is not an operator"
        if free_unbacked_symbols(node.meta.get("val")):
            return f"the size of {node.name} is found at run time"
    return ""


def dumps(program: fx.GraphModule) -> bytes:
    """The program as bytes; see `why_not` for what can't be written."""
    options = Options(ops_filter=None, node_metadata_key_filter=KEPT.__contains__)
    # A module of its own: what AOTAutograd leaves on the graph's module holds live objects.
    bare = fx.GraphModule(torch.nn.Module(), program.graph)
    try:
        return GraphPickler.dumps(bare, options)
    finally:
        program.graph.owning_module = program


def loads(data: bytes, inputs: Sequence[Any]) -> fx.GraphModule:
    """The program that `dumps` wrote.

    Args:
        inputs: the program's inputs as fake tensors and sizes, in placeholder order.

    Raises:
        AttributeError: an operator of the program is not there.
    """
    # The inputs' own mode, which need not be the one that torch's tracing context holds behind dynamo.
    mode = next((item.fake_mode for item in inputs if isinstance(item, FakeTensor)), None)
    mode = mode or FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    program = GraphPickler.loads(data, mode)
    assert isinstance(program, fx.GraphModule)
    program.recompile()
    with mode, torch.no_grad():
        _Values(program).run(*inputs)
    return program


class _Values(fx.Interpreter):
    """Puts the value of each node into its metadata."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]
