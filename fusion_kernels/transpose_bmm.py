"""A batched product whose result lies with the rows before the batch: what latent attention does to its heads.

CANN: aclnnTransposeBatchMatMul (`npu_transpose_batchmatmul`) reads and writes the transposed layouts, so that no copy
is left. Without it the product is followed by a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels.norms import refuses_dtypes
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider

LARGEST = 65536  # batch and columns on A2 and A3; inner size where the batch comes first


def transpose_bmm_reference(x: Tensor, weight: Tensor, batch_first: bool) -> Tensor:
    """[M, B, N]: for each b, x of that batch [M, K] times weight[b] [K, N]. x is [B, M, K] if `batch_first`, otherwise
    [M, B, K]."""
    return torch.bmm(x if batch_first else x.transpose(0, 1), weight).transpose(0, 1).contiguous()


def _fake(x: Tensor, weight: Tensor, batch_first: bool) -> Tensor:
    rows = x.shape[1] if batch_first else x.shape[0]
    return torch.empty((rows, weight.shape[0], weight.shape[2]), dtype=x.dtype, device=x.device)


def _cann(x: Tensor, weight: Tensor, batch_first: bool) -> Tensor:
    return torch.ops.npu.npu_transpose_batchmatmul(
        x, weight, perm_x1=[0, 1, 2] if batch_first else [1, 0, 2], perm_x2=[0, 1, 2], perm_y=[1, 0, 2]
    )


def _refuses(x: Tensor, weight: Tensor, batch_first: bool) -> str:
    if x.dim() != 3 or weight.dim() != 3:
        return f"{x.dim()} and {weight.dim()} dimensions, the operator takes 3"
    if max(weight.shape[0], weight.shape[2]) >= LARGEST or (batch_first and weight.shape[1] >= LARGEST):
        return f"batch and sizes {list(weight.shape)} must stay below {LARGEST}"
    return refuses_dtypes(x, weight)


def _example(dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(5, 3, 16, dtype=dtype), torch.randn(3, 16, 32, dtype=dtype), False


TRANSPOSE_BMM = FusedOperator(
    "transpose_bmm(Tensor x, Tensor weight, bool batch_first) -> Tensor",
    reference=transpose_bmm_reference,
    fake=_fake,
    providers=(
        Provider("aclnnTransposeBatchMatMul", _cann, ("npu::npu_transpose_batchmatmul",), _refuses),
        Provider("composition", transpose_bmm_reference),
    ),
    example=_example,
)
