"""A product and an addition: x * y + z.

CANN: aclnnAddcmul, behind torch.addcmul. It computes half precision in float32 and rounds once. torch's own operator
has no shape inference for dynamic sizes, so a program can't name it directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels.operator import FusedOperator, Provider


def mul_add_reference(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z, broadcast against each other, contiguous; all of one floating dtype."""
    return (x * y + z).contiguous()


def _fake(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.empty(torch.broadcast_shapes(x.shape, y.shape, z.shape), dtype=x.dtype, device=x.device)


def _addcmul(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.addcmul(z, x, y).contiguous()


def _example(dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(64, dtype=dtype), torch.randn(3, 1, 64, dtype=dtype)


MUL_ADD = FusedOperator(
    "mul_add(Tensor x, Tensor y, Tensor z) -> Tensor",
    reference=mul_add_reference,
    fake=_fake,
    providers=(Provider("composition", _addcmul),),
    example=_example,
)
