"""vLLM's IR operators by CANN's: values and layouts are those of vLLM's own definitions."""

from __future__ import annotations

import pytest
import torch
from vllm import ir

from npu_compiler.serving import ir_kernels

LAYOUTS = {
    "contiguous": lambda: torch.randn(6, 4, 16),
    "transposed heads": lambda: torch.randn(6, 4, 16).transpose(0, 1),
    "a part of a row": lambda: torch.randn(6, 40)[:, :16],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rms_norm_keeps_the_layout(layout: str) -> None:
    torch.manual_seed(0)
    x, weight = LAYOUTS[layout](), torch.rand(16) + 0.5
    on_device = torch.empty(0).npu().new_empty_strided(x.shape, x.stride()).copy_(x)
    found = ir_kernels.rms_norm.impl_fn(on_device, weight.npu(), 1e-6)
    expected = ir.ops.rms_norm.impls["native"].impl_fn(x, weight, 1e-6)
    assert found.stride() == expected.stride()
    assert torch.allclose(found.cpu(), expected, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_added_norm_is_taken_for_contiguous_tensors_only(layout: str) -> None:
    x = LAYOUTS[layout]()
    implementation = ir.ops.fused_add_rms_norm.impls[ir_kernels.PROVIDER]
    assert implementation.supports_args(x, x, torch.rand(16), 1e-6) == (layout == "contiguous")
