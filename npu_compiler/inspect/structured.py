"""The stages of a compilation as artifacts of torch's structured trace (TORCH_TRACE), which tlparse shows."""

from __future__ import annotations

import itertools

from torch import fx
from torch._logging import trace_structured

from npu_compiler.inspect.from_graph import program_of
from npu_compiler.inspect.python_text import python_text
from npu_compiler.passes.pipeline import Watch
from npu_compiler.passes.record import PassRecord


def also(name: str, watch: Watch | None) -> Watch:
    """A watcher that writes each stage's program into the trace, as Python, and then calls `watch`.

    A program that a pass left as it was is not written again.

    Args:
        name: the graph's.
    """
    last = ""
    count = itertools.count()

    def stage(stage: str, module: fx.GraphModule, record: PassRecord | None = None) -> None:
        nonlocal last
        text = python_text(program_of(module.graph), f"{name}, {stage}")
        _, _, program = text.partition("\n")  # the first line names the stage
        if program != last:
            last = program
            artifact(f"ascend_{name}_{next(count):02}_{stage}", text)
        if watch is not None:
            watch(stage, module, record)
        elif record is not None:
            record.attempts = None  # nobody else wants them

    return stage


def artifact(name: str, text: str) -> None:
    """Puts a text into the trace of the compilation that is going on."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)
