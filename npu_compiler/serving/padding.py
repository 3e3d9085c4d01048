"""Padding of a batch to the size of a captured graph."""

from __future__ import annotations


def spread_padding(
    query_lengths: list[int], kv_lengths: list[int], num_tokens: int, row_limit: int
) -> tuple[list[int], list[int]]:
    """Gives the tokens behind the batch to its padding rows, so that every token of the graph belongs to a row.

    Padding rows are those at the end with no query token. Each gets up to `row_limit` tokens (but no more than an
    even share needs) and as many KV tokens as query tokens, so that its causal mask hides nothing it must see; they
    lie in vLLM's null block. Real rows are left as they are.

    Returns:
        (cumulative query lengths, KV lengths), one per row.

    Raises:
        ValueError: the tokens do not fit into the padding rows.
    """
    lengths, kv = list(query_lengths), list(kv_lengths)
    left = num_tokens - sum(lengths)
    first = len(lengths)
    while first and lengths[first - 1] == 0:
        first -= 1
    rows = len(lengths) - first
    if left < 0 or left > rows * row_limit:
        raise ValueError(
            f"{num_tokens} tokens of the graph, {sum(lengths)} of the batch: the {rows} padding rows take at most "
            f"{row_limit} tokens each"
        )
    for row in range(first, len(lengths)):
        share = -(-left // (len(lengths) - row))
        lengths[row] = kv[row] = share
        left -= share
    ends, total = [], 0
    for length in lengths:
        total += length
        ends.append(total)
    return ends, kv
