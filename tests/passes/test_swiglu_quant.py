"""swiglu_quant behind swiglu, on the device: one kernel, int8 as from PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.test_norm_quant import HALVES, compiled, operators


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_swiglu_and_dynamic_quantization(dtype: torch.dtype) -> None:
    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = x.chunk(2, dim=-1)
        return torch.ops.npu.npu_dynamic_quant(torch.nn.functional.silu(gate) * up)

    x = torch.randn(6, 256, dtype=dtype).npu()
    (values, scale), graph = compiled(block, x)
    assert operators(graph) == ["npu_fused.swiglu_dynamic_quant.default"]
    gate, up = x.cpu().double().chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    row = exact.abs().amax(-1) / 127
    torch.testing.assert_close(scale.cpu().double(), row, rtol=1e-5, atol=0)
    assert (values.cpu().double() * row[:, None] - exact).abs().div(row[:, None]).max() < 0.502


def test_columns_that_the_operator_does_not_take() -> None:
    """aclnnDequantSwigluQuant takes multiples of 64 columns: another provider runs, and the result is as right."""
    x = torch.randn(6, 96, dtype=torch.float16).npu()
    (values, scale), graph = compiled(
        lambda x: torch.ops.npu.npu_dynamic_quant(torch.nn.functional.silu(x[..., :48]) * x[..., 48:]), x
    )
    assert operators(graph) == ["npu_fused.swiglu_dynamic_quant.default"]
    gate, up = x.cpu().double().chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    assert (values.cpu().double() * scale.cpu()[:, None] - exact).abs().div(scale.cpu()[:, None]).max() < 0.6
