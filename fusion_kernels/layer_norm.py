"""Layer normalisation behind a residual addition: the norm of BERT-like encoders and of GPT-2.

CANN: aclnnAddLayerNorm. It computes in float32 and rounds once; PyTorch rounds the sum to the input dtype first. A lone
layer norm is one kernel (aclnnLayerNorm) as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels.norms import CANN_DTYPES
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual) over the last dimension; x, residual [..., H] of one dtype, weight and
    bias [H]. Computed in float32 (float64 where x is), rounded once to x's dtype."""
    total = x.contiguous() + residual.contiguous()
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + epsilon)
    return (centred * scale * weight.to(wide.dtype) + bias.to(wide.dtype)).to(x.dtype), total


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _cann(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    normed, _, _, total = torch.ops.npu.npu_add_layer_norm(x, residual, weight, bias, epsilon, True)
    return normed, total


def _refuses(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> str:
    """aclnnAddLayerNorm: weight and bias are of x's dtype, or float32."""
    if x.dtype not in CANN_DTYPES or x.dtype != residual.dtype:
        return f"{x.dtype} and {residual.dtype} are not one of {CANN_DTYPES}"
    if weight.dtype != bias.dtype or weight.dtype not in (x.dtype, torch.float32):
        return f"weight {weight.dtype} and bias {bias.dtype} do not go with {x.dtype}"
    return "" if x.numel() else "empty tensors are not taken"


def _example(dtype: torch.dtype) -> tuple[Any, ...]:
    x, residual = torch.randn(3, 5, 64, dtype=dtype), torch.randn(3, 5, 64, dtype=dtype)
    return x, residual, torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype), 1e-5


ADD_LAYER_NORM = FusedOperator(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float epsilon) -> (Tensor, Tensor)",
    reference=add_layer_norm_reference,
    fake=_fake,
    providers=(
        Provider("aclnnAddLayerNorm", _cann, ("npu::npu_add_layer_norm",), _refuses),
        Provider("composition", add_layer_norm_reference),
    ),
    example=_example,
)
