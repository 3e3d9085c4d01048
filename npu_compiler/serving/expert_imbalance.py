"""How evenly the rows of a layer of experts are spread over its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from npu_compiler.serving.expert_maps import ExpertMap


@dataclass(frozen=True)
class ExpertLoad:
    """What a layer's ranks got since the start, the last clear or the last change of the map.

    Attributes:
        layer: module path. `rows`: a token has one for each of its experts; padding is not counted.
        imbalance: rows of the fullest rank, as a multiple of the mean; 1 is even, 0: there were no rows.
        linear: the same rows', had they gone where vLLM's linear placement has the experts.
        moved: how many experts were moved so far. `before`: the imbalance that made the last ones move; 0: none did.
    """

    layer: str
    rows: int
    imbalance: float
    linear: float
    moved: int = 0
    before: float = 0.0

    def __str__(self) -> str:
        moves = f"; {self.moved} experts moved, at last for {self.before:.2f} times" if self.moved else ""
        return (
            f"{self.layer}: the fullest rank got {self.imbalance:.2f} times the mean of {self.rows} rows; "
            f"{self.linear:.2f} times in linear placement{moves}"
        )


def load_of(
    layer: str, slot_rows: Sequence[int], placement: ExpertMap, moved: int = 0, before: float = 0.0
) -> ExpertLoad:
    """The figures of a layer, from the rows of each slot of all ranks."""
    ranks = len(placement.ranks)
    by_rank = rows_by_rank(slot_rows, placement)
    linear = [0] * ranks
    for expert, rows in enumerate(expert_rows(slot_rows, placement)):
        linear[linear_owner(expert, placement.experts, ranks)] += rows
    return ExpertLoad(layer, sum(by_rank), imbalance(by_rank), imbalance(linear), moved, before)


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
