"""Rotary position embedding of queries and keys straight from vLLM's table of cosines and sines.

CANN: aclnnRopeWithSinCosCache (torch_npu.npu_mrope). It gathers the rows by position itself, rotates q and k in one
kernel, reads them as parts of a wider projection (only rows have to be contiguous), and takes both rotations: of halves
("NeoX") and of neighbours ("GPT-J"); of the whole head or of its first elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels.norms import refuses_dtypes
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider


def rotate_reference(x: Tensor, positions: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """x [T, N, D] with its first R elements rotated; positions [T]; table [P, R]: R / 2 cosines, then R / 2 sines."""
    width = table.shape[-1]
    cos, sin = table.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    turned, rest = x[..., :width], x[..., width:]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((rotated, rest), dim=-1).contiguous()


def qk_rope_cached_reference(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Both rotated; q [T, Nq, D], k [T, Nk, D]."""
    return rotate_reference(q, positions, table, interleaved), rotate_reference(k, positions, table, interleaved)


def _fake(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


def _rows(x: Tensor) -> Tensor:
    """[T, N, D] as [T, N * D]; a part of a wider projection stays a view of it."""
    return x.flatten(1) if x.is_contiguous() or x.stride(1) == x.shape[2] else x.contiguous().flatten(1)


def _cann(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    mode = "interleave" if interleaved else "half"  # the wheel's spelling; its page says "interleaved"
    q_out, k_out = torch.ops.npu.npu_mrope(positions, _rows(q), _rows(k), table, q.shape[-1], rotary_mode=mode)
    return q_out.view(q.shape), k_out.view(k.shape)


def _refuses(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, interleaved: bool) -> str:
    if positions.dtype not in (torch.int32, torch.int64):
        return f"positions are {positions.dtype}, the operator takes int32 and int64"
    if not q.numel():
        return "empty tensors are not taken"
    return refuses_dtypes(q, k, table)


def _example(dtype: torch.dtype) -> tuple[Any, ...]:
    packed = torch.randn(7, 8 * 32, dtype=dtype).view(7, 8, 32)
    angle = torch.randn(50, 8)
    table = torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype)
    return packed[:, :4], packed[:, 4:6], torch.tensor([3, 0, 49, 7, 7, 20, 1]), table, True


QK_ROPE_CACHED = FusedOperator(
    "qk_rope_cached(Tensor q, Tensor k, Tensor positions, Tensor table, bool interleaved) -> (Tensor, Tensor)",
    reference=qk_rope_cached_reference,
    fake=_fake,
    providers=(
        Provider("aclnnRopeWithSinCosCache", _cann, ("npu::npu_mrope",), _refuses),
        Provider("composition", qk_rope_cached_reference),
    ),
    example=_example,
)
