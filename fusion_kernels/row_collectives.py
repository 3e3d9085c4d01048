"""Collectives over the rows of a tensor, for programs whose ranks each work on their part of the rows.

Rank r of n has rows r*s to (r+1)*s with s = ceil(rows / n); where that is more than there are, the last ranks' parts
are filled up with zeros. Nothing is padded, and no copy made, where n divides the rows.

CANN: HcclReduceScatter, HcclAllGather and HcclAlltoAll, which take equal parts from all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from npu_compiler.fusion_kernels.operator import FusedOperator, Provider


def reduce_scatter_rows_reference(x: Tensor, group: str, ranks: int) -> Tensor:
    """This rank's rows of the sum over `group` of x [rows, ...]; the result is [ceil(rows / ranks), ...].

    Args:
        group: name of a process group, as `torch.ops._c10d_functional` takes it.
        ranks: its size.
    """
    whole = _filled_up(x, ranks)
    part = x.new_empty((whole.shape[0] // ranks, *x.shape[1:]))
    dist.reduce_scatter_single(part, whole, group=_resolve_process_group(group))
    return part


def all_gather_rows_reference(x: Tensor, group: str, ranks: int, rows: int) -> Tensor:
    """The first `rows` rows of all ranks' parts, [rows, ...]; x [ceil(rows / ranks), ...] is this rank's."""
    whole = x.new_empty((x.shape[0] * ranks, *x.shape[1:]))
    dist.all_gather_single(whole, x.contiguous(), group=_resolve_process_group(group))
    return whole[:rows]


def shard_rows_reference(x: Tensor, group: str, ranks: int) -> Tensor:
    """This rank's rows of x [rows, ...], which all ranks have: [ceil(rows / ranks), ...]. Nothing is communicated."""
    whole = _filled_up(x, ranks)
    size = whole.shape[0] // ranks
    start = _resolve_process_group(group).rank() * size
    return whole[start : start + size].clone()


def unshard_rows_reference(x: Tensor, group: str, ranks: int, rows: int) -> Tensor:
    """[rows, ...]: this rank's rows x [ceil(rows / ranks), ...] in their places, zeros in those of the others. Nothing
    is communicated; the sum over the group is what all_gather_rows gives."""
    whole = x.new_zeros((x.shape[0] * ranks, *x.shape[1:]))
    start = _resolve_process_group(group).rank() * x.shape[0]
    whole[start : start + x.shape[0]] = x
    return whole[:rows]


def all_to_all_rows_reference(x: Tensor, group: str, ranks: int) -> Tensor:
    """This rank's rows of the columns of all ranks, in their order: [ceil(rows / ranks), ranks * columns]; x
    [rows, columns] is this rank's columns of all rows."""
    whole = _filled_up(x, ranks)
    came = torch.empty_like(whole)
    dist.all_to_all_single(came, whole, group=_resolve_process_group(group))
    return _side_by_side(came, ranks)


def all_gather_columns_reference(x: Tensor, group: str, ranks: int) -> Tensor:
    """The columns of all ranks, in their order: [rows, ranks * columns]; x [rows, columns] is this rank's."""
    whole = x.new_empty((x.shape[0] * ranks, x.shape[1]))
    dist.all_gather_single(whole, x.contiguous(), group=_resolve_process_group(group))
    return _side_by_side(whole, ranks)


def own_layer_reference(layers: list[Tensor], group: str) -> Tensor:
    """A copy of the one of `layers` that is this rank's: rank r has the r-th; ranks beyond them have the last.

    Args:
        layers: of one shape, dtype and device; all ranks have them all.
        group: name of a process group. Nothing is communicated.
    """
    rank = _resolve_process_group(group).rank()
    return layers[min(rank, len(layers) - 1)].clone(memory_format=torch.contiguous_format)


def part_of(rows: int, ranks: int) -> int:
    """How many rows a rank has: rounded up. Written as vLLM does (cdiv), so that symbols are the same expression."""
    return -(rows // -ranks)


def _filled_up(x: Tensor, ranks: int) -> Tensor:
    missing = -x.shape[0] % ranks
    return torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) if missing else x.contiguous()


def _side_by_side(parts: Tensor, ranks: int) -> Tensor:
    """[ranks * rows, columns] as [rows, ranks * columns]."""
    rows = parts.shape[0] // ranks
    return parts.view(ranks, rows, -1).transpose(0, 1).reshape(rows, ranks * parts.shape[1])


def _fake_part(x: Tensor, group: str, ranks: int) -> Tensor:
    return torch.empty((part_of(x.shape[0], ranks), *x.shape[1:]), dtype=x.dtype, device=x.device)


def _fake_whole(x: Tensor, group: str, ranks: int, rows: int) -> Tensor:
    return torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device)


def _fake_exchanged(x: Tensor, group: str, ranks: int) -> Tensor:
    return torch.empty((part_of(x.shape[0], ranks), ranks * x.shape[1]), dtype=x.dtype, device=x.device)


def _fake_columns(x: Tensor, group: str, ranks: int) -> Tensor:
    return torch.empty((x.shape[0], ranks * x.shape[1]), dtype=x.dtype, device=x.device)


def _fake_own(layers: list[Tensor], group: str) -> Tensor:
    return torch.empty_like(layers[0], memory_format=torch.contiguous_format)


def _example(dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(5, 32, dtype=dtype), "0", 1  # "0" is the name of the default group


REDUCE_SCATTER_ROWS = FusedOperator(
    "reduce_scatter_rows(Tensor x, str group, int ranks) -> Tensor",
    reference=reduce_scatter_rows_reference,
    fake=_fake_part,
    providers=(Provider("composition", reduce_scatter_rows_reference),),
    example=_example,
)
ALL_GATHER_ROWS = FusedOperator(
    "all_gather_rows(Tensor x, str group, int ranks, SymInt rows) -> Tensor",
    reference=all_gather_rows_reference,
    fake=_fake_whole,
    providers=(Provider("composition", all_gather_rows_reference),),
    example=lambda dtype: (*_example(dtype), 5),
)
SHARD_ROWS = FusedOperator(
    "shard_rows(Tensor x, str group, int ranks) -> Tensor",
    reference=shard_rows_reference,
    fake=_fake_part,
    providers=(Provider("composition", shard_rows_reference),),
    example=_example,
)
UNSHARD_ROWS = FusedOperator(
    "unshard_rows(Tensor x, str group, int ranks, SymInt rows) -> Tensor",
    reference=unshard_rows_reference,
    fake=_fake_whole,
    providers=(Provider("composition", unshard_rows_reference),),
    example=lambda dtype: (*_example(dtype), 5),
)
ALL_TO_ALL_ROWS = FusedOperator(
    "all_to_all_rows(Tensor x, str group, int ranks) -> Tensor",
    reference=all_to_all_rows_reference,
    fake=_fake_exchanged,
    providers=(Provider("composition", all_to_all_rows_reference),),
    example=_example,
)
ALL_GATHER_COLUMNS = FusedOperator(
    "all_gather_columns(Tensor x, str group, int ranks) -> Tensor",
    reference=all_gather_columns_reference,
    fake=_fake_columns,
    providers=(Provider("composition", all_gather_columns_reference),),
    example=_example,
)
OWN_LAYER = FusedOperator(
    "own_layer(Tensor[] layers, str group) -> Tensor",
    reference=own_layer_reference,
    fake=_fake_own,
    providers=(Provider("composition", own_layer_reference),),
    example=lambda dtype: ([torch.randn(5, 32, dtype=dtype), torch.randn(5, 32, dtype=dtype)], "0"),
)
