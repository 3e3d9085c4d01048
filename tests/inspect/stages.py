"""The programs of every stage of a compilation, for the tests of what prints and reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from benchmarks import models
from npu_compiler.config import Options
from npu_compiler.graph import once
from npu_compiler.inspect.from_graph import constants_of, program_of
from npu_compiler.inspect.program import Program
from npu_compiler.passes import pipeline
from tests.passes.lowered import lowered

NPU = torch.device("npu", 0)


@dataclass(frozen=True)
class Stage:
    """One stage: its data, its constants, and the graph itself."""

    name: str
    program: Program
    constants: dict[str, torch.Tensor]
    graph: fx.GraphModule


def stages_of(
    function: Callable[..., Any], *args: Any, options: Sequence[tuple[str, Any]] = (), **how: Any
) -> list[Stage]:
    """Every stage of compiling `function`; `how` as `lowered` takes it."""
    functional = lowered(function, *args, **how)
    chosen = Options(**dict(options))
    if chosen.freeze:
        once.freeze(functional.graph.graph, functional.stable)
    found: list[Stage] = []

    def watch(name: str, module: fx.GraphModule, record: object) -> None:
        graph = fx.Graph()
        graph.output(graph.graph_copy(module.graph, {}))
        copy = fx.GraphModule(module, graph)  # it copies the constants that the graph names
        found.append(Stage(name, program_of(module.graph), constants_of(module.graph), copy))

    pipeline.run(functional.graph, chosen, watch=watch)
    return found


@functools.cache
def qwen3_stages(layers: int = 6) -> tuple[Stage, ...]:
    """Every stage of one decode step of a Qwen3; from six layers on, equal layers are compiled once."""
    with torch.inference_mode():
        return tuple(stages_of(models.step("qwen3", layers, NPU), *models.inputs("qwen3", NPU), inference=True))
