"""A Qwen3-like decoder for one decode step with a static KV cache, in plain PyTorch: the same code on every device."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of a decode step; `positions` is the length of the static cache."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    layers: int = 4
    positions: int = 256
    batch: int = 1


# Almost no compute: what is left is the cost of launching. The other one is a small model that computes something.
HIDDEN_32 = Size(hidden=32, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocab=128)
HIDDEN_256 = Size(hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=768, vocab=4096)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, written out as transformers writes it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (batch, heads, head_dim); cos and sin are (1, 1, head_dim)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention of one new token against a static cache, which it updates in place."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.q = nn.Linear(size.hidden, size.heads * size.head_dim, bias=False)
        self.k = nn.Linear(size.hidden, size.kv_heads * size.head_dim, bias=False)
        self.v = nn.Linear(size.hidden, size.kv_heads * size.head_dim, bias=False)
        self.o = nn.Linear(size.heads * size.head_dim, size.hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(size.head_dim), RMSNorm(size.head_dim)
        shape = (size.batch, size.kv_heads, size.positions, size.head_dim)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def forward(
        self, x: torch.Tensor, position: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        size = self.size
        queries = rotate(self.q_norm(self.q(x).view(size.batch, size.heads, size.head_dim)), cos, sin)
        key = rotate(self.k_norm(self.k(x).view(size.batch, size.kv_heads, size.head_dim)), cos, sin)
        value = self.v(x).view(size.batch, size.kv_heads, size.head_dim)
        self.keys[:, :, position] = key.unsqueeze(2)
        self.values[:, :, position] = value.unsqueeze(2)
        grouped = queries.view(size.batch, size.kv_heads, size.heads // size.kv_heads, size.head_dim)
        scores = torch.matmul(grouped, self.keys.transpose(2, 3)) * size.head_dim**-0.5 + mask
        mixed = torch.matmul(torch.softmax(scores, dim=-1), self.values)
        return self.o(mixed.reshape(size.batch, size.heads * size.head_dim))


class Layer(nn.Module):
    """Attention and a SwiGLU feed-forward block, both behind a norm and a residual."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention = Attention(size)
        self.input_norm, self.post_norm = RMSNorm(size.hidden), RMSNorm(size.hidden)
        self.gate = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.up = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.down = nn.Linear(size.intermediate, size.hidden, bias=False)

    def forward(
        self, x: torch.Tensor, position: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        x = x + self.attention(self.input_norm(x), position, cos, sin, mask)
        normed = self.post_norm(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class Decoder(nn.Module):
    """One decode step: token ids (batch,) int64 and position (1,) int64 to logits (batch, vocab) float32.

    All requests of the batch are at the same position. The cache is part of the module, so a step at the same position
    with the same tokens gives the same logits every time.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    masks: torch.Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocab, size.hidden)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = RMSNorm(size.hidden)
        self.head = nn.Linear(size.hidden, size.vocab, bias=False)
        frequencies = 1e4 ** (-torch.arange(0, size.head_dim, 2) / size.head_dim)
        angles = torch.outer(torch.arange(size.positions), torch.cat((frequencies, frequencies)))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        # Row p is added to the scores of a token at position p: the past and itself are open, the future is not.
        self.register_buffer("masks", torch.full((size.positions, size.positions), -1e30).triu(1))

    def forward(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        cos = self.cos.index_select(0, position).unsqueeze(0)
        sin = self.sin.index_select(0, position).unsqueeze(0)
        mask = self.masks.index_select(0, position)
        for layer in self.layers:
            x = layer(x, position, cos, sin, mask)
        return self.head(self.norm(x))


@torch.no_grad()
def decoder(size: Size, seed: int = 0) -> Decoder:
    """A seeded decoder on the CPU in float32, its cache filled with random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(size).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    for layer in model.layers:
        layer.attention.keys.normal_(generator=generator)  # type: ignore[union-attr, operator]
        layer.attention.values.normal_(generator=generator)  # type: ignore[union-attr, operator]
    return model


def inputs(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (batch,) and position (1,) of the measured step, three quarters into the cache."""
    return torch.arange(size.batch) % size.vocab, torch.tensor([size.positions * 3 // 4])
