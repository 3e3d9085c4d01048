"""Numbers that belong to a module, such as a norm's epsilon, as constants of the program.

With dynamic=True, Dynamo makes every Python float an input, a scalar in host memory. Rules match constants, and what
reads host memory can't be captured. A float argument of the user's function may change with every call, so it stays
an input; an attribute of a module hardly ever does. It gets a guard instead: the function is compiled again if it
changes.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState


def specialize_module_floats(dynamo: fx.GraphModule) -> None:
    """Returns if no input of `dynamo` is a float of a module.

    Raises:
        TensorifyScalarRestartAnalysis: torch's way to have Dynamo trace the function anew with such floats as
            constants (torch/fx/passes/_tensorify_python_scalars.py).
    """
    symbols = [symbol for node in dynamo.graph.find_nodes(op="placeholder") if (symbol := _module_float(node))]
    for symbol in symbols:
        TensorifyState.specialize(symbol)
    if symbols:
        raise TensorifyScalarRestartAnalysis


def _module_float(node: fx.Node) -> str:
    """The symbol of an input that is a float attribute of a module; empty for any other input."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    number = getattr(node.meta.get("example_value"), "item_memo", None)  # of a number that Dynamo passes as a tensor
    if source is None or not isinstance(number, torch.SymFloat):
        return ""
    guarded = source.guard_source
    if not (guarded.is_unspecialized_nn_module() or guarded.is_specialized_nn_module()):
        return ""
    # `_expr` is the symbol itself, also where it is known by now to have one value only.
    symbol = str(number.node._expr)
    return "" if TensorifyState.should_specialize(symbol) else symbol
