"""The gate of a SwiGLU block with the quantization of its result to int8; gate and up are halves of one tensor.

CANN: aclnnDequantSwigluQuant takes half-precision tensors too, and gives the scale that turns int8 back.
aclnnSwiGluQuantV2 gives its reciprocal and takes no more than 8192 columns: it would cost a kernel more, and is not
used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels import triton_driver
from npu_compiler.fusion_kernels.norm_quant import HALVES, quantize, quantize_rows
from npu_compiler.fusion_kernels.norms import refuses_triton
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider

COLUMNS = 64  # aclnnDequantSwigluQuant on A2 and A3: the last dimension must divide by it


def _gated(x: Tensor) -> Tensor:
    """silu(first half) * second half in float32 (float64 where x is)."""
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def swiglu_dynamic_quant_reference(x: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """(int8 [..., H], float32 scale of each row [...]); x [..., 2 H], `smooth` [H] multiplies before quantization."""
    gated = _gated(x)
    return quantize_rows(gated if smooth is None else gated * smooth.to(gated.dtype))


def swiglu_quant_reference(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """int8 [..., H] of swiglu(x) / scale + zero; x [..., 2 H], scale and zero [H] or [1]."""
    gated = _gated(x)
    scaled = gated / scale.to(gated.dtype)
    return quantize(scaled if zero is None else scaled + zero.to(gated.dtype))


def _fake_static(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.int8, device=x.device)


def _fake_dynamic(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_static(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def _cann_dynamic(x: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.ops.npu.npu_dequant_swiglu_quant(x.contiguous(), quant_scale=smooth, activate_left=True, quant_mode=1)


def _cann_static(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return torch.ops.npu.npu_dequant_swiglu_quant(
        x.contiguous(), quant_scale=scale, quant_offset=zero, activate_left=True, quant_mode=0
    )[0]


def _cann_apart(x: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.ops.npu.npu_dynamic_quant(torch.ops.npu.npu_swiglu(x, -1), smooth_scales=smooth)


def _refuses(x: Tensor) -> str:
    if x.dtype not in HALVES:
        return f"{x.dtype} is not float16 or bfloat16"
    if x.dim() < 2:
        return "one dimension, the operator takes two to eight"
    return f"{x.shape[-1]} columns are no multiple of {COLUMNS}" if x.shape[-1] % COLUMNS else ""


def _refuses_dynamic(x: Tensor, smooth: Tensor | None) -> str:
    if smooth is not None and smooth.dtype != torch.float32:
        return f"smooth is {smooth.dtype}, the operator takes float32"
    return _refuses(x)


def _refuses_static(x: Tensor, scale: Tensor, zero: Tensor | None) -> str:
    if scale.dtype != torch.float32 or list(scale.shape) != [1]:
        return f"scale is {scale.dtype} {list(scale.shape)}, the operator takes one float32"
    if zero is None or zero.dtype != scale.dtype or zero.shape != scale.shape:
        return "the operator wants a zero as the scale: one float32"
    return _refuses(x)


def _refuses_apart(x: Tensor, smooth: Tensor | None) -> str:
    if x.dtype not in HALVES:
        return f"{x.dtype} is not float16 or bfloat16"
    return "" if smooth is None or smooth.dtype == x.dtype else f"dtypes {x.dtype} and {smooth.dtype} differ"


def _dynamic_example(dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(3, 5, 128, dtype=dtype), None


def _static_example(dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(3, 5, 128, dtype=dtype), torch.full((1,), 0.03125), torch.full((1,), 3.0)


SWIGLU_DYNAMIC_QUANT = FusedOperator(
    "swiglu_dynamic_quant(Tensor x, Tensor? smooth) -> (Tensor, Tensor)",
    reference=swiglu_dynamic_quant_reference,
    fake=_fake_dynamic,
    providers=(
        Provider(
            "aclnnDequantSwigluQuant dynamic", _cann_dynamic, ("npu::npu_dequant_swiglu_quant",), _refuses_dynamic
        ),
        Provider("Triton", triton_driver.kernel("swiglu_dynamic_quant"), ("triton",), refuses_triton),
        Provider(
            "aclnnSwiGlu and aclnnDynamicQuant",
            _cann_apart,
            ("npu::npu_swiglu", "npu::npu_dynamic_quant"),
            _refuses_apart,
        ),
        Provider("composition", swiglu_dynamic_quant_reference),
    ),
    example=_dynamic_example,
)
SWIGLU_QUANT = FusedOperator(
    "swiglu_quant(Tensor x, Tensor scale, Tensor? zero) -> Tensor",
    reference=swiglu_quant_reference,
    fake=_fake_static,
    providers=(
        Provider("aclnnDequantSwigluQuant static", _cann_static, ("npu::npu_dequant_swiglu_quant",), _refuses_static),
        Provider("composition", swiglu_quant_reference),
    ),
    example=_static_example,
)
