"""How evenly the rows of a layer of experts are spread over its ranks."""

from __future__ import annotations

from collections.abc import Sequence

from npu_compiler.inspect.run import ExpertRows
from npu_compiler.serving.expert_maps import ExpertMap


def load_of(
    layer: str, slot_rows: Sequence[int], placement: ExpertMap, moved: int = 0, before: float = 0.0
) -> ExpertRows:
    """The figures of a layer, from the rows of each slot of all ranks."""
    ranks = len(placement.ranks)
    by_rank = rows_by_rank(slot_rows, placement)
    linear = [0] * ranks
    for expert, rows in enumerate(expert_rows(slot_rows, placement)):
        linear[linear_owner(expert, placement.experts, ranks)] += rows
    return ExpertRows(
        layer=layer,
        rows=sum(by_rank),
        imbalance=imbalance(by_rank),
        linear=imbalance(linear),
        moved=moved,
        before=before,
    )


def rows_by_rank(slot_rows: Sequence[int], placement: ExpertMap) -> list[int]:
    """The rows of each rank's slots."""
    each = placement.each
    return [sum(slot_rows[rank * each : (rank + 1) * each]) for rank in range(len(placement.ranks))]


def expert_rows(slot_rows: Sequence[int], placement: ExpertMap) -> list[int]:
    """The rows of each expert, wherever it was computed."""
    return [sum(slot_rows[slot] for slot in slots) for slots in placement.replicas]


def imbalance(loads: Sequence[float]) -> float:
    """The largest as a multiple of the mean; 0 of nothing."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 0.0


def linear_owner(expert: int, experts: int, ranks: int) -> int:
    """vLLM's linear placement: neighbours, and the first ranks have one more where they can't have as many."""
    each, more = divmod(experts, ranks)
    larger = more * (each + 1)
    return expert // (each + 1) if expert < larger else more + (expert - larger) // each
