"""The parts `dense` and `experts` of `python -m benchmarks parallel`, in one rank: layers, run in several ways."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from benchmarks.harness import Agree, Contestant, Row, Settings, run
from benchmarks.parallel_models import Decoder, Sizes
from npu_compiler.backend import AscendBackend
from npu_compiler.graph.effects import tensors
from npu_compiler.graph.groups import group_of

LAYERS = (2, 4)
"""Two depths, whose difference is what a layer adds; times are those of the larger."""
ROWS = (8, 256)
"""A decode step of 8 requests, and a prompt."""
DENSE, EXPERTS = Sizes(dtype=torch.bfloat16), Sizes(experts=8)
TOLERANCE = {torch.bfloat16: 0.15, torch.float32: 1e-3}
"""Of outputs up to 5, whose sums over the ranks are rounded in another order."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run a model.

    Attributes:
        options: of the compiler.
        whole: whole experts on each rank.
        exact: computes the same as the others.
    """

    name: str
    options: dict[str, Any]
    whole: bool = False
    exact: bool = True


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
            Variant("allgather", {"expert_communication": "allgather"}, whole=True),
            Variant(
                "allgather, sequence_parallel",
                {"expert_communication": "allgather", "sequence_parallel": 1},
                whole=True,
            ),
            Variant("alltoall", {"expert_communication": "alltoall"}, whole=True),
            Variant(
                "alltoall, sequence_parallel",
                {"expert_communication": "alltoall", "sequence_parallel": 1},
                whole=True,
            ),
            Variant("token_drop 1.25", {"token_drop": {"capacity_factor": 1.25}}, whole=True, exact=False),
            Variant("a part of every expert", {}),
        ),
    ),
}
"""The first variant of each is what the others are compared with."""

Sent = Callable[[fx.Node, int], float]


def _result(times: Callable[[int], float]) -> Sent:
    return lambda node, ranks: _bytes(next(tensors(node))) * times(ranks)


def _argument(position: int, times: Callable[[int], float]) -> Sent:
    return lambda node, ranks: _bytes(_of(node.args[position])) * times(ranks)


def _dispatched(node: fx.Node, ranks: int) -> float:
    rows, experts, *_ = tensors(node)
    return (_bytes(rows) + _bytes(experts)) * _others(ranks)


def _combined(node: fx.Node, ranks: int) -> float:
    rows, order = _of(node.args[0]), _of(node.args[1])
    return order.numel() * rows.shape[1] * rows.element_size() * _others(ranks)


def _others(ranks: int) -> float:
    """The part of a buffer that is for other ranks."""
    return (ranks - 1) / ranks


def _of(argument: object) -> Tensor:
    return next(tensors(argument))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


SENT: dict[str, Sent] = {
    "all_reduce": _result(lambda ranks: 2 * _others(ranks)),
    "all_reduce_": _result(lambda ranks: 2 * _others(ranks)),
    "matmul_all_reduce": _result(lambda ranks: 2 * _others(ranks)),
    "reduce_scatter_rows": _result(lambda ranks: ranks - 1),
    "all_gather_rows": _argument(0, lambda ranks: ranks - 1),
    "all_to_all_dispatch": _dispatched,
    "all_to_all_combine": _combined,
    "shard_rows": lambda node, ranks: 0.0,
}
"""Bytes that a rank sends in a call, by the ring algorithm (all-to-all: directly)."""


def collectives(graph: fx.Graph, ranks: int) -> tuple[Counter[str], float]:
    """How often a program calls each operator that sends something, and the bytes that a rank sends.

    Raises:
        KeyError: an operator of a group that SENT does not know.
    """
    count: Counter[str] = Counter()
    total = 0.0
    for node in graph.nodes:
        if node.op == "call_function" and group_of(node):
            name = str(node.target).split(".")[1]
            sent = SENT[name](node, ranks)
            count[name.rstrip("_")] += sent > 0
            total += sent
    return count, total


@dataclasses.dataclass
class Ready:
    """A variant that is captured: how to call it, and what one of its layers sends."""

    call: Callable[[], Tensor]
    counts: dict[str, float]
    sent: float


def captured(variant: Variant, sizes: Sizes, rows: int, rank: int, ranks: int) -> Ready:
    """Compiles and captures a variant at both depths; the deeper one is what is called."""
    x = torch.randn(rows, sizes.hidden, generator=torch.Generator().manual_seed(1)).to(sizes.dtype).npu()
    found = []
    for layers in LAYERS:
        torch._dynamo.reset()
        model = Decoder(sizes, layers, rank, ranks, variant.whole).npu().eval()
        backend = AscendBackend()
        call = torch.compile(model, backend=backend, dynamic=False, options=variant.options)
        for _ in range(3):
            call(x)
        torch.npu.synchronize()
        (entry,) = backend.compiled()
        assert entry.graph is not None and entry.ledger is not None and entry.ledger.replays > 0, "no replay"
        found.append((*collectives(entry.graph.graph, ranks), call))
    (few, few_sent, _), (many, many_sent, call) = found
    more = LAYERS[1] - LAYERS[0]
    counts = {name: (many[name] - few[name]) / more for name in sorted(many | few)}
    return Ready(lambda: call(x), counts, (many_sent - few_sent) / more)


def measured(part: str, rank: int, ranks: int, settings: Settings, agree: Agree) -> list[dict[str, Any]]:
    """A record for each number of rows and variant: those of the harness, with what a layer sends.

    Raises:
        AssertionError: a variant computes something else than the first one.
    """
    sizes, variants = PARTS[part]
    records = []
    for rows in ROWS:
        ready = {variant.name: captured(variant, sizes, rows, rank, ranks) for variant in variants}
        everyone = {variant.name: _contestant(variant, ready[variant.name]) for variant in variants}
        row = Row(
            name=part,
            title=f"{LAYERS[1]} layers, {rows} rows",
            unit="us",
            contestants={name: lambda one=one: one for name, one in everyone.items()},  # type: ignore[misc]
            reference=variants[0].name,
            tolerance=TOLERANCE[sizes.dtype],
        )
        for record in run(row, settings, agree):
            own = ready[record["peer"]]
            records.append({**record, "rows": rows, "ranks": ranks, "collectives": own.counts, "bytes": own.sent})
    return records


def _contestant(variant: Variant, ready: Ready) -> Contestant:
    def batch(count: int) -> None:
        for _ in range(count):
            ready.call()
            torch.npu.synchronize()

    return Contestant(variant.name, batch, (lambda: ready.call().cpu()) if variant.exact else None)
