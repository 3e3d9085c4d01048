"""token_drop: which layers it takes, what it leaves and why. Ranks are threads (tests/world.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from npu_compiler import fusion_kernels
from npu_compiler.config import Options, TokenDrop
from npu_compiler.errors import OptionError
from npu_compiler.passes import pipeline, sequence_parallel, token_drop
from npu_compiler.passes.record import Pass, PassRecord
from tests import world
from tests.experts import Case, kept, owned
from tests.passes.lowered import apply, calls

RANKS, EXPERTS, K, TOKENS, HIDDEN, INNER = 2, 4, 2, 12, 8, 16
DISPATCH, COMBINE = "npu_fused.all_to_all_dispatch.default", "npu_fused.all_to_all_combine.default"
GATHER, SCATTER, UNSHARD = (f"npu_fused.{name}_rows.default" for name in ("all_gather", "reduce_scatter", "unshard"))
EXACT = TokenDrop(max_drop_ratio=0.0)
Program = Callable[..., Any]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    fusion_kernels.register()


def summed(partial: Tensor, reduction: str = "sum") -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(partial, reduction, "0"))


def product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return torch_npu.npu_grouped_matmul(
        [rows], [weight], group_list=counts, split_item=3, group_type=0, group_list_type=1
    )[0]


def own_results(x: Tensor, ids: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, rank: int, ranks: int, **other: Any):  # type: ignore[no-untyped-def]
    """What this rank's experts add to each token, as npu_compiler/serving/moe.py computes it."""
    ids = torch.stack(
        [ids.select(1, index) for index in range(K)], 1
    )  # K is a number, also where all sizes are symbols
    local = owned(Case(ranks, other.pop("experts", EXPERTS), K, 1, "", 1.0), rank)
    settings = {"expert_tokens_num_type": 1, "expert_tokens_num_flag": True, "quant_mode": -1, "row_idx_type": 0}
    rows, places, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x, ids, active_num=-1, active_expert_range=[local[0], local[-1] + 1],
        **settings | {"expert_num": EXPERTS} | other,
    )  # fmt: skip
    rows = torch.ops.npu_fused.swiglu(product(rows, w13, counts))
    rows = product(rows, w2, counts).unsqueeze(1)
    return torch_npu.npu_moe_finalize_routing(rows, None, None, None, weights, places, None, drop_pad_mode=3)


def layer(rank: int, ranks: int) -> Program:
    return lambda x, ids, weights, w13, w2, *_: summed(own_results(x, ids, weights, w13, w2, rank, ranks))


def with_shared_expert(rank: int, ranks: int) -> Program:
    def program(x, ids, weights, w13, w2, own, *_):  # type: ignore[no-untyped-def]
        return summed(own_results(x, ids, weights, w13, w2, rank, ranks) * 2.5 + x @ own)

    return program


def inputs(case: Case, rank: int) -> list[Tensor]:
    """x, ids, weights, which are the same on all ranks; w13, w2 and a matrix, which are a rank's own."""
    _, ids, weights = case.inputs()
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(case.tokens, HIDDEN, generator=draw)
    w13 = torch.randn(case.experts, HIDDEN, 2 * INNER, generator=draw) / 3
    w2 = torch.randn(case.experts, INNER, HIDDEN, generator=draw) / 4
    own = torch.randn(case.ranks, HIDDEN, HIDDEN, generator=draw)
    local = owned(case, rank)
    return [item.npu() for item in (x, ids, weights.float(), w13[local], w2[local], own[rank])]


def expected(case: Case, drops: bool = True) -> Tensor:
    """In float64, with what the definition drops left out."""
    each = [[item.cpu().double() for item in inputs(case, rank)] for rank in range(case.ranks)]
    x, ids, weights = each[0][:3]
    w13, w2 = (torch.cat([one[index] for one in each]) for index in (3, 4))
    total = torch.zeros(case.tokens, HIDDEN, dtype=torch.float64)
    stays, _ = kept(case, ids.int(), weights)
    for token in range(case.tokens):
        for j, expert in enumerate(ids[token].int().tolist()):
            if stays[token, j] or not drops:
                gate, up = (x[token] @ w13[expert]).chunk(2)
                total[token] += weights[token, j] * ((functional.silu(gate) * up) @ w2[expert])
    return total


def rewritten(
    made: Callable[[int, int], Program], case: Case, drop: TokenDrop, dynamic: bool = False, *before: Pass
) -> tuple[list[fx.GraphModule], list[fx.GraphModule], PassRecord]:
    """The program of each rank, without and with the pass; and what the pass noted on rank 0."""
    programs, results, records = [], [], []
    for rank in range(case.ranks):
        with world.group_of(case.ranks, rank), torch.no_grad():
            mode = "symbolic" if dynamic else "fake"
            traced = make_fx(made(rank, case.ranks), tracing_mode=mode)(*inputs(case, rank))
            programs.append(copy.deepcopy(traced))
            for entry in before:
                apply(entry, traced)
            run = lambda module, record: token_drop.run(module, record, drop)  # noqa: E731
            records.append(apply(Pass("token_drop", "", run), traced))
            results.append(traced)
    return programs, results, records[0]


def run(programs: list[fx.GraphModule], case: Case) -> list[Tensor]:
    """What the program of each rank returns."""
    given = [inputs(case, rank) for rank in range(case.ranks)]
    found = world.together(case.ranks, lambda rank: programs[rank](*given[rank]), devices=("cpu", "npu"))
    return [item.cpu() for item in found]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("by", ["score", "arrival"])
def test_tokens_go_to_the_ranks_of_their_experts(dynamic: bool, by: str) -> None:
    case = Case(RANKS, EXPERTS, K, TOKENS, "skewed", 1.0, by)
    before, after, record = rewritten(layer, case, TokenDrop(capacity_factor=1.0, by=by), dynamic)
    (fired,) = record.fired
    assert fired.rule == f"token_drop: 2 ranks, capacity factor 1, dropped by {by}"
    found = calls(after[0])
    assert [found.count(name) for name in (DISPATCH, COMBINE, GATHER)] == [1, 1, 1]
    assert not any("all_reduce" in name or "finalize" in name for name in found)
    assert found.count("npu.npu_moe_init_routing_v2.default") == 1
    for exact in run(before, case):
        torch.testing.assert_close(exact.double(), expected(case, drops=False), rtol=1e-5, atol=1e-5)
    assert kept(case, *case.inputs()[1:])[1] > 0
    for result in run(after, case):
        torch.testing.assert_close(result.double(), expected(case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ranks", "experts", "tokens"), [(2, 4, 12), (2, 4, 1), (4, 6, 7), (8, 8, 5)])
def test_the_same_where_nothing_is_dropped(ranks: int, experts: int, tokens: int) -> None:
    """Also of a number of tokens that the ranks don't divide, and of fewer tokens than ranks."""
    case = Case(ranks, experts, K, tokens, "skewed", float(ranks))

    def made(rank: int, ranks: int) -> Program:
        def program(x, ids, weights, w13, w2, *_):  # type: ignore[no-untyped-def]
            return summed(own_results(x, ids, weights, w13, w2, rank, ranks, experts=experts, expert_num=experts))

        return program

    before, after, record = rewritten(made, case, EXACT)
    assert record.fired
    for got, exact in zip(run(after, case), run(before, case), strict=True):
        assert torch.equal(got, exact), "two experts a token: the sum has no other order"


def test_a_shared_expert_is_summed_as_before() -> None:
    case = Case(RANKS, EXPERTS, K, TOKENS + 1, "random", float(RANKS))
    before, after, _ = rewritten(with_shared_expert, case, EXACT, dynamic=True)
    found = calls(after[0])
    assert [found.count(name) for name in (DISPATCH, UNSHARD, GATHER)] == [1, 1, 0]
    assert found.count("_c10d_functional.all_reduce.default") == 1
    for got, exact in zip(run(after, case), run(before, case), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS + 1])
def test_behind_sequence_parallel_nothing_is_gathered_for_it(tokens: int) -> None:
    case = Case(RANKS, EXPERTS, K, tokens, "random", float(RANKS))

    def made(rank: int, ranks: int) -> Program:
        def program(x, ids, weights, w13, w2, own):  # type: ignore[no-untyped-def]
            total = summed(own_results(x, ids, weights, w13, w2, rank, ranks))
            return torch.ops.npu_fused.rms_norm(total, x[0], 1e-6) @ own

        return program

    parallel = Pass("sequence_parallel", "", sequence_parallel.run)
    before, after, _ = rewritten(made, case, EXACT, False, parallel)
    found = calls(after[0])
    assert [found.count(name) for name in (DISPATCH, COMBINE, GATHER, SCATTER, UNSHARD)] == [1, 1, 1, 0, 0]
    for got, exact in zip(run(after, case), run(before, case), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


def test_weights_are_scaled_up_if_asked_for() -> None:
    case = Case(RANKS, EXPERTS, K, TOKENS, "skewed", 1.0, renormalise=True)
    _, plain, _ = rewritten(layer, case, TokenDrop(capacity_factor=1.0))
    _, scaled, _ = rewritten(layer, case, TokenDrop(capacity_factor=1.0, renormalise=True))
    _, ids, weights = case.inputs()
    stays, _ = kept(case, ids, weights)
    factor = (weights.sum(1) / (weights * stays).sum(1)).nan_to_num(0, 0, 0).float().unsqueeze(1)
    for less, more in zip(run(plain, case), run(scaled, case), strict=True):
        torch.testing.assert_close(less * factor, more, rtol=1e-5, atol=1e-6)
    assert (factor > 1).any()


# -- what is left ------------------------------------------------------------------------------------------------------


def all_experts(x, ids, weights, w13, w2, *_):  # type: ignore[no-untyped-def]
    return summed(own_results(x, ids, weights, w13, w2, 0, 1))


def not_summed(x, ids, weights, w13, w2, *_):  # type: ignore[no-untyped-def]
    return own_results(x, ids, weights, w13, w2, 0, RANKS)


def read_before_the_sum(x, ids, weights, w13, w2, *_):  # type: ignore[no-untyped-def]
    results = own_results(x, ids, weights, w13, w2, 0, RANKS)
    return summed(results), results


def activated_before_the_sum(x, ids, weights, w13, w2, *_):  # type: ignore[no-untyped-def]
    return summed(own_results(x, ids, weights, w13, w2, 0, RANKS).relu())


def others_share(x, ids, weights, w13, w2, *_):  # type: ignore[no-untyped-def]
    return summed(own_results(x, ids, weights, w13, w2, 1, RANKS))


def largest(x, ids, weights, w13, w2, *_):  # type: ignore[no-untyped-def]
    return summed(own_results(x, ids, weights, w13, w2, 0, RANKS), "max")


def cumulated(x, ids, weights, w13, w2, *_):  # type: ignore[no-untyped-def]
    return summed(own_results(x, ids, weights, w13, w2, 0, RANKS, expert_tokens_num_type=0))


def across_rows(x, ids, weights, w13, w2, *_):  # type: ignore[no-untyped-def]
    routed = torch_npu.npu_moe_init_routing_v2(
        x, ids, active_num=-1, expert_num=EXPERTS, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[0, 2], quant_mode=-1, row_idx_type=0,
    )  # fmt: skip
    rows = routed[0].softmax(0).unsqueeze(1)
    return summed(torch_npu.npu_moe_finalize_routing(rows, None, None, None, weights, routed[1], None, drop_pad_mode=3))


def of_all_engines(x, ids, weights, w13, w2, *_):  # type: ignore[no-untyped-def]
    """As data-parallel engines share experts: each gathers the rows of all, and gets back what its own are to get."""
    funcol = torch.ops._c10d_functional
    x, ids, weights = (funcol.wait_tensor(funcol.all_gather_into_tensor(own, RANKS, "0")) for own in (x, ids, weights))
    results = own_results(x, ids, weights, w13, w2, 0, RANKS)
    return funcol.wait_tensor(funcol.reduce_scatter_tensor(results, "sum", RANKS, "0"))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (all_experts, "all experts are on this rank"),
        (not_summed, "output reads the experts' results before they are summed over the ranks"),
        (read_before_the_sum, "has 2 readers, not the sum over the ranks alone"),
        (activated_before_the_sum, "relu reads the experts' results before they are summed"),
        (of_all_engines, "reduce_scatter_tensor reads the experts' results before they are summed"),
        (others_share, "rank 0 of 2 has experts 2 to 3 of 4, not its share of neighbours"),
        (largest, "reads the experts' results before they are summed"),
        (cumulated, "expert_tokens_num_type=0, not 1"),
        (across_rows, "aten._softmax.default sees what is routed"),
    ],
    ids=lambda item: getattr(item, "__name__", "reason"),
)
def test_left_as_it_is(function: Program, reason: str) -> None:
    case = Case(RANKS, EXPERTS, K, TOKENS, "random", 1.0)
    with world.group_of(RANKS), torch.no_grad():
        program = make_fx(function, tracing_mode="fake")(*inputs(case, 0))
        before = calls(program)
        record = apply(Pass("token_drop", "", token_drop.run), program)
    assert not record.fired
    (refused,) = record.refused
    assert reason in refused.reason
    assert calls(program) == before


# -- the option --------------------------------------------------------------------------------------------------------


def test_the_option_switches_it_on() -> None:
    assert "token_drop" not in pipeline.names(pipeline.selected(Options()))
    assert "token_drop" in pipeline.names(pipeline.selected(Options.of({"token_drop": {"capacity_factor": 1.5}})))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, ""),
        ({"capacity_factor": 2, "by": "arrival", "renormalise": True}, ""),
        ({"max_drop_ratio": 0}, ""),
        ({"by": "score"}, "does not say how much room there is"),
        ({"capacity_factor": 1.5, "max_drop_ratio": 0.1}, "does not say how much room"),
        ({"capacity_factor": 0}, "leaves no room"),
        ({"capacity_factor": "1.5"}, "leaves no room"),
        ({"max_drop_ratio": 1.0}, "is no part of the rows"),
        ({"max_drop_ratio": -0.5}, "is no part of the rows"),
        ({"capacity_factor": 1.5, "by": "scores"}, "did you mean 'score'"),
        ({"capacity_factor": 1.5, "renormalize": True}, "did you mean 'renormalise'"),
        ({"capacity_factor": 1.5, "renormalise": 1}, "it is true or false"),
    ],
)
def test_what_the_option_may_be(given: dict[str, Any], message: str) -> None:
    if not message:
        Options.of({"token_drop": given})
        return
    with pytest.raises(OptionError, match=message):
        Options.of({"token_drop": given})
