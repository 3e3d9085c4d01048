"""Size expressions as FX nodes and as functions."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Max, Mod

from npu_compiler.facts.emit import SizeNodes, evaluate, function

S, T = sympy.symbols("s t", integer=True, nonnegative=True)


def test_nodes_are_shared() -> None:
    graph = fx.Graph()
    symbols = {S: graph.placeholder("s"), T: graph.placeholder("t")}
    sizes = SizeNodes(graph, symbols)
    first = sizes.emit(FloorDiv(S + 7, 8) * 8)
    count = len(graph.nodes)
    second = sizes.emit(FloorDiv(S + 7, 8) + T)
    assert len(graph.nodes) == count + 1
    graph.output((first, second, sizes.emit(sympy.Integer(3))))
    assert fx.GraphModule(torch.nn.Module(), graph)(13, 5) == (16, 7, 3)


def test_missing_symbol_is_named() -> None:
    with pytest.raises(KeyError, match="size t is no input"):
        SizeNodes(fx.Graph(), {}).emit(T + 1)


def test_functions() -> None:
    expression = Max(S * T + 4, Mod(S, 8), 3)
    assert function(expression, (S, T))(13, 2) == 30
    assert evaluate(expression, {S: 5, T: 0}) == 5
    assert evaluate(sympy.Integer(12), {}) == 12
