"""Rows that go to the ranks of their experts, sorted by expert, and come back as their weighted sum: MC2.

Each rank sends its part of the rows: rank r of n has rows r*s to (r+1)*s with s = ceil(rows / n). A rank gets room for
every routing, n * s * min(its experts, a token's experts) rows, of which those of its experts are in the front.

CANN: aclnnMoeDistributeDispatchV2 and aclnnMoeDistributeCombineV2, whose communicator may have no other operator in it.
Both ways of a call, and all ranks, have to be served alike: that is decided from what they have in common, the chip,
sizes and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from npu_compiler.fusion_kernels.expert_exchange import ARRIVAL, exchanged, own_part, owners_of, slots_of
from npu_compiler.fusion_kernels.expert_limits import refusal
from npu_compiler.fusion_kernels.norm_quant import quantize_rows
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider
from npu_compiler.fusion_kernels.row_collectives import part_of
from npu_compiler.graph.soc import family

NOTED = 128
"""Numbers for each row that dispatch hands to combine; what they say is the provider's."""


def dispatch_reference(x: Tensor, ids: Tensor, group: str, ranks: int, experts: int) -> tuple[Tensor, ...]:
    """What the ranks send to this one's experts.

    Args:
        x: [rows, hidden]. `ids`: [rows, k] int32, experts of each row, all different. Of all ranks, the same on all.
        group: name of a process group that nothing else uses. `ranks`: its size.
        experts: on all ranks together, as many on each; expert e is on rank e // (experts / ranks).

    Returns:
        rows: [room, hidden], sorted by expert, and for each by source and token; arbitrary behind the last.
        counts: [experts / ranks] int64, how many rows each of this rank's experts has.
        assist: [room * NOTED] int32, received: [experts] int32, for mc2_combine.
    """
    x, ids, _ = _own(x, ids, group, ranks, experts)
    (rows,), *noted = _sent((x,), ids, group, ranks, experts)
    return rows, *noted


def dispatch_quant_reference(x: Tensor, ids: Tensor, group: str, ranks: int, experts: int) -> tuple[Tensor, ...]:
    """What `dispatch_reference` sends, quantized to int8 before it is sent, each row by its largest value.

    Args:
        x, ids, group, ranks, experts: as there.

    Returns:
        rows: [room, hidden] int8. `scales`: [room] float32, what a row is multiplied by to have its values back.
        counts, assist, received: as there.
    """
    x, ids, _ = _own(x, ids, group, ranks, experts)
    values, scales = quantize_rows(x.to(torch.promote_types(torch.float32, x.dtype)))
    (rows, scales), *noted = _sent((values, scales), ids, group, ranks, experts)
    return rows, scales, *noted


def _sent(
    payload: Sequence[Tensor], ids: Tensor, group: str, ranks: int, experts: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """What comes to this rank of each payload, which has as many rows as `ids`, this rank's; counts, assist, received
    as of a dispatch."""
    (size, top_k), each = ids.shape, experts // ranks
    room = size * min(each, top_k)
    slots = _places(ids, experts, ranks)
    last = ranks * room
    token = torch.arange(size * top_k, device=ids.device).div(top_k, rounding_mode="floor")
    source = token.new_zeros(last + 1).scatter_(0, slots, token)[:-1]
    local = ids.reshape(-1).remainder(each)
    to = local.new_full((last + 1,), each).scatter_(0, slots, local)[:-1]
    came = [exchanged(rows.index_select(0, source), group) for rows in payload]
    to = exchanged(to, group)
    order = torch.sort(to, stable=True).indices
    counts = (to.unsqueeze(1) == torch.arange(each, device=ids.device)).sum(0)
    assist = ids.new_zeros(last * NOTED, dtype=torch.int32)
    assist[:last] = order
    rows = [item.index_select(0, order) for item in came]
    return rows, counts, assist, ids.new_zeros(experts, dtype=torch.int32)


def combine_reference(
    rows: Tensor,
    ids: Tensor,
    weights: Tensor,
    assist: Tensor,
    received: Tensor,
    group: str,
    ranks: int,
    experts: int,
) -> Tensor:
    """The weighted sum of what experts made of each of this rank's rows: [ceil(rows / ranks), hidden].

    Args:
        rows: [room, hidden], what this rank's experts computed, as mc2_dispatch sorted them.
        ids: as of the dispatch. `weights`: [rows, k]. Of all ranks.
        assist, received: of the dispatch. The rest as there.
    """
    weights, ids, _ = _own(weights, ids, group, ranks, experts)
    order = assist[: rows.shape[0]].long()
    back = exchanged(torch.empty_like(rows).index_copy_(0, order, rows), group)
    slots = _places(ids, experts, ranks)
    missing = slots >= back.shape[0]
    picked = back.index_select(0, slots.masked_fill(missing, 0)).masked_fill(missing.unsqueeze(1), 0)
    wide = torch.promote_types(torch.float32, rows.dtype)
    return (picked.view(*ids.shape, -1).to(wide) * weights.to(wide).unsqueeze(-1)).sum(1).to(rows.dtype)


def _own(values: Tensor, ids: Tensor, group: str, ranks: int, none: int) -> tuple[Tensor, Tensor, int]:
    """This rank's part of both, filled up with rows that have the expert `none`; and how many rows it has."""
    rank, size = _resolve_process_group(group).rank(), part_of(ids.shape[0], ranks)
    return own_part(values, rank, size, 0), own_part(ids, rank, size, none), size


def _places(ids: Tensor, experts: int, ranks: int) -> Tensor:
    """Where in the buffers each row goes; behind them where it has no expert."""
    owners, flat = owners_of(ids, experts, ranks).view(-1), ids.reshape(-1)
    return slots_of(owners, flat, flat, ranks, ids.shape[0] * min(experts // ranks, ids.shape[1]), ARRIVAL)


def _dispatch_by_cann(x: Tensor, ids: Tensor, group: str, ranks: int, experts: int) -> tuple[Tensor, ...]:
    rows, _, *noted = _called(x, ids, group, ranks, experts, quant_mode=0)
    return rows, *noted


def _dispatch_quant_by_cann(x: Tensor, ids: Tensor, group: str, ranks: int, experts: int) -> tuple[Tensor, ...]:
    return _called(x, ids, group, ranks, experts, quant_mode=2)  # int8, a scale for each row


def _called(
    x: Tensor, ids: Tensor, group: str, ranks: int, experts: int, quant_mode: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = ids.shape[0]
    x, ids, _ = _own(x, ids, group, ranks, 0)
    rows, scales, assist, counts, received, *_ = torch.ops.npu.npu_moe_distribute_dispatch_v2(
        x,
        ids,
        *_world(x, group, ranks, experts),
        x_active_mask=_active(ids, total, group, ranks),
        quant_mode=quant_mode,
    )
    return rows, scales, counts, assist, received


def _combine_by_cann(
    rows: Tensor,
    ids: Tensor,
    weights: Tensor,
    assist: Tensor,
    received: Tensor,
    group: str,
    ranks: int,
    experts: int,
) -> Tensor:
    total = ids.shape[0]
    weights, ids, _ = _own(weights, ids, group, ranks, 0)
    result: Tensor = torch.ops.npu.npu_moe_distribute_combine_v2(
        rows,
        ids,
        assist,
        received,
        weights.float(),
        *_world(rows, group, ranks, experts),
        x_active_mask=_active(ids, total, group, ranks),
    )
    return result


def _world(rows: Tensor, group: str, ranks: int, experts: int) -> tuple[str, int, int, int]:
    # the communicator's name differs from run to run; torch_npu asks for it by the number of the device
    found = _resolve_process_group(group)
    name = found._get_backend(rows.device).get_hccl_comm_name(rows.device.index)
    return name, ranks, found.rank(), experts


def _active(ids: Tensor, total: int, group: str, ranks: int) -> Tensor | None:
    """Which of this rank's rows are rows of the `total` of all ranks; None where no rank is filled up."""
    if total % ranks == 0:
        return None
    start = _resolve_process_group(group).rank() * ids.shape[0]
    return torch.arange(start, start + ids.shape[0], device=ids.device) < total


def _refuses_dispatch(x: Tensor, ids: Tensor, group: str, ranks: int, experts: int) -> str:
    return refusal(family(), ranks, experts, ids.shape[1], part_of(ids.shape[0], ranks), x.shape[1], x.dtype)


def _refuses_combine(rows: Tensor, ids: Tensor, weights: Tensor, assist: Tensor, received: Tensor, *more: Any) -> str:
    return _refuses_dispatch(rows, ids, *more)


def _fake_dispatch(x: Tensor, ids: Tensor, group: str, ranks: int, experts: int) -> tuple[Tensor, ...]:
    each = experts // ranks
    room = ranks * part_of(x.shape[0], ranks) * min(each, ids.shape[1])
    return (
        x.new_empty((room, x.shape[1])),
        ids.new_empty(each, dtype=torch.int64),
        ids.new_empty(room * NOTED),
        ids.new_empty(experts),
    )


def _fake_dispatch_quant(x: Tensor, ids: Tensor, group: str, ranks: int, experts: int) -> tuple[Tensor, ...]:
    rows, *noted = _fake_dispatch(x, ids, group, ranks, experts)
    return rows.new_empty(rows.shape, dtype=torch.int8), rows.new_empty(rows.shape[0], dtype=torch.float32), *noted


def _fake_combine(
    rows: Tensor, ids: Tensor, weights: Tensor, assist: Tensor, received: Tensor, group: str, ranks: int, experts: int
) -> Tensor:
    return rows.new_empty((part_of(ids.shape[0], ranks), rows.shape[1]))


def _example(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(5, 32, dtype=dtype), torch.stack([torch.randperm(6)[:2] for _ in range(5)]).int()


def _combine_example(dtype: torch.dtype) -> tuple[Any, ...]:
    rows, (_, ids) = torch.randn(10, 32, dtype=dtype), _example(dtype)
    assist = torch.zeros(10 * NOTED, dtype=torch.int32)
    assist[:10] = torch.randperm(10)
    return rows, ids, torch.rand(5, 2), assist, torch.zeros(6, dtype=torch.int32), "0", 1, 6


MC2_DISPATCH = FusedOperator(
    "mc2_dispatch(Tensor x, Tensor ids, str group, int ranks, int experts) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=dispatch_reference,
    fake=_fake_dispatch,
    providers=(
        Provider(
            "aclnnMoeDistributeDispatchV2",
            _dispatch_by_cann,
            ("npu::npu_moe_distribute_dispatch_v2",),
            _refuses_dispatch,
        ),
        Provider("composition", dispatch_reference),
    ),
    example=lambda dtype: (*_example(dtype), "0", 1, 6),
)
MC2_DISPATCH_QUANT = FusedOperator(
    "mc2_dispatch_quant(Tensor x, Tensor ids, str group, int ranks, int experts) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=dispatch_quant_reference,
    fake=_fake_dispatch_quant,
    providers=(
        Provider(
            "aclnnMoeDistributeDispatchV2",
            _dispatch_quant_by_cann,
            ("npu::npu_moe_distribute_dispatch_v2",),
            _refuses_dispatch,
        ),
        Provider("composition", dispatch_quant_reference),
    ),
    example=lambda dtype: (*_example(dtype), "0", 1, 6),
)
MC2_COMBINE = FusedOperator(
    "mc2_combine(Tensor rows, Tensor ids, Tensor weights, Tensor assist, Tensor received, str group, int ranks, "
    "int experts) -> Tensor",
    reference=combine_reference,
    fake=_fake_combine,
    providers=(
        Provider(
            "aclnnMoeDistributeCombineV2", _combine_by_cann, ("npu::npu_moe_distribute_combine_v2",), _refuses_combine
        ),
        Provider("composition", combine_reference),
    ),
    example=_combine_example,
)
