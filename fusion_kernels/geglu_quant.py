"""The gate of a GeGLU block with the dynamic quantization of its result to int8; gate and up are halves of one tensor.

CANN has no operator for it: aclnnGeluMul and aclnnGeGluV3 quantize nothing, aclnnGeluQuant multiplies nothing. Triton
makes it one kernel; without it the two operators run one behind the other, as they would have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels import triton_driver
from npu_compiler.fusion_kernels.geglu import GEGLU
from npu_compiler.fusion_kernels.norm_quant import HALVES, quantize_rows
from npu_compiler.fusion_kernels.norms import refuses_triton
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider


def geglu_dynamic_quant_reference(x: Tensor, approximate: str, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """(int8 [..., H], float32 scale of each row [...]) of gelu(first half) * second half; x [..., 2 H]. `smooth` [H]
    multiplies before quantization, `approximate` is torch's of gelu."""
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    gated = torch.nn.functional.gelu(gate, approximate=approximate) * up
    return quantize_rows(gated if smooth is None else gated * smooth.to(gated.dtype))


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    values = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.int8, device=x.device)
    return values, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def _cann_apart(x: Tensor, approximate: str, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.ops.npu.npu_dynamic_quant(GEGLU(x, approximate), smooth_scales=smooth)


def _refuses_apart(x: Tensor, approximate: str, smooth: Tensor | None) -> str:
    if x.dtype not in HALVES:
        return f"{x.dtype} is not float16 or bfloat16"
    return "" if smooth is None or smooth.dtype == x.dtype else f"dtypes {x.dtype} and {smooth.dtype} differ"


def _example(dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(3, 5, 128, dtype=dtype), "tanh", None


GEGLU_DYNAMIC_QUANT = FusedOperator(
    "geglu_dynamic_quant(Tensor x, str approximate, Tensor? smooth) -> (Tensor, Tensor)",
    reference=geglu_dynamic_quant_reference,
    fake=_fake,
    providers=(
        Provider("Triton", triton_driver.kernel("geglu_dynamic_quant"), ("triton",), refuses_triton),
        Provider("GeGLU and aclnnDynamicQuant", _cann_apart, ("npu::npu_dynamic_quant",), _refuses_apart),
        Provider("composition", geglu_dynamic_quant_reference),
    ),
    example=_example,
)
