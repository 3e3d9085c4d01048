"""Reference results of the LLM operators, in float64 and plain PyTorch: written from the formulas, sharing no code with
the kernels under test."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative to the largest element: a few units of the type's rounding."""


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Compares a result on any device with a float64 reference."""
    got = actual.cpu().double()
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    limit = factor * TOLERANCE[dtype] * max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
    worst = (got - expected).abs().max().item() if expected.numel() else 0.0
    assert worst <= limit, f"largest difference {worst}, allowed {limit}"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    hidden: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One request: query [Sq, N, D], key [Sk, Nk, D], value [Sk, Nk, Dv], hidden [Sq, Sk] or [N, Sq, Sk] bool.

    Returns the output [Sq, N, Dv] and the log-sum-exp [Sq, N]; rows that see nothing give zeros and +inf.
    """
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qnd,knd->nqk", query, key) * scale
    if bias is not None:
        scores = scores + bias.double()
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(scores, dim=-1) if key.shape[0] else torch.full(scores.shape[:2], -math.inf).double()
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    lse = torch.where(lse == -math.inf, math.inf, lse)
    return torch.einsum("nqk,knd->qnd", weights, value), lse.T


def causal(query_length: int, key_length: int) -> Tensor:
    """Hidden keys when the last query sees the last key."""
    shift = key_length - query_length
    return torch.ones(query_length, key_length, dtype=torch.bool).triu(shift + 1)


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Over gamma's dimensions; the normalised values and 1 / rms."""
    x, gamma = x.double(), gamma.double()
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    rstd = torch.rsqrt(x.pow(2).mean(dim=dims, keepdim=True) + epsilon)
    return x * rstd * gamma, rstd


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
