"""RMS normalisation, alone and behind a residual addition; with Gemma's weights too, which are stored less one.

CANN: aclnnRmsNorm (`npu_rms_norm`), aclnnAddRmsNorm (`npu_add_rms_norm`), aclnnAddRmsNormCast, which gives the norm in
float32 too, and aclnnGemmaRmsNorm (`npu_gemma_rms_norm`), which adds the one in float32. There is no
aclnnAddGemmaRmsNorm: without Triton the addition stays a kernel of its own, since handing 1 + weight in bfloat16 to
aclnnAddRmsNorm would round it for good. All compute in float32 and round once; PyTorch's usual program rounds x / rms
to the input dtype before it multiplies by the weight, so half-precision results may differ by one unit in the last
place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels import triton_driver
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider

CANN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension; x [..., H], weight [H]. Computed in float32 (or
    in float64 where x is), rounded once to x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x and residual [..., H] of one dtype."""
    total = x + residual
    return rms_norm_reference(total, weight, epsilon), total


def add_rms_norm_cast_reference(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(norm in float32, the same rounded to x's dtype, x + residual). The first is that of the unrounded norm."""
    total = x + residual
    wide = rms_norm_reference(total.to(torch.promote_types(x.dtype, torch.float32)), weight, epsilon)
    return wide.float(), wide.to(x.dtype), total


def gemma_rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * (1 + weight), rounded once to x's dtype; x [..., H], weight [H]."""
    return rms_norm_reference(x, weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1.0, epsilon)


def gemma_add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(gemma_rms_norm(x + residual), x + residual); x and residual [..., H] of one dtype."""
    total = x + residual
    return gemma_rms_norm_reference(total, weight, epsilon), total


def _fake_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_add_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return _fake_norm(x, weight, epsilon), _fake_norm(x, weight, epsilon)


def _fake_cast(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return wide, *_fake_add_norm(x, residual, weight, epsilon)


def _contiguous_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return rms_norm_reference(x.contiguous(), weight, epsilon)


def _contiguous_add_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return add_rms_norm_reference(x.contiguous(), residual.contiguous(), weight, epsilon)


def _contiguous_cast(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    return add_rms_norm_cast_reference(x.contiguous(), residual.contiguous(), weight, epsilon)


def _cann_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.ops.npu.npu_rms_norm(x, weight, epsilon)[0]


def _cann_add_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    normed, _, total = torch.ops.npu.npu_add_rms_norm(x, residual, weight, epsilon)
    return normed, total


def _cann_cast(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    wide, normed, _, total = torch.ops.npu.npu_add_rms_norm_cast(x, residual, weight, epsilon)
    return wide, normed, total


def _contiguous_gemma_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return gemma_rms_norm_reference(x.contiguous(), weight, epsilon)


def _contiguous_gemma_add_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return gemma_add_rms_norm_reference(x.contiguous(), residual.contiguous(), weight, epsilon)


def _cann_gemma_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.ops.npu.npu_gemma_rms_norm(x, weight, epsilon)[0]


def _cann_gemma_add_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    total = x.contiguous() + residual.contiguous()
    return torch.ops.npu.npu_gemma_rms_norm(total, weight, epsilon)[0], total


def refuses_norm(x: Tensor, weight: Tensor, *rest: Any) -> str:
    """aclnnRmsNorm takes a float32 weight with any x, otherwise one dtype for both."""
    return refuses_dtypes(x) if weight.dtype == torch.float32 else refuses_dtypes(x, weight)


def refuses_dtypes(x: Tensor, *others: Any) -> str:
    """CANN's norms take float32, float16 and bfloat16, one dtype for all tensors."""
    if x.dtype not in CANN_DTYPES:
        return f"{x.dtype} is not one of {CANN_DTYPES}"
    different = [other.dtype for other in others if isinstance(other, Tensor) and other.dtype != x.dtype]
    return f"dtypes {x.dtype} and {different[0]} differ" if different else ""


def refuses_triton(*args: Any) -> str:
    """The kernels of triton_kernels.py load float32, float16 and bfloat16, mixed as they come."""
    others = [arg.dtype for arg in args if isinstance(arg, Tensor) and arg.dtype not in CANN_DTYPES]
    return f"{others[0]} is not one of {CANN_DTYPES}" if others else ""


def refuses_cast(x: Tensor, *others: Any) -> str:
    """aclnnAddRmsNormCast takes half precision."""
    if x.dtype not in CANN_DTYPES[1:]:
        return f"{x.dtype} is not float16 or bfloat16"
    return refuses_dtypes(x, *others)


def _norm_example(dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(64, dtype=dtype), 1e-6


def _add_norm_example(dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(3, 5, 64, dtype=dtype), torch.randn(64, dtype=dtype), 1e-6


RMS_NORM = FusedOperator(
    "rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor",
    reference=rms_norm_reference,
    fake=_fake_norm,
    providers=(
        Provider("aclnnRmsNorm", _cann_norm, ("npu::npu_rms_norm",), refuses_norm),
        Provider("Triton", triton_driver.kernel("rms_norm"), ("triton",), refuses_triton),
        Provider("composition", _contiguous_norm),
    ),
    example=_norm_example,
)
ADD_RMS_NORM = FusedOperator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    reference=add_rms_norm_reference,
    fake=_fake_add_norm,
    providers=(
        Provider("aclnnAddRmsNorm", _cann_add_norm, ("npu::npu_add_rms_norm",), refuses_dtypes),
        Provider("Triton", triton_driver.kernel("add_rms_norm"), ("triton",), refuses_triton),
        Provider("composition", _contiguous_add_norm),
    ),
    example=_add_norm_example,
)
ADD_RMS_NORM_CAST = FusedOperator(
    "add_rms_norm_cast(Tensor x, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor, Tensor)",
    reference=add_rms_norm_cast_reference,
    fake=_fake_cast,
    providers=(
        Provider("aclnnAddRmsNormCast", _cann_cast, ("npu::npu_add_rms_norm_cast",), refuses_cast),
        Provider("composition", _contiguous_cast),
    ),
    example=_add_norm_example,
)
GEMMA_RMS_NORM = FusedOperator(
    "gemma_rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor",
    reference=gemma_rms_norm_reference,
    fake=_fake_norm,
    providers=(
        Provider("aclnnGemmaRmsNorm", _cann_gemma_norm, ("npu::npu_gemma_rms_norm",), refuses_dtypes),
        Provider("Triton", triton_driver.kernel("gemma_rms_norm"), ("triton",), refuses_triton),
        Provider("composition", _contiguous_gemma_norm),
    ),
    example=_norm_example,
)
GEMMA_ADD_RMS_NORM = FusedOperator(
    "gemma_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    reference=gemma_add_rms_norm_reference,
    fake=_fake_add_norm,
    providers=(
        Provider("Triton", triton_driver.kernel("gemma_add_rms_norm"), ("triton",), refuses_triton),
        Provider("add and aclnnGemmaRmsNorm", _cann_gemma_add_norm, ("npu::npu_gemma_rms_norm",), refuses_dtypes),
        Provider("composition", _contiguous_gemma_add_norm),
    ),
    example=_add_norm_example,
)
