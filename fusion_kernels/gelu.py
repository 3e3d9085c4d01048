"""GELU by a logistic function, x * sigmoid(1.702 x): "quick_gelu" of CLIP and of vision towers.

CANN: aclnnFastGelu (`npu_fast_gelu`). The form by tanh needs no operator of its own: it is aten.gelu.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels.norms import refuses_dtypes
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider

STEEPNESS = 1.702


def fast_gelu_reference(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), of any shape; computed in float32 (float64 where x is), rounded once to x's dtype."""
    wide = x.contiguous().to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(STEEPNESS * wide)).to(x.dtype)


def _fake(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _cann(x: Tensor) -> Tensor:
    return torch.ops.npu.npu_fast_gelu(x)


def _example(dtype: torch.dtype) -> tuple[Any, ...]:
    return (3 * torch.randn(3, 5, 64, dtype=dtype),)


FAST_GELU = FusedOperator(
    "fast_gelu(Tensor x) -> Tensor",
    reference=fast_gelu_reference,
    fake=_fake,
    providers=(
        Provider("aclnnFastGelu", _cann, ("npu::npu_fast_gelu",), refuses_dtypes),
        Provider("composition", fast_gelu_reference),
    ),
    example=_example,
)
