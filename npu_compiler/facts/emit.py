"""Size expressions as programs: as nodes of an FX graph, and as Python functions of the symbols.

Both walk the sympy expression with torch's interpreter for such expressions; nothing is evaluated from text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import sympy
import torch
from torch import fx
from torch.utils._sympy.interp import _run_sympy_handler
from torch.utils._sympy.reference import OptimizedPythonReferenceAnalysis


class SizeNodes:
    """Emits size expressions into a graph, each subexpression once.

    Args:
        graph: new nodes go to its insertion point.
        symbols: the nodes that hold the symbols' values (size placeholders).
    """

    def __init__(self, graph: fx.Graph, symbols: Mapping[sympy.Symbol, fx.Node]) -> None:
        tracer = fx.proxy.GraphAppendingTracer(graph)
        self._made: dict[sympy.Expr, fx.Proxy] = {symbol: fx.Proxy(node, tracer) for symbol, node in symbols.items()}

    @classmethod
    def of(cls, graph: fx.Graph) -> SizeNodes:
        """With the size placeholders of a lowered graph as symbols."""
        values = {node: node.meta.get("val") for node in graph.find_nodes(op="placeholder")}
        return cls(
            graph,
            {
                value.node.expr: node
                for node, value in values.items()
                if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol
            },
        )

    def emit(self, expression: sympy.Expr) -> fx.Node | int:
        """The node that computes `expression`; an int where it is a number.

        Raises:
            KeyError: a symbol of the expression has no node.
        """
        value = self._emit(sympy.sympify(expression))
        return value.node if isinstance(value, fx.Proxy) else value

    def _emit(self, expression: sympy.Expr) -> fx.Proxy | int:
        if expression.is_Integer:
            return int(expression)
        if expression not in self._made:
            if expression.is_Symbol:
                raise KeyError(f"size {expression} is no input of the graph")
            arguments = [self._emit(part) for part in expression.args]
            self._made[expression] = _run_sympy_handler(OptimizedPythonReferenceAnalysis, arguments, expression)
        return self._made[expression]


@functools.lru_cache(maxsize=4096)
def function(expression: sympy.Expr, symbols: Sequence[sympy.Symbol]) -> Callable[..., int]:
    """`expression` as a function of the values of `symbols` (a tuple), in that order."""
    graph = fx.Graph()
    nodes = {symbol: graph.placeholder(f"size_{index}") for index, symbol in enumerate(symbols)}
    graph.output(SizeNodes(graph, nodes).emit(expression))
    return fx.GraphModule(torch.nn.Module(), graph).forward


def evaluate(expression: sympy.Expr, sizes: Mapping[sympy.Symbol, int]) -> int:
    """The value of `expression` where the symbols have the given sizes."""
    symbols = tuple(sorted(expression.free_symbols, key=str))
    return int(function(expression, symbols)(*(sizes[symbol] for symbol in symbols)))
