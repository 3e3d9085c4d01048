"""Compiled programs on several ranks: `python -m tests.compiler.rank_checks FOLDER RANK RANKS` (tests/ranks.py)."""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npu_compiler.backend import AscendBackend
from npu_compiler.errors import RankError
from tests.experts import Case, kept, owned
from tests.ranks import main

RANK, RANKS = (int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 3 else (0, 1)
WIDTH, INNER = 32, 16
CASE = Case(ranks=RANKS, experts=4, top_k=2, tokens=11, kind="skewed", factor=1.0)
SCATTER, GATHER = ("npu_fused.reduce_scatter_rows.default", "npu_fused.all_gather_rows.default")


def summed(partial: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(partial, "sum", "0"))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (WIDTH,), weight, 1e-6)


def layer(x: Tensor, row: Tensor, column: Tensor, weight: Tensor) -> Tensor:
    residual = summed(x @ row)
    mlp = summed((norm(residual, weight) @ column).relu() @ row)
    return norm(mlp + residual, weight)


def operands(rows: int, rank: int = RANK) -> list[Tensor]:
    """x and the weight are the same on all ranks, the two matrices are a rank's own."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    return [
        torch.randn(rows, INNER, generator=shared),
        torch.randn(INNER, WIDTH, generator=own),
        torch.randn(WIDTH, INNER, generator=own),
        torch.rand(WIDTH, generator=shared),
    ]


def expected(rows: int) -> Tensor:
    """`layer` on all ranks in float64, where a sum over ranks is one over a list."""
    each = [[item.double() for item in operands(rows, rank)] for rank in range(RANKS)]
    weight = each[0][3]
    residual = torch.stack([x @ row for x, row, *_ in each]).sum(0)
    mlp = torch.stack([(norm(residual, weight) @ column).relu() @ row for _, row, column, _ in each]).sum(0)
    return norm(mlp + residual, weight)


def compiled(
    function: Callable[..., Any], dynamic: bool = True, **options: Any
) -> tuple[Callable[..., Any], AscendBackend]:
    torch._dynamo.reset()
    backend = AscendBackend()
    return torch.compile(function, backend=backend, dynamic=dynamic, options={"check": True, **options}), backend


def same(found: Tensor, rows: int) -> None:
    torch.testing.assert_close(found.cpu(), expected(rows).float(), rtol=1e-5, atol=1e-5)


def operators(backend: AscendBackend) -> list[str]:
    (graph,) = (entry.graph for entry in backend.compiled())
    assert graph is not None
    return [str(node.target) for node in graph.graph.nodes]


def check_rows_in_parts_captured() -> None:
    """Rows that the ranks divide and rows that they don't: called, captured and replayed."""
    run, backend = compiled(layer, sequence_parallel=1)
    with torch.no_grad():
        for _ in range(3):
            for rows in (4, 5, 2):
                same(run(*(item.npu() for item in operands(rows))), rows)
    found = operators(backend)
    assert [found.count(name) for name in (SCATTER, GATHER)] == [2, 2], found
    (entry,) = backend.compiled()
    assert entry.ledger is not None and entry.ledger.replays > 0


def check_equal_to_the_program_with_sums() -> None:
    """Bit by bit: the host runtime adds the ranks in one order in both, as HCCL does where it is asked to."""
    given = [item.npu() for item in operands(6)]
    with torch.no_grad():
        whole, parts = (compiled(layer, **options)[0](*given) for options in ({}, {"sequence_parallel": 1}))
    assert torch.equal(whole.cpu(), parts.cpu())


def check_two_halves_of_the_rows_captured() -> None:
    """Called, captured and replayed: sums of halves, of which each is on its way while the other half is computed."""
    run, backend = compiled(layer, dual_batch_overlap=2)
    with torch.no_grad():
        for _ in range(3):
            for rows in (4, 5, 7):
                same(run(*(item.npu() for item in operands(rows))), rows)
    (entry,) = backend.compiled()
    assert entry.graph is not None and entry.ledger is not None and entry.ledger.replays > 0
    nodes = list(entry.graph.graph.nodes)
    starts = [node for node in nodes if "_c10d_functional.all_reduce" in str(node.target)]
    assert len(starts) == 4, nodes
    for start in starts[:-1]:  # behind the last one there is a norm alone
        (wait,) = start.users
        between = nodes[nodes.index(start) + 1 : nodes.index(wait)]
        assert any("aten.matmul" in str(node.target) for node in between), (start, between)


def check_a_weight_that_differs_is_refused() -> None:
    run, _ = compiled(layer, sequence_parallel=1)
    x, row, column, weight = operands(4)
    try:
        with torch.no_grad():
            run(*(item.npu() for item in (x, row, column, weight + RANK)))
    except RankError as error:
        assert "is not the same on ranks 0 and 1" in str(error), error
        assert "sequence_parallel" in str(error), error
    else:
        raise AssertionError("nothing was refused")


def check_other_collectives_are_refused() -> None:
    """Every rank hears of it, and where."""

    def one_more(x: Tensor, row: Tensor, column: Tensor, weight: Tensor) -> Tensor:
        return summed(layer(x, row, column, weight))

    run, _ = compiled(layer if RANK == 0 else one_more)
    try:
        with torch.no_grad():
            run(*(item.npu() for item in operands(4)))
    except RankError as error:
        assert "ranks 0 and 1 of group '0' planned different collectives: number 3 is none on rank 0" in str(error)
        assert "rank_checks.py" in str(error), error
    else:
        raise AssertionError("nothing was refused")


def check_ranks_can_go_on_after_a_refusal() -> None:
    run, _ = compiled(layer)
    with torch.no_grad():
        same(run(*(item.npu() for item in operands(4))), 4)


# -- whole weights -----------------------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """A rank's heads, and its part of the output projection."""

    def __init__(self, rank: int = RANK) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3 + rank)
        for name, shape in (("qkv", (WIDTH, INNER)), ("out", (WIDTH, INNER))):
            weight = torch.randn(shape, generator=draw)
            self.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))

    def partial(self, x: Tensor) -> Tensor:
        """x [rows, WIDTH]; this rank's term of the sum over the ranks."""
        heads = (x @ self.qkv).view(x.shape[0], 2, -1).transpose(0, 1)
        found = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return found.transpose(0, 1).reshape(x.shape[0], -1) @ self.out.t()

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x and the norm's weight are the same on all ranks."""
        return norm(summed(self.partial(x)) + x, weight)


def attended(rows: int, models: list[Attention]) -> tuple[list[Tensor], Tensor]:
    """x and the norm's weight, and what comes out, in float64."""
    draw = torch.Generator().manual_seed(7)
    x, weight = torch.randn(rows, WIDTH, generator=draw), torch.rand(WIDTH, generator=draw)
    terms = [model.double().partial(x.double()) for model in models]
    return [x.npu(), weight.npu()], norm(sum(terms, x.double()), weight.double())


def check_attention_is_exchanged_and_its_projection_whole() -> None:
    """Rows that the ranks divide and rows that they don't, captured and replayed; then with other weights."""
    model, models = Attention().npu(), [Attention(rank) for rank in range(RANKS)]
    run, backend = compiled(model, attention_exchange=1, sequence_parallel=1)
    with torch.no_grad():
        for factor in (1, 2):
            for rows in (4, 5, 4, 5):
                given, right = attended(rows, models)
                torch.testing.assert_close(run(*given).cpu().double(), right, rtol=1e-4, atol=1e-4)
            for item in (model, *models):
                item.out.mul_(2 * factor)
    names = ("all_to_all_rows", "all_gather_rows", "all_gather_columns", "reduce_scatter_rows")
    for entry in backend.compiled():
        assert entry.graph is not None and entry.ledger is not None
        found = [str(node.target) for node in entry.graph.graph.nodes]
        assert [found.count(f"npu_fused.{name}.default") for name in names] == [1, 1, 0, 0], found
        assert entry.ledger.replays > 0
        assert "a whole weight of 4.0 KiB beside the part of 2.0 KiB" in str(entry), entry


class Layers(torch.nn.Module):
    """Layers of attention, of which each adds to what the one before gives."""

    def __init__(self, rank: int = RANK, count: int = 5) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Attention(rank + 10 * index) for index in range(count))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """As of Attention."""
        for entry in self.layers:
            x = entry(x, weight)
        return x


def check_each_layer_is_kept_on_one_rank() -> None:
    """Captured and replayed at several sizes, twice with other weights, to the bits of the program that keeps all."""
    model = Layers().npu()
    options: dict[str, Any] = {"attention_exchange": 1, "sequence_parallel": 1}
    kept, plain = compiled(model, **options)
    spread, backend = compiled(model, **options, layer_sharding=True)
    with torch.no_grad():
        for _ in range(2):
            for rows in (4, 5, 4, 5, 4):
                given, _ = attended(rows, [])
                assert torch.equal(spread(*given), kept(*given))
            for entry in model.layers:
                entry.out.mul_(1.5)
    for entry in backend.compiled():
        assert entry.graph is not None and entry.ledger is not None and entry.ledger.replays > 0
        found = [str(node.target) for node in entry.graph.graph.nodes]
        assert found.count("_c10d_functional.broadcast.default") == 5, found
        assert "5 weights of 4.0 KiB spread over 2 ranks, 16.0 KiB on each instead of 20.0 KiB" in str(entry), entry
        assert "constants: 3 computed once, 12.0 KiB" in str(entry), entry
        assert "ahead: 5 broadcasts" in str(entry), entry
    assert all("constants: 5 computed once, 20.0 KiB" in str(entry) for entry in plain.compiled())


def check_a_broadcast_holds_nothing_up() -> None:
    """What stands between a broadcast and the wait for it runs before the broadcast's owner has come to it."""
    store, owner = torch.distributed.distributed_c10d._get_default_store(), RANKS - 1
    x, kept = torch.arange(4.0).npu(), torch.full((8,), float(RANK)).npu()
    if owner == RANK:
        store.wait(["computed"], datetime.timedelta(seconds=60))
    sent = torch.ops._c10d_functional.broadcast(kept, owner, "0")
    y = x * 2
    if RANK == 0:
        torch.npu.current_stream().synchronize()
        store.set("computed", "")
    came = torch.ops._c10d_functional.wait_tensor(sent)
    assert torch.equal(came.cpu(), torch.full((8,), float(owner))) and torch.equal(y.cpu(), torch.arange(4.0) * 2)
    assert torch.equal(kept.cpu(), torch.full((8,), float(RANK)))


def check_a_part_in_fractals_becomes_whole() -> None:
    """Another program has laid the weight out in FRACTAL_NZ."""
    part = torch.randn(WIDTH, INNER, generator=torch.Generator().manual_seed(RANK)).half()
    held = torch.nn.Parameter(part.npu(), requires_grad=False)
    torch.npu.config.allow_internal_format = True
    torch.ops.npu.npu_format_cast_(held, 29)
    parts = [torch.randn(WIDTH, INNER, generator=torch.Generator().manual_seed(rank)).half() for rank in range(RANKS)]
    whole = torch.ops.npu_fused.all_gather_columns(held, "0", RANKS)
    assert torch.equal(whole.cpu(), torch.cat(parts, dim=1))
    whole = torch.ops.npu_fused.all_gather_rows(held, "0", RANKS, RANKS * WIDTH)
    assert torch.equal(whole.cpu(), torch.cat(parts))


# -- experts -----------------------------------------------------------------------------------------------------------


def experts_layer(x: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """This rank's experts of CASE for all tokens, summed over the ranks."""
    local = owned(CASE, RANK)
    rows, places, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
        x, ids, active_num=-1, expert_num=CASE.experts, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[local[0], local[-1] + 1], quant_mode=-1, row_idx_type=0,
    )  # fmt: skip
    grouped = {"group_list": counts, "split_item": 3, "group_type": 0, "group_list_type": 1}
    (rows,) = torch.ops.npu.npu_grouped_matmul([rows], [w13], **grouped)
    (rows,) = torch.ops.npu.npu_grouped_matmul([torch.ops.npu_fused.swiglu(rows)], [w2], **grouped)
    rows = rows.unsqueeze(1)
    return summed(
        torch.ops.npu.npu_moe_finalize_routing(rows, None, None, None, weights, places, None, drop_pad_mode=3)
    )


def experts_given(case: Case) -> list[Tensor]:
    """x, experts and weights of all tokens, and this rank's matrices."""
    _, ids, weights = case.inputs()
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(case.tokens, WIDTH, generator=draw)
    w13, w2 = (torch.randn(case.experts, *shape, generator=draw) / 4 for shape in ((WIDTH, 2 * INNER), (INNER, WIDTH)))
    local = owned(case, RANK)
    return [item.npu() for item in (x, ids, weights.float(), w13[local], w2[local])]


def experts_expected(case: Case) -> Tensor:
    """In float64: what the definition drops counts nothing."""
    x, ids, weights = case.inputs()
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(case.tokens, WIDTH, generator=draw).double()
    w13, w2 = (torch.randn(case.experts, *shape, generator=draw) / 4 for shape in ((WIDTH, 2 * INNER), (INNER, WIDTH)))
    total = torch.zeros(case.tokens, WIDTH, dtype=torch.float64)
    for token, j in kept(case, ids, weights.float())[0].nonzero().tolist():
        expert = int(ids[token, j])
        gate, up = (x[token] @ w13[expert].double()).chunk(2)
        total[token] += weights[token, j] * ((torch.nn.functional.silu(gate) * up) @ w2[expert].double())
    return total


def check_tokens_beyond_the_capacity_are_dropped_in_a_replay() -> None:
    """Other tokens in each call of the captured graph: it drops and counts what it is given."""
    run, backend = compiled(experts_layer, dynamic=False, token_drop={"capacity_factor": CASE.factor})
    lost = routed = 0
    with torch.no_grad():
        for number in range(4):
            case = dataclasses.replace(CASE, number=number)
            found = run(*experts_given(case))
            torch.testing.assert_close(found.cpu().double(), experts_expected(case), rtol=1e-5, atol=1e-5)
            lost += kept(case, *case.inputs()[1:])[1]
            routed += case.tokens * case.top_k
    (entry,) = backend.compiled()
    assert entry.ledger is not None and entry.ledger.replays > 0
    assert entry.drops is not None and lost > 0
    (counted,) = entry.drops.read()
    assert (counted.routed, counted.dropped) == (routed, lost), "both ranks count for all sources"
    assert f"{lost} of {routed} rows dropped" in str(entry)


def check_a_stored_program_counts_too() -> None:
    given = experts_given(CASE)
    lost = kept(CASE, *CASE.inputs()[1:])[1]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        os.environ["NPU_COMPILER_CACHE"] = folder
        for stored in ("stored", "from the cache"):
            run, backend = compiled(experts_layer, dynamic=False, cache=True, token_drop={"capacity_factor": 1.0})
            run(*given)
            (entry,) = backend.compiled()
            assert (entry.stored, entry.drops is None) == (stored, False)
            assert entry.drops is not None and [counted.dropped for counted in entry.drops.read()] == [lost]
        del os.environ["NPU_COMPILER_CACHE"]


def check_nothing_dropped_is_the_same_bits() -> None:
    given = experts_given(CASE)
    with torch.no_grad():
        exact = compiled(experts_layer, dynamic=False, expert_communication="allgather")[0](*given)
        run, backend = compiled(experts_layer, dynamic=False, token_drop={"capacity_factor": float(RANKS)})
        found = [run(*given) for _ in range(3)]
    assert "npu_fused.all_to_all_dispatch.default" in operators(backend)
    assert all(torch.equal(exact.cpu(), item.cpu()) for item in found)


def check_other_capacities_are_refused() -> None:
    run, _ = compiled(experts_layer, dynamic=False, token_drop={"capacity_factor": 1.0 + RANK})
    try:
        with torch.no_grad():
            run(*experts_given(CASE))
    except RankError as error:
        assert "planned different collectives: number 1 is npu_fused.all_to_all_dispatch.default" in str(error), error
    else:
        raise AssertionError("nothing was refused")


if __name__ == "__main__":
    main(globals())
