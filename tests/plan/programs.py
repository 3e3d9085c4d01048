"""Programs for the tests of plans, built call by call on fake tensors; random ones drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from npu_compiler.graph.build import call

aten = torch.ops.aten
SIDE = 8


class Program:
    """A graph under construction; every value is a square matrix, so every operator takes every value."""

    def __init__(self, inputs: int = 2, side: int = SIDE) -> None:
        self.graph, self._side = fx.Graph(), side
        self._mode = FakeTensorMode()
        self.values = [self._input(index) for index in range(inputs)]

    def _input(self, index: int) -> fx.Node:
        node = self.graph.placeholder(f"x{index}")
        with self._mode:
            node.meta["val"] = torch.empty(self._side, self._side)
        return node

    def add(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        node = call(self.graph, target, args, replaces=[], made_by="test")
        self.values.append(node)
        return node

    def done(self, outputs: Sequence[fx.Node]) -> fx.GraphModule:
        self.graph.output(tuple(outputs))
        return fx.GraphModule({}, self.graph)


UNARY = (aten.relu.default, aten.sin.default, aten.neg.default)
BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.mm.default)
IN_PLACE = (aten.add_.Tensor, aten.mul_.Tensor)
VIEWS = (aten.t.default, aten.alias.default)


@st.composite
def programs(draw: st.DrawFn, largest: int = 14) -> fx.GraphModule:
    """Calls that compute, write in place and look at memory in another way, in any order."""
    program = Program()
    for _ in range(draw(st.integers(2, largest))):
        values = st.sampled_from(program.values)
        kind = draw(st.sampled_from((UNARY, BINARY, BINARY, IN_PLACE, VIEWS)))
        target = draw(st.sampled_from(kind))
        program.add(target, *(draw(values) for _ in range(1 if kind in (UNARY, VIEWS) else 2)))
    calls = [node for node in program.values if node.op == "call_function"]
    return program.done(draw(st.lists(st.sampled_from(calls), min_size=1, max_size=3, unique=True)))


def two_branches(length: int = 4, side: int = SIDE) -> fx.GraphModule:
    """Two chains that share an input and meet at the end."""
    program = Program(inputs=1, side=side)
    left = right = program.values[0]
    for _ in range(length):
        left = program.add(aten.mm.default, left, program.values[0])
    for _ in range(length):
        right = program.add(aten.sin.default, right)
    return program.done([program.add(aten.add.Tensor, left, right)])
