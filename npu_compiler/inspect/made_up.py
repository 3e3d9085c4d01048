"""What printed programs are made of besides torch: inputs where they are run without their own, and what is unknown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Never

import torch
from torch import Tensor


def tensor(
    storages: dict[int, Tensor],
    storage: int,
    shape: Sequence[int],
    stride: Sequence[int],
    offset: int,
    dtype: torch.dtype,
    device: str,
    counted: bool = False,
) -> Tensor:
    """A tensor of this layout: floats are drawn from a normal distribution with a fixed seed, the rest is zero.

    Args:
        storages: what was made before, by number; tensors of one number share memory.
        counted: integers are 0, 1, 2, ..., and truth values alternate.
    """
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else -1
    needed = (last + 1) * dtype.itemsize
    if storage not in storages:
        storages[storage] = filled(last + 1, dtype, storage, counted).to(device).view(torch.uint8)
    elif storages[storage].numel() < needed:  # an alias that reaches further: the memory grows, and stays the same one
        storages[storage].untyped_storage().resize_(needed)
        storages[storage].resize_(needed).view(dtype).copy_(filled(last + 1, dtype, storage, counted))
    return storages[storage][:needed].view(dtype).as_strided(tuple(shape), tuple(stride), offset)


def filled(count: int, dtype: torch.dtype, seed: int, counted: bool) -> Tensor:
    """Made-up values: floats of a normal distribution; integers are counted to 127 and begin again, or are zeros."""
    if dtype.is_floating_point:
        return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if not counted:
        return torch.zeros(count, dtype=dtype)
    return (torch.arange(count) % (2 if dtype is torch.bool else 128)).to(dtype)


def unknown(text: str) -> Never:
    """Stands for what a printed program can't say: a user's Python function, say.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(f"{text} is no operator: the dumped program names it but can't run it")
