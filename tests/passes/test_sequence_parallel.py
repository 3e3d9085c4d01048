"""sequence_parallel: which regions it takes, what it leaves and why.

Ranks are simulated (tests/world.py). Two real ones: tests/compiler/rank_checks.py, and
tests/serving/test_tensor_parallel.py through vLLM.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from npu_compiler import fusion_kernels
from npu_compiler.config import Options
from npu_compiler.errors import OptionError
from npu_compiler.graph.source import TIMES
from npu_compiler.passes import pipeline, sequence_parallel
from npu_compiler.passes.record import Pass, PassRecord
from tests import world
from tests.passes.lowered import apply, calls

RANKS, ROWS, WIDTH, INNER = 2, 6, 8, 4
SCATTER, GATHER, SHARD = (
    f"npu_fused.{name}.default" for name in ("reduce_scatter_rows", "all_gather_rows", "shard_rows")
)
SUM = ["_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default"]


@pytest.fixture(autouse=True, scope="module")
def ranks() -> Iterator[None]:
    fusion_kernels.register()
    with world.group_of(RANKS), torch.no_grad():
        yield


def summed(partial: Tensor, reduction: str = "sum") -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(partial, reduction, "0"))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.npu_fused.rms_norm(x, weight, 1e-6)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.npu_fused.add_rms_norm(x, residual, weight, 1e-6)


def inputs(rank: int, rows: int = ROWS, width: int = WIDTH) -> dict[str, Tensor]:
    """`shared` ones are the same on all ranks; `x`, `row` and `column` are a rank's own."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    draw = torch.float64
    return {
        "x": torch.randn(rows, INNER, generator=own, dtype=draw),
        "row": torch.randn(INNER, width, generator=own, dtype=draw),
        "column": torch.randn(width, INNER, generator=own, dtype=draw),
        "weight": torch.randn(width, generator=shared, dtype=draw),
        "other": torch.randn(width, generator=shared, dtype=draw),
        "embedded": torch.randn(rows, width, generator=shared, dtype=draw),
    }


def rewritten(
    function: Callable[..., Any], rows: int = 1, dynamic: bool = False, sizes: tuple[int, ...] = (ROWS,)
) -> tuple[fx.GraphModule, PassRecord]:
    """The program of `function` behind the pass, which means what it meant before: compared at these sizes."""
    example = inputs(0)
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    program = make_fx(function, tracing_mode="symbolic" if dynamic else "fake")(*(example[name] for name in names))
    before = copy.deepcopy(program)
    record = apply(
        Pass("sequence_parallel", "", lambda module, record: sequence_parallel.run(module, record, rows)), program
    )
    for size in sizes:
        given = [[inputs(rank, size)[name] for name in names] for rank in range(RANKS)]
        for got, expected in zip(world.run(program, given), world.run(before, given), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    return program, record


def layer(x, row, column, weight, other):  # type: ignore[no-untyped-def]
    residual = summed(x @ row)
    normed = norm(residual, weight)
    normed, residual = add_norm(summed((normed @ column).relu() @ row), residual, other)
    normed, residual = add_norm(summed((normed @ column).relu() @ row), residual, weight)
    return (normed,)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_region_with_its_residual_is_worked_on_in_parts(dynamic: bool) -> None:
    program, record = rewritten(layer, dynamic=dynamic, sizes=(6, 7, 2) if dynamic else (ROWS,))
    (fired,) = record.fired
    padding = "padded where the ranks do not divide the rows" if dynamic else "no padding"
    assert fired.rule == f"sequence_parallel: 3 sums, 3 gathers over 2 ranks, {padding}"
    assert fired.saves is not None and fired.saves.kernels == -3
    found = calls(program)
    assert [found.count(name) for name in (SCATTER, GATHER, SHARD, *SUM)] == [3, 3, 0, 0, 0]
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.npu_fused.add_rms_norm.default):
        assert node.meta["val"][0].shape[0] == (ROWS // 2 if not dynamic else (node.args[0].meta["val"].shape[0]))
    (output,) = program.graph.output_node().args[0]
    assert str(output.target) == GATHER


def test_rows_that_no_rank_has_are_zero() -> None:
    """Fewer rows than ranks: the last rank norms a row of zeros, which nobody reads."""
    program, _ = rewritten(layer, dynamic=True, sizes=(1, 3))
    assert SCATTER in calls(program)


def test_a_whole_residual_is_cut_into_parts() -> None:
    """Embedded on every rank alike, as where the vocabulary is not split."""

    def first_layer(x, row, column, weight, embedded):  # type: ignore[no-untyped-def]
        return add_norm(summed(x @ row), embedded * 2, weight)[0] @ column

    program, _ = rewritten(first_layer)
    assert [calls(program).count(name) for name in (SCATTER, SHARD, GATHER)] == [1, 1, 1]


def test_what_is_quantized_is_gathered_quantized() -> None:
    """One byte an element instead of eight; the scale of a row goes with it."""

    def quantized(x, row, weight):  # type: ignore[no-untyped-def]
        partial, weight = (x @ row).to(torch.float16), weight.to(torch.float16)
        total = summed(partial)
        rows, scale, _ = torch.ops.npu_fused.add_rms_norm_dynamic_quant(total, total, weight, None, None, 1e-6)
        return rows, scale

    program, record = rewritten(quantized)
    assert record.fired
    gathered = program.graph.find_nodes(op="call_function", target=torch.ops.npu_fused.all_gather_rows.default)
    assert [node.meta["val"].dtype for node in gathered] == [torch.int8, torch.float32]


def test_a_wider_result_is_computed_from_what_was_gathered() -> None:
    def widened(x, row, weight):  # type: ignore[no-untyped-def]
        return norm(summed((x @ row).float()), weight.float()).double()

    program, _ = rewritten(widened)
    (gather,) = program.graph.find_nodes(op="call_function", target=torch.ops.npu_fused.all_gather_rows.default)
    assert gather.meta["val"].dtype is torch.float32
    assert calls(program)[-1].startswith("aten._to_copy")


def both_kept(x, row, weight, embedded):  # type: ignore[no-untyped-def]
    return add_norm(summed(x @ row), embedded, weight)


def sum_kept(x, row, weight):  # type: ignore[no-untyped-def]
    total = summed(x @ row)
    return norm(total, weight), total


def nothing_behind(x, row, column):  # type: ignore[no-untyped-def]
    return summed(x @ row) @ column


def across_rows(x, row, column):  # type: ignore[no-untyped-def]
    return summed(x @ row).softmax(0) @ column


def own_factor(x, row, column):  # type: ignore[no-untyped-def]
    return summed(x @ row) * column.sum(1) + 1


def own_rows(x, row):  # type: ignore[no-untyped-def]
    return summed(x @ row) + x @ row


def largest(x, row, weight):  # type: ignore[no-untyped-def]
    return norm(summed(x @ row, "max"), weight)


def a_vector(x, row, weight):  # type: ignore[no-untyped-def]
    return summed((x @ row).sum(0)) + weight


def per_row_factor(x, row, embedded):  # type: ignore[no-untyped-def]
    return summed(x @ row)[None] * embedded


def stage(layers: int) -> Callable[..., Any]:
    """So many layers of a pipeline, in front of another stage, which wants the residual too."""

    def function(x, row, column, weight, embedded):  # type: ignore[no-untyped-def]
        residual = embedded
        for _ in range(2 * layers):
            normed, residual = add_norm(summed(x @ row), residual, weight)
            x = (normed @ column).relu()
        return summed(x @ row), residual

    return function


def test_a_stage_of_many_layers_gathers_its_residual_at_the_end() -> None:
    """One result more than it has sums, which is worth it from a number of norms on."""
    program, record = rewritten(stage(6))
    (fired,) = record.fired
    assert fired.rule == "sequence_parallel: 12 sums, 13 gathers over 2 ranks, no padding"
    assert [calls(program).count(name) for name in (SCATTER, SHARD, GATHER)] == [12, 1, 13]
    normed, residual = program.graph.output_node().args[0]
    assert str(normed.target) == SUM[1], "nothing is normed behind the last sum"
    assert str(residual.target) == GATHER


def test_a_stage_of_few_layers_stays() -> None:
    program, record = rewritten(stage(2))
    (refused,) = record.refused
    assert refused.reason.startswith("5 results would be gathered for 4 sums: 384 bytes more, which are estimated")
    assert SCATTER not in calls(program)


def test_a_layer_counts_as_often_as_it_is_repeated() -> None:
    """Of equal layers the pass sees a few; they stand for all."""
    names = ("x", "row", "column", "weight", "embedded")
    short = make_fx(stage(2), tracing_mode="fake")(*(inputs(0)[name] for name in names))
    norms = short.graph.find_nodes(op="call_function", target=torch.ops.npu_fused.add_rms_norm.default)
    for node in norms[1:3]:
        for of_layer in (node, *node.users, *(item for item in node.all_input_nodes if item.op == "call_function")):
            of_layer.meta[TIMES] = 6
    assert apply(Pass("sequence_parallel", "", sequence_parallel.run), short).fired


def gathered_rows(part: Tensor) -> Tensor:
    whole = torch.ops._c10d_functional.all_gather_into_tensor(part, RANKS, "0")
    return torch.ops._c10d_functional.wait_tensor(whole)


def experts_of_own_rows(x, row, column, weight, other):  # type: ignore[no-untyped-def]
    """As vLLM has a mixture of experts whose tokens it divides over the ranks."""
    residual = summed(x @ row)
    normed, residual = add_norm(summed((norm(residual, weight) @ column).relu() @ row), residual, other)
    own = torch.ops.npu_fused.shard_rows(normed, "0", RANKS).sigmoid() * other
    normed, residual = add_norm(gathered_rows(own)[: x.shape[0]], residual, weight)
    return normed @ column


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_what_the_program_cuts_and_gathers_stays_in_parts(dynamic: bool) -> None:
    program, record = rewritten(experts_of_own_rows, dynamic=dynamic, sizes=(6, 7, 2, 1) if dynamic else (ROWS,))
    (fired,) = record.fired
    assert fired.rule.startswith(
        "sequence_parallel: 2 sums and 1 gather of the program, 2 gathers over 2 ranks, 1 cut left out, "
    )
    found = calls(program)
    assert [found.count(name) for name in (SCATTER, GATHER, SHARD, *SUM)] == [2, 2, 0, 0, 0]
    assert not any("all_gather_into_tensor" in name or "slice" in name for name in found)


def other_rows_gathered(x, row, column, weight, other):  # type: ignore[no-untyped-def]
    """The ranks' parts are not the rows' in their order: the last row of each is nobody's."""
    residual = summed(x @ row)
    own = torch.cat([torch.ops.npu_fused.shard_rows(residual, "0", RANKS), residual[:1]])
    return add_norm(gathered_rows(own)[: x.shape[0]], residual, weight)[0]


def gather_is_read(x, row, column, weight, other):  # type: ignore[no-untyped-def]
    residual = summed(x @ row)
    whole = gathered_rows(torch.ops.npu_fused.shard_rows(residual, "0", RANKS))
    return add_norm(whole[: x.shape[0]], residual, weight)[0], whole.sum(0)


def only_gathered(x, row, column, weight, other):  # type: ignore[no-untyped-def]
    return norm(gathered_rows(x @ row), weight)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (other_rows_gathered, "parts of 4 rows are not known to be 6 divided by 2, rounded up"),
        (gather_is_read, "what is gathered is read before filled-up rows are cut off"),
        (only_gathered, ""),
    ],
)
def test_gathers_that_no_region_goes_on_from(function: Callable[..., Any], reason: str) -> None:
    program, record = rewritten(function, dynamic=function is gather_is_read)
    assert any("all_gather_into_tensor" in name for name in calls(program))
    assert not reason or [entry.reason for entry in record.refused if entry.reason == reason], record


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (both_kept, "2 results would be gathered for 1 sum: 384 bytes more"),
        (sum_kept, ""),
        (nothing_behind, ""),
        (across_rows, ""),
        (own_factor, "is computed, and may differ between the ranks"),
        (own_rows, "may differ between the ranks"),
        (largest, ""),
        (a_vector, "the sum has 1 dimensions, rows need two"),
        (per_row_factor, ""),
    ],
    ids=lambda item: getattr(item, "__name__", "reason"),
)
def test_left_as_it_is(function: Callable[..., Any], reason: str) -> None:
    program, record = rewritten(function)
    assert not record.fired
    assert SCATTER not in calls(program)
    assert [reason in entry.reason for entry in record.refused] == [True] * bool(reason), record


def test_fewer_rows_than_asked_for() -> None:
    _, record = rewritten(layer, rows=ROWS + 1)
    (refused,) = record.refused
    assert "option sequence_parallel=7" in refused.reason
    assert rewritten(layer, rows=ROWS)[1].fired
    assert not rewritten(layer, rows=3, dynamic=True)[1].fired, "3 rows can't be proven"


def test_fewer_rows_than_ranks() -> None:
    with_one = make_fx(layer, tracing_mode="fake")(*(inputs(0, 1)[name] for name in list(inputs(0))[:5]))
    record = apply(Pass("sequence_parallel", "", sequence_parallel.run), with_one)
    assert [entry.reason for entry in record.refused] == ["1 rows for 2 ranks"]


def test_another_group_is_not_known_here() -> None:
    def elsewhere(x, row, weight):  # type: ignore[no-untyped-def]
        total = torch.ops._c10d_functional.all_reduce(x @ row, "sum", "7")
        return norm(torch.ops._c10d_functional.wait_tensor(total), weight)

    names = ("x", "row", "weight")
    program = make_fx(elsewhere, tracing_mode="fake")(*(inputs(0)[name] for name in names))
    record = apply(Pass("sequence_parallel", "", sequence_parallel.run), program)
    assert [entry.reason for entry in record.refused] == ["there is no process group '7' in this process"]


def test_the_option_switches_it_on() -> None:
    assert "sequence_parallel" not in pipeline.names(pipeline.selected(Options()))
    assert "sequence_parallel" in pipeline.names(pipeline.selected(Options(sequence_parallel=1)))
    with pytest.raises(OptionError, match="no number of rows"):
        Options(sequence_parallel=-1)
    with pytest.raises(OptionError, match="both want the sums"):
        Options(sequence_parallel=1, matmul_all_reduce=1)
