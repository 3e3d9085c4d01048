"""Padding rows take exactly the tokens a graph has beyond its batch, and never touch a real request."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_compiler.serving.padding import spread_padding


def test_decode_padding_is_one_token_a_row() -> None:
    assert spread_padding([1, 1, 0, 0], [5, 7, 0, 0], num_tokens=4, row_limit=64) == ([1, 2, 3, 4], [5, 7, 1, 1])


def test_a_full_batch_needs_no_padding() -> None:
    assert spread_padding([3, 2], [9, 2], num_tokens=5, row_limit=64) == ([3, 5], [9, 2])


@given(
    real=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 50)), min_size=1, max_size=6),
    rows=st.integers(0, 5),
    left=st.integers(0, 60),
    limit=st.integers(1, 30),
)
def test_tokens_are_accounted_for(real: list[tuple[int, int]], rows: int, left: int, limit: int) -> None:
    queries = [q for q, _ in real] + [0] * rows
    lengths = [q + cached for q, cached in real] + [0] * rows
    total = sum(queries) + left
    if left > rows * limit:
        with pytest.raises(ValueError, match="padding rows take at most"):
            spread_padding(queries, lengths, total, limit)
        return
    ends, kv = spread_padding(queries, lengths, total, limit)
    starts = [0, *ends[:-1]]
    padded = [end - start for start, end in zip(starts, ends, strict=True)]
    assert ends[-1] == total
    assert padded[: len(real)] == [q for q, _ in real]
    assert kv[: len(real)] == lengths[: len(real)]
    assert all(0 <= row <= limit for row in padded[len(real) :])
    assert kv[len(real) :] == padded[len(real) :]
