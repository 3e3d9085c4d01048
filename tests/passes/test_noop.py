"""noop: needless calls go, needed ones stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from npu_compiler.passes import dead_code, noop
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered

NOOP = Pass(noop.NAME, "", noop.run)
DEAD = Pass(dead_code.NAME, "", dead_code.run)
aten = torch.ops.aten
# Functions that return their argument [4, 8], and the one dtype where they do.
IDLE: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype | None]] = {
    "clone": (torch.clone, None),
    "copy": (lambda x: aten.copy.default(torch.zeros(4, 8, dtype=x.dtype), x), None),
    "_to_copy": (lambda x: aten._to_copy.default(x, dtype=x.dtype), None),
    "convert_element_type": (lambda x: torch.ops.prims.convert_element_type.default(x, x.dtype), None),
    "view": (lambda x: aten.view.default(x, [4, 8]), None),
    "_unsafe_view": (lambda x: aten._unsafe_view.default(x, [4, 8]), None),
    "expand": (lambda x: aten.expand.default(x, [4, 8]), None),
    "permute": (lambda x: aten.permute.default(x, [0, 1]), None),
    "transpose": (lambda x: aten.transpose.int(x, 1, 1), None),
    "squeeze": (lambda x: aten.squeeze.dim(x, 0), None),
    "as_strided": (lambda x: aten.as_strided.default(x, [4, 8], [8, 1]), None),
    "slice.": (lambda x: aten.slice.Tensor(x, 1, 0, 100), None),
    "repeat": (lambda x: aten.repeat.default(x, [1, 1]), None),
    "constant_pad_nd": (lambda x: aten.constant_pad_nd.default(x, [0, 0, 0, 0]), None),
    "cat": (lambda x: torch.cat((x[:0], x)), None),
    "slice_scatter": (lambda x: aten.slice_scatter.default(torch.zeros(4, 8, dtype=x.dtype), x, 0), None),
    "as_strided_scatter": (
        lambda x: aten.as_strided_scatter.default(torch.zeros(4, 8, dtype=x.dtype), x, [4, 8], [8, 1]),
        None,
    ),
    "floor": (torch.floor, torch.int64),
    "round": (torch.round, torch.int64),
    "pow": (lambda x: aten.pow.Tensor_Scalar(x, 1), None),
    "add": (lambda x: x + 0, torch.int64),
    "sub": (lambda x: x - 0, None),
}
NEAR_MISSES: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (lambda x: aten.constant_pad_nd.default(x, [-1, 1]), "it moves the values"),
    (lambda x: x + 0, "-0.0 + 0 is 0.0"),
    (lambda x: x - -0.0, "-0.0 - -0.0 is 0.0"),
    (lambda x: x + 1, ""),
    (lambda x: x**2, ""),
    (torch.floor, ""),
    (lambda x: aten.slice_scatter.default(x, x[:2] * 2, 0, 0, 2), ""),
    (lambda x: aten.as_strided_scatter.default(x, x.t() * 2, [8, 4], [1, 8]), ""),
    (lambda x: aten.as_strided.default(x, [4, 8], [8, 0]), ""),
    (lambda x: x.double().float(), ""),
    (lambda x: x.t().clone(memory_format=torch.contiguous_format).t(), ""),
    (lambda x: torch.cat((x[:2], x[2:])), ""),
    (lambda x: x.repeat(2, 1)[::2], ""),
]


def test_clone_view_and_empty_cat_go() -> None:
    """Before: clone, view, slice, cat, add. After: add (the unused slice is dead code)."""

    def idle(x: Tensor) -> Tensor:
        y = x.clone().view(4, 8)
        return torch.cat((y, y[:, 8:]), dim=-1) + 1

    x = torch.rand(4, 8)
    program = lowered(idle, x)
    apply(NOOP, program.graph)
    record = apply(DEAD, program.graph)
    assert calls(program.graph) == ["aten.add.Tensor"]
    assert [fired.nodes for fired in record.fired] == [("slice_1",)]
    torch.testing.assert_close(program.graph(x)[0], x + 1)


def test_real_work_stays() -> None:
    def works(x: Tensor) -> Tensor:
        return torch.cat((x.view(8, 4), x.view(8, 4)), dim=-1).to(torch.float64)

    x = torch.rand(4, 8)
    program = lowered(works, x)
    before = calls(program.graph)
    apply(NOOP, program.graph)
    assert calls(program.graph) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("name", [*IDLE])
def test_rules(name: str, dtype: torch.dtype) -> None:
    """Each rule of the table goes where it does nothing, and the values stay."""
    function, only = IDLE[name]
    if only not in (None, dtype):
        return
    x = torch.arange(32).reshape(4, 8).to(dtype)
    program = lowered(lambda x: function(x * 2) * 3, x)
    record = apply(NOOP, program.graph)
    apply(DEAD, program.graph)
    assert calls(program.graph) == ["aten.mul.Tensor", "aten.mul.Tensor"]
    assert any(name in fired.rule for fired in record.fired)
    assert torch.equal(program.graph(x)[0], x * 6)


@pytest.mark.parametrize("function, reason", NEAR_MISSES)
def test_near_misses_stay(function: Callable[[Tensor], Tensor], reason: str) -> None:
    """Equal layouts, other values; the refusal says why where it could have been a no-op."""
    x = torch.arange(-16.0, 16.0).reshape(4, 8)
    program = lowered(lambda x: function(x * 2) * 3, x)
    before = calls(program.graph)
    record = apply(NOOP, program.graph)
    assert calls(program.graph) == before
    assert [refused.reason for refused in record.refused] == ([reason] if reason else [])
    assert torch.equal(program.graph(x)[0], function(x * 2) * 3)


def test_assertion_checked_in_tracing_goes_and_one_for_run_time_stays() -> None:
    program = lowered(lambda x: x + 1, torch.rand(4))
    graph = program.graph.graph
    (x,) = graph.find_nodes(op="placeholder")
    with graph.inserting_after(x):
        graph.call_function(aten._assert_tensor_metadata.default, (x, None, None, torch.float32))
        graph.call_function(aten._assert_scalar.default, (True, "checked"))
        size = graph.call_function(aten.sym_size.int, (x, 0))
    size.meta["val"] = 4
    with graph.inserting_after(size):
        known_at_run_time = graph.call_function(aten._assert_scalar.default, (size, "not checked"))
    apply(NOOP, program.graph)
    assert [node.args for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default)] == [
        (size, "not checked")
    ]
    assert known_at_run_time in graph.nodes
    assert "aten._assert_tensor_metadata.default" not in calls(program.graph)


def test_output_does_not_become_an_alias_of_an_input() -> None:
    x = torch.rand(4)
    program = lowered(lambda x: x.clone(), x)
    record = apply(NOOP, program.graph)
    assert program.graph(x)[0].data_ptr() != x.data_ptr()
    assert [refused.reason for refused in record.refused] == ["an output would come to share memory with an input"]


def test_a_chain_of_copies_leaves_one_between_input_and_output() -> None:
    x = torch.rand(4)
    program = lowered(lambda x: x.clone().clone().view(4).clone(), x)
    apply(NOOP, program.graph)
    assert calls(program.graph) == ["aten.clone.default"]


def test_outputs_do_not_become_one_tensor() -> None:
    def twins(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, y.clone()

    program = lowered(twins, torch.rand(4))
    record = apply(NOOP, program.graph)
    assert [refused.reason for refused in record.refused] == [
        "an output would come to share memory with another output"
    ]


def test_copy_before_a_write_stays() -> None:
    """The program writes x at its end, behind which the copy is still read."""
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    copy = graph.call_function(aten.clone.default, (x,))
    write = graph.call_function(aten.add_.Tensor, (x, y))
    total = graph.call_function(aten.mul.Tensor, (copy, y))
    graph.output((total,))
    with torch._subclasses.FakeTensorMode():
        for node in (x, y, copy, total):
            node.meta["val"] = torch.empty(4)
    write.meta["val"] = x.meta["val"]
    record = apply(NOOP, torch.fx.GraphModule({}, graph))
    assert [refused.reason for refused in record.refused] == ["one of the two is written while the other is still read"]


def test_copy_that_as_strided_counts_from_stays() -> None:
    """as_strided counts from the start of memory: of the copy's, not of what it was copied from."""

    def program_of(x: Tensor) -> Tensor:
        return (x * 2)[2:].clone().as_strided((2, 2), (1, 2), 0) + 1

    x = torch.rand(8)
    program = lowered(program_of, x)
    record = apply(NOOP, program.graph)
    assert torch.equal(program.graph(x)[0], program_of(x))
    assert any("as_strided counts from its start" in refused.reason for refused in record.refused)


def test_sizes_that_nobody_knows_are_left_alone() -> None:
    """Two symbols may be equal or not: the slice stays, and the reason says what could not be proven."""
    x, y = torch.rand(6, 4), torch.rand(5, 4)
    program = lowered(lambda x, y: x[: y.shape[0]] + 1, x, y, dynamic=True)
    record = apply(NOOP, program.graph)
    assert "aten.slice.Tensor" in calls(program.graph)
    assert any("can't be proven" in refused.reason for refused in record.refused)
    assert program.graph is not None
