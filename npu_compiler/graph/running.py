"""Running a program as it is, operator by operator: what fails names the call and its place in the user's model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from npu_compiler.graph.source import operator_name, where

ALONE = (
    'options={"dump": DIR, "dump_inputs": "all"} keeps the program with its inputs, and `npu-compiler replay DIR` runs '
    "it without the model"
)


def caller(program: fx.GraphModule) -> Callable[..., Any]:
    """What calls `program` with its flat arguments, by `run`. Its code is generated now, not at the first call."""
    _LazyGraphModule.force_recompile(program)
    return functools.partial(_run, program)


def run(program: fx.GraphModule, args: Sequence[Any]) -> Any:
    """The program's results. What an operator raises goes on as it is, with a note of the call and its place."""
    return _run(program, *args)


class CallByCall(fx.Interpreter):
    """Runs a program call by call.

    Attributes:
        current: the node being run.
    """

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.extra_traceback = False
        self.current: fx.Node | None = None

    def results(self, args: Sequence[Any]) -> Any:
        """As `run` of this module, without code of the program: worth it for one call."""
        try:
            return self.run(*args, enable_io_processing=False)
        except Exception as error:
            note(error, self.current)
            raise

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        return self.call(n)

    def call(self, n: fx.Node) -> Any:
        """Runs a node: as the interpreter's own `run_node`, which also notes the node for calls that are traced, in
        half of its time."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, args, kwargs)


def _run(program: fx.GraphModule, *args: Any) -> Any:
    try:
        return program.forward(*args)
    except Exception as error:
        note(error, failed(program, error.__traceback__))
        raise


def note(error: BaseException, node: fx.Node | None) -> None:
    """Notes on an error which call it came from; nothing where that is not known."""
    if node is not None:
        error.add_note(f"  in: {operator_name(node.target)} ({node.name})\n  where: {where(node)}\n  fix: {ALONE}")


def failed(program: fx.GraphModule, trace: TracebackType | None) -> fx.Node | None:
    """The call of `program` that an exception came from; None where it came from elsewhere."""
    code = type(program).forward.__code__
    while trace is not None:
        if trace.tb_frame.f_code is code:
            index = (program._lineno_map or {}).get(trace.tb_lineno - program._prologue_start)
            return None if index is None else list(program.graph.nodes)[index]
        trace = trace.tb_next
    return None
