"""Which batch sizes get a graph: the default list, and the check of a list the user gives."""

from __future__ import annotations

from collections.abc import Sequence


def default_capture_sizes(max_requests: int, query_length: int, max_tokens: int) -> list[int]:
    """Sizes in tokens such that every uniform decode batch up to `max_requests` finds a graph.

    1, 2, 4, then steps of 8 to 256 and of 16 above, in requests; the last one is `max_requests` itself, so that no
    decode step is too large for the graphs. Each is `query_length` tokens a request, at most `max_tokens`.
    """
    largest = min(max_requests, max_tokens // query_length)
    grid = [1, 2, 4, *range(8, 256, 8), *range(256, largest, 16)]
    requests = sorted({size for size in grid if size < largest} | {largest})
    return [size * query_length for size in requests]


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
