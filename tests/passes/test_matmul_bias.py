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
