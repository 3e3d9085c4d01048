"""Lowering a function for the tests of one pass: the functional program that the passes would see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from npu_compiler.config import Options
from npu_compiler.graph.spec import SpecCheck
from npu_compiler.lowering.functional import Functional, lower
from npu_compiler.passes import pipeline
from npu_compiler.passes.record import Pass, PassRecord


class Lowered(Exception):
    """Raised in the place of the program's first run."""


def stop(*args: object) -> None:
    raise Lowered


def lowered(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = False, inference: bool = False
) -> Functional:
    """The functional program of `function` called with `args`; one graph, no passes run. The program is not run either:
    it may be one that the device would refuse.

    Args:
        inference: lower as vLLM does, under inference_mode, where F.layer_norm, reshape and matmul stay whole.
    """
    programs: list[Functional] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def finish(functional: Functional) -> Callable[..., Any]:
            programs.append(functional)
            return stop

        return lower(gm, example_inputs, finish)

    torch._dynamo.reset()
    with torch.inference_mode() if inference else torch.no_grad(), contextlib.suppress(Lowered):
        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    (program,) = programs
    return program


def apply(entry: Pass, module: fx.GraphModule) -> PassRecord:
    """Runs one pass as the pipeline does."""
    return pipeline.run_pass(entry, module, Options(), SpecCheck(module))


def calls(module: fx.GraphModule) -> list[str]:
    """The program as the list of its operators, in order; getitem and arithmetic on sizes are left out."""
    return [
        str(node.target)
        for node in module.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OperatorBase)
    ]
