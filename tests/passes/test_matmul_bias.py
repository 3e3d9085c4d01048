"""matmul_bias: products whose bias is added apart, in both lowerings."""

from __future__ import annotations

import pytest
import torch

from npu_compiler.passes import matmul_bias
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(matmul_bias.NAME, "", rules=matmul_bias.RULES)


@pytest.mark.parametrize("inference", [False, True])
def test_bias_on_either_side(inference: bool) -> None:
    x, weight, bias = torch.randn(5, 8), torch.randn(8, 12), torch.randn(12)
    program = lowered(lambda x, weight, bias: bias + x @ weight, x, weight, bias, inference=inference)
    order = [node.meta["val"].shape for node in program.graph.graph.find_nodes(op="placeholder")]
    apply(PASS, program.graph)
    assert calls(program.graph) == ["aten.addmm.default"]
    by_shape = {tuple(tensor.shape): tensor for tensor in (x, weight, bias)}
    torch.testing.assert_close(program.graph(*(by_shape[tuple(shape)] for shape in order))[0], bias + x @ weight)


def test_batched_products_stay() -> None:
    program = lowered(
        lambda x, weight, bias: x @ weight + bias, torch.randn(2, 5, 8), torch.randn(2, 8, 12), torch.randn(12)
    )
    assert not apply(PASS, program.graph).fired


def test_dynamic_rows() -> None:
    x = torch.randn(5, 8)
    torch._dynamo.mark_dynamic(x, 0)
    program = lowered(lambda x, weight, bias: x @ weight + bias, x, torch.randn(8, 12), torch.randn(12), dynamic=True)
    apply(PASS, program.graph)
    assert calls(program.graph) == ["aten.addmm.default"]


def test_product_that_is_reshaped_in_between() -> None:
    """An input with batches is multiplied as a matrix. Before: mm, view, add. After: addmm, view."""
    x, weight, bias = torch.randn(2, 5, 8), torch.randn(8, 12), torch.randn(12)
    torch._dynamo.mark_dynamic(x, 1)
    program = lowered(lambda x, weight, bias: x @ weight + bias, x, weight, bias, dynamic=None)
    record = apply(PASS, program.graph)
    assert [entry.rule for entry in record.fired] == ["matmul_bias"], str(record)
    assert [name for name in calls(program.graph) if "view" not in name] == ["aten.addmm.default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_numbers_of_a_product_that_is_reshaped_in_between(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((2, 5, 8), (8, 12), (12,)))
    program = lowered(lambda x, weight, bias: x @ weight + bias, x, weight, bias)
    assert apply(PASS, program.graph).fired
    (got,) = program.graph(x, weight, bias)
    want = x.double() @ weight.double() + bias.double()
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4 * torch.finfo(dtype).eps * float(want.abs().max()))
