"""One rank of `python -m benchmarks parallel`: `python -m benchmarks.parallel_ranks FOLDER RANK RANKS PART ROUNDS`.

Every variant of a model is compiled and captured first, then they take turns. A rank has one core for itself, where
there are as many.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from benchmarks.parallel_models import Decoder, Sizes
from npu_compiler.backend import AscendBackend
from npu_compiler.graph.effects import tensors
from npu_compiler.graph.groups import group_of

LAYERS = (2, 4)
"""Two depths, whose difference is what a layer adds; times are those of the larger."""
ROWS = (8, 256)
"""A decode step of 8 requests, and a prompt."""
ROUND_SECONDS = 0.2
DENSE, EXPERTS = Sizes(), Sizes(experts=8)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run a model: `options` of the compiler; `whole`: whole experts on each rank."""

    name: str
    options: dict[str, Any]
    whole: bool = False


PARTS: dict[str, tuple[Sizes, tuple[Variant, ...]]] = {
    "dense": (
        DENSE,
        (
            Variant("sums", {}),
            Variant("sequence_parallel", {"sequence_parallel": 1}),
            Variant("matmul_all_reduce", {"matmul_all_reduce": 1}),
        ),
    ),
    "experts": (
        EXPERTS,
        (
            Variant("parts of experts", {}),
            Variant("parts of experts, sequence_parallel", {"sequence_parallel": 1}),
            Variant("whole experts", {"expert_communication": "allgather"}, whole=True),
            Variant(
                "whole experts, sequence_parallel",
                {"expert_communication": "allgather", "sequence_parallel": 1},
                whole=True,
            ),
            Variant("whole experts, alltoall", {"expert_communication": "alltoall"}, whole=True),
        ),
    ),
}
"""The first variant of each is what the others are compared with."""
SENT: dict[str, Callable[[int, int], float]] = {
    "all_reduce": lambda size, ranks: 2 * size * (ranks - 1) / ranks,
    "reduce_scatter": lambda size, ranks: size * (ranks - 1),
    "all_gather": lambda size, ranks: size * (ranks - 1) / ranks,
    "all_to_all": lambda size, ranks: size * (ranks - 1) / ranks,
}
"""Bytes that a rank sends by the ring algorithm (all-to-all: directly), given the bytes of the result."""


def collectives(graph: fx.Graph, ranks: int) -> tuple[dict[str, int], float]:
    """How often a program calls each operator that sends something, and the bytes that a rank sends."""
    count: dict[str, int] = {}
    sent = 0.0
    for node in graph.nodes:
        name = str(node.target)
        kind = next((kind for kind in SENT if kind in name), None)
        if kind is None or not group_of(node):
            continue
        count[name] = count.get(name, 0) + 1
        size = sum(item.numel() * item.element_size() for item in list(tensors(node))[:1])
        sent += SENT[kind](size, ranks)
    return count, sent


def of_a_layer(few: dict[str, int], many: dict[str, int]) -> dict[str, float]:
    """What one layer adds, from two depths."""
    more = LAYERS[1] - LAYERS[0]
    return {name: (many.get(name, 0) - few.get(name, 0)) / more for name in sorted(many | few)}


@dataclasses.dataclass
class Ready:
    """A variant that is captured: a call of it, and what its program sends."""

    variant: Variant
    call: Callable[[], Tensor]
    counts: dict[str, float]
    sent: float


def prepared(variant: Variant, sizes: Sizes, rows: int, rank: int, ranks: int) -> Ready:
    """Compiles and captures a variant at both depths; the deeper one is what is called."""
    found = []
    x = torch.randn(rows, sizes.hidden, generator=torch.Generator().manual_seed(1)).to(sizes.dtype).npu()
    for layers in LAYERS:
        torch._dynamo.reset()
        torch.manual_seed(100 + rank)
        model = Decoder(sizes, layers, rank, ranks, variant.whole).npu().eval()
        backend = AscendBackend()
        run = torch.compile(model, backend=backend, dynamic=False, options=variant.options)
        for _ in range(3):
            run(x)
        torch.npu.synchronize()
        (entry,) = backend.compiled()
        assert entry.graph is not None and entry.ledger is not None and entry.ledger.replays > 0
        found.append((*collectives(entry.graph.graph, ranks), run))
    (few, few_sent, _), (many, sent, run) = found
    a_layer = (sent - few_sent) / (LAYERS[1] - LAYERS[0])
    return Ready(variant, lambda: run(x), of_a_layer(few, many), a_layer)


def timed(ready: Ready, loops: int) -> float:
    """Seconds of a call."""
    dist.barrier()
    torch.npu.synchronize()
    begin = time.perf_counter()
    for _ in range(loops):
        ready.call()
    torch.npu.synchronize()
    return (time.perf_counter() - begin) / loops


def agreed(number: int) -> int:
    """Rank 0's number."""
    shared: list[object] = [number]
    dist.broadcast_object_list(shared, src=0)
    return int(str(shared[0]))


def measured(part: str, rank: int, ranks: int, rounds: int) -> list[dict[str, Any]]:
    """A record for each variant and number of rows: medians over rounds in which the variants take turns."""
    sizes, variants = PARTS[part]
    records = []
    for rows in ROWS:
        everyone = [prepared(variant, sizes, rows, rank, ranks) for variant in variants]
        loops = [agreed(max(1, round(ROUND_SECONDS / timed(ready, 3)))) for ready in everyone]
        seconds: list[list[float]] = [[] for _ in everyone]
        for turn in range(rounds):
            for index in range(len(everyone)):
                which = (index + turn) % len(everyone)
                seconds[which].append(timed(everyone[which], loops[which]))
        for ready, own in zip(everyone, seconds, strict=True):
            ratios = [one / base for one, base in zip(own, seconds[0], strict=True)]
            records.append(
                {
                    "part": part,
                    "variant": ready.variant.name,
                    "rows": rows,
                    "ranks": ranks,
                    "layers": LAYERS[1],
                    "collectives": ready.counts,
                    "bytes": ready.sent,
                    "microseconds": statistics.median(own) * 1e6,
                    "ratio": statistics.median(ratios),
                    "ratio_min": min(ratios),
                    "ratio_max": max(ratios),
                }
            )
    return records


def main() -> None:
    folder, rank, ranks, part, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    with torch.no_grad():
        records = measured(part, rank, ranks, int(rounds))
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(records))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
