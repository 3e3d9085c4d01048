"""Rows that go to the ranks of their experts and come back, in buffers of a fixed size, so that a graph can hold it.

Of each of its tokens a rank (the source) sends a row to each of the token's experts. The rows for one rank (the
destination) have room for `capacity` of them; rows beyond are dropped: they count nothing in the sum over a token's
experts. A buffer is [ranks * capacity, ...]; of what nobody sent the expert is `no_expert`, and the row is arbitrary.

Experts are spread as vLLM does it: neighbours, and the first ranks have one more where they can't have as many.

CANN: HcclAlltoAll with equal parts, aclnnSort, aclnnScatter, aclnnMoeFinalizeRoutingV2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from npu_compiler.fusion_kernels import drop_counts
from npu_compiler.fusion_kernels.expert_capacity import FINE, capacity
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider
from npu_compiler.fusion_kernels.row_collectives import part_of

SCORE, ARRIVAL = "score", "arrival"


def dispatch_reference(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    group: str,
    ranks: int,
    experts: int,
    parts: int,
    by: str,
    renormalise: bool,
    whole: bool,
    counter: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the other ranks send to this one's experts.

    Args:
        x: [rows, hidden]. `ids`: [rows, k] int32, experts of each row, all different; `experts` and more for none.
        weights: [rows, k], what the experts' results are multiplied by.
        group: name of a process group. `ranks`: its size. `experts`: on all ranks together.
        parts: the capacity factor, in parts of expert_capacity.FINE.
        by: which rows stay: "score", those of the largest weights, or "arrival", those of the lowest experts, as they
            are sorted by expert. Of equals, those of the first tokens.
        renormalise: a token's weights that stay are scaled up to the sum of all of them.
        whole: x, ids and weights are all ranks' rows, the same on all, and this rank's are rank * s to (rank + 1) * s,
            s = ceil(rows / ranks). Else they are this rank's.
        counter: under which name what is dropped is counted (drop_counts); empty or unknown: not at all.

    Returns:
        rows: [ranks * capacity, hidden], by source. `experts`: [ranks * capacity, 1] int32, of this rank's.
        places: [s, k] int32, where in the buffers a row of this rank's went to; -1 where it was dropped.
        scales: [s, k], the weights; 0 where it was dropped.
    """
    counts = drop_counts.find(counter)
    rank = _resolve_process_group(group).rank()
    rows, top_k = part_of(x.shape[0], ranks) if whole else x.shape[0], ids.shape[1]
    ids = _without_padding(ids, experts, None if counts is None else counts.real, 0 if whole else rank * rows)
    each, more = divmod(experts, ranks)
    room = capacity(rows, top_k, ranks, each + (more > 0), parts)
    if counts is not None:
        every = _filled(ids, rows * ranks, experts) if whole else ids
        counts.add(_sent(owners_of(every, experts, ranks).view(-1, rows * top_k), ranks), room, rows * top_k)
    if whole:
        x, ids, weights = (own_part(item, rank, rows, fill) for item, fill in ((x, 0), (ids, experts), (weights, 0)))

    owners = owners_of(ids, experts, ranks).view(-1)
    slots = slots_of(owners, ids.reshape(-1), weights.reshape(-1), ranks, room, by)
    token = torch.arange(rows * top_k, device=x.device).div(top_k, rounding_mode="floor")
    last = ranks * room  # one more, for what is dropped
    source = token.new_zeros(last + 1).scatter_(0, slots, token)[:-1]
    local = ids.reshape(-1) - owners * each - owners.clamp(max=more)
    to = local.new_full((last + 1,), no_expert(experts, ranks)).scatter_(0, slots, local)[:-1]

    kept = (slots < last).view_as(ids)
    places = torch.where(kept, slots.view_as(ids), -1).to(torch.int32)
    scales = torch.where(kept, weights, 0)
    if renormalise:
        scales = scales * _restored(weights, scales)
    sent = x.index_select(0, source)
    return exchanged(sent, group), exchanged(to, group).unsqueeze(1), places, scales


def combine_reference(rows: Tensor, order: Tensor, places: Tensor, scales: Tensor, group: str, ranks: int) -> Tensor:
    """The weighted sum of each token's rows, [s, hidden], after they are sent back to the ranks they came from.

    Args:
        rows: [ranks * capacity, hidden], what this rank's experts computed, sorted by expert.
        order: [ranks * capacity], where among them the result of each row that came is; -1 where nobody sent one.
        places, scales: [s, k], of the dispatch.
        group: name of a process group. `ranks`: its size.
    """
    back = _sent_back(rows, order, group)
    picked = back.index_select(0, places.reshape(-1).clamp(min=0))
    picked = picked.masked_fill((places < 0).view(-1, 1), 0).view(*places.shape, -1)
    wide = torch.promote_types(torch.float32, rows.dtype)
    return (picked.to(wide) * scales.to(wide).unsqueeze(-1)).sum(1).to(rows.dtype)


def no_expert(experts: int, ranks: int) -> int:
    """The number of an expert that no rank has."""
    return experts // ranks + (experts % ranks > 0)


def _combine_by_cann(rows: Tensor, order: Tensor, places: Tensor, scales: Tensor, group: str, ranks: int) -> Tensor:
    back = _sent_back(rows, order, group).unsqueeze(1)  # experts with a capacity of one row: -1 is taken only of such
    return torch.ops.npu.npu_moe_finalize_routing(
        back, None, None, None, scales, places.reshape(-1), None, drop_pad_mode=3
    )


def _sent_back(rows: Tensor, order: Tensor, group: str) -> Tensor:
    """In the places they came from. Where nobody sent one, some other row goes back, which nobody reads."""
    return exchanged(rows.index_select(0, order.clamp(min=0)), group)


def exchanged(parts: Tensor, group: str) -> Tensor:
    """The r-th of equal parts goes to rank r; the r-th of the result is from it."""
    result = torch.empty_like(parts)
    dist.all_to_all_single(result, parts, group=_resolve_process_group(group))
    return result


def owners_of(ids: Tensor, experts: int, ranks: int) -> Tensor:
    """Which rank has an expert; `ranks` where there is none."""
    each, more = divmod(experts, ranks)
    if not more:
        owner = ids.div(each, rounding_mode="floor")
    else:
        larger = more * (each + 1)
        first = ids.div(each + 1, rounding_mode="floor")
        others = (ids - larger).div(max(each, 1), rounding_mode="floor") + more
        owner = torch.where(ids < larger, first, others)
    return owner.masked_fill(ids >= experts, ranks)


def _sent(owners: Tensor, ranks: int) -> Tensor:
    """How many rows each source has for each rank: [sources, ranks], from owners [sources, rows]."""
    return (owners.unsqueeze(2) == torch.arange(ranks, device=owners.device)).sum(1)


def slots_of(owners: Tensor, ids: Tensor, weights: Tensor, ranks: int, room: int, by: str) -> Tensor:
    """Where in the buffers each row goes: rank * room + its place among those of the rank; ranks * room: nowhere."""
    key, descending = (weights, True) if by == SCORE else (ids, False)
    order = torch.sort(key, stable=True, descending=descending).indices
    owner = owners.index_select(0, order).long()
    mine = owner.unsqueeze(1) == torch.arange(ranks + 1, device=owner.device)
    place = mine.int().cumsum(0, dtype=torch.int32).gather(1, owner.unsqueeze(1)).squeeze(1) - 1
    fits = (place < room).logical_and(owner < ranks)
    slot = torch.where(fits, owner * room + place, ranks * room)
    return torch.empty_like(slot).scatter_(0, order, slot)


def _restored(weights: Tensor, scales: Tensor) -> Tensor:
    """[rows, 1]: the sum of all weights as a multiple of what stayed; exactly 1 where nothing was dropped."""
    total, kept = weights.sum(1, keepdim=True), scales.sum(1, keepdim=True)
    return torch.where(kept > 0, total / kept, 0).to(scales.dtype)


def _without_padding(ids: Tensor, experts: int, real: Tensor | None, start: int) -> Tensor:
    """`ids`, of which rows from `real` [1] on have no expert; the first one is row `start` of all ranks'."""
    if real is None:
        return ids
    padding = torch.arange(start, start + ids.shape[0], device=ids.device) >= real
    return ids.masked_fill(padding.unsqueeze(1), experts)


def own_part(whole: Tensor, rank: int, rows: int, fill: int) -> Tensor:
    """Row rank * rows to (rank + 1) * rows, filled up."""
    return _filled(whole[rank * rows : (rank + 1) * rows], rows, fill)


def _filled(part: Tensor, rows: int, fill: int) -> Tensor:
    missing = rows - part.shape[0]
    return torch.cat([part, part.new_full((missing, *part.shape[1:]), fill)]) if missing else part.contiguous()


def _fake_dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    group: str,
    ranks: int,
    experts: int,
    parts: int,
    by: str,
    renormalise: bool,
    whole: bool,
    counter: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, top_k = part_of(x.shape[0], ranks) if whole else x.shape[0], ids.shape[1]
    size = ranks * capacity(rows, top_k, ranks, no_expert(experts, ranks), parts)
    return (
        x.new_empty((size, x.shape[1])),
        ids.new_empty((size, 1)),
        ids.new_empty((rows, top_k), dtype=torch.int32),
        weights.new_empty((rows, top_k)),
    )


def _fake_combine(rows: Tensor, order: Tensor, places: Tensor, scales: Tensor, group: str, ranks: int) -> Tensor:
    return rows.new_empty((places.shape[0], rows.shape[1]))


def _refuses_combine(rows: Tensor, order: Tensor, places: Tensor, scales: Tensor, group: str, ranks: int) -> str:
    if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{rows.dtype} is no dtype of rows"
    if scales.dtype not in (rows.dtype, torch.float32) or (rows.dtype, scales.dtype) == (torch.float16, torch.float32):
        return f"{scales.dtype} weights of {rows.dtype} rows"
    return ""


def _routing(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(5)]).int()
    return torch.randn(5, 32, dtype=dtype), ids, torch.rand(5, 2)


def _combine_example(dtype: torch.dtype) -> tuple[Any, ...]:
    rows, _, weights = _routing(dtype)
    places, order = torch.tensor([[3, 0], [-1, 1], [2, -1]]).int(), torch.tensor([4, 0, 2, 1, -1]).int()
    return rows, order, places, weights[:3].to(dtype), "0", 1


ALL_TO_ALL_DISPATCH = FusedOperator(
    "all_to_all_dispatch(Tensor x, Tensor ids, Tensor weights, str group, int ranks, int experts, int parts, str by, "
    "bool renormalise, bool whole, str counter) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=dispatch_reference,
    fake=_fake_dispatch,
    providers=(Provider("composition", dispatch_reference),),
    example=lambda dtype: (*_routing(dtype), "0", 1, 6, FINE // 2, SCORE, False, True, ""),
)
ALL_TO_ALL_COMBINE = FusedOperator(
    "all_to_all_combine(Tensor rows, Tensor order, Tensor places, Tensor scales, str group, int ranks) -> Tensor",
    reference=combine_reference,
    fake=_fake_combine,
    providers=(
        Provider("aclnnMoeFinalizeRoutingV2", _combine_by_cann, ("npu::npu_moe_finalize_routing",), _refuses_combine),
        Provider("composition", combine_reference),
    ),
    example=_combine_example,
)
