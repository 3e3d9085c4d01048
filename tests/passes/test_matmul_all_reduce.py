"""matmul_all_reduce: with vLLM's collective, in other shapes, and what decides between one operator and two.

Two ranks: tests/runtime/process_group_checks.py, and tests/serving/test_tensor_parallel.py through vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._C._distributed_c10d import _register_process_group
from torch._subclasses import FakeTensorMode

import npu_compiler
from npu_compiler.config import Options
from npu_compiler.errors import OptionError
from npu_compiler.fusion_kernels.matmul_all_reduce import MATMUL_ALL_REDUCE
from npu_compiler.lowering.functional import Functional, lower
from npu_compiler.passes import matmul_all_reduce, pipeline
from npu_compiler.passes.record import PassRecord
from npu_compiler.passes.rewrite import apply
from tests.one_rank import one_rank
from tests.passes.lowered import calls, lowered

FUSED = "npu_fused.matmul_all_reduce.default"
OF_VLLM = "tp:0"


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    with one_rank() as default:
        _register_process_group(OF_VLLM, default)
        yield


def summed(product: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(product, "sum", "0"))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return summed(x @ weight)


def operands(*rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return torch.randn(*rows, 32, dtype=dtype), torch.randn(32, 48, dtype=dtype)


def rewritten(program: Functional, rows: int = 1) -> PassRecord:
    record = PassRecord(matmul_all_reduce.NAME)
    apply(program.graph, matmul_all_reduce.rules(rows), record)
    program.graph.recompile()
    return record


def traced(function: Callable[..., Any], *args: Tensor) -> Functional:
    """The functional program of a function that can't run here, since vLLM's groups don't exist."""
    programs: list[Functional] = []
    with FakeTensorMode() as mode, torch.inference_mode():
        fakes = [mode.from_tensor(arg) for arg in args]

        def finish(functional: Functional) -> Callable[..., Any]:
            programs.append(functional)
            return functional.graph.forward

        lower(fx.symbolic_trace(function), fakes, finish)
    return programs[0]


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "with bias"])
def test_row_parallel_linear_of_vllm(biased: bool) -> None:
    """As RowParallelLinear calls it: on rank 0 with a bias, elsewhere without; the weight is stored transposed."""
    pytest.importorskip("vllm.distributed.parallel_state")

    def of_vllm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        product = torch.nn.functional.linear(x, weight, bias if biased else None)
        return (torch.ops.vllm.all_reduce(product, OF_VLLM),)

    args = torch.randn(5, 32).half().npu(), torch.randn(48, 32).half().npu(), torch.randn(48).half().npu()
    program = traced(of_vllm, *args)
    record = rewritten(program)
    assert [fired.rule for fired in record.fired] == ["matmul_all_reduce"], record
    assert "vllm.all_reduce.default" not in calls(program.graph)
    (node,) = program.graph.graph.find_nodes(op="call_function", target=torch.ops.npu_fused.matmul_all_reduce.default)
    assert node.args[3:] == (OF_VLLM, 1)
    assert (node.args[2] is not None) == biased
    (got,) = program.graph(*args)
    exact = args[0].cpu().double() @ args[1].cpu().double().t() + (args[2].cpu().double() if biased else 0)
    torch.testing.assert_close(got.cpu().double(), exact, rtol=0, atol=1e-3 * exact.abs().max().item())


@pytest.mark.parametrize("inference", [False, True], ids=["views", "whole"])
def test_three_dimensions(inference: bool) -> None:
    """Lowered into views round a product of two dimensions, or kept whole."""
    args = tuple(value.npu() for value in operands(2, 5))
    program = lowered(linear, *args, inference=inference)
    record = rewritten(program)
    assert len(record.fired) == 1, record
    assert calls(program.graph).count(FUSED) == 1
    torch.testing.assert_close(program.graph(*args), (args[0] @ args[1],), rtol=0, atol=0)


def test_rows_that_are_known_to_be_too_few_are_refused() -> None:
    record = rewritten(lowered(linear, *operands(2, 5)), rows=11)
    assert [entry.reason for entry in record.refused] == ["10 rows, fewer than the option matmul_all_reduce=11"]


def test_rows_that_are_not_known_are_left_to_the_call() -> None:
    program = lowered(linear, *operands(12), dynamic=True)
    assert rewritten(program, rows=11).fired
    (node,) = program.graph.graph.find_nodes(op="call_function", target=torch.ops.npu_fused.matmul_all_reduce.default)
    for rows, provider in ((10, "composition"), (11, "aclnnMatmulAllReduce")):
        x, weight = (value.npu() for value in operands(rows))
        assert MATMUL_ALL_REDUCE.provider(x, weight, *node.args[2:]).name == provider


def test_bounds_prove_that_rows_never_suffice() -> None:
    x, weight = operands(12)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=16)
    record = rewritten(lowered(linear, x, weight, dynamic=None), rows=17)
    assert [entry.reason.partition(" ")[2] for entry in record.refused] == [
        "rows, fewer than the option matmul_all_reduce=17"
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (torch.Tensor.float, "torch.float32 is not float16 or bfloat16"),
        (lambda x: x[:0], "empty tensors are not taken"),
        (torch.Tensor.t, "x is not contiguous"),
    ],
    ids=["float32", "empty", "transposed"],
)
def test_calls_that_the_operator_does_not_take(change: Callable[[Tensor], Tensor], reason: str) -> None:
    x, weight = (value.npu() for value in operands(32))
    x = change(x)
    weight = weight.to(x.dtype)
    assert MATMUL_ALL_REDUCE.passed_over(x, weight, None, "0", 1) == [f"aclnnMatmulAllReduce: {reason}"]
    torch.testing.assert_close(MATMUL_ALL_REDUCE(x, weight, None, "0", 1), x @ weight, rtol=0, atol=0)


def test_group_that_does_not_exist() -> None:
    x, weight = (value.npu() for value in operands(4))
    (reason,) = MATMUL_ALL_REDUCE.passed_over(x, weight, None, "tp:7", 1)
    assert reason.endswith("there is no process group 'tp:7'")


def test_is_off_unless_asked_for() -> None:
    assert matmul_all_reduce.NAME not in pipeline.names(pipeline.selected(Options()))
    assert matmul_all_reduce.NAME in pipeline.names(pipeline.selected(Options(matmul_all_reduce=1)))
    assert matmul_all_reduce.NAME in pipeline.names(pipeline.PASSES)
    with pytest.raises(OptionError, match="is no number of rows"):
        Options(matmul_all_reduce=-1)


def test_captured() -> None:
    """The norm and the residual behind it stay one operator of their own."""

    def layer(x: Tensor, weight: Tensor, residual: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        total = linear(x, weight) + residual
        wide = total.float()
        return gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype), total

    x, weight = operands(4)
    args = [value.npu() for value in (x, weight, torch.randn(4, 48).bfloat16(), torch.randn(48).bfloat16())]
    compiled = torch.compile(layer, backend="ascend", options={"matmul_all_reduce": 2})
    with torch.inference_mode():
        expected = layer(*args)
        results = [compiled(*args) for _ in range(3)]
    for got in results:
        torch.testing.assert_close(got, expected)
    report = npu_compiler.report()
    assert "matmul_all_reduce x1: aclnnMatmulAllReduce" in report
    assert "add_rms_norm x1: aclnnAddRmsNorm" in report
    assert "captured static: 4 calls" in report  # the two operators and what hands out the norm's two results
