"""Checks of npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2 inside rank processes:
`python -m tests.runtime.expert_exchange_checks FOLDER RANK RANKS [SCENARIO]` (tests/ranks.py), on an A3.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch_npu
from torch import Tensor

from tests.ranks import main

RANK = int(sys.argv[2]) if len(sys.argv) > 2 else 0
RANKS = int(sys.argv[3]) if len(sys.argv) > 3 else 1
EACH, K, TOKENS, HIDDEN = 3, 4, 5, 1024
"""Experts of a rank, fewer than a token has; experts of a token; tokens of a rank."""
EXPERTS = EACH * RANKS
HALF = (torch.float16, torch.bfloat16)


@functools.cache
def group() -> str:
    """A communicator for the two operators alone, as their page wants it."""
    made = dist.new_group(list(range(RANKS)), backend="hccl")
    return made._get_backend(torch.device("npu")).get_hccl_comm_name(RANK)


def world(name: str | None = None) -> dict[str, Any]:
    return {
        "group_ep": group() if name is None else name,
        "ep_world_size": RANKS,
        "ep_rank_id": RANK,
        "moe_expert_num": EXPERTS,
    }


def given(rank: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What a rank has: rows, experts (all of the first rank's for every third token) and weights."""
    draw = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randn(TOKENS, HIDDEN, generator=draw).to(dtype)
    ids = torch.stack([torch.randperm(EXPERTS, generator=draw)[:K] for _ in range(TOKENS)])
    ids[::3] = torch.arange(K)
    return x, ids.int(), torch.rand(TOKENS, K, generator=draw)


def sent_to(rank: int, active: list[Tensor], seed: int = 0) -> list[list[tuple[int, int, int]]]:
    """By the definition: (source, token, j) of the rows that each expert of `rank` gets, in order."""
    lists: list[list[tuple[int, int, int]]] = [[] for _ in range(EACH)]
    for source in range(RANKS):
        ids = given(source, seed=seed)[1]
        for token in range(TOKENS):
            for j in range(K):
                expert = int(ids[token, j]) - rank * EACH
                if 0 <= expert < EACH and bool(active[source][token, j]):
                    lists[expert].append((source, token, j))
    return lists


def everybody() -> list[Tensor]:
    return [torch.ones(TOKENS, K, dtype=torch.bool) for _ in range(RANKS)]


def factor(expert: int) -> float:
    return 1.0 + expert / 4


def dispatched(dtype: torch.dtype = torch.bfloat16, seed: int = 0, **settings: Any) -> tuple[Tensor, ...]:
    x, ids, _ = given(RANK, dtype, seed)
    return torch_npu.npu_moe_distribute_dispatch_v2(x.npu(), ids.npu(), **world(), **settings)


def computed(rows: Tensor, counts: Tensor) -> Tensor:
    """A stand-in for experts: rows times a number of the expert, exact in every dtype that is used."""
    wide = torch.repeat_interleave(
        torch.tensor([factor(RANK * EACH + expert) for expert in range(EACH)]), counts.cpu()
    ).to(rows.dtype)
    result = torch.full_like(rows, torch.nan)
    result[: len(wide)] = rows[: len(wide)] * wide.npu().unsqueeze(1)
    return result


def combined(rows: Tensor, came: tuple[Tensor, ...], seed: int = 0, **settings: Any) -> Tensor:
    _, ids, weights = given(RANK, rows.dtype, seed)
    return torch_npu.npu_moe_distribute_combine_v2(
        rows, ids.npu(), came[2], came[4], weights.npu(), **world(), **settings
    )


def expected(dtype: torch.dtype, active: list[Tensor], seed: int = 0) -> Tensor:
    """In float64, but for the experts' results, which are rounded as rows are."""
    x, ids, weights = given(RANK, dtype, seed)
    total = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token in range(TOKENS):
        for j in range(K):
            if active[RANK][token, j]:
                row = x[token] * torch.tensor(factor(int(ids[token, j])), dtype=dtype)
                total[token] += weights[token, j].double() * row.double()
    return total


def close(found: Tensor, wanted: Tensor) -> None:
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=eps, atol=eps)


def refused(message: str, *args: Any, **settings: Any) -> None:
    try:
        torch_npu.npu_moe_distribute_dispatch_v2(*args, **settings)
    except RuntimeError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def check_rows_go_to_their_experts() -> None:
    for dtype in HALF:
        rows, _, _, counts, *_ = dispatched(dtype)
        lists = sent_to(RANK, everybody())
        assert rows.shape == (TOKENS * RANKS * min(EACH, K), HIDDEN)
        assert counts.tolist() == [len(one) for one in lists] and counts.dtype == torch.int64
        wanted = [given(source, dtype)[0][token] for one in lists for source, token, _ in one]
        assert torch.equal(rows.cpu()[: len(wanted)], torch.stack(wanted)), "experts, then ranks, then tokens"
        combined(computed(rows, counts), dispatched(dtype))


def check_counts_as_sums() -> None:
    came = dispatched(expert_token_nums_type=0)
    assert came[3].tolist() == torch.tensor([len(one) for one in sent_to(RANK, everybody())]).cumsum(0).tolist()


def check_there_and_back() -> None:
    for dtype in HALF:
        came = dispatched(dtype)
        close(combined(computed(came[0], came[3]), came), expected(dtype, everybody()))


def check_a_shared_expert_is_added() -> None:
    came = dispatched()
    shared = torch.full((TOKENS, HIDDEN), 0.5, dtype=torch.bfloat16, device="npu")
    found = combined(computed(came[0], came[3]), came, shared_expert_x=shared)
    close(found, expected(torch.bfloat16, everybody()) + 0.5)


def check_tokens_that_are_not_active() -> None:
    """As of padding: rank 1 has no token at all."""
    kept = [0 if rank == 1 else TOKENS - 2 for rank in range(RANKS)]
    masks = [torch.arange(TOKENS) < number for number in kept]
    active = [mask.unsqueeze(1).expand(TOKENS, K) for mask in masks]
    came = dispatched(x_active_mask=masks[RANK].npu())
    assert came[3].tolist() == [len(one) for one in sent_to(RANK, active)]
    found = combined(computed(came[0], came[3]), came, x_active_mask=masks[RANK].npu())
    close(found[: kept[RANK]], expected(torch.bfloat16, active)[: kept[RANK]])


def check_places_that_are_not_active() -> None:
    active = [torch.rand(TOKENS, K, generator=torch.Generator().manual_seed(rank)) < 0.6 for rank in range(RANKS)]
    mine = active[RANK].npu()
    came = dispatched(x_active_mask=mine)
    assert came[3].tolist() == [len(one) for one in sent_to(RANK, active)]
    found = combined(computed(came[0], came[3]), came, x_active_mask=mine)
    close(found, expected(torch.bfloat16, active))


def check_quantized_rows() -> None:
    smooth = 0.5 + torch.rand(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(9))
    for scales in (None, smooth):
        rows, row_scales, _, counts, *_ = dispatched(quant_mode=2, scales=None if scales is None else scales.npu())
        lists = sent_to(RANK, everybody())
        assert rows.dtype == torch.int8 and counts.tolist() == [len(one) for one in lists]
        wide = [
            given(source)[0][token].double() * (1 if scales is None else scales[RANK * EACH + expert].double())
            for expert, one in enumerate(lists)
            for source, token, _ in one
        ]
        found = rows.cpu()[: len(wide)].double() * row_scales.cpu()[: len(wide)].double().unsqueeze(1)
        for got, wanted in zip(found, wide, strict=True):
            assert (got - wanted).abs().max() <= 0.501 * wanted.abs().max() / 127, "half a step of int8"


def check_ranks_with_different_numbers_of_tokens() -> None:
    """global_bs says how many the fullest has."""
    own = TOKENS if RANK == 0 else 2
    x, ids, weights = (item[:own].npu() for item in given(RANK))
    settings = {**world(), "global_bs": TOKENS * RANKS}
    came = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, **settings)
    assert came[0].shape[0] == TOKENS * RANKS * min(EACH, K)
    rows = computed(came[0], came[3])
    found = torch_npu.npu_moe_distribute_combine_v2(rows, ids, came[2], came[4], weights, **settings)
    close(found, expected(torch.bfloat16, everybody())[:own])


def check_captured() -> None:
    """One capture, many replays, each with another routing: other counts from every rank."""
    x, ids, weights = (torch.empty_like(item).npu() for item in given(RANK))
    ids.copy_(given(RANK)[1])
    group()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        came = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, **world())
        out = torch_npu.npu_moe_distribute_combine_v2(came[0], ids, came[2], came[4], weights, **world())
    for seed in range(20):
        for buffer, fresh in zip((x, ids, weights), given(RANK, seed=seed), strict=True):
            buffer.copy_(fresh)
        graph.replay()
        rows, _, scale = given(RANK, seed=seed)
        close(out, rows.double() * scale.double().sum(1, keepdim=True))
        assert came[3].tolist() == [len(one) for one in sent_to(RANK, everybody(), seed)]


def check_large_parts_take_several_rounds() -> None:
    tokens, hidden = 300, 8192
    draw = torch.Generator().manual_seed(RANK)
    x = torch.randn(tokens, hidden, generator=draw).bfloat16().npu()
    ids = torch.arange(1).expand(tokens, 1).int().contiguous().npu()  # all for expert 0
    weights = torch.full((tokens, 1), 2.0, device="npu")
    name = dist.new_group(list(range(RANKS)), backend="hccl")._get_backend(x.device).get_hccl_comm_name(RANK)
    settings = world(name) | {"moe_expert_num": RANKS}
    came = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, **settings)
    assert came[3].tolist() == [tokens * RANKS if RANK == 0 else 0]
    found = torch_npu.npu_moe_distribute_combine_v2(came[0], ids, came[2], came[4], weights, **settings)
    assert torch.equal(found.cpu(), x.cpu() * 2)


def check_what_the_page_excludes() -> None:
    x, ids, _ = (item.npu() for item in given(RANK))
    narrow = x[:, :512].contiguous()
    for message, args, changes in (
        ("names no communicator of this process", (x, ids), {"group_ep": "nobody"}),
        ("has to be float16 or bfloat16, not float32", (x.float(), ids), {}),
        ("has to be int32, not int64", (x, ids.long()), {}),
        ("has to be 1024 to 8192 on A3, not 512", (narrow, ids), {}),
        ("has to be 1 to 512 on A3, not 520", (x.repeat(104, 1), ids.repeat(104, 1)), {}),
        ("has to be a multiple of the ranks", (x, ids), {"moe_expert_num": EXPERTS + 1}),
        ("has to be 0 or 2 (dynamic), not 1", (x, ids), {"quant_mode": 1}),
        ("has to be 0, the only documented value", (x, ids), {"expert_shard_type": 1}),
        ("is not supported on A3", (x, ids), {"comm_alg": "hierarchy"}),
        ("has to be bool, not int32", (x, ids), {"x_active_mask": ids[:, 0]}),
        ("of more than 1 is not implemented", (x, ids), {"tp_world_size": 2, "group_tp": "other"}),
        ("has to be left out where nothing is quantized", (x, ids), {"scales": torch.ones(EXPERTS, HIDDEN).npu()}),
    ):
        refused(message, *args, **world() | changes)


def check_the_buffer_has_to_be_large_enough() -> None:
    draw = torch.zeros(512, 8192, dtype=torch.bfloat16, device="npu")
    ids = torch.arange(8).expand(512, 8).int().contiguous().npu()
    refused("has a buffer of 200 MiB and needs", draw, ids, **world() | {"moe_expert_num": 16 * RANKS})


def check_a_communicator_of_others_is_refused() -> None:
    x, ids, _ = (item.npu() for item in given(RANK))
    dist.all_reduce(torch.zeros(1, device="npu"))
    torch.npu.synchronize()
    default = dist.distributed_c10d._get_default_group()
    refused("has run other operators before", x, ids, **world(default._get_backend(x.device).get_hccl_comm_name(RANK)))


def scenario_a_sum_in_the_communicator_of_experts() -> None:
    own = dist.new_group(list(range(RANKS)), backend="hccl")
    x, ids, _ = (item.npu() for item in given(RANK))
    name = own._get_backend(x.device).get_hccl_comm_name(RANK)
    torch_npu.npu_moe_distribute_dispatch_v2(x, ids, **world(name))
    torch.npu.synchronize()
    dist.all_reduce(torch.zeros(1, device="npu"), group=own)
    torch.npu.synchronize()


def scenario_compiled() -> None:
    """A layer of experts that the compiler makes one dispatch and one combine of, captured and replayed with other
    routings; of 7 tokens one rank has 4, the other 3."""
    from npu_compiler import fusion_kernels
    from tests.compiler.rank_checks import compiled, experts_layer
    from tests.experts import Case
    from tests.passes import test_expert_mc2 as mc2

    fusion_kernels.register()
    own = dist.new_group(list(range(RANKS)), backend="hccl")
    options = {"expert_communication": "mc2", "expert_group": own.group_name, "expert_tokens": 7}
    run, backend = compiled(experts_layer, dynamic=False, **options)
    for number in range(5):
        case = Case(RANKS, 4, 2, 7, "skewed", 1.0, number=number)
        with torch.no_grad():
            found = run(*mc2.inputs(case, RANK)[:5])
        torch.testing.assert_close(found.cpu().double(), mc2.expected(case), rtol=4 * 2**-8, atol=4 * 2**-8)
    (entry,) = backend.compiled()
    targets = [str(node.target) for node in entry.graph.graph.nodes]
    assert [targets.count(name) for name in (mc2.DISPATCH, mc2.COMBINE)] == [1, 1]
    assert entry.ledger is not None and entry.ledger.replays > 0
    for operator in ("Dispatch", "Combine"):
        assert f"aclnnMoeDistribute{operator}V2" in str(entry), str(entry)


def scenario_compiled_int8() -> None:
    """A layer of experts that quantize their rows: replays send int8, and give the bits of the exact all-to-all, which
    sends the rows as they are."""
    from npu_compiler import fusion_kernels
    from tests.compiler.rank_checks import compiled
    from tests.experts import Case
    from tests.passes import test_expert_mc2 as mc2

    fusion_kernels.register()
    own = dist.new_group(list(range(RANKS)), backend="hccl")
    layer = mc2.quantized_experts("behind")(RANK, RANKS)
    chosen = {"mc2": {"expert_group": own.group_name, "expert_tokens": 7}, "alltoall": {}}
    runs = {
        method: compiled(layer, dynamic=False, expert_communication=method, **more) for method, more in chosen.items()
    }
    for number in range(3):
        given = mc2.inputs(Case(RANKS, 4, 2, 7, "skewed", 1.0, number=number), RANK)[:5]
        with torch.no_grad():
            by_mc2, by_all_to_all = (run(*given).cpu() for run, _ in runs.values())
        assert torch.equal(by_mc2, by_all_to_all)
    (entry,) = runs["mc2"][1].compiled()
    targets = [str(node.target) for node in entry.graph.graph.nodes]
    assert [targets.count(name) for name in (mc2.DISPATCH_QUANT, mc2.DISPATCH, mc2.COMBINE)] == [1, 0, 1]
    assert entry.ledger is not None and entry.ledger.replays > 0


def scenario_dead_rank() -> None:
    dispatched()
    torch.npu.synchronize()
    if RANK == 1:
        os._exit(7)
    dispatched()
    torch.npu.synchronize()


def scenario_another_number_of_experts() -> None:
    x, ids, _ = (item.npu() for item in given(RANK))
    torch_npu.npu_moe_distribute_dispatch_v2(x, ids, **world() | {"moe_expert_num": EXPERTS + RANK * RANKS})
    torch.npu.synchronize()


def scenario_an_expert_that_is_not_there() -> None:
    x, ids, _ = given(RANK)
    ids[2, 1] = EXPERTS
    torch_npu.npu_moe_distribute_dispatch_v2(x.npu(), ids.npu(), **world())
    torch.npu.synchronize()


if __name__ == "__main__":
    main(globals())
