"""Running a program as it is, operator by operator: what fails names the call and its place in the user's model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from npu_compiler.graph.rolled import Rolled, Stamped, held
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
    """Runs a program call by call."""

    def __init__(self, program: fx.GraphModule | Rolled) -> None:
        super().__init__(held(program))
        self.extra_traceback = False
        self._rolled = program if isinstance(program, Rolled) else None
        self._node: fx.Node | None = None
        self._times = 0  # how many layers on of its own a call is repeated
        self._plain: dict[fx.Node, bool] = {}  # calls whose arguments hold no results inside of lists

    @property
    def current(self) -> fx.Node | Stamped | None:
        """The call that runs."""
        return None if self._node is None else self.standing_for(self._node)

    def standing_for(self, n: fx.Node) -> fx.Node | Stamped:
        """The call of the whole program that a node is just now."""
        return n if self._rolled is None else self._rolled.stamped(n, self._times)

    def results(self, args: Sequence[Any]) -> Any:
        """As `run` of this module, without code of the program: worth it for one call."""
        try:
            return self.run(*args, enable_io_processing=False)
        except Exception as error:
            note(error, self.current)
            raise

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the program returns; `kwargs` as the interpreter takes them."""
        return super().run(*args, **kwargs) if self._rolled is None else self._run_rolled(self._rolled, args)

    def _run_rolled(self, rolled: Rolled, args: Sequence[Any]) -> Any:
        repetition = rolled.repetition
        assert repetition is not None, "a program that can't be run rolled is written out"
        inputs = dict(zip(rolled.graph.find_nodes(op="placeholder"), args, strict=True))
        self.env: dict[fx.Node, Any] = {}
        self.args_iter, self._times = iter(args), 0
        self._run_calls(repetition.head, self.user_to_last_uses)
        gone = repetition.gone
        for times in (0, *rolled.repetitions):
            self._times = times
            if times:
                for there, here in repetition.carried:
                    self.env[there] = self.env.pop(here)
                for leaf in repetition.inputs:
                    self.env[leaf] = inputs[rolled.bindings.shifted(leaf, times)]
            if times == rolled.bindings.left_out:
                gone = repetition.gone_at_last
            self._run_calls(rolled.template, gone)
        for leaf in repetition.inputs_of_rest:
            self.env[leaf] = inputs[rolled.bindings.shifted(leaf, self._times)]
        self._run_calls(repetition.rest, self.user_to_last_uses)
        return self.env[rolled.graph.output_node()]

    def _run_calls(self, calls: Sequence[fx.Node], gone: Mapping[fx.Node, Sequence[fx.Node]]) -> None:
        """Runs calls one after the other; behind each lets go of the values `gone`."""
        for node in calls:
            self.env[node] = self.run_node(node)
            for value in gone.get(node, ()):
                self.env.pop(value, None)

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return self.call(n)

    def call(self, n: fx.Node) -> Any:
        """Runs a node: as the interpreter's own `run_node`, which also notes the node for calls that are traced and
        looks into every argument each time."""
        plain = self._plain.get(n)
        if plain is None:
            plain = self._plain[n] = _is_plain(n)
        if plain:
            env = self.env
            return n.target(*[env[item] if type(item) is fx.Node else item for item in n.args], **n.kwargs)  # type: ignore[operator]
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, args, kwargs)


def _is_plain(node: fx.Node) -> bool:
    """Whether the results that a call reads are arguments of it, not parts of lists or keyword arguments."""
    read: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), read.append)
    return node.op == "call_function" and len(read) == sum(isinstance(item, fx.Node) for item in node.args)


def _run(program: fx.GraphModule, *args: Any) -> Any:
    try:
        return program.forward(*args)
    except Exception as error:
        note(error, failed(program, error.__traceback__))
        raise


def note(error: BaseException, node: fx.Node | Stamped | None) -> None:
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
