"""How many rows a rank may send to another one, where experts are spread over ranks and buffers have a fixed size.

A source is a rank with n rows of k experts each. Were they even, each of the ranks would get n * k / ranks of them; the
capacity factor says how many times that there is room for. It is counted in parts of FINE, so that all ranks, and sizes
that are symbols, come to the same whole number.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

FINE = 10_000
"""Parts of a capacity factor of 1."""


def parts_of(factor: float) -> int:
    """A capacity factor in parts of FINE, rounded up."""
    return math.ceil(Fraction(repr(factor)) * FINE)


def parts_for(max_drop_ratio: float, top_k: int, experts_each: int, ranks: int) -> int:
    """The smallest capacity factor, in parts of FINE, with which no routing of a source's rows loses more than
    `max_drop_ratio` of them.

    The worst routing fills as few ranks as it can: a token has top_k different experts, so that at most
    m = min(top_k, experts_each) of its rows go to one rank. With room for c rows a token, q = top_k // m ranks lose
    m - c each, and one more the rest, if it has as many.

    Args:
        experts_each: of the rank that has most.
    """
    most = min(top_k, experts_each)
    full, rest = divmod(top_k, most)
    kept = Fraction(top_k) * (1 - Fraction(repr(max_drop_ratio)))
    needed = (kept - rest) / full  # the last rank loses nothing
    if needed < rest:
        needed = kept / (full + 1)
    return math.ceil(needed * ranks / top_k * FINE)


def capacity(rows: Any, top_k: Any, ranks: int, experts_each: int, parts: int) -> Any:
    """ceil(factor * rows * top_k / ranks), but never more than could come: the room of a source for each rank.

    Args:
        rows: of the source; may be a symbol, as top_k may.
        experts_each: of the rank that has most. `parts`: the factor in parts of FINE.
    """
    if is_exact(top_k, ranks, experts_each, parts):
        return rows * min(int(top_k), experts_each)
    return (rows * top_k * parts + ranks * FINE - 1) // (ranks * FINE)


def is_exact(top_k: Any, ranks: int, experts_each: int, parts: int) -> bool:
    """Whether nothing can be dropped, whatever the routing."""
    return bool(parts * int(top_k) >= ranks * min(int(top_k), experts_each) * FINE)
