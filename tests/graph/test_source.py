"""What nodes are called in the terms of a user's model."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from npu_compiler.graph.source import input_name, operator_name


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.names, self.more = nn.LayerNorm(4), torch.ones(4), [torch.ones(4)]
        self.register_buffer("kept", torch.ones(4))

    def forward(inner, x: Tensor) -> Tensor:
        return inner.norm(x) * inner.names + inner.more[0] + inner.kept


def names(called: Any, *args: Any, **kwargs: Any) -> set[str]:
    found: set[str] = set()

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.update(map(input_name, gm.graph.find_nodes(op="placeholder")))
        return gm

    torch._dynamo.reset()
    torch.compile(called, backend=backend, fullgraph=True)(*args, **kwargs)
    return found


def test_inputs_have_the_names_of_the_model_whatever_holds_it() -> None:
    model, x = Inner(), torch.rand(2, 4)
    own = {"norm.weight", "norm.bias", "names", "more[0]", "kept"}
    assert names(model, x) == {*own, "x"}
    assert names(lambda given: model(given["x"]), {"x": x}) == {*own, "given['x']"}
    assert names(nn.Sequential(model), x) == {*(f"0.{name}" for name in own), "args[0]"}
    torch._dynamo.mark_dynamic(x, 0)
    assert any(name.startswith("s") and name[1:].isdecimal() for name in names(lambda x: x + x.shape[0], x))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.ops.aten.add.Tensor, "aten.add.Tensor"),
        (operator.getitem, "operator.getitem"),
        (math.floor, "math.floor"),
        ("arg0_1", "arg0_1"),
        (torch.ops.higher_order.cond, "higher_order.cond"),
    ],
)
def test_operators_have_the_names_that_programs_print(target: Any, name: str) -> None:
    assert operator_name(target) == name
