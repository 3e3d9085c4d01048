"""Rotary position embedding of queries and keys, with their RMS norms where a model has them (Qwen3).

The half-split ("NeoX") rotation: out = x * cos + rotate_half(x) * sin, rotate_half(x) = (-second half, first half).
Heads come before the head size in memory: x is [..., tokens, heads, D].

CANN: aclnnRmsNorm for each of q and k, then one aclnnApplyRotaryPosEmbV2 for both where the head size is 128 (it writes
in place, which is safe on the norms' fresh results), otherwise one aclnnRotaryPositionEmbedding each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels.norms import refuses_dtypes, refuses_norm, rms_norm_reference
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider

PAIR_HEAD_SIZE = 128  # aclnnApplyRotaryPosEmbV2: D must be 128
MOST_HEADS = 1000  # aclnnRotaryPositionEmbedding on A2/A3, half mode: B and N below 1000
LARGEST_HEAD = 896  # same: D below 896 and even

ROTATE = ("npu::npu_rotary_mul",)
ROTATE_PAIR = ("npu::npu_apply_rotary_pos_emb",)
NORM = ("npu::npu_rms_norm",)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin; x [..., T, N, D], cos and sin [..., T, 1, D] (broadcast over the heads).

    bfloat16 is computed in float32 and rounded once, as CANN's kernels do it.
    """
    wide = x.float() if x.dtype == torch.bfloat16 else x
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype).contiguous()


def qk_rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both rotated; q [..., T, Nq, D], k [..., T, Nk, D]."""
    return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin)


def qk_norm_rope_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_epsilon: float,
    k_epsilon: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """Both normalised over the head size and rotated; the weights are [D]."""
    return qk_rope_reference(
        rms_norm_reference(q, q_weight, q_epsilon), rms_norm_reference(k, k_weight, k_epsilon), cos, sin
    )


def _fake(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


def _four_dimensions(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 3 else x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = torch.ops.npu.npu_rotary_mul(_four_dimensions(x), _four_dimensions(cos), _four_dimensions(sin))
    return rotated.view(x.shape)


def _cann_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _norms(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_epsilon: float, k_epsilon: float
) -> tuple[Tensor, Tensor]:
    norm = torch.ops.npu.npu_rms_norm
    return norm(q, q_weight, q_epsilon)[0], norm(k, k_weight, k_epsilon)[0]


def _cann_norm_rope_pair(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_epsilon: float,
    k_epsilon: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    q, k = _norms(q, k, q_weight, k_weight, q_epsilon, k_epsilon)
    wide = [_four_dimensions(item) for item in (q, k, cos, sin)]
    torch.ops.npu.npu_apply_rotary_pos_emb(*wide, "BSND", "half")  # writes q and k
    return q, k


def _cann_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_epsilon: float,
    k_epsilon: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    return _cann_rope(*_norms(q, k, q_weight, k_weight, q_epsilon, k_epsilon), cos, sin)


def _refuses_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str:
    if q.dim() not in (3, 4):
        return f"{q.dim()} dimensions, the operator takes 3 or 4"
    if max(q.shape[-2], k.shape[-2], q.shape[0] if q.dim() == 4 else 1) >= MOST_HEADS:
        return f"heads and batch must stay below {MOST_HEADS}"
    if q.shape[-1] >= LARGEST_HEAD or q.shape[-1] % 2:
        return f"head size {q.shape[-1]} must be even and below {LARGEST_HEAD}"
    return refuses_dtypes(q, k, cos, sin)


def _refuses_norm_rope(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *rest: Any) -> str:
    _, _, cos, sin = rest
    return _refuses_rope(q, k, cos, sin) or refuses_norm(q, q_weight) or refuses_norm(k, k_weight)


def _refuses_norm_rope_pair(*args: Any) -> str:
    q, k, cos, sin = args[0], args[1], args[-2], args[-1]
    if q.shape[-1] != PAIR_HEAD_SIZE:
        return f"head size {q.shape[-1]} is not {PAIR_HEAD_SIZE}"
    if not q.numel():
        return "empty tensors are not taken"
    whole = cos.dim() == q.dim() and cos.shape[:-2] == q.shape[:-2] == k.shape[:-2] and cos.shape == sin.shape
    return _refuses_norm_rope(*args) if whole else "cos and sin must cover every token of the batch"


def _rope_example(dtype: torch.dtype) -> tuple[Any, ...]:
    angle = torch.randn(7, 1, 32).repeat(1, 1, 2)
    q, k = torch.randn(7, 4, 64, dtype=dtype), torch.randn(7, 2, 64, dtype=dtype)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


def _norm_rope_example(dtype: torch.dtype) -> tuple[Any, ...]:
    q, k, cos, sin = _rope_example(dtype)
    return q, k, torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype), 1e-6, 1e-5, cos, sin


QK_ROPE = FusedOperator(
    "qk_rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    reference=qk_rope_reference,
    fake=_fake,
    providers=(
        Provider("aclnnRotaryPositionEmbedding", _cann_rope, ROTATE, _refuses_rope),
        Provider("composition", qk_rope_reference),
    ),
    example=_rope_example,
)
QK_NORM_ROPE = FusedOperator(
    "qk_norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float q_epsilon, float k_epsilon, "
    "Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    reference=qk_norm_rope_reference,
    fake=_fake,
    providers=(
        Provider("aclnnApplyRotaryPosEmbV2", _cann_norm_rope_pair, NORM + ROTATE_PAIR, _refuses_norm_rope_pair),
        Provider("aclnnRotaryPositionEmbedding", _cann_norm_rope, NORM + ROTATE, _refuses_norm_rope),
        Provider("composition", qk_norm_rope_reference),
    ),
    example=_norm_rope_example,
)
