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
    dtype: torch.dtype = torch.bfloat16


def summed(partial: Tensor) -> Tensor:
    """The sum over the default group, whose name is "0"."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(partial, "sum", "0"))


class Linear(nn.Module):
    """A product without bias, weight [in, out]."""

    def __init__(self, size: int, out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(size, out) / size**0.5).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Norm(nn.Module):
    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class Attention(nn.Module):
    """Causal attention of one prompt, on this rank's heads."""

    def __init__(self, sizes: Sizes, ranks: int) -> None:
        super().__init__()
        self.heads, own = sizes.heads // ranks, sizes.hidden // ranks
        self.qkv, self.out = Linear(sizes.hidden, 3 * own, sizes.dtype), Linear(own, sizes.hidden, sizes.dtype)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).view(x.shape[0], 3, self.heads, -1).unbind(1)
        query, key, value = (part.transpose(0, 1)[None] for part in parts)
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return summed(self.out(found[0].transpose(0, 1).reshape(x.shape[0], -1)))


class Mlp(nn.Module):
    def __init__(self, sizes: Sizes, ranks: int) -> None:
        super().__init__()
        own = sizes.inner // ranks
        self.up, self.down = Linear(sizes.hidden, 2 * own, sizes.dtype), Linear(own, sizes.hidden, sizes.dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return summed(self.down(functional.silu(gate) * up))


class Experts(nn.Module):
    """A layer of experts in the form of docs/moe.md: each rank has a part of every expert, or, with `whole`, some whole
    experts."""

    def __init__(self, sizes: Sizes, rank: int, ranks: int, whole: bool) -> None:
        super().__init__()
        self.sizes, self.whole = sizes, whole
        count, own = (sizes.experts // ranks, sizes.inner) if whole else (sizes.experts, sizes.inner // ranks)
        self.range = [rank * count, (rank + 1) * count] if whole else [0, sizes.experts]
        generator = torch.Generator().manual_seed(7)  # the router is the same on all ranks
        router = torch.randn(sizes.hidden, sizes.experts, generator=generator).to(sizes.dtype)
        self.router = nn.Parameter(router, requires_grad=False)
        self.up = Linear(sizes.hidden, 2 * own, sizes.dtype)
        self.down = Linear(own, sizes.hidden, sizes.dtype)
        for layer in (self.up, self.down):
            layer.weight = nn.Parameter(layer.weight.expand(count, -1, -1).contiguous(), requires_grad=False)

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
        weights = weights.to(x.dtype)
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
        self.before, self.between = Norm(sizes.hidden, sizes.dtype), Norm(sizes.hidden, sizes.dtype)
        self.attention = Attention(sizes, ranks)
        self.mlp: nn.Module = Experts(sizes, rank, ranks, whole) if sizes.experts else Mlp(sizes, ranks)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = x if residual is None else x + residual
        x = self.attention(self.before(residual))
        residual = x + residual
        return self.mlp(self.between(residual)), residual


class Decoder(nn.Module):
    """Layers and a last norm; x [tokens, hidden] is the same on all ranks."""

    def __init__(self, sizes: Sizes, layers: int, rank: int, ranks: int, whole: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes, rank, ranks, whole) for _ in range(layers))
        self.last = Norm(sizes.hidden, sizes.dtype)

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.last(x + residual)
