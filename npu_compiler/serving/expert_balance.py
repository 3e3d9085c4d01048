"""Which map suits the rows that experts got: replicas for those with most, then ranks that get as much as each other.

The greedy method that DeepSeek published as EPLB (its global policy; github.com/deepseek-ai/EPLB, README), with two
rules of our own: a rank has an expert at most once, and of all equal ways of naming the ranks the one stays that moves
little.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from npu_compiler.serving.expert_maps import ExpertMap


def balanced(rows: Sequence[float], old: ExpertMap) -> ExpertMap:
    """A map for experts that got so many `rows`, with as many slots as `old`, near to it."""
    counts = replicas_for(rows, len(old.slots), len(old.ranks))
    return _near(_packed(rows, counts, len(old.ranks), old.each), old)


def rank_rows(rows: Sequence[float], placed: ExpertMap) -> list[float]:
    """What each rank gets of the experts' rows where replicas share evenly."""
    shares = [rows[expert] / len(slots) for expert, slots in enumerate(placed.replicas)]
    return [sum(shares[expert] for expert in rank) for rank in placed.ranks]


def replicas_for(rows: Sequence[float], slots: int, ranks: int) -> list[int]:
    """How many slots each expert gets: one each, and every other one goes to the expert whose replicas have most rows.
    No expert gets more than there are ranks."""
    counts = [1] * len(rows)
    fullest = [(-amount, expert) for expert, amount in enumerate(rows)]
    heapq.heapify(fullest)
    for _ in range(slots - len(rows)):
        _, expert = heapq.heappop(fullest)
        counts[expert] += 1
        if counts[expert] < ranks:
            heapq.heappush(fullest, (-rows[expert] / counts[expert], expert))
    return counts


def _packed(rows: Sequence[float], counts: Sequence[int], ranks: int, each: int) -> list[list[int]]:
    """The experts of each rank: replicas, the largest first, go to the rank that has least so far, has room, and does
    not have the expert yet."""
    loads = [rows[expert] / counts[expert] for expert in range(len(rows))]
    packs: list[list[int]] = [[] for _ in range(ranks)]
    total = [0.0] * ranks
    for expert in sorted(range(len(rows)), key=lambda expert: -loads[expert]):
        for _ in range(counts[expert]):
            room = [rank for rank in range(ranks) if len(packs[rank]) < each]
            free = [rank for rank in room if expert not in packs[rank]]
            target = (
                min(free, key=lambda rank: (total[rank], rank)) if free else _make_room(packs, loads, total, expert)
            )
            packs[target].append(expert)
            total[target] += loads[expert]
    return packs


def _make_room(packs: list[list[int]], loads: Sequence[float], total: list[float], expert: int) -> int:
    """Moves an expert to a rank with room, for all of which have `expert`; the rank that it left, which does not.

    There is one: `expert` has no more replicas than there are ranks, so some full rank lacks it, and a full rank has
    more experts than one with room, so one that the other lacks.
    """
    each = max(map(len, packs))
    target = next(rank for rank, pack in enumerate(packs) if len(pack) < each)
    ways = [
        (abs(loads[other] - loads[expert]), rank, other)
        for rank, pack in enumerate(packs)
        if expert not in pack
        for other in pack
        if other not in packs[target]
    ]
    _, source, other = min(ways)
    packs[source].remove(other)
    packs[target].append(other)
    total[source] -= loads[other]
    total[target] += loads[other]
    return source


def _near(packs: Sequence[Sequence[int]], old: ExpertMap) -> ExpertMap:
    """Packs as ranks: each pack goes to the rank that has most of it, and what a rank has stays in its slot."""
    ranks = range(len(packs))
    common = sorted(
        (-len(set(packs[pack]).intersection(old.ranks[rank])), pack, rank) for pack in ranks for rank in ranks
    )
    of_rank: dict[int, int] = {}
    for _, pack, rank in common:
        if rank not in of_rank and pack not in of_rank.values():
            of_rank[rank] = pack
    found = []
    for rank in ranks:
        wanted = packs[of_rank[rank]]
        new = iter([expert for expert in wanted if expert not in old.ranks[rank]])
        found.append(tuple(expert if expert in wanted else next(new) for expert in old.ranks[rank]))
    return ExpertMap(tuple(found), old.experts)
