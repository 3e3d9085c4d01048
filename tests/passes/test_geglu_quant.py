"""geglu_quant behind geglu, on the device: int8 as from PyTorch, by each of gelu's approximations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.test_norm_quant import HALVES, compiled, operators


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_geglu_and_dynamic_quantization(dtype: torch.dtype, approximate: str) -> None:
    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = x.chunk(2, dim=-1)
        return torch.ops.npu.npu_dynamic_quant(torch.nn.functional.gelu(gate, approximate=approximate) * up)

    torch.manual_seed(0)
    x = torch.randn(6, 256, dtype=dtype).npu()
    (values, scale), graph = compiled(block, x)
    assert operators(graph) == ["npu_fused.geglu_dynamic_quant.default"]
    assert "geglu_dynamic_quant x1: GeGLU and aclnnDynamicQuant (not Triton: " in str(graph)
    gate, up = x.cpu().double().chunk(2, dim=-1)
    exact = torch.nn.functional.gelu(gate, approximate=approximate) * up
    row = exact.abs().amax(-1) / 127
    rounding = 2 * torch.finfo(dtype).eps  # the gate's result in between, of up to 127 steps
    torch.testing.assert_close(scale.cpu().double(), row, rtol=rounding, atol=0)
    assert (values.cpu().double() * row[:, None] - exact).abs().div(row[:, None]).max() < 0.5 + 127 * rounding
