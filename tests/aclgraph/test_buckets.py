"""The buckets are the list of least cost: checked against every possible list."""

from __future__ import annotations

import doctest
import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from npu_compiler.aclgraph import buckets as module
from npu_compiler.aclgraph.buckets import GraphPrice, buckets, padding

FREE = GraphPrice(seconds=0, mebibytes=0, streams=0)


def price_of(share: float) -> GraphPrice:
    return GraphPrice(seconds=share, of_seconds=1.0, mebibytes=0, streams=0)


def least(largest: int, weights: Sequence[float] | None, cost: Callable[[int], float], share: float) -> float:
    """The cost of the best of all lists that end in `largest`."""
    lists = (
        [*smaller, largest] for count in range(largest) for smaller in itertools.combinations(range(1, largest), count)
    )
    return min(padding(sizes, weights, cost) + share * len(sizes) for sizes in lists)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("cost", [float, lambda n: -(-n // 4), lambda n: 10.0 + n], ids=["rows", "tiles", "flat"])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_no_list_is_cheaper(share: float, cost: Callable[[int], float], seed: int | None) -> None:
    draw = random.Random(seed)
    weights = None if seed is None else [draw.choice([0.0, 1.0, 5.0]) + 0.01 for _ in range(10)]
    found = buckets(10, weights=weights, cost=cost, price=price_of(share))
    assert found == sorted(set(found))
    assert found[-1] == 10
    assert padding(found, weights, cost) + share * len(found) == pytest.approx(least(10, weights, cost, share))


def test_padding_counts_what_runs_for_nothing() -> None:
    # sizes 1, 2 run in 2, sizes 3, 4 in 4: a half and a quarter of two of the four steps
    assert padding([2, 4]) == pytest.approx((1 / 2 + 1 / 4) / 4)
    assert padding([2, 4], weights=[0, 1, 0, 1]) == 0


def test_free_graphs_leave_no_padding_and_dear_ones_leave_one_graph() -> None:
    assert buckets(20, price=FREE) == list(range(1, 21))
    assert buckets(20, price=price_of(1.0)) == [20]


def test_sizes_that_occur_get_their_buckets() -> None:
    weights = [0.0] * 100
    weights[6] = weights[40] = 1.0
    assert buckets(100, weights=weights, price=price_of(0.01)) == [7, 41, 100]


@pytest.mark.parametrize("limit", [1, 5, 35])
def test_never_more_graphs_than_the_limit(limit: int) -> None:
    found = buckets(512, price=FREE, limit=limit)
    assert len(found) <= limit
    assert found[-1] == 512


def test_many_sizes() -> None:
    found = buckets(5000)
    assert found[-1] == 5000
    assert len(found) <= 64
    assert padding(found) < 0.1
    assert found == buckets(5000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"largest": 0}, "at least 1"),
        ({"largest": 4, "limit": 0}, "at least 1"),
        ({"largest": 4, "weights": [1.0]}, "expected 4 numbers"),
        ({"largest": 2, "weights": [0.0, 0.0]}, "not all 0"),
        ({"largest": 2, "weights": [-1.0, 2.0]}, "none negative"),
    ],
)
def test_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        buckets(**arguments)  # type: ignore[arg-type]


def test_examples_of_the_docstrings() -> None:
    assert doctest.testmod(module).failed == 0
