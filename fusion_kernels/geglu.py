"""The gate of a GeGLU block (Gemma): gelu(gate) * up, both halves of one tensor.

CANN: aclnnGeluMul where the tensor is within its limits, otherwise aclnnGeGluV3, which writes gelu(gate) too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels.norms import refuses_dtypes
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider

APPROXIMATIONS = {"none": 0, "tanh": 1}  # aclnnGeGluV3's numbers for torch's names
GELU_MUL_WIDTH = 1024  # aclnnGeluMul: the last dimension at most
GELU_MUL_ROWS = 200_000  # aclnnGeluMul: the product of the other dimensions at most


def geglu_reference(x: Tensor, approximate: str) -> Tensor:
    """gelu(first half) * second half of the last dimension; x [..., 2 H], the result [..., H]."""
    gate, up = x.chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate, approximate=approximate) * up).contiguous()


def _fake(x: Tensor, approximate: str) -> Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


def _cann(x: Tensor, approximate: str) -> Tensor:
    return torch.ops.npu.npu_geglu(x, -1, APPROXIMATIONS[approximate], True)[0]


def _gelu_mul(x: Tensor, approximate: str) -> Tensor:
    return torch.ops.npu.npu_gelu_mul(x, approximate=approximate)


def _refuses_gelu_mul(x: Tensor, approximate: str) -> str:
    if x.shape[-1] > GELU_MUL_WIDTH:
        return f"{x.shape[-1]} columns, the operator takes up to {GELU_MUL_WIDTH}"
    if x.numel() > GELU_MUL_ROWS * x.shape[-1]:
        return f"more than {GELU_MUL_ROWS} rows"
    return refuses_dtypes(x)


def _refuses(x: Tensor, approximate: str) -> str:
    return refuses_dtypes(x)


def _example(dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), "tanh"


GEGLU = FusedOperator(
    "geglu(Tensor x, str approximate) -> Tensor",
    reference=geglu_reference,
    fake=_fake,
    providers=(
        Provider("aclnnGeluMul", _gelu_mul, ("npu::npu_gelu_mul",), _refuses_gelu_mul),
        Provider("aclnnGeGluV3", _cann, ("npu::npu_geglu",), _refuses),
        Provider("composition", geglu_reference),
    ),
    example=_example,
)
