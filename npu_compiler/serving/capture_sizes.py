"""Which batch sizes get a graph: the default list, and the check of a list the user gives."""

from __future__ import annotations

from collections.abc import Sequence

from npu_compiler.backend import buckets

TILE = 8
"""Above this many requests, padding up to the next multiple counts as free: matrix units work on tiles of rows."""


def default_capture_sizes(max_requests: int, query_length: int, max_tokens: int) -> list[int]:
    """Sizes in tokens such that every uniform decode batch up to `max_requests` finds a graph.

    Chosen by cost (aclgraph/buckets.py), all numbers of requests alike, and 1, 2 and 4: a lone request must not pay for
    a large server. The last one is `max_requests` itself, so that no decode step is too large for the graphs. Each is
    `query_length` tokens a request, at most `max_tokens`.
    """
    largest = min(max_requests, max_tokens // query_length)
    requests = sorted({size for size in (1, 2, 4) if size < largest} | set(buckets(largest, cost=_step_cost)))
    return [size * query_length for size in requests]


def _step_cost(requests: int) -> float:
    return float(requests if requests <= TILE else -(-requests // TILE) * TILE)


def check_capture_sizes(
    sizes: Sequence[int], *, max_requests: int, query_length: int, max_tokens: int, decode_only: bool
) -> None:
    """Refuses a list that cannot work. Sizes are in tokens.

    Raises:
        ValueError: empty list, a size that is not positive, a list that is not ascending, a size no batch can have.
    """
    where = f"cudagraph_capture_sizes={list(sizes)}"
    if not sizes:
        raise ValueError(f"{where}: no size to capture; give at least one, or set cudagraph_mode to NONE")
    for size in sizes:
        if size < 1:
            raise ValueError(f"{where}: a graph holds at least 1 token, {size} can't be captured; remove it")
        if size > max_tokens:
            raise ValueError(
                f"{where}: no batch has {size} tokens, max_num_batched_tokens is {max_tokens}; remove it or raise "
                "--max-num-batched-tokens"
            )
    if list(sizes) != sorted(set(sizes)):
        raise ValueError(f"{where}: must be ascending and without repeats; use {sorted(set(sizes))}")
    if not decode_only:
        return
    limit = max_requests * query_length
    for size in sizes:
        if size > limit:
            raise ValueError(
                f"{where}: a decode batch has at most {limit} tokens (max_num_seqs={max_requests}), so the graph of "
                f"size {size} would never run; remove it or raise --max-num-seqs"
            )
        if size % query_length:
            raise ValueError(
                f"{where}: a decode batch has {query_length} tokens a request, {size} is not a multiple of it; use "
                f"{size // query_length * query_length or query_length}"
            )
