"""shared_expert_rows: which shared experts it takes, what it leaves and why, and what the passes behind it make of it.

Ranks are simulated (tests/world.py); two real ones through vLLM: tests/serving/test_placements.py.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from npu_compiler import fusion_kernels
from npu_compiler.config import Options
from npu_compiler.errors import OptionError
from npu_compiler.graph import once
from npu_compiler.passes import pipeline, shared_expert_rows
from npu_compiler.passes.record import Pass, PassRecord
from tests import world
from tests.passes.lowered import apply, calls

ROWS, WIDTH, INNER = 6, 16, 4
SCATTER, GATHER, COLUMNS = (
    f"npu_fused.{name}.default" for name in ("reduce_scatter_rows", "all_gather_rows", "all_gather_columns")
)
PARAMETERS = ("up", "down", "turned_up", "turned_down", "gate", "scale", "column")
finalize = torch.ops.npu.npu_moe_finalize_routing
fused = torch.ops.npu_fused
c10d = torch.ops._c10d_functional


@pytest.fixture(autouse=True, scope="module")
def operators() -> None:
    fusion_kernels.register()


def inputs(rank: int, ranks: int) -> dict[str, Tensor]:
    """`gate` and `scale` are the same on all ranks; a rank's own: the routed experts' rows, matrices, its part of x."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)

    def draw(*shape: int, generator: torch.Generator = own) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": draw(-(-ROWS // ranks), WIDTH),
        "gate": draw(1, WIDTH, generator=shared),
        "scale": draw(WIDTH, generator=shared),
        "experts": draw(ROWS, WIDTH),
        "places": torch.arange(ROWS, dtype=torch.int32),
        "up": draw(WIDTH, 2 * INNER),
        "down": draw(INNER, WIDTH),
        "turned_up": draw(2 * INNER, WIDTH),
        "turned_down": draw(WIDTH, INNER),
        "column": draw(WIDTH, INNER),
        "activations": draw(WIDTH, INNER),
    }


def traced(function: Callable[..., Any], ranks: int) -> tuple[fx.GraphModule, list[str]]:
    names = list(function.__code__.co_varnames[: function.__code__.co_argcount])
    example = inputs(0, ranks)
    with_ranks = functools.partial(function, ranks=ranks)
    program = make_fx(with_ranks, tracing_mode="fake")(*(example[name] for name in names))
    once.note_lasting(program.graph, [index for index, name in enumerate(names) if name in PARAMETERS])
    return program, names


def rows_alone(rows: int = 1) -> Pass:
    return Pass("shared_expert_rows", "", lambda module, record: shared_expert_rows.run(module, record, rows))


def rewritten(function: Callable[..., Any], ranks: int = 2, rows: int = 1) -> tuple[fx.GraphModule, PassRecord]:
    """The program behind the pass, which means what it meant before."""
    program, names = traced(function, ranks)
    before = copy.deepcopy(program)
    record = apply(rows_alone(rows), program)
    given = [[inputs(rank, ranks)[name] for name in names] for rank in range(ranks)]
    for got, expected in zip(run(program, given), run(before, given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    return program, record


def run(program: fx.GraphModule, given: list[list[Tensor]]) -> list[Any]:
    """On all ranks. CANN's operator that ends the routed experts stands for any of their results here."""
    standing = copy.deepcopy(program)
    for node in standing.graph.find_nodes(op="call_function", target=finalize.default):
        node.replace_all_uses_with(node.args[0])
        standing.graph.erase_node(node)
    return world.run(standing, given)


def routed(experts: Tensor, places: Tensor) -> Tensor:
    return finalize(experts, None, None, None, None, places, None, drop_pad_mode=2)


def gathered(x: Tensor, ranks: int) -> Tensor:
    return fused.all_gather_rows(x, "0", ranks, ROWS)


def scattered(total: Tensor, ranks: int) -> Tensor:
    """Read behind a gather, without rows that fill up the last ranks' parts: of those, nobody reads a value."""
    return gathered(fused.reduce_scatter_rows(total, "0", ranks), ranks)


def plain(x, experts, places, up, down, *, ranks):  # type: ignore[no-untyped-def]
    shared = fused.swiglu(gathered(x, ranks) @ up) @ down
    return scattered(routed(experts, places) + shared, ranks)


def turned(x, experts, places, turned_up, turned_down, *, ranks):  # type: ignore[no-untyped-def]
    shared = fused.swiglu(gathered(x, ranks) @ turned_up.t()) @ turned_down.t()
    return scattered(shared + routed(experts, places), ranks)


def gated(x, experts, places, up, down, gate, scale, *, ranks):  # type: ignore[no-untyped-def]
    whole = gathered(x, ranks)
    shared = (fused.swiglu(whole @ up) @ down) * (whole @ gate.t()).sigmoid() * scale
    return scattered(shared + routed(experts, places), ranks)


def of_one_product(x, experts, places, column, down, *, ranks):  # type: ignore[no-untyped-def]
    return scattered((gathered(x, ranks) @ column).relu() @ down + routed(experts, places), ranks)


@pytest.mark.parametrize("function", [plain, turned, gated, of_one_product], ids=lambda item: item.__name__)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8], indirect=True)
def test_all_ranks_compute_the_same_before_and_after(ranks: int, function: Callable[..., Any]) -> None:
    program, record = rewritten(function, ranks)
    assert len(record.fired) == 1, record
    (scatter,) = program.graph.find_nodes(op="call_function", target=fused.reduce_scatter_rows.default)
    assert scatter.args[0].target is finalize.default, "the routed experts are summed alone"
    products = program.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert {node.meta["val"].shape[0] for node in products} == {-(-ROWS // ranks)}


def test_what_it_takes_is_told(ranks: int) -> None:
    _, record = rewritten(plain)
    assert record.fired[0].rule == (
        "shared_expert_rows: on the rows of 2 ranks, whole weights of 3.0 KiB beside the part of 1.5 KiB"
    )


@pytest.mark.parametrize("function", [plain, turned])
def test_whole_weights_are_made_once(function: Callable[..., Any], ranks: int) -> None:
    program, _ = rewritten(function)
    part = once.split(program)
    assert part is not None and len(part.values) == 2
    found = calls(program)
    assert COLUMNS not in found and "aten.clone.default" not in found
    assert found.count(GATHER) == 2, "of x, for the routed experts, and of the result"


def another_term(x, experts, places, *, ranks):  # type: ignore[no-untyped-def]
    return scattered(gathered(x, ranks).relu() + routed(experts, places), ranks)


def not_gathered(experts, places, up, down, *, ranks):  # type: ignore[no-untyped-def]
    return scattered(fused.swiglu(experts @ up) @ down + routed(experts, places), ranks)


def kept(x, experts, places, up, down, *, ranks):  # type: ignore[no-untyped-def]
    shared = fused.swiglu(gathered(x, ranks) @ up) @ down
    return scattered(shared + routed(experts, places), ranks), shared


def across_rows(x, experts, places, up, down, *, ranks):  # type: ignore[no-untyped-def]
    whole = gathered(x, ranks)
    shared = (fused.swiglu(whole @ up) @ down) * whole.softmax(0)
    return scattered(shared + routed(experts, places), ranks)


def across_columns(x, experts, places, column, down, *, ranks):  # type: ignore[no-untyped-def]
    return scattered((gathered(x, ranks) @ column).softmax(1) @ down + routed(experts, places), ranks)


def no_parameter(x, experts, places, activations, down, *, ranks):  # type: ignore[no-untyped-def]
    return scattered((gathered(x, ranks) @ activations).relu() @ down + routed(experts, places), ranks)


def written(x, experts, places, up, down, *, ranks):  # type: ignore[no-untyped-def]
    part = plain(x, experts, places, up, down, ranks=ranks)
    up.mul_(2)
    return part


def scaled(x, experts, places, up, down, *, ranks):  # type: ignore[no-untyped-def]
    shared = fused.swiglu(gathered(x, ranks) @ up) @ down
    return scattered(shared + routed(experts, places) * 2.5, ranks)


def of_engines(x, experts, places, up, down, *, ranks):  # type: ignore[no-untyped-def]
    shared = fused.swiglu(gathered(x, ranks) @ up) @ down
    every = routed(torch.cat([experts] * ranks), torch.cat([places] * ranks))
    own = c10d.wait_tensor(c10d.reduce_scatter_tensor(every, "sum", ranks, "0"))
    return scattered(shared + own, ranks)


def no_experts(x, up, down, *, ranks):  # type: ignore[no-untyped-def]
    whole = gathered(x, ranks)
    return scattered(fused.swiglu(whole @ up) @ down + whole, ranks)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (another_term, "is not made of two products with an activation between them"),
        (not_gathered, "is not gathered from the rows of the same ranks (option sequence_parallel)"),
        (kept, "is also read by output"),
        (across_rows, "may do more than to compute each row by itself"),
        (across_columns, "is not made of two products with an activation between them"),
        (no_parameter, "is not made of two products with an activation between them"),
        (written, "the program writes "),
        (scaled, "changes the routed experts' result, so its sum would stay"),
        (of_engines, "wait_tensor changes the routed experts' result, so its sum would stay"),
        (no_experts, ""),
    ],
    ids=lambda item: getattr(item, "__name__", "reason"),
)
def test_left_as_it_is(function: Callable[..., Any], reason: str, ranks: int) -> None:
    program, _ = traced(function, ranks)
    before = calls(program)
    record = apply(rows_alone(), program)
    assert not record.fired
    assert calls(program) == before
    assert [reason in entry.reason for entry in record.refused] == [True] * bool(reason), record


def test_fewer_rows_than_asked_for(ranks: int) -> None:
    program, _ = traced(plain, ranks)
    (refused,) = apply(rows_alone(ROWS + 1), program).refused
    assert "option shared_expert_rows=7" in refused.reason
    assert rewritten(plain, rows=ROWS)[1].fired


def test_the_option_switches_it_on() -> None:
    assert "shared_expert_rows" not in pipeline.names(pipeline.selected(Options()))
    names = pipeline.names(pipeline.selected(Options(shared_expert_rows=1, sequence_parallel=1)))
    order = [names.index(name) for name in ("sequence_parallel", "shared_expert_rows", "expert_communication")]
    assert order == sorted(order)
    with pytest.raises(OptionError, match="no number of rows"):
        Options(shared_expert_rows=-1)
