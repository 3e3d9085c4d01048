"""attention_exchange: which output projections it takes, what it leaves and why.

Ranks are simulated (tests/world.py). Two real ones: tests/compiler/rank_checks.py, and
tests/serving/test_placements.py through vLLM.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.functional import scaled_dot_product_attention

from npu_compiler import fusion_kernels
from npu_compiler.config import Options
from npu_compiler.errors import OptionError
from npu_compiler.graph import once
from npu_compiler.passes import attention_exchange, pipeline, sequence_parallel
from npu_compiler.passes.record import Pass, PassRecord
from tests import world
from tests.passes.lowered import apply, calls

ROWS, WIDTH, HEADS, SIZE = 6, 16, 2, 3
EXCHANGE, SCATTER, GATHER, COLUMNS = (
    f"npu_fused.{name}.default"
    for name in ("all_to_all_rows", "reduce_scatter_rows", "all_gather_rows", "all_gather_columns")
)
SUM = ["_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default"]
OF_ROWS = ("x", "heads")
PARAMETERS = ("out", "turned_out", "weight", "column", "row")


@pytest.fixture(autouse=True, scope="module")
def operators() -> None:
    fusion_kernels.register()


def summed(partial: Tensor, reduction: str = "sum") -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(partial, reduction, "0"))


def inputs(rank: int, rows: int = ROWS) -> dict[str, Tensor]:
    """`x` and the norm's `weight` are the same on all ranks; heads and matrices are a rank's own."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)

    def draw(*shape: int, generator: torch.Generator = own) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": draw(rows, WIDTH, generator=shared),
        "weight": draw(WIDTH, generator=shared),
        "heads": draw(1, HEADS, rows, SIZE),
        "qkv": draw(WIDTH, 3 * HEADS * SIZE),
        "out": draw(HEADS * SIZE, WIDTH),
        "turned_out": draw(WIDTH, HEADS * SIZE),
        "column": draw(WIDTH, 4),
        "row": draw(4, WIDTH),
        "many": draw(HEADS * SIZE, 2),
    }


def attended(heads: Tensor) -> Tensor:
    """Attention's output, [rows, heads * size]."""
    found = scaled_dot_product_attention(heads, heads, heads)
    return found[0].transpose(0, 1).reshape(heads.shape[2], HEADS * SIZE)


def traced(function: Callable[..., Any], dynamic: bool = False) -> tuple[fx.GraphModule, list[str]]:
    """The program of `function`, with the names of its arguments. Rows alone may be dynamic, as in a model."""
    names = list(function.__code__.co_varnames[: function.__code__.co_argcount])
    example = inputs(0)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for name in names:
        kinds = [
            DimDynamic.DYNAMIC if dynamic and size == ROWS and name in OF_ROWS else DimDynamic.STATIC
            for size in example[name].shape
        ]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        fakes.append(mode.from_tensor(example[name], symbolic_context=context, source=ConstantSource(name)))
    program = make_fx(function, tracing_mode="real")(*fakes)
    once.note_lasting(program.graph, [index for index, name in enumerate(names) if name in PARAMETERS])
    return program, names


def exchanged(rows: int = 1) -> Pass:
    return Pass("attention_exchange", "", lambda module, record: attention_exchange.run(module, record, rows))


def rewritten(
    function: Callable[..., Any],
    *before: Pass,
    ranks: int = 2,
    rows: int = 1,
    dynamic: bool = False,
    sizes: tuple[int, ...] = (ROWS,),
) -> tuple[fx.GraphModule, PassRecord]:
    """The program of `function` behind the passes, which means what it meant before: compared at these sizes."""
    program, names = traced(function, dynamic)
    original = copy.deepcopy(program)
    for entry in before:
        apply(entry, program)
    record = apply(exchanged(rows), program)
    for size in sizes:
        given = [[inputs(rank, size)[name] for name in names] for rank in range(ranks)]
        for got, expected in zip(world.run(program, given), world.run(original, given), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    return program, record


PARALLEL = Pass("sequence_parallel", "", sequence_parallel.run)


def layer(x, heads, out, weight, column, row):  # type: ignore[no-untyped-def]
    fused = torch.ops.npu_fused
    normed, residual = fused.add_rms_norm(summed(attended(heads) @ out), x, weight, 1e-6)
    return fused.add_rms_norm(summed((normed @ column).relu() @ row), residual, weight, 1e-6)[0]


def turned(heads, turned_out):  # type: ignore[no-untyped-def]
    return summed(attended(heads) @ turned_out.t())


def written_out(heads, out):  # type: ignore[no-untyped-def]
    found = torch.matmul((heads @ heads.mT).softmax(-1), heads)
    return summed(found[0].transpose(0, 1).reshape(heads.shape[2], HEADS * SIZE) @ out)


def gated(heads, out):  # type: ignore[no-untyped-def]
    attention = attended(heads)
    return summed((attention * attention.sigmoid()) @ out)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8], indirect=True)
def test_all_ranks_compute_the_same_before_and_after(ranks: int, dynamic: bool) -> None:
    """Rows that the ranks divide and rows that they don't."""
    sizes = (2 * ranks, ranks + 1, ranks) if dynamic else (ROWS,)
    for before, functions in (((), (layer, turned, gated, written_out)), ((PARALLEL,), (layer,))):
        for function in functions:
            program, record = rewritten(function, *before, ranks=ranks, dynamic=dynamic, sizes=sizes)
            expected = 1 if dynamic or ranks <= ROWS else 0
            assert len(record.fired) == expected, (function, record)
            assert calls(program).count(EXCHANGE) == expected


def test_a_scattered_sum_is_no_sum_any_more(ranks: int) -> None:
    program, record = rewritten(layer, PARALLEL)
    found = calls(program)
    assert [found.count(name) for name in (EXCHANGE, SCATTER, *SUM)] == [1, 1, 0, 0]
    (fired,) = record.fired
    size = HEADS * SIZE * WIDTH * 8
    assert fired.rule == (
        "attention_exchange: 6 columns exchanged over 2 ranks instead of 16 summed, "
        f"a whole weight of 1.5 KiB beside the part of {size} B"
    )
    assert fired.saves is not None and fired.saves.kernels == 0
    assert fired.saves.bytes == ROWS * WIDTH * 8 // 2 - size


def test_another_sum_is_gathered(ranks: int) -> None:
    program, record = rewritten(turned)
    found = calls(program)
    assert [found.count(name) for name in (EXCHANGE, COLUMNS, GATHER, *SUM)] == [1, 1, 1, 0, 0]
    (fired,) = record.fired
    assert "6 columns exchanged and 16 gathered over 2 ranks instead of 16 summed" in fired.rule
    assert fired.saves is not None and fired.saves.kernels == -1


@pytest.mark.parametrize("function", [turned, gated], ids=["out, in", "in, out"])
def test_the_whole_weight_is_made_once(function: Callable[..., Any], ranks: int) -> None:
    program, _ = rewritten(function)
    part = once.split(program)
    assert part is not None
    assert [node.meta["val"].shape for node in part.values] in ([(WIDTH, 12)], [(12, WIDTH)])
    rest = calls(program)
    assert COLUMNS not in rest and rest.count(GATHER) == 1 and EXCHANGE in rest


def mlp(x, column, row):  # type: ignore[no-untyped-def]
    return summed((x @ column).relu() @ row)


def behind_another_product(heads, out, column, row):  # type: ignore[no-untyped-def]
    return summed(((attended(heads) @ out) @ column) @ row)


def largest(heads, out):  # type: ignore[no-untyped-def]
    return summed(attended(heads) @ out, "max")


def biased(heads, out, weight):  # type: ignore[no-untyped-def]
    return summed(torch.addmm(weight, attended(heads), out))


def kept(heads, out):  # type: ignore[no-untyped-def]
    product = attended(heads) @ out
    return summed(product), product


def computed(heads, out):  # type: ignore[no-untyped-def]
    return summed(attended(heads) @ out.exp())


def no_parameter(heads, qkv):  # type: ignore[no-untyped-def]
    return summed(attended(heads) @ qkv[:6])


def part_of_it(heads, turned_out):  # type: ignore[no-untyped-def]
    return summed(attended(heads) @ turned_out[:6])


def written(heads, out):  # type: ignore[no-untyped-def]
    total = summed(attended(heads) @ out)
    out.mul_(2)
    return total


def wider(heads, many):  # type: ignore[no-untyped-def]
    return summed(attended(heads) @ many)


def in_batches(heads, out):  # type: ignore[no-untyped-def]
    return summed(torch.matmul(attended(heads)[None].expand(2, -1, -1), out))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (mlp, ""),
        (behind_another_product, ""),
        (largest, ""),
        (biased, "aten.addmm.default is no product of rows and a weight that could be whole"),
        (kept, "the product is also used by output"),
        (computed, "exp is no parameter of the model"),
        (no_parameter, "slice_1 is no parameter of the model"),
        (written, "the program writes out_1"),
        (wider, "6 columns would be sent instead of 2"),
        (in_batches, "is no product of rows"),
    ],
    ids=lambda item: getattr(item, "__name__", "reason"),
)
def test_left_as_it_is(function: Callable[..., Any], reason: str, ranks: int) -> None:
    program, names = traced(function)
    once.note_lasting(program.graph, [index for index, name in enumerate(names) if name == "many"])
    record = apply(exchanged(), program)
    assert not record.fired
    assert EXCHANGE not in calls(program)
    assert [reason in entry.reason for entry in record.refused] == [True] * bool(reason), record


def test_fewer_rows_than_asked_for(ranks: int) -> None:
    program, _ = traced(turned)
    (refused,) = apply(exchanged(ROWS + 1), program).refused
    assert "option attention_exchange=7" in refused.reason
    assert rewritten(turned, rows=ROWS)[1].fired
    assert not rewritten(turned, rows=3, dynamic=True)[1].fired, "3 rows can't be proven"


@pytest.mark.parametrize("ranks", [8], indirect=True)
def test_fewer_rows_than_ranks(ranks: int) -> None:
    program, _ = traced(turned)
    assert [entry.reason for entry in apply(exchanged(), program).refused] == ["6 rows for 8 ranks"]


def test_the_option_switches_it_on() -> None:
    assert "attention_exchange" not in pipeline.names(pipeline.selected(Options()))
    both = pipeline.names(pipeline.selected(Options(attention_exchange=1, sequence_parallel=1)))
    assert both.index("sequence_parallel") < both.index("attention_exchange")
    with pytest.raises(OptionError, match="no number of rows"):
        Options(attention_exchange=-1)
    with pytest.raises(OptionError, match="attention_exchange and matmul_all_reduce both want the sums"):
        Options(attention_exchange=1, matmul_all_reduce=1)
