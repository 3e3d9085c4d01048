"""dead_code: what nobody reads goes, what has an effect stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx

from npu_compiler.passes import dead_code
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered
from tests.properties.programs import written_operators

DEAD = Pass(dead_code.NAME, "", dead_code.run)


@pytest.fixture(autouse=True, scope="module")
def operators() -> Iterator[None]:
    """Of the namespace npu_properties, which write their arguments."""
    with written_operators():
        yield


def first_alone(function: Callable[..., tuple[Tensor, ...]], *args: Tensor) -> fx.GraphModule:
    """The program of `function`, of whose results the first one is returned: AOTAutograd leaves nothing unread."""
    module = lowered(function, *args).graph
    output = module.graph.output_node()
    output.args = (output.args[0][:1],)
    module.recompile()
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_unused_chain_goes(dtype: torch.dtype) -> None:
    x = torch.randint(-8, 9, (4, 8)).to(dtype)
    module = first_alone(lambda x: (x + 1, (x * 2).neg()), x)
    record = apply(DEAD, module)
    assert calls(module) == ["aten.add.Tensor"]
    assert [fired.rule for fired in record.fired] == ["dead_code"] * 2
    assert torch.equal(module(x)[0], x + 1)


def test_random_draw_stays() -> None:
    """Dropping an unused random draw would shift the numbers every later one gives."""
    x = torch.rand(4)
    module = first_alone(lambda x: (x + 1, torch.rand(4).exp()), x)
    apply(DEAD, module)
    assert sorted(calls(module)) == ["aten.add.Tensor", "aten.rand.default"]


def test_writes_stay() -> None:
    """Of an input, and of a custom operator whose result nobody reads."""

    def writes(x: Tensor, y: Tensor) -> Tensor:
        torch.ops.npu_properties.accumulate(y, x)
        y.mul_(2)
        return y + 1

    x, y = torch.rand(4), torch.rand(4)
    program = lowered(writes, x, y)
    before = calls(program.graph)
    assert before.count("aten.copy_.default") == 2
    apply(DEAD, program.graph)
    assert calls(program.graph) == before


def test_one_of_several_results_is_enough() -> None:
    x = torch.rand(4, 8)
    program = lowered(lambda x: x.topk(2)[1], x)
    before = calls(program.graph)
    apply(DEAD, program.graph)
    assert calls(program.graph) == before
    assert torch.equal(program.graph(x)[0], x.topk(2)[1])
