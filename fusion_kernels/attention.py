"""Scaled dot-product attention with a mask that is added to the scores.

CANN: aclnnFlashAttentionScoreV2 (`npu_fusion_attention_v2`) of pseType 0, which adds behind the scale. Scores stay in
float32 and are never stored; without it, they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels.norms import refuses_dtypes
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider

HEADS_FIRST, ROWS_FIRST = "BNSD", "BSND"
MOST_HEADS, WIDEST_HEAD = 256, 768  # of aclnnFlashAttentionScoreV2
ADDED_BEHIND_SCALE, NO_SHIFT = 0, 1  # its pseType


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, layout: str
) -> Tensor:
    """softmax(scale * q k^T + mask) v, for each batch and head.

    Args:
        query: [B, N, Sq, D]; with layout "BSND" [B, Sq, N, D], and so are key, value and the result.
        key, value: [B, Nk, Skv, D]; query head n reads key head n // (N / Nk).
        mask: [B, N, Sq, Skv], [B, N, 1, Skv] or [1, N, Sq, Skv] in either layout.

    Returns:
        Contiguous, of query's shape and dtype; computed in float32 (or in float64 where query is), rounded once.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (_heads_first(item.to(wide), layout) for item in (query, key, value))
    k, v = (item.repeat_interleave(q.shape[1] // item.shape[1], dim=1) for item in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    shares = torch.softmax(scores if mask is None else scores + mask.to(wide), dim=-1)
    return _heads_first(torch.matmul(shares, v), layout).to(query.dtype).contiguous()


def _heads_first(tensor: Tensor, layout: str) -> Tensor:
    """From "BSND" to "BNSD", and back."""
    return tensor.transpose(1, 2) if layout == ROWS_FIRST else tensor


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, layout: str) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _heads(query: Tensor, layout: str) -> Any:
    return query.shape[layout.index("N")]


def _cann(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, layout: str) -> Tensor:
    return torch.ops.npu.npu_fusion_attention_v2(
        query,
        key,
        value,
        _heads(query, layout),
        layout,
        pse=mask,
        scale=scale,
        sync=True,  # else the stream for dropout's masks waits, which a capture is not told of; there is no dropout
        pse_type=NO_SHIFT if mask is None else ADDED_BEHIND_SCALE,
    )[0]


def _refuses(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, layout: str) -> str:
    if _heads(query, layout) > MOST_HEADS or query.shape[-1] > WIDEST_HEAD:
        return f"{list(query.shape)} has more than {MOST_HEADS} heads, or wider ones than {WIDEST_HEAD}"
    return refuses_dtypes(query, key, value, mask)


def _example(dtype: torch.dtype) -> tuple[Any, ...]:
    query, key = torch.randn(2, 5, 4, 16, dtype=dtype), torch.randn(2, 7, 2, 16, dtype=dtype)
    return query, key, torch.randn_like(key), torch.randn(2, 4, 1, 7, dtype=dtype), 0.25, ROWS_FIRST


ATTENTION = FusedOperator(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, str layout) -> Tensor",
    reference=attention_reference,
    fake=_fake,
    providers=(
        Provider("aclnnFlashAttentionScoreV2", _cann, ("npu::npu_fusion_attention_v2",), _refuses),
        Provider("composition", attention_reference),
    ),
    example=_example,
)
