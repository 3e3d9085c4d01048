"""Sending rows to the ranks of their experts and back, against a plain program in float64. Ranks are threads."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from npu_compiler import fusion_kernels
from npu_compiler.fusion_kernels import drop_counts
from npu_compiler.fusion_kernels.expert_capacity import FINE, capacity, is_exact, parts_for, parts_of
from npu_compiler.fusion_kernels.expert_exchange import no_expert
from tests import world
from tests.experts import HIDDEN, KINDS, Case, kept, owned
from tests.properties.draws import integers, one_of
from tests.properties.seeded import PHASES, SEED


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    fusion_kernels.register()


def matrices(case: Case) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(case.experts, HIDDEN, HIDDEN, dtype=torch.float64, generator=draw)


def expected(case: Case) -> Tensor:
    x, ids, weights = case.inputs()
    stays, _ = kept(case, ids, weights)
    scales = weights * stays
    if case.renormalise:
        scales = scales * (weights.sum(1) / scales.sum(1)).nan_to_num(0, 0, 0).unsqueeze(1)
    experts = matrices(case)
    rows = torch.stack([torch.stack([x[t] @ experts[e] for e in ids[t].tolist()]) for t in range(case.tokens)])
    return (rows * scales.unsqueeze(-1)).sum(1)


def exchanged(case: Case, factor: float, whole: bool = True, counter: str = "") -> list[Tensor]:
    """What each rank has in the end: its rows."""
    x, ids, weights = case.inputs()
    experts = matrices(case)
    operators = torch.ops.npu_fused

    def rank_does(rank: int) -> Tensor:
        mine = slice(None) if whole else slice(rank * case.rows, (rank + 1) * case.rows)
        rows, to, places, scales = operators.all_to_all_dispatch(
            x[mine], ids[mine], weights[mine], world.DEFAULT, case.ranks, case.experts, parts_of(factor), case.by,
            case.renormalise, whole, counter,
        )  # fmt: skip
        local = owned(case, rank)
        assert int(to.max()) <= no_expert(case.experts, case.ranks)
        # Experts by number, those of nobody last, as the routing operator sorts them; what nobody sent is not computed.
        order = to.flatten().argsort(stable=True)
        results = torch.full_like(rows, torch.nan)
        for index, source in enumerate(order.tolist()):
            if int(to[source]) < len(local):
                results[index] = (rows[source].unsqueeze(1) * experts[local[int(to[source])]]).sum(0)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        back[to.flatten() >= len(local)] = -1
        return operators.all_to_all_combine(results, back.int(), places, scales, world.DEFAULT, case.ranks)

    return world.together(case.ranks, rank_does)


def check(case: Case) -> None:
    assume(case.top_k <= case.experts)
    found = torch.cat(exchanged(case, case.factor))[: case.tokens]
    torch.testing.assert_close(found, expected(case), rtol=1e-12, atol=1e-12)
    _, ids, weights = case.inputs()
    if kept(case, ids, weights)[1] == 0:
        without_limit = torch.cat(exchanged(case, float(case.ranks)))[: case.tokens]
        assert torch.equal(found, without_limit), "nothing was dropped, so no bit may differ"


def cases(ranks: int) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        ranks=st.just(ranks),
        experts=integers(1, 2 * ranks + 1),
        top_k=integers(1, 4),
        tokens=integers(1, 3 * ranks + 1),
        kind=one_of(KINDS),
        factor=one_of([0.01, 0.5, 1.0, 1.1, 1.25, 1.5, 2.0, 8.0]),
        by=one_of(["score", "arrival"]),
        renormalise=st.booleans(),
        ties=st.booleans(),
        number=integers(0, 1000),
    )


@pytest.mark.parametrize(("ranks", "examples"), [(2, 80), (4, 50), (8, 25)])
def test_rows_are_what_their_experts_make_of_them(ranks: int, examples: int) -> None:
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]

    @seed(SEED * 100 + ranks)
    @settings(max_examples=examples, database=None, phases=PHASES, suppress_health_check=slow)
    @given(cases(ranks))
    @example(Case(ranks, 2 * ranks, 2, 1, "one rank", 1.0))  # fewer tokens than ranks
    @example(Case(ranks, 2 * ranks, 2, 4 * ranks, "one rank", 1.0, "arrival", renormalise=True))
    @example(Case(ranks, 2 * ranks + 1, 2, 4 * ranks, "skewed", 1.25, ties=True))
    @example(Case(ranks, 2 * ranks, 2, 4 * ranks, "balanced", 1.0))
    def run(case: Case) -> None:
        check(case)

    run()


def test_a_rank_that_has_its_own_rows_only_sends_the_same() -> None:
    case = Case(2, 4, 2, 8, "skewed", 1.0)
    for all_rows, own_rows in zip(exchanged(case, 1.0), exchanged(case, 1.0, whole=False), strict=True):
        assert torch.equal(all_rows, own_rows)


# -- counters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def counter(request: pytest.FixtureRequest) -> Iterator[tuple[str, Tensor]]:
    """The name of a counter, and its memory: the threads of all ranks count with it. `param`: how many rows are
    real."""
    memory = torch.zeros(3, dtype=torch.int64)
    real = getattr(request, "param", None)
    made = drop_counts.Counter(memory, None if real is None else torch.tensor([real]))
    drop_counts._counters["test"] = made
    yield "test", memory
    del drop_counts._counters["test"]


@pytest.mark.parametrize(
    ("kind", "tokens", "drops"),
    [
        ("balanced", 16, False),
        ("random", 16, True),
        ("skewed", 16, True),
        ("one rank", 16, True),
        ("one rank", 3, True),
    ],
)
def test_what_is_dropped_is_counted(counter: tuple[str, Tensor], kind: str, tokens: int, drops: bool) -> None:
    case = Case(4, 8, 2, tokens, kind, 1.25, number=tokens)
    name, memory = counter
    _, ids, weights = case.inputs()
    lost = kept(case, ids, weights)[1]
    assert (lost > 0) == drops
    for _ in range(2):
        exchanged(case, case.factor, counter=name)
    calls = 2 * case.ranks  # every rank counts for all of them
    routed, dropped, needed = memory.tolist()
    assert (routed, dropped) == (calls * case.tokens * case.top_k, calls * lost)
    memory.zero_()
    exchanged(case, needed / FINE, counter=name)
    assert memory.tolist()[1] == 0, "this is what was needed"
    room = needed * case.rows * case.top_k // (case.ranks * FINE)
    exchanged(case, (room - 1) * case.ranks / (case.rows * case.top_k) or 0.01, counter=name)
    assert memory.tolist()[1] > 0 or room == 1, "and no less"


@pytest.mark.parametrize("counter", [5], indirect=True)
def test_padding_takes_no_room_and_is_not_counted(counter: tuple[str, Tensor]) -> None:
    name, memory = counter
    case = Case(2, 4, 2, 8, "one rank", 1.0)
    found = torch.cat(exchanged(case, 1.0, counter=name))
    _, ids, weights = case.inputs()
    ids[5:] = case.experts  # nobody's
    stays, lost = kept(case, ids, weights)
    assert memory.tolist()[:2] == [2 * 5 * case.top_k, 2 * lost]
    assert not found[5:].any()
    assert found[4].any(), "the only real row of rank 1 has all the room"
    assert stays[4].all()


# -- capacity ----------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(2, 5), st.integers(1, 6), st.sampled_from([0, 0.1, 0.3, 0.5, 0.9])
)
@settings(database=None, max_examples=300)
def test_no_routing_loses_more_than_the_ratio(top_k: int, each: int, ranks: int, rows: int, ratio: float) -> None:
    """Every way to spread a source's rows over the ranks, at most min(top_k, each) of a token's to one."""
    assume(top_k <= each * ranks)
    parts = parts_for(ratio, top_k, each, ranks)
    room = capacity(rows, top_k, ranks, each, parts)
    most, total = rows * min(top_k, each), rows * top_k
    worst = 0
    left, full = total, 0
    while left > 0:  # the worst is to fill one rank after the other; anything else loses less
        worst += max(0, min(most, left) - room)
        left -= most
        full += 1
    assert worst <= Fraction(str(ratio)) * total
    if not ratio:
        assert room == most
        assert is_exact(top_k, ranks, each, parts)
    for spread in _spreads(total, ranks, most):
        assert sum(max(0, part - room) for part in spread) <= worst


def _spreads(total: int, ranks: int, most: int) -> Iterator[list[int]]:
    """Some thousand ways at most: whole and half loads of each rank."""
    if ranks == 1:
        if total <= most:
            yield [total]
        return
    for part in sorted({0, most // 2, min(most, total), total // ranks}):
        if part <= total:
            for rest in _spreads(total - part, ranks - 1, most):
                yield [part, *rest]


def test_capacity_is_the_mean_times_the_factor_rounded_up() -> None:
    assert capacity(8, 2, 2, 2, parts_of(1.25)) == 10
    assert capacity(7, 2, 2, 2, parts_of(1.1)) == 8  # 7.7
    assert capacity(1, 1, 8, 2, parts_of(0.1)) == 1, "there is room for one at least"
    assert capacity(8, 2, 2, 2, parts_of(2.0)) == 16, "all of a source's rows"
    assert capacity(8, 2, 2, 1, parts_of(8.0)) == 8, "a token has one row for a rank with one expert"
