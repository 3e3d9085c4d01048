"""A program with its equal layers rolled up does what it does written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import models
from npu_compiler.aclgraph.inputs import InputPlan
from npu_compiler.backend import FROM_CACHE, STORED, CompiledGraph, ascend
from npu_compiler.cache import FOLDER
from npu_compiler.config import Options
from npu_compiler.graph.rolled import Rolled
from npu_compiler.graph.running import CallByCall
from npu_compiler.graph.serialized import dumps, loads
from npu_compiler.passes import pipeline
from npu_compiler.plan import memory
from npu_compiler.plan.order import PROGRAM, arrange_rolled
from npu_compiler.runtime import trace
from tests.compiler.test_layers_once import program
from tests.passes.lowered import lowered

LAYERS = 8
NPU = torch.device("npu", 0)


class Layer(nn.Module):
    """A gated product with a count of its calls."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16, generator=generator) / 4, requires_grad=False)
        self.count = torch.zeros((), dtype=torch.int64, device=NPU)  # no buffer: as transformers' caches count
        torch._dynamo.mark_static_address(self.count)

    def forward(self, x: Tensor) -> Tensor:
        gated = torch.relu(x @ self.weight) * self.count
        self.count.add_(1)
        return gated + x


class Stack(nn.Module):
    """Equal layers; `what` says how they are joined."""

    def __init__(self, what: str = "") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(Layer(generator) for _ in range(LAYERS))
        self.what = what
        self.to(NPU)

    def forward(self, x: Tensor) -> Any:
        steps = [x, x]
        for layer in self.layers:
            found = layer(steps[-1])
            steps.append(found + steps[-2] if self.what == "reads two layers back" else found)
        return tuple(steps[2:]) if self.what == "returns every layer" else steps[-1]


def compiled(what: str = "", **options: Any) -> tuple[CompiledGraph, Stack, Callable[[Tensor], Any]]:
    """The compiled graph of a stack, called once and captured."""
    torch._dynamo.reset()
    before = set(ascend.compiled())
    with torch.inference_mode():
        stack = Stack(what)
        call = torch.compile(stack, backend="ascend", fullgraph=True, options=options)
        call(sample(0))
    (graph,) = set(ascend.compiled()) - before
    return graph, stack, call


def sample(seed: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).to(NPU)


@pytest.mark.parametrize(
    ("what", "rolled"),
    [("", True), ("reads two layers back", False), ("returns every layer", False)],
)
def test_first_call_and_replays_are_those_of_eager(what: str, rolled: bool) -> None:
    graph, stack, call = compiled(what)
    assert isinstance(graph.program, Rolled) == rolled
    with torch.inference_mode():
        eager = Stack(what)
        eager(sample(0))
        for seed in (1, 2):
            torch.testing.assert_close(call(sample(seed)), eager(sample(seed)))
    assert [int(layer.count) for layer in stack.layers] == [3] * LAYERS
    assert graph.ledger is not None and graph.ledger.replays == 2


@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_what_is_known_of_inputs_is_what_the_whole_program_says(name: str) -> None:
    found = rolled_step(name)
    names = [node.name for node in found.graph.find_nodes(op="placeholder")]
    assert InputPlan.of(found, (), names) == InputPlan.of(found.whole, (), names)
    assert found.calls == sum(node.op == "call_function" for node in found.whole.graph.nodes)


def rolled_step(name: str) -> Rolled:
    with torch.inference_mode():
        lower = lowered(models.step(name, LAYERS, NPU), *models.inputs(name, NPU), inference=True)
        _, found = pipeline.run_rolled(lower.graph, Options())
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_order_of_the_calls_that_are_held_is_good_for_all(name: str) -> None:
    before = rolled_step(name)
    own = memory.plan(before.whole.graph).live_formula
    found = arrange_rolled(before)
    assert found is not None
    done, after = found
    assert done.peaks[PROGRAM] == own
    assert done.peaks[done.winner] == memory.plan(after.whole.graph).live_formula <= own


def test_stored_program_is_read_as_it_was() -> None:
    kept = compiled()[0].program
    assert isinstance(kept, Rolled)
    read = loads(dumps(kept), [node.meta["val"] for node in inputs_of(kept)])
    assert isinstance(read, Rolled)
    assert program(read.whole.graph) == program(kept.whole.graph)
    assert [node.name for node in read.whole.graph.nodes] == [node.name for node in kept.whole.graph.nodes]


def test_warm_start_goes_on_with_the_rolled_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    cold, *_ = compiled(cache=True)
    warm, _, call = compiled(cache=True)
    assert [cold.stored, warm.stored] == [STORED, FROM_CACHE]
    assert isinstance(warm.program, Rolled)
    with torch.inference_mode():
        eager = Stack()
        eager(sample(0))
        torch.testing.assert_close(call(sample(1)), eager(sample(1)))


def inputs_of(kept: Rolled) -> list[Any]:
    return kept.graph.find_nodes(op="placeholder")


def test_tasks_are_labelled_by_the_calls_of_every_layer() -> None:
    graphs = [compiled()[0], compiled(layers_once=False)[0]]
    said = []
    for graph in graphs:
        assert graph.ledger is not None and graph.graph is not None
        tasks = trace.nodes(graph.ledger.captures[0].graph_id)
        assert {task["node"] for task in tasks} <= {node.name for node in graph.graph.graph.nodes}
        said.append([(task["name"], task["call"], task.get("module", "")) for task in tasks])
    assert said[0] == said[1]
    assert {f"layers.{index}" for index in range(LAYERS)} <= {module for *_, module in said[0]}


def test_recorded_first_call_names_the_calls_of_every_layer() -> None:
    recorder = trace.recorder()
    recorder.start()
    try:
        graph, *_ = compiled()
    finally:
        events = recorder.stop()
    assert graph.graph is not None
    tasks = [event["args"] for event in events if event.get("cat") == "task" and "node" in event["args"]]
    calls = {node.name for node in graph.graph.graph.nodes if node.op == "call_function"}
    assert {task["node"] for task in tasks} == calls


def test_values_are_let_go_of_as_in_the_whole_program() -> None:
    rolled = compiled()[0].program
    assert isinstance(rolled, Rolled)
    peaks = []
    for held in (rolled, rolled.whole):
        fakes = [node.meta["val"] for node in inputs_of(rolled)]
        given = [torch.ones(fake.shape, dtype=fake.dtype, device=NPU) for fake in fakes]
        torch.npu.synchronize()
        torch.npu.reset_peak_memory_stats()
        start = torch.npu.memory_allocated()
        with torch.inference_mode():
            CallByCall(held).results(given)
        torch.npu.synchronize()
        peaks.append(torch.npu.max_memory_allocated() - start)
        del given
    assert peaks[0] == peaks[1] > 0


@pytest.fixture
def failing() -> Iterator[torch.library.Library]:
    """`positive(x, weight)`: a product that refuses a weight that begins with a negative number."""
    with torch.library._scoped_library("rolled_test", "DEF") as library:
        library.define("positive(Tensor x, Tensor weight) -> Tensor")

        def positive(x: Tensor, weight: Tensor) -> Tensor:
            if float(weight[0, 0]) < 0:
                raise ValueError("a negative weight")
            return x @ weight

        library.impl("positive", positive, "PrivateUse1")
        library.impl("positive", lambda x, weight: torch.empty_like(x), "Meta")
        yield library


def test_error_in_a_layer_that_is_not_held_names_it(failing: torch.library.Library) -> None:
    class Checked(nn.Module):
        def __init__(self, sign: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((16, 16), sign), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.rolled_test.positive(x, self.weight) + x  # type: ignore[no-any-return]

    torch._dynamo.reset()
    stack = nn.Sequential(*(Checked(-1.0 if index == 6 else 1.0) for index in range(LAYERS))).to(NPU)
    with torch.inference_mode(), pytest.raises(ValueError, match="a negative weight") as failed:
        torch.compile(stack, backend="ascend", fullgraph=True)(sample(0))
    notes = "\n".join(failed.value.__notes__)
    assert "where: 6 at" in notes, notes
