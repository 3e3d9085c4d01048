"""`bisect`, and then a small program and a test file for what it found."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from npu_compiler.config import Options
from npu_compiler.errors import BundleError
from npu_compiler.inspect.bisect import UNCAPTURED, Cause, bisect
from npu_compiler.inspect.bundle import StoredGraph
from npu_compiler.inspect.contents import FINAL
from npu_compiler.inspect.minify import calls_in, shrink
from npu_compiler.inspect.outcome import Outcome, Point
from npu_compiler.inspect.program import Data, Program
from npu_compiler.inspect.python_text import CONSTANTS, python_text
from npu_compiler.inspect.rerun import ALL_PASSES, point_of
from npu_compiler.inspect.worker import Source, Worker
from npu_compiler.passes import pipeline

THERE = frozenset(
    {"aten", "prims", "npu", "npu_fused", "_c10d_functional", "operator", "math", "torch", "higher_order"}
)
"""Where a program's calls come from that need no import of their own."""
Say = Callable[[str], None]


class Smallest(Data):
    """What `minify` left.

    Attributes:
        file: the test. `step`: the pass or layer that it runs.
        calls: how many calls the program has; `of` how many there were in front of the step.
        outcome: what comes of the test.
    """

    file: str
    step: str
    calls: int
    of: int
    outcome: Outcome

    def __str__(self) -> str:
        lines = [f"{self.file}: {self.calls} calls of {self.of}, and {self.step}", *str(self.outcome).splitlines()]
        return "\n".join(lines)


def find(source: Source, worker: Worker, say: Say = lambda text: None) -> Cause:
    """What makes a graph of a bundle wrong (bisect.Cause)."""
    graph, options = source.open(), source.chosen()
    return bisect(lambda point: worker.run(source, point), options, comparable_stages(graph), say)


def comparable_stages(graph: StoredGraph) -> list[str]:
    """Names of a graph's stages; empty for those whose program is not the whole, or has other inputs."""
    found: list[str] = []
    short = False
    for stage in graph.stages:
        short = stage.name == pipeline.SHORTENED or (short and stage.name != pipeline.LAYERS_ONCE)
        whole = stage.program and not short and stage.calls == stage.calls_of_all
        more = stage.name == FINAL and graph.plan is not None and graph.plan.once  # values computed once are inputs
        found.append(stage.name if whole and not more else "")
    return found


def minify(source: Source, cause: Cause, worker: Worker, file: Path, say: Say = lambda text: None) -> Smallest:
    """Shrinks the program in front of what `bisect` found, and writes a test of it.

    Args:
        file: the test; `test_*.py`, so that pytest finds it.

    Raises:
        BundleError: nothing was found that a smaller program can show.
    """
    graph, options = source.open(), source.chosen()
    if cause.layer not in ("pass", "order", "capture", "streams", "equal layers") or cause.wrong is None:
        raise BundleError(
            f"there is nothing to make smaller: {cause.layer}",
            rule="a test is written for a step of the compiler that makes a right program wrong",
            fix="look at what bisect says",
        )
    step = {"pass": cause.stage, "equal layers": ALL_PASSES}.get(cause.layer, cause.layer)
    program = worker.program_at(source, _before(cause, options))
    point = _alone(cause, options, step)

    def holds(candidate: Program) -> bool:
        found = worker.run(source.model_copy(update={"program": candidate}), point)
        return cause.outcome.same(found)

    if not holds(program):
        raise BundleError(
            f"with made-up values, {step} is right",
            rule="a small program is called with random floats and counted integers",
            fix="keep the test that replay is: npu-compiler replay with the saved inputs",
        )
    near = [*(cause.match.nodes if cause.match is not None else ()), *([cause.call.name] if cause.call else ())]
    small = shrink(program, holds, near, say)
    _refuse_surroundings(small, graph)
    _write(file, small, cause, step, graph, options)
    outcome = worker.run_file(file)
    return Smallest(
        file=str(file), step=step, calls=len(list(calls_in(small))), of=len(list(calls_in(program))), outcome=outcome
    )


def _refuse_surroundings(small: Program, graph: StoredGraph) -> None:
    """A test holds a program, but not what vLLM's attention needs besides."""
    named = graph.surroundings.inputs if graph.surroundings is not None else {}
    needed = [named[call.name] for call in small.inputs if call.name in named]
    if needed:
        raise BundleError(
            f"no smaller program shows it without calls that need {', '.join(needed)}",
            rule="a test holds a program and inputs, not the step of a serving engine",
            fix="keep the bundle: npu-compiler replay runs it",
        )


def _before(cause: Cause, options: Options) -> Point:
    """The program in front of the step."""
    names = pipeline.names(pipeline.selected(options))
    if cause.layer == "pass":
        assert cause.wrong is not None and cause.wrong.passes is not None
        return UNCAPTURED.model_copy(update={"passes": cause.wrong.passes - 1})
    if cause.layer == "equal layers":
        return UNCAPTURED
    ordered = cause.layer != "order" and options.reorder
    return UNCAPTURED.model_copy(update={"passes": len(names), "order": None if ordered else 0})


def _alone(cause: Cause, options: Options, step: str) -> Point:
    if cause.layer != "pass":
        return point_of(step, options)
    assert cause.wrong is not None and cause.wrong.passes is not None
    return Point(first=cause.wrong.passes - 1, passes=cause.wrong.passes, order=0, captured=0)


def _write(file: Path, program: Program, cause: Cause, step: str, graph: StoredGraph, options: Options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    wanted = {call.target for call in program.constants} - set(program.made_up)
    if wanted:
        constants = graph.constants()
        save_file({name: constants[name] for name in wanted}, file.parent / CONSTANTS)
    file.write_text(text_of(program, cause, step, _given(options), _registering(program, graph)))


def _registering(program: Program, graph: StoredGraph) -> str:
    """The module that registers the program's operators, where they are not torch's, torch_npu's or this project's."""
    spaces = {call.target.partition(".")[0] for call in calls_in(program)}
    return graph.surroundings.module if graph.surroundings is not None and spaces - THERE else ""


def text_of(program: Program, cause: Cause, step: str, options: dict[str, Any], registering: str = "") -> str:
    """The test, as Python.

    Args:
        registering: a module that registers operators.
    """
    what = f"rule {cause.rule} of {step}" if cause.rule else step
    first = cause.outcome.differences[0] if cause.outcome.differences else cause.outcome.text
    body = python_text(program, f"{what} is wrong here: {first}", counted=True)
    body = body[: body.index('\n\nif __name__ == "__main__"')].rstrip()
    more = f"import {registering}  # registers operators\n" if registering else ""
    more += "from npu_compiler.inspect.rerun import rerun\n"
    body = re.sub(r"(from npu_compiler\.inspect\.made_up .*\n)", rf"\1{more}", body)
    name = re.sub(r"\W+", "_", cause.rule or step).strip("_")
    given = f", options={options!r}" if options else ""
    given += f", groups={program.groups!r}" if program.groups else ""
    return f"""{body}


def outcome():
    return rerun(program, inputs(), {step!r}{given})


def test_{name}():
    found = outcome()
    assert found.right, str(found)
"""


def _given(options: Options) -> dict[str, Any]:
    """The options that are not at their defaults."""
    default = Options()
    return {name: value for name, value in vars(options).items() if value != getattr(default, name)}
