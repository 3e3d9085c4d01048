"""RMS normalisation with the quantization of its result to int8.

The normalised value is quantized from float32, so it is rounded once where norm and quantization apart round twice.
`beta`, where given, is added to it before (anti-outlier methods shift activations so).

CANN on Atlas A2 and A3: aclnnAddRmsNormDynamicQuantV2, aclnnAddRmsNormQuantV2 (one scale a channel) and
aclnnRmsNormQuant (one scale in all, always with beta and an int8 offset). torch_npu offers no function for
aclnnRmsNormDynamicQuant: Triton makes a lone norm and its dynamic quantization one kernel, without it they are two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels import triton_driver
from npu_compiler.fusion_kernels.norms import refuses_dtypes, refuses_triton
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider

HALVES = (torch.float16, torch.bfloat16)
LARGEST = 127.0


def quantize_rows(wide: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 values, one float32 scale a row) with value * scale ~ wide [..., H]; a row of zeros has scale 0."""
    scale = wide.abs().amax(-1, keepdim=True) / LARGEST
    return quantize(torch.where(scale > 0, wide / scale, 0.0)), scale.squeeze(-1).float()


def quantize(scaled: Tensor) -> Tensor:
    """Rounded to the nearest (half to even) and clamped to int8."""
    return scaled.round().clamp(-128, 127).to(torch.int8)


def normalize(x: Tensor, weight: Tensor, beta: Tensor | None, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight + beta in float32 (float64 where x is); x [..., H], weight, beta [H]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * weight.to(wide.dtype)
    return normed if beta is None else normed + beta.to(wide.dtype)


def add_rms_norm_dynamic_quant_reference(
    x: Tensor, residual: Tensor, weight: Tensor, smooth: Tensor | None, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(int8 [..., H], float32 scale of each row [...], x + residual). `smooth` [H] multiplies before quantization."""
    total = x.contiguous() + residual.contiguous()
    normed = normalize(total, weight, beta, epsilon)
    values, scale = quantize_rows(normed if smooth is None else normed * smooth.to(normed.dtype))
    return values, scale, total


def rms_norm_dynamic_quant_reference(
    x: Tensor, weight: Tensor, smooth: Tensor | None, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(int8 [..., H], float32 scale of each row [...]). `smooth` [H] multiplies before quantization."""
    normed = normalize(x.contiguous(), weight, beta, epsilon)
    return quantize_rows(normed if smooth is None else normed * smooth.to(normed.dtype))


def add_rms_norm_quant_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """(int8 [..., H] of norm / scale + zero, x + residual); scale and zero [H] or [1]."""
    total = x.contiguous() + residual.contiguous()
    return _static(normalize(total, weight, beta, epsilon), scale, zero), total


def rms_norm_quant_reference(
    x: Tensor, weight: Tensor, beta: Tensor, scale: Tensor, zero: Tensor | None, epsilon: float
) -> Tensor:
    """int8 [..., H] of norm / scale + zero; scale and zero [H] or [1]."""
    return _static(normalize(x.contiguous(), weight, beta, epsilon), scale, zero)


def _static(normed: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    scaled = normed / scale.to(normed.dtype)
    return quantize(scaled if zero is None else scaled + zero.to(normed.dtype))


def _int8(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


def _fake_dynamic(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    return _int8(x), scale, torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_lone_dynamic(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_dynamic(x)[:2]


def _fake_static(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _int8(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_lone(x: Tensor, *rest: Any) -> Tensor:
    return _int8(x)


def _cann_dynamic(
    x: Tensor, residual: Tensor, weight: Tensor, smooth: Tensor | None, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    values, _, total, scale, _ = torch.ops.npu.npu_add_rms_norm_dynamic_quant(
        x, residual, weight, smooth_scale1=smooth, beta=beta, epsilon=epsilon, output_mask=[True, False]
    )
    return values, scale, total


def _cann_apart(
    x: Tensor, residual: Tensor, weight: Tensor, smooth: Tensor | None, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    normed, _, total = torch.ops.npu.npu_add_rms_norm(x, residual, weight, epsilon)
    values, scale = torch.ops.npu.npu_dynamic_quant(normed, smooth_scales=smooth)
    return values, scale, total


def _cann_lone_apart(
    x: Tensor, weight: Tensor, smooth: Tensor | None, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    normed = torch.ops.npu.npu_rms_norm(x, weight, epsilon)[0]
    return torch.ops.npu.npu_dynamic_quant(normed if beta is None else normed + beta, smooth_scales=smooth)


def _cann_static(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    values, _, total = torch.ops.npu.npu_add_rms_norm_quant(x, residual, weight, scale, zero, beta, epsilon=epsilon)
    return values, total


def _cann_lone(x: Tensor, weight: Tensor, beta: Tensor, scale: Tensor, zero: Tensor | None, epsilon: float) -> Tensor:
    return torch.ops.npu.npu_rms_norm_quant(x, weight, beta, scale, zero, epsilon)


def _refuses_half(x: Tensor, *others: Any) -> str:
    if x.dtype not in HALVES:
        return f"{x.dtype} is not float16 or bfloat16"
    return refuses_dtypes(x, *others)


def _refuses_dynamic(x: Tensor, *rest: Any) -> str:
    return _refuses_half(x, *rest) if x.dim() >= 2 else "one dimension, the operator takes two to eight"


def _refuses_apart(
    x: Tensor, residual: Tensor, weight: Tensor, smooth: Tensor | None, beta: Tensor | None, epsilon: float
) -> str:
    if beta is not None:
        return "aclnnAddRmsNorm adds no bias"
    return _refuses_half(x, residual, weight, smooth)


def _refuses_lone_apart(x: Tensor, weight: Tensor, smooth: Tensor | None, beta: Tensor | None, epsilon: float) -> str:
    return _refuses_half(x, weight, smooth, beta)


def _refuses_static(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
) -> str:
    """aclnnAddRmsNormQuantV2 on A2 and A3: float16 with float32 scales and int32 zeros, bfloat16 with bfloat16 both."""
    types = {torch.float16: (torch.float32, torch.int32), torch.bfloat16: (torch.bfloat16, torch.bfloat16)}
    refusal = _refuses_half(x, residual, weight, beta)
    if refusal:
        return refusal
    if scale.shape != weight.shape:
        return f"scale {list(scale.shape)} has not one element a channel"
    given = (scale.dtype, types[x.dtype][1] if zero is None else zero.dtype)
    return "" if given == types[x.dtype] else f"scale and zero are {given}, {x.dtype} goes with {types[x.dtype]}"


def _refuses_lone(x: Tensor, weight: Tensor, beta: Tensor, scale: Tensor, zero: Tensor | None, epsilon: float) -> str:
    """aclnnRmsNormQuant on A2 and A3: a scale of one element in x's dtype, an int8 zero."""
    if scale.dim() != 1 or scale.shape[0] != 1:
        return f"scale {list(scale.shape)} has not exactly one element"
    if zero is None or zero.dtype != torch.int8 or zero.shape != scale.shape:
        return "the operator wants an int8 zero of one element"
    return _refuses_half(x, weight, beta, scale)


def _add_example(dtype: torch.dtype) -> tuple[Any, ...]:
    """x and residual are sixteenths, whose sum every dtype holds exactly: int8 values are then known to the unit."""
    x, residual = (torch.randint(-32, 33, (3, 5, 64)).div(16).to(dtype) for _ in range(2))
    return x, residual, torch.randn(64, dtype=dtype)


def _dynamic_example(dtype: torch.dtype) -> tuple[Any, ...]:
    return *_add_example(dtype), torch.rand(64, dtype=dtype) + 0.5, None, 1e-6


def _lone_dynamic_example(dtype: torch.dtype) -> tuple[Any, ...]:
    x, _, weight, smooth, beta, epsilon = _dynamic_example(dtype)
    return x, weight, smooth, beta, epsilon


def _static_example(dtype: torch.dtype) -> tuple[Any, ...]:
    scale = torch.rand(64).add(0.5).div(32).to(torch.float32 if dtype == torch.float16 else dtype)
    zero = torch.randint(-8, 8, (64,)).to(torch.int32 if dtype == torch.float16 else dtype)
    return *_add_example(dtype), scale, zero, torch.randn(64, dtype=dtype), 1e-6


def _lone_example(dtype: torch.dtype) -> tuple[Any, ...]:
    scale = torch.full((1,), 0.03125, dtype=dtype)
    weight, beta = torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype)
    return torch.randn(3, 5, 64, dtype=dtype), weight, beta, scale, torch.full((1,), 3, dtype=torch.int8), 1e-6


ADD_RMS_NORM_DYNAMIC_QUANT = FusedOperator(
    "add_rms_norm_dynamic_quant(Tensor x, Tensor residual, Tensor weight, Tensor? smooth, Tensor? beta, float epsilon)"
    " -> (Tensor, Tensor, Tensor)",
    reference=add_rms_norm_dynamic_quant_reference,
    fake=_fake_dynamic,
    providers=(
        Provider(
            "aclnnAddRmsNormDynamicQuantV2", _cann_dynamic, ("npu::npu_add_rms_norm_dynamic_quant",), _refuses_dynamic
        ),
        Provider("Triton", triton_driver.kernel("add_rms_norm_dynamic_quant"), ("triton",), refuses_triton),
        Provider(
            "aclnnAddRmsNorm and aclnnDynamicQuant",
            _cann_apart,
            ("npu::npu_add_rms_norm", "npu::npu_dynamic_quant"),
            _refuses_apart,
        ),
        Provider("composition", add_rms_norm_dynamic_quant_reference),
    ),
    example=_dynamic_example,
)
RMS_NORM_DYNAMIC_QUANT = FusedOperator(
    "rms_norm_dynamic_quant(Tensor x, Tensor weight, Tensor? smooth, Tensor? beta, float epsilon) -> (Tensor, Tensor)",
    reference=rms_norm_dynamic_quant_reference,
    fake=_fake_lone_dynamic,
    providers=(
        Provider("Triton", triton_driver.kernel("rms_norm_dynamic_quant"), ("triton",), refuses_triton),
        Provider(
            "aclnnRmsNorm and aclnnDynamicQuant",
            _cann_lone_apart,
            ("npu::npu_rms_norm", "npu::npu_dynamic_quant"),
            _refuses_lone_apart,
        ),
        Provider("composition", rms_norm_dynamic_quant_reference),
    ),
    example=_lone_dynamic_example,
)
ADD_RMS_NORM_QUANT = FusedOperator(
    "add_rms_norm_quant(Tensor x, Tensor residual, Tensor weight, Tensor scale, Tensor? zero, Tensor? beta, "
    "float epsilon) -> (Tensor, Tensor)",
    reference=add_rms_norm_quant_reference,
    fake=_fake_static,
    providers=(
        Provider("aclnnAddRmsNormQuantV2", _cann_static, ("npu::npu_add_rms_norm_quant",), _refuses_static),
        Provider("composition", add_rms_norm_quant_reference),
    ),
    example=_static_example,
)
RMS_NORM_QUANT = FusedOperator(
    "rms_norm_quant(Tensor x, Tensor weight, Tensor beta, Tensor scale, Tensor? zero, float epsilon) -> Tensor",
    reference=rms_norm_quant_reference,
    fake=_fake_lone,
    providers=(
        Provider("aclnnRmsNormQuant", _cann_lone, ("npu::npu_rms_norm_quant",), _refuses_lone),
        Provider("composition", rms_norm_quant_reference),
    ),
    example=_lone_example,
)
