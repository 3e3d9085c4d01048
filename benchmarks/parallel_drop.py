"""The part `drop` of `python -m benchmarks parallel`, in one rank: experts, exact and with tokens dropped.

Contestants, each captured and replayed: ALLGATHER (every rank computes its own experts for all tokens, and the ranks
add up), ALLTOALL (the same buffers as with dropping, with room for everything), and token_drop at several capacity
factors. Routing is by imbalance: the fuller rank's rows as a multiple of an even share.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.harness import Agree, Contestant, Measured, Settings, measure

if TYPE_CHECKING:
    from npu_compiler.backend import AscendBackend

ALLGATHER, ALLTOALL = "allgather", "alltoall"
FACTORS = (1.0, 1.25, 1.5, 2.0)
IMBALANCES = (1.0, 1.2, 1.3, 1.5)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of the layer."""

    tokens: int = 512
    hidden: int = 512
    inner: int = 1024
    experts: int = 8
    top_k: int = 2


def options_of() -> dict[str, dict[str, Any]]:
    """The compile options of each contestant."""
    drops = {f"capacity {factor:g}": {"token_drop": {"capacity_factor": factor}} for factor in FACTORS}
    return {name: {"expert_communication": name} for name in (ALLGATHER, ALLTOALL)} | drops


def routed(shape: Shape, ranks: int, imbalance: float, seed: int = 0) -> Tensor:
    """Experts of each token, int32 [tokens, top_k]: of each source's rows the first rank's experts get `imbalance`
    times an even share, each expert of a rank as many as any."""
    draw, each, here = torch.Generator().manual_seed(seed), shape.experts // ranks, shape.tokens // ranks
    sources = []
    for _ in range(ranks):
        fuller = torch.arange(here * shape.top_k) < round(here * shape.top_k * imbalance / ranks)
        # Shuffled by token, then by place: a token has one row for each rank, or both for one.
        to_first = fuller[torch.randperm(len(fuller), generator=draw)].view(here, shape.top_k)
        ids = torch.empty(here, shape.top_k, dtype=torch.int32)
        for token in range(here):
            own, other = torch.randperm(each, generator=draw), torch.randperm(each, generator=draw) + each
            ids[token] = torch.where(to_first[token], own[: shape.top_k], other[: shape.top_k])
        sources.append(ids)
    return torch.cat(sources)


def layer(rank: int, ranks: int, shape: Shape) -> Callable[..., Any]:
    """The experts of a rank for all tokens, and the sum over the ranks, in the form of docs/moe.md."""
    each = shape.experts // ranks
    collectives = torch.ops._c10d_functional

    def experts(x: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Any:
        rows, places, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
            x, ids, active_num=-1, expert_num=shape.experts, expert_tokens_num_type=1, expert_tokens_num_flag=True,
            active_expert_range=[rank * each, (rank + 1) * each], quant_mode=-1, row_idx_type=0,
        )  # fmt: skip
        grouped = {"group_list": counts, "split_item": 3, "group_type": 0, "group_list_type": 1}
        (rows,) = torch.ops.npu.npu_grouped_matmul([rows], [w13], **grouped)
        (rows,) = torch.ops.npu.npu_grouped_matmul([torch.ops.npu_fused.swiglu(rows)], [w2], **grouped)
        rows = rows.unsqueeze(1)
        own = torch.ops.npu.npu_moe_finalize_routing(rows, None, None, None, weights, places, None, drop_pad_mode=3)
        return collectives.wait_tensor(collectives.all_reduce(own, "sum", "0"))

    return experts


@dataclasses.dataclass
class Ready:
    """A contestant that is captured, and its backend, which counts what is dropped."""

    call: Callable[[], Tensor]
    backend: AscendBackend

    def dropped(self) -> float:
        """The part of the rows that the next call drops."""
        (compiled,) = self.backend.compiled()
        if compiled.drops is None:
            return 0.0
        compiled.drops.clear()
        self.call()
        (counted,) = compiled.drops.read()
        return float(counted.ratio)


def measured(rank: int, ranks: int, settings: Settings, agree: Agree) -> list[dict[str, Any]]:
    """A record for each imbalance and contestant.

    Raises:
        AssertionError: ALLTOALL, or a capacity with room for everything, computes something else than ALLGATHER; or
            a contestant was compiled anew on the way.
    """
    from npu_compiler import fusion_kernels

    fusion_kernels.register()
    shape = Shape()
    given = operands(rank, ranks, shape)
    ids = given[1]
    ids.copy_(routed(shape, ranks, 1.0))
    ready = {name: captured(layer(rank, ranks, shape), given, options) for name, options in options_of().items()}
    records = []
    for imbalance in IMBALANCES:
        ids.copy_(routed(shape, ranks, imbalance))
        exact = ready[ALLGATHER].call().cpu()
        results = {}
        for name, one in ready.items():
            dropped = one.dropped()
            error = float((one.call().cpu() - exact).norm() / exact.norm())
            assert dropped or error < 1e-5, f"{name}, imbalance {imbalance}: nothing dropped, but it differs by {error}"
            results[name] = {"dropped": dropped, "error": error}
        found = measure([_contestant(name, one) for name, one in ready.items()], 1, settings, agree)
        records += [{"imbalance": imbalance, **results[name], **figures(found, name)} for name in ready]
    assert all(len(one.backend.compiled()) == 1 for one in ready.values()), "compiled anew meanwhile"
    return records


def operands(rank: int, ranks: int, shape: Shape) -> list[Tensor]:
    """x, experts (empty), weights, and this rank's experts."""
    draw = torch.Generator().manual_seed(1)
    each = shape.experts // ranks
    x = torch.randn(shape.tokens, shape.hidden, generator=draw)
    weights = torch.rand(shape.tokens, shape.top_k, generator=draw)
    w13 = torch.randn(shape.experts, shape.hidden, 2 * shape.inner, generator=draw) / shape.hidden**0.5
    w2 = torch.randn(shape.experts, shape.inner, shape.hidden, generator=draw) / shape.inner**0.5
    own = slice(rank * each, (rank + 1) * each)
    ids = torch.empty(shape.tokens, shape.top_k, dtype=torch.int32)
    return [item.npu() for item in (x, ids, weights, w13[own], w2[own])]


def captured(function: Callable[..., Any], given: Sequence[Tensor], options: dict[str, Any]) -> Ready:
    """The compiled function, called until it is replayed."""
    from npu_compiler.backend import AscendBackend  # brings up torch_npu, which the page of figures needs not

    backend = AscendBackend()
    run = torch.compile(function, backend=backend, dynamic=False, options={"clone_outputs": False, **options})
    for _ in range(3):
        run(*given)
    (compiled,) = backend.compiled()
    assert compiled.ledger is not None and compiled.ledger.replays, "a contestant is a replay"
    return Ready(lambda: run(*given), backend)


def _contestant(name: str, ready: Ready) -> Contestant:
    def batch(count: int) -> None:
        for _ in range(count):
            ready.call()
        torch.npu.synchronize()

    return Contestant(name, batch)


def figures(found: Measured, name: str) -> dict[str, Any]:
    """A contestant's milliseconds, and its gain over both exact ones: their time over its own, in the same round."""
    own = found.seconds[name]
    record: dict[str, Any] = {"peer": name, "milliseconds": statistics.median(own) * 1e3, "rounds": len(own)}
    record |= {"rejected": found.rejected, "noisy": found.noisy}
    for other in (ALLGATHER, ALLTOALL):
        gains = [theirs / mine for theirs, mine in zip(found.seconds[other], own, strict=True)]
        record[f"over_{other}"] = {"median": statistics.median(gains), "min": min(gains), "max": max(gains)}
    return record
