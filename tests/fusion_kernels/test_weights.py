"""Norm weights in float32 beside half-precision activations: CANN takes them, so nothing is rounded or composed."""

from __future__ import annotations

import pytest
import torch

from npu_compiler.fusion_kernels.norms import RMS_NORM, rms_norm_reference
from npu_compiler.fusion_kernels.rope import QK_NORM_ROPE, qk_norm_rope_reference

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 64, dtype=dtype), torch.rand(64) + 1
    provider = RMS_NORM.provider(x.npu(), weight.npu(), 1e-6)
    assert provider.name == "aclnnRmsNorm"
    got = provider.run(x.npu(), weight.npu(), 1e-6).cpu()
    assert got.dtype == dtype
    torch.testing.assert_close(got, rms_norm_reference(x.double(), weight.double(), 1e-6).to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_norms_of_queries_and_keys(dtype: torch.dtype) -> None:
    """Gemma 3: heads of 256 elements, weights of one and what is stored."""
    q, k = torch.randn(5, 4, 256, dtype=dtype), torch.randn(5, 1, 256, dtype=dtype)
    weights = torch.rand(256) + 0.5, torch.rand(256) + 0.5
    angle = torch.randn(5, 1, 128).repeat(1, 1, 2)
    args = q, k, *weights, 1e-6, 1e-6, angle.cos().to(dtype), angle.sin().to(dtype)
    on_device = [arg.npu() if isinstance(arg, torch.Tensor) else arg for arg in args]
    provider = QK_NORM_ROPE.provider(*on_device)
    assert provider.name == "aclnnRotaryPositionEmbedding"
    exact = qk_norm_rope_reference(*(arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args))
    for got, want in zip(provider.run(*on_device), exact, strict=True):
        assert got.dtype == dtype
        assert (got.cpu().double() - want).abs().max() / want.abs().max() < 1.6e-2
