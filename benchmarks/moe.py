"""`python -m benchmarks moe`: experts on two ranks, exact and with tokens dropped, under even and skewed routing.

Contestants, each captured and replayed: `all experts' tokens` (every rank computes its own experts for all tokens, and
the ranks add up), `all to all` (the same buffers as with dropping, with room for everything), and token_drop at several
capacity factors. They take turns in every round, on two processes with a core each. A time is that of the slower rank.

Routing is by imbalance: the fuller rank's rows as a multiple of an even share. A gain is the time of the exact
contestant over that of the one that drops, within a round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import kept

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
RANKS = 2
EXACT, EXCHANGED = "all experts' tokens", "all to all"
FACTORS = (1.0, 1.25, 1.5, 2.0)
IMBALANCES = (1.0, 1.2, 1.3, 1.6, 1.9)
TIMEOUT_S = 600


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of the layer; rounds of so many replays of each contestant."""

    tokens: int = 512
    hidden: int = 512
    inner: int = 1024
    experts: int = 8
    top_k: int = 2
    rounds: int = 11
    replays: int = 2

    @classmethod
    def quick(cls) -> Shape:
        return cls(tokens=32, hidden=32, inner=64, rounds=3, replays=1)


def options_of() -> dict[str, dict[str, Any]]:
    """The compile options of each contestant."""
    drops = {f"capacity {factor:g}": {"token_drop": {"capacity_factor": factor}} for factor in FACTORS}
    exact = {EXACT: {"expert_communication": "allgather"}, EXCHANGED: {"expert_communication": "alltoall"}}
    return exact | drops


# -- a rank ------------------------------------------------------------------------------------------------------------


def routed(shape: Shape, imbalance: float, seed: int = 0) -> Any:
    """Experts of each token, int32 [tokens, top_k]: of each source's rows the first rank's experts get `imbalance`
    times an even share, each expert of a rank as many as any."""
    import torch

    draw, each, here = torch.Generator().manual_seed(seed), shape.experts // RANKS, shape.tokens // RANKS
    sources = []
    for _ in range(RANKS):
        fuller = torch.arange(here * shape.top_k) < round(here * shape.top_k * imbalance / RANKS)
        # Shuffled by token, then by place: a token has one row for each rank, or both for one.
        to_first = fuller[torch.randperm(len(fuller), generator=draw)].view(here, shape.top_k)
        ids = torch.empty(here, shape.top_k, dtype=torch.int32)
        for token in range(here):
            own, other = torch.randperm(each, generator=draw), torch.randperm(each, generator=draw) + each
            ids[token] = torch.where(to_first[token], own[: shape.top_k], other[: shape.top_k])
        sources.append(ids)
    return torch.cat(sources)


def layer(rank: int, shape: Shape) -> Callable[..., Any]:
    """The experts of a rank for all tokens, and the sum over the ranks, in the form of docs/moe.md."""
    import torch

    each = shape.experts // RANKS
    collectives = torch.ops._c10d_functional

    def experts(x: Any, ids: Any, weights: Any, w13: Any, w2: Any) -> Any:
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


def measure_rank(rank: int, folder: Path, shape: Shape) -> None:
    """Writes this rank's seconds to `rank.json`: by imbalance and contestant a list, a round each; and what was
    dropped."""
    import torch
    import torch.distributed as dist

    from npu_compiler import fusion_kernels

    fusion_kernels.register()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    torch.npu.set_device(rank)  # type: ignore[attr-defined]
    dist.init_process_group("hccl", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    draw = torch.Generator().manual_seed(1)
    each = shape.experts // RANKS
    x, weights = torch.randn(shape.tokens, shape.hidden, generator=draw), torch.rand(shape.tokens, 2, generator=draw)
    w13 = torch.randn(shape.experts, shape.hidden, 2 * shape.inner, generator=draw) / shape.hidden**0.5
    w2 = torch.randn(shape.experts, shape.inner, shape.hidden, generator=draw) / shape.inner**0.5
    own = slice(rank * each, (rank + 1) * each)
    ids = torch.empty(shape.tokens, shape.top_k, dtype=torch.int32).npu()  # type: ignore[attr-defined]
    given = [x.npu(), ids, weights.npu(), w13[own].npu(), w2[own].npu()]  # type: ignore[attr-defined]
    found = {}
    with torch.no_grad():
        ids.copy_(routed(shape, 1.0))
        contestants = {name: _captured(layer(rank, shape), given, options) for name, options in options_of().items()}
        for imbalance in IMBALANCES:
            ids.copy_(routed(shape, imbalance))
            found[str(imbalance)] = _measured(contestants, given, shape)
            assert all(len(backend.compiled()) == 1 for _, backend in contestants.values()), "compiled anew meanwhile"
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _captured(function: Callable[..., Any], given: Sequence[Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """The compiled function, called until it is replayed, and its backend."""
    import torch

    from npu_compiler.backend import AscendBackend

    backend = AscendBackend()
    run = torch.compile(function, backend=backend, dynamic=False, options={"clone_outputs": False, **options})
    for _ in range(3):
        run(*given)
    (compiled,) = backend.compiled()
    assert compiled.ledger is not None and compiled.ledger.replays, "a contestant is a replay"
    return run, backend


def _measured(contestants: dict[str, tuple[Any, Any]], given: Sequence[Any], shape: Shape) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    exact = contestants[EXACT][0](*given).cpu()
    found: dict[str, Any] = {}
    for name, (run, backend) in contestants.items():
        (compiled,) = backend.compiled()
        if compiled.drops is not None:
            compiled.drops.clear()
        result = run(*given).cpu()
        (counted,) = compiled.drops.read() if compiled.drops is not None else (None,)
        found[name] = {"dropped": 0.0 if counted is None else counted.ratio}
        found[name]["error"] = float((result - exact).norm() / exact.norm())
    names, tick = list(contestants), torch.zeros(1, device="npu")
    for number in range(shape.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            dist.all_reduce(tick)  # the ranks start together
            torch.npu.synchronize()  # type: ignore[attr-defined]
            began = time.perf_counter()
            for _ in range(shape.replays):
                contestants[name][0](*given)
            torch.npu.synchronize()  # type: ignore[attr-defined]
            seconds[name].append((time.perf_counter() - began) / shape.replays)
    return {name: found[name] | {"seconds": seconds[name]} for name in names}


# -- the ranks together ------------------------------------------------------------------------------------------------


def measure(shape: Shape) -> list[kept.Record]:
    """A record for each imbalance and contestant.

    Raises:
        RuntimeError: a rank failed; its error output is in the message.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        settings = json.dumps(dataclasses.asdict(shape))
        commands = [
            [sys.executable, "-m", "benchmarks.moe", "--rank", str(rank), name, settings] for rank in range(RANKS)
        ]
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for command in commands]
        try:
            errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            if process.returncode:
                raise RuntimeError(f"rank {rank} ended with {process.returncode}:\n{errors[rank][-3000:]}")
        return records([json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)])


def records(ranks: Sequence[dict[str, Any]]) -> list[kept.Record]:
    """Of what each rank measured: times in milliseconds, and the gain over both exact contestants, as median over the
    rounds with the first and the third quartile."""
    out = []
    for imbalance, contestants in ranks[0].items():
        slower = {
            name: [max(times) for times in zip(*(rank[imbalance][name]["seconds"] for rank in ranks), strict=True)]
            for name in contestants
        }
        for name, entry in contestants.items():
            record = {"imbalance": float(imbalance), "contestant": name, "dropped": entry["dropped"]}
            record |= {"error": entry["error"], "milliseconds": statistics.median(slower[name]) * 1e3}
            for key, other in (("gain", EXACT), ("gain_exchanged", EXCHANGED)):
                ratios = [theirs / own for theirs, own in zip(slower[other], slower[name], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                record |= {key: middle, f"{key}_low": low, f"{key}_high": high}
            out.append(record)
    return out


def table(found: Sequence[kept.Record]) -> str:
    """The records as text."""
    lines = ["imbalance  contestant            dropped   error      ms   gain over: the sum           all to all"]
    for entry in found:
        gains = (
            f"{entry[key] - 1:+6.1%} ({entry[f'{key}_low'] - 1:+.1%} to {entry[f'{key}_high'] - 1:+.1%})"
            for key in ("gain", "gain_exchanged")
        )
        lines.append(
            f"{entry['imbalance']:9.2f}  {entry['contestant']:20s} {entry['dropped']:8.1%} {entry['error']:7.1%} "
            f"{entry['milliseconds']:7.2f}   {'   '.join(gains)}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the table and writes `moe.json`."""
    if arguments[:1] == ["--rank"]:
        _, rank, folder, settings = arguments
        measure_rank(int(rank), Path(folder), Shape(**json.loads(settings)))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks moe", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small layer: shows that it runs, the figures are rough")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    shape = Shape.quick() if chosen.quick else Shape()
    part = kept.measured(lambda: measure(shape), ranks=RANKS, **dataclasses.asdict(shape), quick=chosen.quick)
    chosen.results.mkdir(parents=True, exist_ok=True)
    (chosen.results / "moe.json").write_text(json.dumps(part, indent=1) + "\n")
    about = part["about"]
    print(
        f"{RANKS} ranks with a core each, {shape.tokens} tokens of {shape.top_k} of {shape.experts} experts, ", end=""
    )
    print(f"hidden {shape.hidden}, inner {shape.inner}, float32; others took {about['others']:.0%} of the machine")
    print(table(part["records"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
