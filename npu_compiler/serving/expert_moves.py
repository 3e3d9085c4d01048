"""Moves experts' weights between the ranks' slots, within the storage that captured graphs read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch_npu import Format

from npu_compiler.serving.expert_maps import ExpertMap


@dataclass(frozen=True)
class Move:
    """The weights of one slot go to another one; slots are counted over all ranks."""

    source: int
    target: int


def moves(old: ExpertMap, new: ExpertMap) -> list[Move]:
    """What has to move, by target. Of several replicas that of the rank that sends least so far is taken."""
    sent = [0] * len(old.ranks)
    held, found = old.replicas, []
    for target, (before, expert) in enumerate(zip(old.slots, new.slots, strict=True)):
        if before != expert:
            source = min(held[expert], key=lambda slot: (sent[slot // old.each], slot))
            sent[source // old.each] += 1
            found.append(Move(source, target))
    return found


def exchange(
    weights: Sequence[Tensor], given: Sequence[Move], rank: int, ranks: int, group: dist.ProcessGroup | None = None
) -> None:
    """Makes the moves, in the stream's order: all slots are read before one is written. Every rank calls it.

    Args:
        weights: of this rank's slots, [slots here, ...], as `memory_of` gives them.
        given: of all ranks, the same on each. `group`: of these ranks; None: the default group.
    """
    each = weights[0].shape[0]
    sent = sorted((one for one in given if one.source // each == rank), key=lambda one: one.target)
    came = sorted(
        (one for one in given if one.target // each == rank), key=lambda one: (one.source // each, one.target)
    )
    to = [sum(one.target // each == other for one in sent) for other in range(ranks)]
    by = [sum(one.source // each == other for one in came) for other in range(ranks)]
    for weight in weights:
        rows = weight.view(each, -1)
        send = rows.new_empty(len(sent), rows.shape[1])
        for place, one in enumerate(sent):
            send[place].copy_(rows[one.source % each])
        receive = rows.new_empty(len(came), rows.shape[1])
        dist.all_to_all_single(receive, send, output_split_sizes=by, input_split_sizes=to, group=group)
        for place, one in enumerate(came):
            rows[one.target % each].copy_(receive[place])


def memory_of(weight: Tensor) -> Tensor:
    """A weight [slots, ...] as it lies in memory, of the same shape.

    In FRACTAL_NZ the elements of a slot are in another order, but they lie together and are as many: weights of experts
    are put into that format only where they fill it (plan/weight_layout.py).
    """
    if weight.device.type != "npu" or torch.ops.npu.get_npu_format(weight) != int(Format.FRACTAL_NZ):
        return weight.data
    return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(weight.data))  # it knows no formats
