"""Equal layers are compiled once: the program is the one that compiling all of them gives, call by call."""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from benchmarks import models
from npu_compiler.backend import CompiledGraph, ascend, compile_fx
from npu_compiler.config import Options
from npu_compiler.graph import layers as equal_layers
from npu_compiler.graph.effects import storage, tensors
from npu_compiler.graph.source import place
from npu_compiler.passes import pipeline
from npu_compiler.passes.pipeline import LAYERS_ONCE
from tests.passes.lowered import lowered

LAYERS = 7
NPU = torch.device("npu", 0)


def program(graph: fx.Graph) -> list[str]:
    """A program call by call: operators, arguments by position, layouts, which values share memory, and places."""
    number = {node: index for index, node in enumerate(graph.nodes)}
    memory: dict[int, int] = {}
    lines = []
    for node in graph.nodes:
        arguments = map_aggregate((node.args, node.kwargs), lambda item: number.get(item, item))  # type: ignore[call-overload]
        values = [
            (tensor.dtype, tuple(tensor.shape), tensor.stride(), memory.setdefault(storage(tensor), len(memory)))
            for tensor in tensors(node)
        ]
        target = node.target if node.op != "placeholder" else node.name
        lines.append(f"{node.op} {target} {arguments} {values} {place(node)!r}")
    return lines


def counts(compiled: CompiledGraph) -> list[tuple[Any, ...]]:
    """What the records say, for all layers."""
    return [
        (
            record.name,
            record.nodes_before,
            record.nodes_after,
            sum(entry.layers for entry in record.fired),
            sum(entry.layers for entry in record.refused),
        )
        for record in compiled.records
        if record.name != LAYERS_ONCE
    ]


def compiled_step(name: str, **options: Any) -> tuple[CompiledGraph, Tensor]:
    torch._dynamo.reset()
    before = set(ascend.compiled())
    with torch.inference_mode():
        arguments, step = models.inputs(name, NPU), models.step(name, LAYERS, NPU)
        found = torch.compile(step, backend="ascend", fullgraph=True, dynamic=False, options=options)(*arguments)
    (graph,) = set(ascend.compiled()) - before
    return graph, found


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.full if name in ("llama", "gemma") else ()) for name in models.FAMILIES],
)
def test_transformers_models_give_the_same_program(name: str) -> None:
    once, result = compiled_step(name, layers_once=True, check=True, reorder=False)
    each, expected = compiled_step(name, layers_once=False, reorder=False)
    assert [entry.rule for entry in once.records[0].fired] == [f"{LAYERS_ONCE}: {LAYERS} equal layers, 4 compiled"]
    assert once.graph is not None
    assert each.graph is not None
    assert program(once.graph.graph) == program(each.graph.graph)
    assert counts(once) == counts(each)
    assert torch.equal(result, expected)


class Chain(nn.Module):
    """Layers of a product and an activation; `change` makes one of them differ."""

    def __init__(self, layers: int, change: str = "") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(16, 16, generator=generator) / 4 for _ in range(layers)]
        self.weights = nn.ParameterList(nn.Parameter(weight.to(NPU), requires_grad=False) for weight in weights)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for index, weight in enumerate(self.weights):
            if self.change == "shared weight" and index == 4:
                weight = self.weights[1]
            x = torch.relu(x @ weight) + x
            if self.change == "another activation" and index == 3:
                x = torch.tanh(x)
            if self.change == "an early layer is read late" and index == 1:
                first = x
        return x + first


def records_of(module: nn.Module, **options: Any) -> list[str]:
    program = lowered(module, torch.ones(4, 16, device=NPU), inference=True)
    found = equal_layers.find(program.graph.graph)
    return [found] if isinstance(found, str) else [f"{found.run.count} layers"]


@pytest.mark.parametrize(
    ("layers", "change", "found"),
    [
        (5, "", ""),
        (6, "", "6 layers"),
        (9, "shared weight", "an input or a name is shared by some of the layers"),
        (9, "an early layer is read late", "reads a layer before the last"),
        (8, "another activation", ""),
    ],
)
def test_what_counts_as_layers(layers: int, change: str, found: str) -> None:
    (said,) = records_of(Chain(layers, change))
    assert found in said
    assert bool(found) == bool(said)


@pytest.mark.parametrize("change", ["", "shared weight", "another activation", "an early layer is read late"])
def test_results_are_those_of_eager(change: str) -> None:
    torch._dynamo.reset()
    module, x = Chain(9, change), torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).to(NPU)
    with torch.inference_mode():
        found = torch.compile(module, backend="ascend", options={"check": True})(x)
        torch.testing.assert_close(found, module(x))


def test_users_code_sees_every_layer() -> None:
    """A hook, a rule or a pass of a user's might tell layers apart."""
    seen: list[int] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> CompiledGraph:
        return compile_fx(gm, inputs, after_passes=lambda graph: seen.append(str(graph).count("aten.relu.default")))

    torch._dynamo.reset()
    with torch.inference_mode():
        torch.compile(Chain(8), backend=backend)(torch.ones(4, 16, device=NPU))
    assert seen == [8]


def work(layers: int) -> Counter[str]:
    """How often each Python function is called while the passes run on a decode step, by file and name."""
    with torch.inference_mode():
        program = lowered(models.step("qwen3", layers, NPU), *models.inputs("qwen3", NPU), inference=True).graph
    profile = cProfile.Profile()
    with torch.inference_mode():
        records = profile.runcall(pipeline.run, program, Options())
    assert records[0].name == LAYERS_ONCE and records[0].fired
    found: Counter[str] = Counter()
    for (file, _, name), (_, calls, *_) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        found[f"{Path(file).name} {name}"] += calls
    return found


def test_more_layers_infer_no_more_values() -> None:
    few, many = work(6), work(12)  # what is loaded once counts for the first
    assert 0 < many["fake_tensor.py dispatch"] <= few["fake_tensor.py dispatch"]
