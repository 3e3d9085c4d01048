"""Attention in a replayed graph sees the lengths of its step, not those of the capture."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch_npu import npu

from npu_compiler.serving.graph_updates import AttentionCall, GraphUpdates, UpdateResources

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, BLOCKS = 4, 2, 64, 128, 2
LAYERS = ("one", "other")


@dataclass
class Lengths:
    query_ends: list[int]
    kv_lengths: list[int]


def attention(requests: int) -> AttentionCall:
    """A decode step of `requests` requests, each with BLOCKS blocks of keys and values of its own."""
    generator = torch.Generator().manual_seed(requests)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.bfloat16).to("npu")

    query = random(requests, HEADS, HEAD_SIZE)
    cache = (requests * BLOCKS, BLOCK_SIZE, KV_HEADS * HEAD_SIZE)
    return AttentionCall(
        query=query,
        key=random(*cache),
        value=random(*cache),
        block_table=torch.arange(requests * BLOCKS, dtype=torch.int32).view(requests, BLOCKS).to("npu"),
        mask=torch.triu(torch.ones(2048, 2048, dtype=torch.bool), 1).to("npu"),
        output=torch.empty_like(query),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        scale=HEAD_SIZE**-0.5,
        block_size=BLOCK_SIZE,
    )


@pytest.mark.parametrize("requests", [3, 40])
@torch.inference_mode()
def test_each_replay_attends_to_as_much_as_its_step_has(requests: int) -> None:
    ends = list(range(1, requests + 1))
    calls = [attention(requests) for _ in LAYERS]
    with npu.stream(npu.Stream()):
        updates, graph = GraphUpdates(UpdateResources()), npu.NPUGraph()
        captured = Lengths(ends, [1] * requests)
        npu.synchronize()
        graph.capture_begin()
        for name, call in zip(LAYERS, calls, strict=True):
            updates.capture(name, call, captured)
        graph.capture_end()
        for step in range(3):
            # Of two KV cache groups: lengths differ from layer to layer and from step to step.
            of_layers = [
                Lengths(ends, [1 + (7 * row + 31 * step + 100 * place) % 250 for row in range(requests)])
                for place in range(len(LAYERS))
            ]
            expected = []
            for call, lengths in zip(calls, of_layers, strict=True):
                call.run(lengths.query_ends, lengths.kv_lengths)
                expected.append(call.output.cpu())
                call.output.zero_()
            updates.before_replay()
            graph.replay()
            updates.after_replay(dict(zip(LAYERS, of_layers, strict=True)))
            npu.synchronize()
            for call, right in zip(calls, expected, strict=True):
                assert right.abs().max() > 0 and torch.equal(call.output.cpu(), right)
