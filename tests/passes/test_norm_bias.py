"""norm_bias behind the passes that it builds on, on the device: the sum goes on, the bias is added to the norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.test_norm_quant import compiled, exact_norm, inputs, norm, operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_written_out_norm_with_a_bias(dtype: torch.dtype) -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return beta + norm(total, weight), total

    x, residual, weight = inputs(dtype)
    beta = torch.randn(64, dtype=dtype).npu()
    (shifted, total), graph = compiled(block, x, residual, weight, beta)
    assert operators(graph) == ["npu_fused.add_rms_norm_bias.default"]
    exact = exact_norm(x + residual, weight) + beta.cpu().double()
    error = (shifted.cpu().double() - exact).abs().max() / exact.abs().max()
    assert error < 2 * torch.finfo(dtype).eps, "rounded once by one kernel, twice by two"
    assert torch.equal(total, x + residual)


def test_a_bias_that_is_quantized_stays_with_the_quantization() -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.npu.npu_dynamic_quant(norm(x + residual, weight) + beta)

    *args, weight = inputs(torch.float16)
    _, graph = compiled(block, *args, weight, torch.zeros(64).half().npu())
    assert operators(graph) == ["npu_fused.add_rms_norm_dynamic_quant.default"]


def test_the_next_residual_is_no_bias() -> None:
    """A norm behind a sub-layer, as in Gemma 2 and OLMo 2, is added to the stream of hidden states."""

    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return residual + norm(x + residual, weight)

    _, graph = compiled(block, *inputs(torch.float16))
    assert operators(graph) == ["npu_fused.add_rms_norm.default", "aten.add.Tensor"]
    assert "shape of beta" in str(graph)
