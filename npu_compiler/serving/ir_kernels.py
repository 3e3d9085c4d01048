"""Implementations named "npu" of vLLM's IR operators, by torch_npu's fused operators. Imported once a process.

CANN's results are contiguous. vLLM's own definitions keep the layout of what they normalise, and programs are traced
with that: a view behind the norm of transposed heads relies on it.
"""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor
from vllm import ir

PROVIDER = "npu"


def _norm_supported(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return weight is not None and weight.dtype == x.dtype and variance_size is None


def _add_norm_supported(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    same = weight is not None and weight.dtype == x.dtype == x_residual.dtype
    return same and variance_size is None and x.is_contiguous() and x_residual.is_contiguous()


@ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_norm_supported)
def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """x / rms(x) * weight over the last dimension; x and weight of one dtype. The result has x's layout."""
    normed: Tensor = torch_npu.npu_rms_norm(x, weight, epsilon)[0]
    return normed if x.is_contiguous() else torch.empty_like(x).copy_(normed)


@ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_add_norm_supported)
def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """(norm(x + x_residual) * weight, x + x_residual); all of one dtype, contiguous."""
    normed, _, total = torch_npu.npu_add_rms_norm(x, x_residual, weight, epsilon)
    return normed, total
