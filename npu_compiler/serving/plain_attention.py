"""Attention with what the fused operator has no argument for, as plain operators over the paged cache.

`npu_fused_infer_attention_score` takes no soft cap, no ALiBi slopes, no sliding window over queries that lie one behind
the other, and its first version no sinks. Layers with one of these go through here. Shapes do not depend on the texts
(every query reads the whole row of the block table, and a mask hides what it must not see) and nothing is read on the
host, so that a full graph holds it as it is. That makes it complete, not fast: a step reads `max_model_len` keys for
each of its tokens, however short the texts are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_HIDDEN = -1e30
"""The score of a key that must not be seen. Finite: rows of padding see no key at all, and must not become NaN."""
_ELEMENTS = 1 << 26
"""Elements of keys that are gathered at a time: 256 MiB."""


@dataclass(frozen=True)
class Extras:
    """What a layer's attention has beside scale and causality."""

    window: int | None = None
    """A query sees the last `window` keys, its own included."""
    soft_cap: float | None = None
    """Scores become soft_cap * tanh(score / soft_cap)."""
    slopes: Tensor | None = None
    """[heads] float32: ALiBi's, times how far a key lies back"""
    sinks: Tensor | None = None
    """[heads]: a score of no key, which takes its part of the softmax"""

    def __str__(self) -> str:
        kinds = {"a window": self.window, "a soft cap": self.soft_cap, "slopes": self.slopes, "sinks": self.sinks}
        return " and ".join(kind for kind, value in kinds.items() if value is not None)

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.window, self.soft_cap, self.slopes, self.sinks))


def attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float,
    extras: Extras,
) -> Tensor:
    """[tokens, heads, head size] of query's type.

    query [tokens, heads, head size], one request behind the other; caches [blocks, block size, kv heads, head size];
    block_table [requests, blocks]; query_starts [requests + 1] and lengths [requests] on the device.
    """
    tokens = torch.arange(query.shape[0], device=query.device)
    ends, lengths = query_starts[1:], lengths[: query_starts.shape[0] - 1]
    row = (tokens[:, None] >= ends[None, :]).sum(-1).clamp(max=ends.shape[0] - 1)
    positions = lengths[row] - ends[row] + tokens
    _, size, kv_heads, head_size = key_cache.shape
    at_a_time = max(1, _ELEMENTS // (block_table.shape[1] * size * kv_heads * head_size))
    outputs = []
    for first in range(0, query.shape[0], at_a_time):
        part = slice(first, first + at_a_time)
        blocks = block_table[row[part]]
        keys, values = (_gathered(cache, blocks) for cache in (key_cache, value_cache))
        outputs.append(_attend(query[part], keys, values, positions[part], scale, extras))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _gathered(cache: Tensor, blocks: Tensor) -> Tensor:
    """[tokens, kv heads, keys, head size] float32 of blocks [tokens, blocks a request]."""
    return cache[blocks].flatten(1, 2).transpose(1, 2).float()


def _attend(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float, extras: Extras) -> Tensor:
    kv_heads = keys.shape[1]
    grouped = query.float().unflatten(1, (kv_heads, -1))  # [tokens, kv heads, heads of one, head size]
    scores = (grouped @ keys.transpose(2, 3)) * scale
    if extras.soft_cap is not None:
        scores = torch.tanh(scores / extras.soft_cap) * extras.soft_cap
    behind = positions[:, None] - torch.arange(keys.shape[2], device=query.device)  # [tokens, keys]
    if extras.slopes is not None:
        scores = scores - extras.slopes.view(1, kv_heads, -1, 1) * behind[:, None, None, :]
    hidden = behind < 0
    if extras.window is not None:
        hidden = hidden | (behind >= extras.window)
    scores = scores.masked_fill(hidden[:, None, None, :], _HIDDEN)
    if extras.sinks is not None:
        sinks = extras.sinks.float().view(1, kv_heads, -1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ values).flatten(1, 2).to(query.dtype)
