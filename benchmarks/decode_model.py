"""A Qwen3-like decoder in plain PyTorch, the same code on every device: steps with a static cache, and prefill."""

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
# The layers of Qwen3-0.6B: more weights than the caches of a CPU hold.
HIDDEN_1024 = Size(hidden=1024, heads=16, kv_heads=8, head_dim=128, intermediate=3072, vocab=8192)


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

    def projected(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (rows, heads, head_dim), keys and values (rows, kv_heads, head_dim) of x (rows, hidden)."""
        size, rows = self.size, x.shape[0]
        queries = rotate(self.q_norm(self.q(x).view(rows, size.heads, size.head_dim)), cos, sin)
        keys = rotate(self.k_norm(self.k(x).view(rows, size.kv_heads, size.head_dim)), cos, sin)
        return queries, keys, self.v(x).view(rows, size.kv_heads, size.head_dim)

    def forward(
        self, x: torch.Tensor, position: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        size = self.size
        queries, key, value = self.projected(x, cos, sin)
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
        return self.fed(x + self.attention(self.input_norm(x), position, cos, sin, mask))

    def fed(self, x: torch.Tensor) -> torch.Tensor:
        """The feed-forward block with its norm and residual."""
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


class ReadOnlyStep(nn.Module):
    """The same step for runtimes whose graphs change no input: the caches are inputs, the caller writes the new rows.

    Token ids, position and `2 * layers` caches (batch, kv_heads, positions, head_dim), keys before values, to logits,
    new keys and new values, both (layers, batch, kv_heads, head_dim). The weights are those of `decoder`.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, tokens: torch.Tensor, position: torch.Tensor, *caches: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        decoder = self.decoder
        x = decoder.embedding(tokens)
        cos = decoder.cos.index_select(0, position).unsqueeze(0)
        sin = decoder.sin.index_select(0, position).unsqueeze(0)
        past = decoder.masks.index_select(0, position - 1)  # without the row at `position`: it is written afterwards
        keys, values = [], []
        for index, layer in enumerate(decoder.layers):
            cached = caches[index], caches[len(decoder.layers) + index]
            mixed, key, value = attended(layer.attention, layer.input_norm(x), cos, sin, past, cached)
            x = layer.fed(x + mixed)
            keys.append(key)
            values.append(value)
        return decoder.head(decoder.norm(x)), torch.stack(keys), torch.stack(values)


def attended(
    attention: Attention,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    past: torch.Tensor,
    cached: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of one new token over the open rows of `cached` and itself; also its key and value."""
    size = attention.size
    queries, key, value = attention.projected(x, cos, sin)
    grouped = queries.view(size.batch, size.kv_heads, size.heads // size.kv_heads, size.head_dim)
    scale = size.head_dim**-0.5
    before = torch.matmul(grouped, cached[0].transpose(2, 3)) * scale + past
    own = (grouped * key.unsqueeze(2)).sum(-1, keepdim=True) * scale
    shares = torch.softmax(torch.cat((before, own), dim=-1), dim=-1)
    mixed = torch.matmul(shares[..., : size.positions], cached[1]) + shares[..., size.positions :] * value.unsqueeze(2)
    return attention.o(mixed.reshape(size.batch, size.heads * size.head_dim)), key, value


class Prefill(nn.Module):
    """A prompt of one request: embedded tokens (tokens, hidden) to logits of the last one (1, vocab); no cache.

    `grouped`: attention shares keys and values among heads; else they are repeated, for what knows no groups.
    """

    def __init__(self, decoder: Decoder, grouped: bool = True) -> None:
        super().__init__()
        self.decoder, self.grouped = decoder, grouped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        decoder, tokens = self.decoder, x.shape[0]
        cos, sin = decoder.cos[:tokens].unsqueeze(1), decoder.sin[:tokens].unsqueeze(1)
        for layer in decoder.layers:
            queries, keys, values = layer.attention.projected(layer.input_norm(x), cos, sin)
            if not self.grouped:
                times = queries.shape[1] // keys.shape[1]
                keys, values = keys.repeat_interleave(times, dim=1), values.repeat_interleave(times, dim=1)
            q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (queries, keys, values))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
            x = layer.fed(x + layer.attention.o(mixed[0].transpose(0, 1).reshape(tokens, -1)))
        return decoder.head(decoder.norm(x[-1:]))


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


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that a decode step reads: all but the embedding, of which it reads a row."""
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embedding" not in name)


def cache_bytes(model: nn.Module) -> int:
    """Bytes of the keys and values that a decode step reads."""
    return sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name.endswith(("keys", "values")))


def caches(decoder: Decoder) -> torch.Tensor:
    """Copies of keys and values: (2, layers, batch, kv_heads, positions, head_dim)."""
    attentions = [layer.attention for layer in decoder.layers]
    keys, values = [a.keys for a in attentions], [a.values for a in attentions]  # type: ignore[union-attr]
    return torch.stack((torch.stack(keys), torch.stack(values)))  # type: ignore[arg-type]


def inputs(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (batch,) and position (1,) of the measured step, three quarters into the cache."""
    return torch.arange(size.batch) % size.vocab, torch.tensor([size.positions * 3 // 4])
