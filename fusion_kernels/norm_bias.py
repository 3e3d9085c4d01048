"""RMS normalisation behind a residual addition, and a bias added to its result.

CANN has no operator for it: aclnnRmsNorm, aclnnAddRmsNorm, aclnnAddRmsNormCast and aclnnInplaceAddRmsNorm take a weight
alone. A custom operator library does it: vllm-ascend's, where it is loaded, has
`_C_ascend::npu_add_rms_norm_bias(x1, x2, gamma, beta, epsilon) -> (norm, 1 / rms, x1 + x2)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels import triton_driver
from npu_compiler.fusion_kernels.norms import refuses_dtypes, refuses_triton
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider

LIBRARY = "_C_ascend::npu_add_rms_norm_bias"


def add_rms_norm_bias_reference(
    x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual) * weight + beta, x + residual); x and residual [..., H], weight and beta [H]. Computed in
    float32 (or in float64 where x is), rounded once to x's dtype."""
    total = x.contiguous() + residual.contiguous()
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * weight.to(wide.dtype)
    return (normed + beta.to(wide.dtype)).to(x.dtype), total


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return normed, total


def _library(x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    operator = torch.ops._C_ascend.npu_add_rms_norm_bias
    normed, _, total = operator(x.contiguous(), residual.contiguous(), weight.contiguous(), beta.contiguous(), epsilon)
    return normed, total


def _cann_apart(x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    normed, _, total = torch.ops.npu.npu_add_rms_norm(x, residual, weight, epsilon)
    return normed + beta, total


def _example(dtype: torch.dtype) -> tuple[Any, ...]:
    x, residual = (torch.randn(3, 5, 64, dtype=dtype) for _ in range(2))
    return x, residual, torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype), 1e-6


ADD_RMS_NORM_BIAS = FusedOperator(
    "add_rms_norm_bias(Tensor x, Tensor residual, Tensor weight, Tensor beta, float epsilon) -> (Tensor, Tensor)",
    reference=add_rms_norm_bias_reference,
    fake=_fake,
    providers=(
        Provider("vllm-ascend's npu_add_rms_norm_bias", _library, (LIBRARY,), refuses_dtypes),
        Provider("Triton", triton_driver.kernel("add_rms_norm_bias"), ("triton",), refuses_triton),
        Provider("aclnnAddRmsNorm and aclnnAdd", _cann_apart, ("npu::npu_add_rms_norm",), refuses_dtypes),
        Provider("composition", add_rms_norm_bias_reference),
    ),
    example=_example,
)
