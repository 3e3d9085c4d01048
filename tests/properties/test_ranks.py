"""Rewrites of collectives on random programs: a simulated world of 2 to 8 ranks computes the same before and after.

A program is a list of steps over values of [rows, WIDTH]. Matrices are each rank's own; norm weights, and the inputs
that have rows, are the same on all ranks, as in tensor parallelism.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from npu_compiler import fusion_kernels
from npu_compiler.passes import sequence_parallel
from npu_compiler.passes.record import Pass
from tests import world
from tests.passes.lowered import apply, calls
from tests.properties.draws import integers, one_of
from tests.properties.seeded import PHASES, SEED

WIDTH, INNER, PROGRAMS = 8, 4, 75
FIRED: Counter[int] = Counter()
"""How many programs of each number of ranks were rewritten."""
PASS = Pass("sequence_parallel", "", sequence_parallel.run)
Step = tuple[str, int, int]
"""What is done, to which of the values so far, and to which other one."""


def summed(partial: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(partial, "sum", "0"))


def linear(x: Tensor, column: Tensor, row: Tensor) -> Tensor:
    return summed((x @ column).relu() @ row)


def divided(x: Tensor, own: Tensor) -> Tensor:
    """Each rank's rows times a number of its own, put together again."""
    ranks = dist.get_world_size()
    part = torch.ops.npu_fused.shard_rows(x, "0", ranks) * own
    whole = torch.ops._c10d_functional.all_gather_into_tensor(part, ranks, "0")
    return torch.ops._c10d_functional.wait_tensor(whole)[: x.shape[0]]


Made = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]]
STEPS: dict[str, Made] = {
    "linear": lambda x, y, column, row, weight: [linear(x, column, row)],
    "norm": lambda x, y, column, row, weight: [torch.ops.npu_fused.rms_norm(x, weight, 1e-3)],
    "add_norm": lambda x, y, column, row, weight: torch.ops.npu_fused.add_rms_norm(x, y, weight, 1e-3),
    "add": lambda x, y, column, row, weight: [x + y],
    "mul": lambda x, y, column, row, weight: [x * y.sigmoid()],
    "scale": lambda x, y, column, row, weight: [x * weight],
    "narrow": lambda x, y, column, row, weight: [x.float()],
    "across": lambda x, y, column, row, weight: [x.softmax(0)],
    "turned": lambda x, y, column, row, weight: [x.flip(0)],
    "divided": lambda x, y, column, row, weight: [divided(x, row.sum())],
    "own": lambda x, y, column, row, weight: [x * row.sum()],
}


def program(steps: Sequence[Step], returned: int) -> Callable[..., list[Tensor]]:
    """The steps as a function of an input with rows, the two matrices and the weight."""

    def function(x: Tensor, column: Tensor, row: Tensor, weight: Tensor) -> list[Tensor]:
        values = [x, linear(x, column, row)]
        for name, first, second in steps:
            some = (values[index % len(values)].double() for index in (first, second))
            values += STEPS[name](*some, column, row, weight)
        return [values[-1], values[returned % len(values)]]

    return function


def inputs(rank: int, rows: int) -> list[Tensor]:
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    return [
        torch.randn(rows, WIDTH, generator=shared, dtype=torch.float64),
        torch.randn(WIDTH, INNER, generator=own, dtype=torch.float64),
        torch.randn(INNER, WIDTH, generator=own, dtype=torch.float64),
        torch.rand(WIDTH, generator=shared, dtype=torch.float64),
    ]


def check(steps: Sequence[Step], returned: int, ranks: int, rows: int, dynamic: bool) -> None:
    """At the rows it was traced with and, where they are dynamic, at others."""
    traced = make_fx(program(steps, returned), tracing_mode="symbolic" if dynamic else "fake")(*inputs(0, rows))
    before: fx.GraphModule = copy.deepcopy(traced)
    record = apply(PASS, traced)
    note(traced.code)
    sums = [calls(module).count("_c10d_functional.all_reduce.default") for module in (before, traced)]
    assert (sums[1] < sums[0]) == bool(record.fired)
    FIRED[ranks] += bool(record.fired)
    x, *_ = traced.graph.find_nodes(op="placeholder")
    constant = is_concrete_int(x.meta["val"].shape[0])  # dynamic rows too, where tracing saw one row a rank
    for count in (rows,) if constant else (rows, 1, 2 * rows + 1):
        given_to = [inputs(rank, count) for rank in range(ranks)]
        for got, expected in zip(world.run(traced, given_to), world.run(before, given_to), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_all_ranks_compute_the_same_before_and_after(ranks: int) -> None:
    names = one_of([*STEPS, "linear", "norm", "add_norm", "divided"])
    earlier = one_of([-1, -1, -1, -1, -2, -2, -3, -4])
    step = st.tuples(names, earlier, earlier)

    @seed(SEED * 1000 + ranks)
    @settings(
        max_examples=PROGRAMS,
        database=None,
        print_blob=True,
        phases=PHASES,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.lists(step, min_size=1, max_size=9), earlier, integers(2, 2 * ranks + 1), st.booleans())
    def run(steps: list[Step], returned: int, rows: int, dynamic: bool) -> None:
        note(f"NPU_COMPILER_SEED={SEED}")
        check(steps, returned, ranks, rows, dynamic)

    fusion_kernels.register()
    with world.group_of(ranks), torch.no_grad():
        run()
    assert FIRED[ranks] >= PROGRAMS / 5, "too few programs are rewritten for the check to mean something"
