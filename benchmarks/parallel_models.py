"""Tensor-parallel decoder layers in plain PyTorch, a rank's part of them: what `python -m benchmarks parallel` runs."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as functional
import torch_npu
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model's sizes, over all ranks; `experts` 0 is a dense model, and `inner` is that of one expert."""

    hidden: int = 512
    heads: int = 8
    inner: int = 1024
    experts: int = 0
    chosen: int = 2
    dtype: torch.dtype = torch.float32


def summed(partial: Tensor) -> Tensor:
    """The sum over the default group, whose name is "0"."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(partial, "sum", "0"))


def drawn(*shape: int) -> Tensor:
    """A weight [..., in, out], the same on all ranks, which draw in the same order."""
    return torch.randn(shape) / shape[-2] ** 0.5


def parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)


class Linear(nn.Module):
    """A product without bias, weight [in, out]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class Attention(nn.Module):
    """Causal attention of one prompt, on this rank's heads."""

    def __init__(self, sizes: Sizes, rank: int, ranks: int) -> None:
        super().__init__()
        self.heads, size = sizes.heads // ranks, sizes.hidden
        qkv, out = drawn(size, 3 * size).unflatten(1, (3, ranks, -1)), drawn(size, size)
        self.qkv, self.out = Linear(qkv[:, :, rank].flatten(1)), Linear(out.chunk(ranks)[rank])

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).view(x.shape[0], 3, self.heads, -1).unbind(1)
        query, key, value = (part.transpose(0, 1)[None] for part in parts)
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return summed(self.out(found[0].transpose(0, 1).reshape(x.shape[0], -1)))


def part_of_inner(up: Tensor, down: Tensor, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """A rank's columns of gate and up [..., hidden, 2 * inner], and its rows of down [..., inner, hidden]."""
    own = up.unflatten(-1, (2, ranks, -1))[..., rank, :].flatten(-2)
    return own, down.chunk(ranks, dim=-2)[rank]


class Mlp(nn.Module):
    def __init__(self, sizes: Sizes, rank: int, ranks: int) -> None:
        super().__init__()
        whole = drawn(sizes.hidden, 2 * sizes.inner), drawn(sizes.inner, sizes.hidden)
        self.up, self.down = map(Linear, part_of_inner(*whole, rank, ranks))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return summed(self.down(functional.silu(gate) * up))


class Experts(nn.Module):
    """A layer of experts in the form of docs/moe.md: each rank has a part of every expert, or, with `whole`, some whole
    experts."""

    def __init__(self, sizes: Sizes, rank: int, ranks: int, whole: bool) -> None:
        super().__init__()
        self.sizes, self.whole = sizes, whole
        each = sizes.experts // ranks
        self.range = [rank * each, (rank + 1) * each] if whole else [0, sizes.experts]
        self.router = parameter(drawn(sizes.hidden, sizes.experts))
        weights = (
            drawn(sizes.experts, sizes.hidden, 2 * sizes.inner),
            drawn(sizes.experts, sizes.inner, sizes.hidden),
        )
        own = (weight[slice(*self.range)] for weight in weights) if whole else part_of_inner(*weights, rank, ranks)
        self.up, self.down = map(Linear, own)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen, _ = torch_npu.npu_moe_gating_top_k_softmax_v2(x @ self.router, k=self.sizes.chosen, renorm=1)
        rows, places, counts, _ = torch_npu.npu_moe_init_routing_v2(
            x, chosen, active_num=-1, expert_num=self.sizes.experts, expert_tokens_num_type=1,
            expert_tokens_num_flag=True, active_expert_range=self.range, quant_mode=-1, row_idx_type=0,
        )  # fmt: skip
        gate, up = _product(rows, self.up.weight, counts).chunk(2, dim=-1)
        down = _product(functional.silu(gate) * up, self.down.weight, counts)
        mode = 3 if self.whole else 2
        results = down.unsqueeze(1) if self.whole else down
        return summed(
            torch_npu.npu_moe_finalize_routing(results, None, None, None, weights, places, None, drop_pad_mode=mode)
        )


def _product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return torch_npu.npu_grouped_matmul(
        [rows], [weight], group_list=counts, split_item=3, group_type=0, group_list_type=1
    )[0]


class Layer(nn.Module):
    def __init__(self, sizes: Sizes, rank: int, ranks: int, whole: bool) -> None:
        super().__init__()
        self.before, self.between = Norm(sizes.hidden), Norm(sizes.hidden)
        self.attention = Attention(sizes, rank, ranks)
        self.mlp: nn.Module = Experts(sizes, rank, ranks, whole) if sizes.experts else Mlp(sizes, rank, ranks)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = x if residual is None else x + residual
        x = self.attention(self.before(residual))
        residual = x + residual
        return self.mlp(self.between(residual)), residual


class Decoder(nn.Module):
    """Layers and a last norm, with the same weights for any number of ranks and any placement; x [tokens, hidden] is
    the same on all ranks."""

    def __init__(self, sizes: Sizes, layers: int, rank: int, ranks: int, whole: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.ModuleList(Layer(sizes, rank, ranks, whole) for _ in range(layers))
        self.last = Norm(sizes.hidden)
        self.to(sizes.dtype)

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.last(x + residual)
