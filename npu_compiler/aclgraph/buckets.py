"""Which sizes get a captured graph of their own: padding wasted against what the graphs cost.

A batch of n rows runs in the smallest bucket that holds it. More buckets waste less on padding and take more time,
memory and streams. Both sides are shares of a whole, so they add up: the mean share of a step that is padding, and for
each graph the shares of the budgets that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

CANDIDATES = 512
"""At most this many sizes are considered; of more, multiples of a step are."""
LEAST_SHARE = 1e-4
"""Where the search for few enough graphs starts when they cost nothing."""


@dataclass(frozen=True)
class GraphPrice:
    """What one captured graph takes, and of how much. The defaults are assumptions; none was measured on a card.

    Attributes:
        seconds, of_seconds: its capture, and the time that captures may take in all.
        mebibytes, of_mebibytes: the same for device memory. In a shared pool a graph takes little beyond its largest.
        streams, of_streams: the same for streams; an Ascend 910B has 2048, and a captured graph keeps its own.
    """

    seconds: float = 0.25
    of_seconds: float = 600.0
    mebibytes: float = 1.0
    of_mebibytes: float = 2048.0
    streams: int = 1
    of_streams: int = 2048

    @property
    def share(self) -> float:
        """The sum of the shares: how much mean padding one more graph must save."""
        return self.seconds / self.of_seconds + self.mebibytes / self.of_mebibytes + self.streams / self.of_streams


def buckets(
    largest: int,
    *,
    weights: Sequence[float] | None = None,
    cost: Callable[[int], float] = float,
    price: GraphPrice | None = None,
    limit: int = 64,
) -> list[int]:
    """The sizes to capture, ascending, the last one `largest`: the list of least cost, always the same for the same
    arguments.

    Args:
        largest: the largest size that occurs.
        weights: how often sizes 1, 2, ..., largest occur; None: all alike.
        cost: what a step of a size costs, in any unit, positive and not falling; the default counts rows. A device that
            works on tiles of 16 rows has `lambda n: -(-n // 16)`.
        price: what a graph costs.
        limit: the most graphs.

    Raises:
        ValueError: `largest` or `limit` is not positive, or `weights` is of another length, negative or all zero.

    >>> buckets(8)
    [1, 2, 3, 4, 5, 6, 7, 8]
    >>> buckets(64, cost=lambda n: -(-n // 16))
    [16, 32, 48, 64]
    """
    if largest < 1 or limit < 1:
        raise ValueError(f"largest={largest}, limit={limit}: both are at least 1")
    weights = [1.0] * largest if weights is None else list(weights)
    if len(weights) != largest or min(weights) < 0 or not sum(weights):
        raise ValueError(
            f"weights: expected {largest} numbers, one for each size from 1 to {largest}, none negative and not all 0"
        )
    costs = [cost(size) for size in range(1, largest + 1)]
    share = (price or GraphPrice()).share
    while len(found := _cheapest(weights, costs, share)) > limit:
        share = max(share * 1.5, LEAST_SHARE)  # dearer graphs, until few enough pay
    return found


def padding(
    sizes: Sequence[int], weights: Sequence[float] | None = None, cost: Callable[[int], float] = float
) -> float:
    """The mean share of a step that is padding when sizes 1 to sizes[-1] run in these buckets, from 0 to 1.

    >>> padding([4])
    0.375
    """
    chances = [1.0] * sizes[-1] if weights is None else list(weights)
    wasted, smaller = 0.0, 0
    for bucket in sizes:
        wasted += sum(chances[n - 1] * (1 - cost(n) / cost(bucket)) for n in range(smaller + 1, bucket + 1))
        smaller = bucket
    return wasted / sum(chances)


def _cheapest(weights: Sequence[float], costs: Sequence[float], share: float) -> list[int]:
    """Shortest path over the sizes; an edge from a to b is a bucket b that serves the sizes above a."""
    largest, total = len(weights), sum(weights)
    chance, work = [0.0], [0.0]  # running sums over sizes: how often they occur, and the work they hold then
    for weight, cost in zip(weights, costs, strict=True):
        chance.append(chance[-1] + weight / total)
        work.append(work[-1] + weight / total * cost)
    step = -(-largest // CANDIDATES)
    ends = [0, *(size for size in range(1, largest) if size % step == 0), largest]
    best, before = {0: 0.0}, {0: 0}
    for index, end in enumerate(ends[1:], start=1):
        of_end = costs[end - 1]
        best[end], before[end] = min(
            (best[start] + chance[end] - chance[start] - (work[end] - work[start]) / of_end + share, start)
            for start in ends[:index]
        )
    sizes = [largest]
    while before[sizes[-1]]:
        sizes.append(before[sizes[-1]])
    return sizes[::-1]
