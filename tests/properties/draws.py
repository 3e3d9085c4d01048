"""Numbers and choices that depend on the seed alone.

Hypothesis mixes the constants of every loaded module of the project into the integers it draws, those behind
`sampled_from` too, so what it draws depends on which tests ran before in the same process. It draws booleans without.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

from hypothesis import strategies as st

Item = TypeVar("Item")


@functools.cache
def integers(least: int, most: int) -> st.SearchStrategy[int]:
    """Whole numbers from `least` to `most`, made of booleans; they shrink towards `least`."""
    count = most - least + 1
    bits = (count - 1).bit_length()
    if count != 1 << bits:
        bits += 4  # the first ones of a count that is no power of two are drawn a little more often
    return _of_bits(bits).map(lambda number: least + number % count)


def one_of(items: Sequence[Item]) -> st.SearchStrategy[Item]:
    """One of `items`; it shrinks towards the first."""
    held = tuple(items)
    return integers(0, len(held) - 1).map(held.__getitem__)


@functools.cache
def _of_bits(bits: int) -> st.SearchStrategy[int]:
    return st.tuples(*[st.booleans()] * bits).map(lambda drawn: int("".join("01"[bit] for bit in (False, *drawn)), 2))
