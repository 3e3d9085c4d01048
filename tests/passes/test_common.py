"""common: equal calls are merged, and what may not be merged is not."""

from __future__ import annotations

import pytest
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


@pytest.mark.parametrize("one, other", [(0.0, -0.0), (1, True), (2, 2.0)])
def test_equal_numbers_may_be_different_arguments(one: float, other: float) -> None:
    """0.0 == -0.0, and they hash alike; but x * 0.0 and x * -0.0 differ in sign."""
    x = torch.ones(4)
    program = lowered(lambda x: torch.cat((1 / (x * one), 1 / (x * other))), x)
    before = calls(program.graph)
    record = apply(PASS, program.graph)
    assert calls(program.graph) == before
    assert not record.fired
    assert torch.equal(program.graph(x)[0], torch.cat((1 / (x * one), 1 / (x * other))))


def test_outputs_stay_separate_tensors() -> None:
    def twins(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.cos(), x.cos()

    x = torch.rand(4)
    program = lowered(twins, x)
    record = apply(PASS, program.graph)
    first, second = program.graph(x)
    first.fill_(9)
    torch.testing.assert_close(second, x.cos())
    assert [refused.reason for refused in record.refused] == [
        "the caller gets it and the equal cos as separate tensors"
    ]


def test_views_of_equal_results_stay_apart_where_both_are_returned() -> None:
    def twins(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.cos()[0], x.cos()[1]

    x = torch.rand(2, 4)
    program = lowered(twins, x)
    apply(PASS, program.graph)
    assert calls(program.graph).count("aten.cos.default") == 2


@pytest.mark.parametrize("returned", [0, 1])
def test_one_of_two_equal_results_may_be_returned(returned: int) -> None:
    def program_of(x: Tensor) -> tuple[Tensor, Tensor]:
        pair = x.cos(), x.cos()
        return pair[returned], pair[1 - returned] + 1

    x = torch.rand(4)
    program = lowered(program_of, x)
    record = apply(PASS, program.graph)
    assert calls(program.graph) == ["aten.cos.default", "aten.add.Tensor"]
    assert not record.refused
    for got, want in zip(program.graph(x), program_of(x), strict=True):
        torch.testing.assert_close(got, want)


def test_the_second_result_is_returned_through_a_merged_one() -> None:
    """The first call becomes an output by the merge: a third one must not join it."""

    def three(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.cos() + 1, x.cos(), x.cos()  # type: ignore[return-value]

    program = lowered(three, torch.rand(4))
    record = apply(PASS, program.graph)
    assert calls(program.graph).count("aten.cos.default") == 2
    assert len(record.refused) == 1


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
        assert [refused.reason for refused in record.refused] == [
            "what it reads is written between it and the equal call cos_default"
        ]


def test_a_write_elsewhere_separates_nothing() -> None:
    graph = torch.fx.Graph()
    mode = torch._subclasses.FakeTensorMode()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    first = graph.call_function(torch.ops.aten.cos.default, (x,))
    write = graph.call_function(torch.ops.aten.add_.Tensor, (y, 1))
    second = graph.call_function(torch.ops.aten.cos.default, (x,))
    total = graph.call_function(torch.ops.aten.sub.Tensor, (first, second))
    graph.output((total,))
    for node in (x, y, first, second, total):
        with mode:
            node.meta["val"] = torch.empty(4)
    write.meta["val"] = y.meta["val"]
    record = apply(PASS, torch.fx.GraphModule({}, graph))
    assert [fired.nodes for fired in record.fired] == [("cos_default_1",)]
