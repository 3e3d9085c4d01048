"""One step of the compiler on one small program, judged: what the tests that `minify` writes are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from npu_compiler.config import Options
from npu_compiler.errors import OptionError
from npu_compiler.inspect.contents import Inputs
from npu_compiler.inspect.from_graph import constants_of, program_of
from npu_compiler.inspect.outcome import Outcome, Point
from npu_compiler.inspect.replay import Subject
from npu_compiler.inspect.values import Values, saved
from npu_compiler.passes import pipeline

ALL_PASSES, ORDER, CAPTURE, STREAMS = "all passes", "order", "capture", "streams"


def rerun(
    program: Callable[..., Any],
    inputs: Sequence[Any],
    step: str,
    options: Mapping[str, Any] | None = None,
    groups: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> Outcome:
    """What a step makes of a program, compared with the program itself (inspect/judge.py says how).

    Args:
        program: calls operators of torch.ops, one after the other; nothing is lowered.
        inputs: its arguments. Those that share memory share it in the run too.
        step: the name of a pass, which runs alone; "order", "capture" or "streams", on the program as it is; or
            "all passes".
        options: as torch.compile takes them.
        groups: the number of the process in each group that the program's calls name, and how many ranks that has.
    """
    chosen = Options.of(options)
    traced = fx.symbolic_trace(program)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(item) if isinstance(item, Tensor) else item for item in inputs]
    with mode, torch.no_grad():
        _Recorded(traced, mode).run(*fakes)
    kept, pieces = saved(inputs)
    data = program_of(traced.graph).model_copy(update={"groups": dict(groups)})
    values = Values(data, Inputs(inputs=tuple(kept)), pieces)
    return Subject(data, constants_of(traced.graph), chosen, values).run(point_of(step, chosen))


def point_of(step: str, options: Options) -> Point:
    """The point that adds just this step to a program.

    Raises:
        OptionError: there is no such step.
    """
    names = pipeline.names(pipeline.selected(options))
    none = Point(first=len(names), passes=len(names), order=0, captured=0)
    if step in names:
        index = names.index(step)
        return Point(first=index, passes=index + 1, order=0, captured=0)
    match step:
        case "all passes":
            return Point(order=0, captured=0)
        case "order":
            return none.model_copy(update={"order": None})
        case "capture":
            return none.model_copy(update={"captured": None, "streams": 0})
        case "streams":
            return none.model_copy(update={"captured": None})
    steps = ", ".join((*dict.fromkeys(names), ALL_PASSES, ORDER, CAPTURE, STREAMS))
    raise OptionError(f"there is no step {step!r}", rule=f"the steps are {steps}", fix="name one of them")


class _Recorded(fx.Interpreter):
    """Notes what each node yields."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self._mode = mode

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.op == "get_attr":
            found = self._mode.from_tensor(found)
        if n.op != "output":
            n.meta["val"] = found
        return found
