"""layer_sharding: which whole weights it spreads over the ranks, that all ranks compute the same bits, and where their
broadcasts begin (plan/ahead.py).

Ranks are simulated (tests/world.py). Real ones: tests/compiler/rank_checks.py, and tests/serving/test_placements.py
through vLLM.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from npu_compiler import fusion_kernels
from npu_compiler.config import Options
from npu_compiler.errors import OptionError
from npu_compiler.graph import once, serialized
from npu_compiler.graph.traffic import launches
from npu_compiler.passes import attention_exchange, layer_sharding, pipeline, sequence_parallel
from npu_compiler.passes.record import Pass, PassRecord
from npu_compiler.plan.ahead import Ahead, begin_early
from npu_compiler.plan.engines import Engine, engine_of
from tests import world
from tests.passes.lowered import apply, calls
from tests.passes.test_attention_exchange import HEADS, SIZE, WIDTH, attended, summed
from tests.properties.draws import integers, one_of
from tests.properties.seeded import PHASES, SEED

BROADCAST, WAIT, OWN, COLUMNS, GATHER, EXCHANGE = (
    *("_c10d_functional.broadcast.default", "_c10d_functional.wait_tensor.default"),
    *(
        f"npu_fused.{name}.default"
        for name in ("own_layer", "all_gather_columns", "all_gather_rows", "all_to_all_rows")
    ),
)
EXCHANGED = Pass("attention_exchange", "", attention_exchange.run)
SCATTERED = Pass("sequence_parallel", "", sequence_parallel.run)
SPREAD = Pass("layer_sharding", "", layer_sharding.run)
Layer = tuple[str, bool]
"""How a layer's output projection lies ("out, in", "in, out", or "wide": twice as many outputs), and whether an MLP is
behind it."""


@pytest.fixture(autouse=True, scope="module")
def operators() -> None:
    fusion_kernels.register()


def parameters(layers: Sequence[Layer], rank: int, rows: int) -> list[Tensor]:
    """x, the same on all ranks, and four matrices of each layer, which are a rank's own."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    found = [torch.randn(rows, WIDTH, generator=shared, dtype=torch.float64)]
    out = {"out, in": (WIDTH, HEADS * SIZE), "in, out": (HEADS * SIZE, WIDTH), "wide": (2 * WIDTH, HEADS * SIZE)}
    for kind, _ in layers:
        shapes = ((WIDTH, HEADS * SIZE), out[kind], (WIDTH, 4), (4, WIDTH))
        found += [torch.randn(*shape, generator=own, dtype=torch.float64) / 4 for shape in shapes]
    return found


def model(layers: Sequence[Layer]) -> Callable[..., Tensor]:
    """A function of what `parameters` gives."""

    def function(x: Tensor, *matrices: Tensor) -> Tensor:
        for index, (kind, has_mlp) in enumerate(layers):
            qkv, out, column, row = matrices[4 * index : 4 * index + 4]
            heads = attended((x @ qkv).view(x.shape[0], HEADS, SIZE).transpose(0, 1)[None])
            attention = summed(heads @ (out if kind == "in, out" else out.t()))
            x = x + (attention[:, :WIDTH] * attention[:, WIDTH:] if kind == "wide" else attention)
            x = x + summed((x @ column).relu() @ row) if has_mlp else x.relu()
        return x

    return function


def traced(layers: Sequence[Layer], rows: int, dynamic: bool) -> fx.GraphModule:
    mode, fakes = FakeTensorMode(shape_env=ShapeEnv()), []
    for index, tensor in enumerate(parameters(layers, 0, rows)):
        kinds = [DimDynamic.DYNAMIC if dynamic and index == 0 else DimDynamic.STATIC, DimDynamic.STATIC]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        fakes.append(mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(f"input_{index}")))
    program = make_fx(model(layers), tracing_mode="real")(*fakes)
    once.note_lasting(program.graph, range(1, len(fakes)))
    return program


def whole_weights(
    layers: Sequence[Layer], rows: int = 8, dynamic: bool = False, scattered: bool = False
) -> fx.GraphModule:
    """The program with whole output projections, as it is before the pass."""
    program = traced(layers, rows, dynamic)
    for entry in [SCATTERED, EXCHANGED] if scattered else [EXCHANGED]:
        apply(entry, program)
    return program


def served(program: fx.GraphModule, inputs: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], Ahead | None]:
    """What the ranks return as the backend runs it: what is computed once apart, and broadcasts begun early."""
    program = copy.deepcopy(program)
    part = once.split(program)
    assert part is not None
    done = begin_early(program.graph, part.values)
    program.recompile()
    kept = world.run(part.first, [[one[index] for index in part.sources] for one in inputs])
    return world.run(program, [[*one, *values] for one, values in zip(inputs, kept, strict=True)]), done


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


LIKE_LLAMA: list[Layer] = [("out, in", True)] * 7


@pytest.mark.parametrize("ranks", [2, 3, 4, 8], indirect=True)
def test_all_ranks_compute_the_same_bits(ranks: int) -> None:
    """Random models, as they come from the pass and as the backend runs them. Every broadcast is joined in the gap
    between two collectives in which it began."""
    kind = one_of(["out, in", "out, in", "in, out", "wide"])
    layer = st.tuples(kind, st.booleans())
    fired = 0

    @seed(SEED * 1000 + ranks)
    @settings(
        max_examples=6,
        database=None,
        print_blob=True,
        phases=PHASES,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.lists(layer, min_size=3, max_size=9), integers(ranks, 2 * ranks + 1), st.booleans(), st.booleans())
    def run(layers: list[Layer], rows: int, dynamic: bool, scattered: bool) -> None:
        nonlocal fired
        note(f"NPU_COMPILER_SEED={SEED}")
        before = whole_weights(layers, rows, dynamic, scattered)
        program = copy.deepcopy(before)
        record = apply(SPREAD, program)
        fired += bool(record.fired)
        for count in (rows, 2 * rows + 1) if dynamic else (rows,):
            inputs = [parameters(layers, rank, count) for rank in range(ranks)]
            expected = world.run(before, inputs)
            same(world.run(program, inputs), expected)
            if EXCHANGE in calls(program):
                same(served(program, inputs)[0], expected)

    run()
    assert fired >= 2, "too few programs are rewritten for the check to mean something"


def test_a_rank_keeps_an_nth_and_room_for_one(ranks: int) -> None:
    program = whole_weights(LIKE_LLAMA)
    size = WIDTH * HEADS * SIZE * 2 * 8
    before = once.split(copy.deepcopy(program))
    assert before is not None and before.size == 7 * size
    (fired,) = apply(SPREAD, program).fired
    assert fired.rule == "layer_sharding: 7 weights of 1.5 KiB spread over 2 ranks, 7.5 KiB on each instead of 10.5 KiB"
    assert fired.saves is not None and (fired.saves.kernels, fired.saves.bytes) == (-7, -14 * size)
    part = once.split(program)
    assert part is not None
    assert [node.meta["val"].shape for node in part.values] == [(WIDTH, 2 * HEADS * SIZE)] * 4
    assert part.size == 4 * size
    found = calls(program)
    assert [found.count(name) for name in (BROADCAST, COLUMNS, OWN, EXCHANGE)] == [7, 0, 0, 7]


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_weights_are_let_go_while_they_are_made(ranks: int) -> None:
    """At the first call a rank holds as many whole weights as there are ranks, beside what it keeps."""
    program = whole_weights(LIKE_LLAMA)
    apply(SPREAD, program)
    part = once.split(program)
    assert part is not None
    found = [name for name in calls(part.first) if name in (COLUMNS, OWN)]
    assert found == [COLUMNS] * 4 + [OWN] + [COLUMNS] * 3 + [OWN]


def test_it_can_be_stored(ranks: int) -> None:
    """With what is computed once, and in whatever order."""
    program = whole_weights(LIKE_LLAMA)
    apply(SPREAD, program)
    inputs = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
    again = serialized.loads(serialized.dumps(program), inputs)
    assert isinstance(again, fx.GraphModule) and calls(again) == calls(program)
    part = once.split(again)
    assert part is not None and len(part.values) == 4
    done = begin_early(again.graph, part.values)
    assert done is not None and done.count == 7


def launched(program: fx.GraphModule) -> list[fx.Node]:
    return [node for node in program.graph.nodes if launches(node)]


@pytest.mark.parametrize("scattered", [False, True], ids=["summed", "scattered"])
def test_a_broadcast_is_alone_on_the_link_and_beside_products(scattered: bool, ranks: int) -> None:
    program = whole_weights(LIKE_LLAMA, dynamic=True, scattered=scattered)
    apply(SPREAD, program)
    part = once.split(program)
    assert part is not None
    done = begin_early(program.graph, part.values)
    assert done is not None and done.count == 7 and 0 < done.beside <= done.link
    assert str(done).startswith("ahead: 7 broadcasts, estimated") and "=4096" in str(done)
    order = launched(program)
    sends = [node for node in order if str(node.target) == BROADCAST]
    for send in sends:
        (wait,) = send.users
        beside = order[order.index(send) + 1 : order.index(wait)]
        assert beside and all(engine_of(node) is not Engine.LINK for node in beside)
    for one, other in itertools.pairwise(sends):
        (wait,) = one.users
        (view,) = wait.users
        (reader,) = view.users
        assert order.index(reader) < order.index(other), "one is on its way at a time"
    assert begin_early(program.graph, part.values) is not None, "it can be done again"
    assert [str(node.target) for node in launched(program)] == [str(node.target) for node in order]


def test_nothing_to_compute_beside_it(ranks: int) -> None:
    """A program that reads the weight at once, and another that broadcasts what it has computed, stay as they are."""

    def at_once(kept: Tensor, x: Tensor) -> Tensor:
        c10d = torch.ops._c10d_functional
        return x @ c10d.wait_tensor(c10d.broadcast(kept, 1, "0"))

    def computed(kept: Tensor, x: Tensor) -> Tensor:
        c10d = torch.ops._c10d_functional
        return x.relu() @ c10d.wait_tensor(c10d.broadcast(kept.relu(), 1, "0"))

    for function, count in ((at_once, 1), (computed, 0)):
        program = make_fx(function, tracing_mode="fake")(torch.rand(4, 4), torch.rand(4, 4))
        order = [node.name for node in program.graph.nodes]
        done = begin_early(program.graph, program.graph.find_nodes(op="placeholder"))
        assert (done.count if done else 0) == count
        assert done is None or done.beside == 0
        assert [node.name for node in program.graph.nodes] == order


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([("out, in", True)] * 4, ""),
        (
            [("out, in", True)] * 3,
            "3 equal weights on 2 ranks: 2 and one on its way take 4.5 KiB instead of 4.5 KiB",
        ),
        ([("out, in", True), ("in, out", True)], "1 equal weights on 2 ranks"),
    ],
)
def test_left_where_it_saves_no_memory(layers: list[Layer], reason: str, ranks: int) -> None:
    program = whole_weights(layers)
    record = apply(SPREAD, program)
    assert bool(record.fired) == (not reason)
    assert all(reason in entry.reason for entry in record.refused) and bool(record.refused) == bool(reason)
    assert (BROADCAST in calls(program)) == (not reason)


def other_values_computed_once(x: Tensor, out: Tensor) -> Any:
    doubled = out.exp()
    return x @ doubled


def test_other_values_that_are_computed_once_stay(ranks: int) -> None:
    program = make_fx(other_values_computed_once, tracing_mode="fake")(torch.rand(4, 4), torch.rand(4, 4))
    (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    node.meta[once.ONCE] = True
    record: PassRecord = apply(SPREAD, program)
    assert not record.fired and not record.refused


def test_the_option_switches_it_on() -> None:
    def selected(**options: Any) -> list[str]:
        return pipeline.names(pipeline.selected(Options(**options)))

    assert "layer_sharding" not in selected(attention_exchange=1)
    assert "layer_sharding" not in selected(layer_sharding=True), "a range of tokens in which no weight is whole"
    names = selected(layer_sharding=True, attention_exchange=1)
    assert names.index("attention_exchange") < names.index("layer_sharding")
    with pytest.raises(OptionError, match="layer_sharding has no weights to spread over the ranks"):
        Options.of({"layer_sharding": True})
    assert Options.of({"layer_sharding": True, "shared_expert_rows": 1}).layer_sharding
