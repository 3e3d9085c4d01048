"""common: equal calls are merged, and what may not be merged is not."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_compiler.passes import common
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(common.NAME, "", common.run)


def test_equal_calls_are_merged() -> None:
    """Before: cos, cos, add. After: cos, add."""
    x = torch.rand(4)
    program = lowered(lambda x: x.cos() + x.cos(), x)
    assert calls(program.graph).count("aten.cos.default") == 2
    record = apply(PASS, program.graph)
    assert calls(program.graph) == ["aten.cos.default", "aten.add.Tensor"]
    assert len(record.fired) == 1
    torch.testing.assert_close(program.graph(x)[0], x.cos() * 2)


def test_different_arguments_are_not() -> None:
    program = lowered(lambda x: (x + 1) * (x + 1.5), torch.rand(4))
    apply(PASS, program.graph)
    assert calls(program.graph).count("aten.add.Tensor") == 2


def test_random_numbers_are_not() -> None:
    x = torch.rand(64)
    program = lowered(lambda x: torch.rand_like(x) - torch.rand_like(x), x)
    apply(PASS, program.graph)
    assert program.graph(x)[0].abs().max() > 0


def test_outputs_stay_separate_tensors() -> None:
    def twins(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.cos(), x.cos()

    x = torch.rand(4)
    program = lowered(twins, x)
    apply(PASS, program.graph)
    first, second = program.graph(x)
    first.fill_(9)
    torch.testing.assert_close(second, x.cos())


def test_uninitialised_tensors_stay_apart() -> None:
    program = lowered(lambda x: torch.empty_like(x).fill_(1) + torch.empty_like(x).fill_(2), torch.rand(4))
    apply(PASS, program.graph)
    assert program.graph(torch.rand(4))[0].eq(3).all()


def test_calls_before_and_after_a_write_differ() -> None:
    with torch.library._scoped_library("common_test", "DEF") as library:
        library.define("bump(Tensor(a!) x) -> ()")
        graph = torch.fx.Graph()
        library.impl("bump", lambda x: x.add_(1), "CompositeExplicitAutograd")
        library.impl("bump", lambda x: None, "Meta")
        mode = torch._subclasses.FakeTensorMode()
        x = graph.placeholder("x")
        first = graph.call_function(torch.ops.aten.cos.default, (x,))
        graph.call_function(torch.ops.common_test.bump.default, (x,))
        second = graph.call_function(torch.ops.aten.cos.default, (x,))
        total = graph.call_function(torch.ops.aten.sub.Tensor, (first, second))
        graph.output((total,))
        for node in (x, first, second, total):
            with mode:
                node.meta["val"] = torch.empty(4)
        module = torch.fx.GraphModule({}, graph)
        record = apply(PASS, module)
        assert not record.fired
