"""What decode graphs add to their pool of memory, in bytes."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compiler
from npu_compiler.serving.graph_updates import AttentionCall, GraphUpdates, UpdateResources
from npu_compiler.serving.graph_wrapper import pool_bytes

TOKENS, HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 1024, 16, 2, 128, 128


def test_asking_for_a_workspace_takes_nothing_from_the_pool() -> None:
    """The question makes tensors of the output's size, 4 MiB each, for which the pool would get 20."""
    dtype = torch.bfloat16
    query, output = (torch.zeros(TOKENS, HEADS, HEAD_SIZE, dtype=dtype, device="npu") for _ in range(2))
    key, value = (torch.zeros(1, BLOCK_SIZE, KV_HEADS * HEAD_SIZE, dtype=dtype, device="npu") for _ in range(2))
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        block_table=torch.zeros(TOKENS, 1, dtype=torch.int32, device="npu"),
        mask=torch.ones(2048, 2048, dtype=torch.bool, device="npu").triu(1),
        output=output,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        scale=HEAD_SIZE**-0.5,
        block_size=BLOCK_SIZE,
    )
    lengths = SimpleNamespace(query_ends=list(range(1, TOKENS + 1)), kv_lengths=[1] * TOKENS)
    pool, graph, updates = torch.npu.graph_pool_handle(), torch.npu.NPUGraph(), GraphUpdates(UpdateResources())
    with torch.npu.stream(torch.npu.Stream()):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        updates.capture("layer", call, lengths)
        graph.capture_end()
    assert len(updates) == 1
    assert pool_bytes(pool) == 0


def test_the_size_of_a_pool() -> None:
    """Behind the 256th pool of a process, whose numbers are objects of their own: torch_npu's filter frees them."""
    pools = [torch.npu.graph_pool_handle() for _ in range(300)]
    pool, other = pools[-2:]
    references = [sys.getrefcount(number) for number in pool]
    graphs, kept = [], []
    for chosen, size in ((pool, 3 << 20), (other, 30 << 20)):
        graphs.append(torch.npu.NPUGraph())
        with torch.npu.graph(graphs[-1], pool=chosen):
            kept.append(torch.zeros(size, dtype=torch.uint8, device="npu"))
        assert pool_bytes(chosen) >= size
    assert 0 == pool_bytes(pools[0]) < pool_bytes(pool) < pool_bytes(other)
    assert [sys.getrefcount(number) for number in pool] == references


@pytest.mark.full
def test_35_sizes_grow_the_pool_by_at_most_5_percent() -> None:
    (row,) = compiler.pool_rows("qwen3", [1024])
    assert row["missing"] is None
    assert row["captures"] == 35
    assert row["mib_largest"] > 20
    assert row["met"], f"{row['mib']} MiB, the largest alone {row['mib_largest']}"
