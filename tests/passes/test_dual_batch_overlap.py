"""dual_batch_overlap: random programs on simulated ranks mean the same, sums run beside the other half's products, and
what is left as it is.

Two real ranks: tests/compiler/rank_checks.py, and tests/serving/test_placements.py through vLLM.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from npu_compiler import fusion_kernels
from npu_compiler.config import Options
from npu_compiler.errors import OptionError
from npu_compiler.graph.traffic import launches
from npu_compiler.passes import dual_batch_overlap, pipeline
from npu_compiler.passes.record import Pass, PassRecord
from npu_compiler.plan.order import arrange
from tests import world
from tests.experts import Case
from tests.passes import test_token_drop as experts
from tests.passes.lowered import apply, calls
from tests.properties.draws import one_of
from tests.properties.seeded import PHASES, SEED
from tests.properties.test_ranks import INNER, STEPS, WIDTH, Step, inputs, program, summed

SUM, WAIT, CAT = "_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default", "aten.cat.default"
ROWS = 6


@pytest.fixture(autouse=True, scope="module")
def operators() -> None:
    fusion_kernels.register()


def halved(rows: int = 2) -> Pass:
    return Pass("dual_batch_overlap", "", lambda module, record: dual_batch_overlap.run(module, record, rows))


def traced(function: Callable[..., Any], dynamic: bool = False) -> fx.GraphModule:
    return make_fx(function, tracing_mode="symbolic" if dynamic else "fake")(*inputs(0, ROWS))


def rewritten(function: Callable[..., Any], ranks: int = 2, dynamic: bool = False) -> tuple[fx.GraphModule, PassRecord]:
    """The program of `function` behind the pass, which means what it meant before."""
    module = traced(function, dynamic)
    before = copy.deepcopy(module)
    record = apply(halved(), module)
    for rows in (ROWS, 2, 2 * ROWS + 1) if dynamic else (ROWS,):
        given_to = [inputs(rank, rows) for rank in range(ranks)]
        for got, expected in zip(world.run(module, given_to), world.run(before, given_to), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    return module, record


@pytest.mark.parametrize("ranks", [2, 3, 4, 8], indirect=True)
def test_all_ranks_compute_the_same_before_and_after(ranks: int) -> None:
    names = one_of([*STEPS, "linear", "linear", "norm", "add_norm"])
    earlier = one_of([-1, -1, -1, -1, -2, -2, -3, -4])
    fired = 0

    @seed(SEED * 1000 + ranks)
    @settings(
        max_examples=25,
        database=None,
        print_blob=True,
        phases=PHASES,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.lists(st.tuples(names, earlier, earlier), min_size=1, max_size=9), earlier, st.booleans())
    def run(steps: list[Step], returned: int, dynamic: bool) -> None:
        nonlocal fired
        note(f"NPU_COMPILER_SEED={SEED}")
        function = program(steps, returned)
        before = calls(traced(function)).count(SUM)
        module, record = rewritten(function, ranks, dynamic)
        note(module.code)
        sums = sum(int(entry.rule.split(":")[1].split()[0]) for entry in record.fired)
        assert calls(module).count(SUM) == before + sums
        fired += bool(record.fired)

    run()
    assert fired >= 10, "too few programs are rewritten for the check to mean something"


def layers(x: Tensor, column: Tensor, row: Tensor, weight: Tensor) -> list[Tensor]:
    """Two layers. A flip stands for attention: it reads all rows at once."""
    fused = torch.ops.npu_fused
    residual = x
    for _ in range(2):
        normed, residual = fused.add_rms_norm(summed((x @ column) @ row), residual, weight, 1e-3)
        normed, residual = fused.add_rms_norm(summed((normed @ column).relu() @ row), residual, weight, 1e-3)
        x = (normed @ column).flip(0) @ row
    return [x, residual]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_half_is_computed_while_the_other_is_sent(dynamic: bool, ranks: int) -> None:
    module, record = rewritten(layers, dynamic=dynamic)
    assert [entry.rule for entry in record.fired] == [
        "dual_batch_overlap: 2 sums and 5 products of two halves of the rows",
        "dual_batch_overlap: 2 sums and 6 products of two halves of the rows",
    ]
    for order in (module, _arranged(module)):
        nodes = [node for node in order.graph.nodes if launches(node)]
        starts = [node for node in nodes if str(node.target) == SUM]
        assert len(starts) == 8
        for start in starts:
            (wait,) = start.users
            between = [str(node.target) for node in nodes[nodes.index(start) + 1 : nodes.index(wait)]]
            assert "aten.mm.default" in between, (start, between)


def _arranged(module: fx.GraphModule) -> fx.GraphModule:
    module = copy.deepcopy(module)
    arrange(module.graph, "cpu")
    return module


def test_the_residual_stays_in_halves_between_regions(ranks: int) -> None:
    """Put together is what attention reads, and what is returned."""
    found = calls(rewritten(layers)[0])
    assert found.count(CAT) == 4, "normed @ column and the last product, and the residual of both regions"
    assert found.count("aten.slice.Tensor") == 4, "of x, and of what stands for attention's output"


def viewed(x: Tensor, column: Tensor, row: Tensor, weight: Tensor) -> Any:
    """What looks at a result stands in front of calls of the region, and is read behind them."""
    total = summed(x @ column @ row)
    turned = total.t()
    out = (total.relu() @ column) @ row
    return turned @ out


def test_views_of_results_move_behind_the_halves(ranks: int) -> None:
    for dynamic in (False, True):
        assert len(rewritten(lambda *args: [viewed(*args)], dynamic=dynamic)[1].fired) == 1


def alone(x: Tensor, column: Tensor, row: Tensor, weight: Tensor) -> Any:
    return [torch.ops.npu_fused.rms_norm(summed(x), weight, 1e-3)]


def scaled_by_a_sum(x: Tensor, column: Tensor, row: Tensor, weight: Tensor) -> Any:
    """A factor of each column that is made of all rows."""
    partial = x @ column @ row
    return [(summed(partial) * partial.sum(0)) @ column]


def largest(x: Tensor, column: Tensor, row: Tensor, weight: Tensor) -> Any:
    partial = x @ column @ row
    return [torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(partial, "max", "0")) @ column]


def test_left_as_it_is(ranks: int) -> None:
    module, record = rewritten(alone)
    assert [entry.reason for entry in record.refused] == ["there is nothing to compute beside the sum"]
    assert not record.fired and CAT not in calls(module)
    module, record = rewritten(largest)
    assert not record.fired and not record.refused
    module, record = rewritten(scaled_by_a_sum)
    assert calls(module).count("aten.sum.dim_IntList") == 1, "all rows are summed up together"


def test_fewer_rows_than_asked_for(ranks: int) -> None:
    (refused, *_) = apply(halved(ROWS + 1), traced(layers)).refused
    assert "option dual_batch_overlap=7" in refused.reason
    assert apply(halved(ROWS), traced(layers)).fired
    assert not apply(halved(5), traced(layers, dynamic=True)).fired, "5 rows can't be proven"


@pytest.mark.parametrize("exchange", [{"token_drop": {"max_drop_ratio": 0.0}}, {"expert_communication": "alltoall"}])
def test_the_sum_of_experts_is_left_to_what_exchanges_their_tokens(exchange: dict[str, Any]) -> None:
    """And the others are halved."""

    def made(rank: int) -> Callable[..., Any]:
        def block(x, ids, weights, w13, w2, own, *_):  # type: ignore[no-untyped-def]
            whole = summed(x @ own).relu()
            return summed(experts.own_results(whole, ids, weights, w13, w2, rank, 2)) @ own

        return block

    case = Case(2, experts.EXPERTS, experts.K, 12, "random", 1.0)
    options = Options.of({"dual_batch_overlap": 2, **exchange})
    before, after = [], []
    for rank in range(2):
        with world.group_of(2, rank), torch.no_grad():
            before.append(make_fx(made(rank), tracing_mode="fake")(*experts.inputs(case, rank)))
            after.append(copy.deepcopy(before[-1]))
            for entry in pipeline.selected(options):
                if entry.name in {"dual_batch_overlap", *exchange}:
                    apply(entry, after[-1])
    found = calls(after[0])
    assert [found.count(name) for name in (experts.DISPATCH, experts.COMBINE, SUM)] == [1, 1, 2]
    for got, exact in zip(experts.run(after, case), experts.run(before, case), strict=True):
        torch.testing.assert_close(got, exact)


def test_the_option_switches_it_on() -> None:
    assert "dual_batch_overlap" not in pipeline.names(pipeline.selected(Options()))
    names = pipeline.names(pipeline.selected(Options(dual_batch_overlap=2, attention_exchange=1)))
    assert names.index("attention_exchange") < names.index("dual_batch_overlap")
    for wrong in (-1, 1):
        with pytest.raises(OptionError, match=f"dual_batch_overlap={wrong} is no number of rows"):
            Options(dual_batch_overlap=wrong)
    with pytest.raises(OptionError, match="dual_batch_overlap and matmul_all_reduce both want the sums"):
        Options(dual_batch_overlap=2, matmul_all_reduce=1)
    assert (INNER, WIDTH) == (4, 8)
