"""A dumped program run alone on the device, and compared with what it means.

The lowered program of a bundle is compiled again, as far as a `Point` says, and called several times with other values
at the same addresses; what it returns, and what it leaves in its inputs, is judged (judge.py). This runs code:
operators of torch.ops by the names in the bundle, and the modules that its options `rules` and `passes`, and its
surroundings, name.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from npu_compiler.aclgraph.replay import Replayer
from npu_compiler.config import Options
from npu_compiler.errors import BundleError, OptionError
from npu_compiler.graph import groups, once
from npu_compiler.graph.source import operator_name, where
from npu_compiler.graph.spec import SpecCheck
from npu_compiler.inspect import collectives, partly, reference, undefined
from npu_compiler.inspect.bundle import StoredGraph
from npu_compiler.inspect.contents import Fire
from npu_compiler.inspect.from_graph import program_of
from npu_compiler.inspect.judge import Difference, Expected, Seen, compared, judge, shared_memory
from npu_compiler.inspect.outcome import RACE, Outcome, Part, Point
from npu_compiler.inspect.program import Program
from npu_compiler.inspect.surroundings import Nothing, Restored, calls_of, restored
from npu_compiler.inspect.to_graph import graph_of
from npu_compiler.inspect.values import Values
from npu_compiler.passes import pipeline
from npu_compiler.passes.record import PassRecord
from npu_compiler.plan.schedule import Step
from npu_compiler.runtime import counters

CALLS = 3
"""How often a program is called, with other values each time; where it is captured, the later calls are replays."""
SEED = 20
FAILURES = (RuntimeError, LookupError, ValueError, TypeError, AttributeError, AssertionError, ArithmeticError)
"""What a wrong rewrite makes a program, or the compiler behind it, raise."""
MEMORY = "memory"
_PARTICULAR = re.compile(r"\[[^\]]*\]|'[^']*'|\d+")
UNUSED = frozenset({"dump", "dump_inputs", "cache", "check"})
"""Options of the dumped compilation that a replay leaves out, or decides itself."""


class Subject:
    """A program that can be run in different ways: a graph of a bundle, or a program made of one.

    Args:
        program: what is right by definition. `constants`: their values.
        options: as it was compiled.
        values: its inputs.
        stored: the program of a stage of the bundle, by the stage's index; it may be run in its place.
        ranks: how many ranks there were.
        surroundings: what its calls need besides their arguments.
    """

    def __init__(
        self,
        program: Program,
        constants: Mapping[str, Tensor],
        options: Options,
        values: Values,
        stored: Callable[[int], Program] | None = None,
        ranks: int = 1,
        surroundings: Restored | None = None,
    ) -> None:
        self.program, self.options, self.values = program, options, values
        self._surroundings = surroundings or Nothing()
        self.constants = constants
        self._stored, self._ranks = stored, ranks

    @classmethod
    def of(cls, graph: StoredGraph, options: Options | None = None, ranks: int = 1, made_up: bool = False) -> Subject:
        """A graph of a bundle, with saved inputs where it has them.

        Args:
            options: in place of the bundle's.
            made_up: leave saved inputs alone.

        Raises:
            BundleError: the bundle has no lowered program, or options that can't be read back.
        """
        if not graph.stages or graph.stages[0].name != pipeline.LOWERED:
            raise BundleError(
                f"{graph.name} has no lowered program",
                rule="what is found in the cache was not compiled",
                fix="dump with another $NPU_COMPILER_CACHE, or without the option cache",
            )
        program = graph.program(graph.stages[0])
        kept = None if made_up else graph.inputs
        values = Values(program, kept, graph.tensors() if kept is not None else None)
        chosen = options or options_of(graph)
        around = surroundings_of(graph, made_up)

        def stored(index: int) -> Program:
            return graph.program(graph.stages[index])

        return cls(program, graph.constants(), chosen, values, stored, ranks, around)

    def run(self, point: Point) -> Outcome:
        """Compiles and calls the program as far as `point` says, and judges what it gives.

        Raises:
            OptionError: a rule or pass that the options or the point name is not there, or the program has a call that
                needs other ranks; nothing has run then.
        """
        if point.stage is None:
            pipeline.selected(_with(self.options, point))
        try:
            expected, on_device = self._expected
        except FAILURES as error:
            return Outcome(
                state="error", text=f"the lowered program fails: {_text(error)}", kind=f"lowered {_kind(error)}"
            )
        made: dict[str, Any] = {}
        races = _races()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compiled = self._compiled(point, made)
                if not point.called:
                    return Outcome(state="right", **_described(made))
                seen, later = self._calls(compiled, self.options.clone_outputs)
        except OptionError:
            raise
        except FAILURES as error:
            return Outcome(state="error", text=_text(error), kind=_kind(error), **_described(made))
        found = [entry for index, one in enumerate(seen) for entry in judge(index, one, expected[index])]
        found += later
        disorder = made.get("disorder", "")
        if disorder:
            found.append(Difference(call=0, what="order of collectives", text=disorder, kind="collectives"))
        races = _races() - races
        if races:
            found.append(Difference(call=0, what=MEMORY, text=f"is touched in no order, {races} times", kind=RACE))
        return Outcome(
            state="wrong" if found else "right",
            differences=tuple(_first_of_each(found)),
            on_device=tuple(on_device),
            compared=tuple(entry for index, one in enumerate(seen) for entry in compared(index, one, expected[index])),
            **_described(made),
        )

    @functools.cached_property
    def _expected(self) -> tuple[list[Expected], list[str]]:
        """What each call should leave, and the calls of the reference that ran on the device."""
        module = self._module(self.program)
        self._surroundings.fit(calls_of(module.graph))
        try:
            wide, on_device = self._reference()
        except FAILURES:
            self.values.count_integers = False  # some integer is an index into something shorter
            try:
                wide, on_device = self._reference()
            except FAILURES:  # not what the CPU can do: the lowered program on the device decides alone
                wide, on_device = [None] * CALLS, [call.name for call in self.program.calls if call.target != "output"]
        lowered, _ = self._calls(module, keep=False)
        return [Expected(*pair) for pair in zip(lowered, wide, strict=True)], on_device

    def _reference(self) -> tuple[list[Seen | None], list[str]]:
        module, around = self._module(self.program), self._surroundings.in_float64()
        found: list[Seen | None] = []
        on_device: list[str] = []
        for turn in range(CALLS):
            arguments = self.values.in_float64(turn)
            if arguments is None:
                return [None] * CALLS, []
            arguments = self._with_objects(arguments)
            before = [item.clone() if isinstance(item, Tensor) else item for item in arguments]
            torch.npu.manual_seed(SEED)
            with around.turn(turn):
                outputs, on_device = reference.run(module, arguments, around.meanings)
            found.append(self._seen(outputs, arguments, before, around.left()))
        return found, on_device

    def _calls(self, run: Callable[..., Any], keep: bool) -> tuple[list[Seen], list[Difference]]:
        """Calls a program with one set of values after the other at the same addresses; also returns what changed in
        results that were handed out, where the caller may keep them."""
        memory, around = self.values.memory(0), self._surroundings.on_device()
        arguments = self._with_objects(self.values.arguments(memory))
        found: list[Seen] = []
        held: list[Any] = []
        later: list[Difference] = []
        for turn in range(CALLS):
            if turn:
                for name in memory:
                    memory[name].copy_(self.values.bytes_of(name, turn))
            before = [item.clone() if isinstance(item, Tensor) else item for item in arguments]
            torch.npu.manual_seed(SEED)
            with torch.no_grad(), around.turn(turn):
                outputs = list(run(*arguments))
            torch.npu.synchronize()
            found.append(self._seen(outputs, arguments, before, around.left()))
            later += self._overwritten(turn, held, found, arguments) if keep else ()
            held = outputs if keep else []
            del outputs
        return found, later

    def _overwritten(
        self, turn: int, held: Sequence[Any], found: Sequence[Seen], arguments: Sequence[Any]
    ) -> Iterator[Difference]:
        """Results of the call before that this call has changed; a view of an input may change."""
        inputs = {item.untyped_storage().data_ptr() for item in arguments if isinstance(item, Tensor)}
        for index, item in enumerate(held):
            if isinstance(item, Tensor) and item.untyped_storage().data_ptr() not in inputs:
                before = found[turn - 1].outputs[index]
                if not torch.equal(item.cpu().nan_to_num(), before.nan_to_num()):
                    yield Difference(
                        call=turn, what=f"output {index}", text="of the call before was overwritten", kind="overwritten"
                    )

    def _with_objects(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments, with the inputs that are neither tensors nor numbers."""
        objects = self._surroundings.objects
        return [objects.get(call.name, item) for call, item in zip(self.program.inputs, arguments, strict=True)]

    def _seen(
        self, outputs: Sequence[Any], arguments: Sequence[Any], before: Sequence[Any], left: Mapping[str, Tensor]
    ) -> Seen:
        names = [call.name for call in self.program.inputs]
        written = {
            name: now.cpu().clone()
            for name, now, old in zip(names, arguments, before, strict=True)
            if isinstance(now, Tensor) and not _equal(now, old)
        }
        named = [(f"output {index}", item) for index, item in enumerate(outputs)]
        named += [(f"input {name}", item) for name, item in zip(names, arguments, strict=True)]
        host = [item.cpu().clone() if isinstance(item, Tensor) else item for item in outputs]
        return Seen(host, {**written, **left}, shared_memory(named, len(outputs)))

    def _module(self, program: Program) -> fx.GraphModule:
        module = self._graph(program)
        self._alone(module)
        return module

    def _alone(self, module: fx.GraphModule) -> None:
        """Makes a program one that runs alone, and does the same again."""
        collectives.replace(module, self._ranks, self.program.groups)
        undefined.fill(module)

    def _graph(self, program: Program) -> fx.GraphModule:
        return graph_of(program, self.constants, self._surroundings.objects)

    @functools.cached_property
    def _collectives(self) -> list[str]:
        return collectives.in_order(self._graph(self.program).graph)

    def _compiled(self, point: Point, made: dict[str, Any]) -> Callable[..., Any]:
        """The program at a point, as something to call; `made` receives what is known of it."""
        expected = self._collectives
        if point.stage is not None:
            assert self._stored is not None, "only a bundle has stages"
            module = self._graph(self._stored(point.stage))
            made["disorder"] = collectives.disorder(module.graph, expected)
            self._alone(module)
            return module
        options = _with(self.options, point)
        with groups.made_up(self.program.groups):
            module = self._rewritten(point, options, made)
        stable = partly.lasting(module.graph)
        made["disorder"] = collectives.disorder(module.graph, expected)
        self._alone(module)
        part = once.split(module)
        if part is not None:
            inputs = len(self.program.inputs)
            stable = [*stable, *range(inputs, inputs + len(part.values))]
        served = _served(module, stable, options, point, made)
        if part is None:
            return served
        values = once.Once(part)
        return lambda *args: served(*args, *values(args))

    def program_at(self, point: Point) -> Program:
        """The program behind the passes and the order of a point, before anything is captured."""
        with groups.made_up(self.program.groups):
            return program_of(self._rewritten(point, _with(self.options, point), {}).graph)

    def _rewritten(self, point: Point, options: Options, made: dict[str, Any]) -> fx.GraphModule:
        module = self._graph(self.program)
        if options.freeze:
            once.freeze(module.graph, partly.lasting(module.graph))
        check = SpecCheck(module)
        until = None if point.passes is None else pipeline.Until(point.passes, point.rewrites, point.first)
        records = pipeline.run(module, options, until=until)
        made["record"] = records[-1] if records else None
        check.after(records[-1].name if records else pipeline.LOWERED, module)
        if options.reorder and point.order != 0:
            count = len(module.graph.nodes) if point.order is None else point.order
            made["ordered"] = [_part(node) for node in partly.order(module.graph, count)]
            module.recompile()
        return module


def _served(
    module: fx.GraphModule, stable: Sequence[int], options: Options, point: Point, made: dict[str, Any]
) -> Callable[..., Any]:
    calls = [_part(node) for node in module.graph.nodes if node.op == "call_function"]
    if not options.capture or point.captured == 0:
        return module
    made["calls"] = calls
    if point.captured is not None and point.captured < len(calls):
        return partly.captured_first(module, point.captured, stable, options, "replay")
    if options.multistream == "auto":
        launches = len(calls) if point.streams is None else point.streams
        made["streams"] = partly.FirstSteps(module, options.stream_limit, launches)
    return Replayer(module, stable, options, "replay", (), streams=made.get("streams"))


def _with(options: Options, point: Point) -> Options:
    return dataclasses.replace(
        options,
        disabled_rules=(*options.disabled_rules, *point.disabled),
        layers_once=options.layers_once and point.equal_layers,
        multistream="off" if point.streams == 0 else options.multistream,
        check=False,
    )


def surroundings_of(graph: StoredGraph, made_up: bool) -> Restored:
    """What the calls of a dumped graph need besides their arguments; imports the module that makes it anew.

    Args:
        made_up: leave what was kept of a step alone.
    """
    stored = graph.surroundings
    if stored is not None and made_up:
        return restored(stored.model_copy(update={"step": None}), {})
    return restored(stored, graph.memory())


def options_of(graph: StoredGraph) -> Options:
    """The options of a dumped compilation. Names of the user's own rules and passes are imported when they are used.

    Raises:
        BundleError: rules or passes were given as objects, which a bundle does not hold.
    """
    return Options.of(options_given(graph))


def options_given(graph: StoredGraph, but: Collection[str] = ()) -> dict[str, Any]:
    """The options that a dumped compilation was given, without those of the names `but`; raises as `options_of`."""
    given: dict[str, Any] = {}
    for name in graph.about.given:
        if name in UNUSED or name in but:
            continue
        try:
            given[name] = ast.literal_eval(graph.about.options[name])
        except (ValueError, SyntaxError) as error:
            raise BundleError(
                f"{graph.name} was compiled with {name}={graph.about.options[name]:.80}, which a bundle does not hold",
                rule="rules and passes are found again where they were given by name",
                fix=f'compile with options={{"{name}": ["module:name"]}}, or add --option {name}=module:name here',
            ) from error
    return given


def point_up_to(graph: StoredGraph, stop_after: str, disabled: Sequence[str], options: Options) -> Point:
    """The point of `replay`: all that was done, or only the passes up to one.

    Raises:
        BundleError: there is no such pass.
    """
    if not stop_after:
        return Point(disabled=tuple(disabled))
    names = pipeline.names(pipeline.selected(options))
    if stop_after not in (*names, pipeline.LOWERED):
        raise BundleError(
            f"{graph.name} is compiled by no pass {stop_after!r}",
            rule=f"its passes are {', '.join(dict.fromkeys(names))}",
            fix="name one of them, or `lowered`",
        )
    count = 0 if stop_after == pipeline.LOWERED else len(names) - names[::-1].index(stop_after)
    return Point(passes=count, equal_layers=False, order=0, captured=0, disabled=tuple(disabled))


def _described(made: Mapping[str, Any]) -> dict[str, Any]:
    record: PassRecord | None = made.get("record")
    fired = () if record is None else record.fired
    streams = made.get("streams")
    steps: tuple[Step, ...] = () if streams is None else streams.steps
    return {
        "rewrites": tuple(
            Fire(rule=fire.rule, place=fire.place, nodes=fire.nodes, made=fire.made, layers=fire.layers)
            for fire in fired
        ),
        "ordered": tuple(made.get("ordered", ())),
        "calls": tuple(made.get("calls", ())),
        "steps": tuple(_part(step.node) for step in steps),
    }


def _part(node: fx.Node) -> Part:
    origin = node.meta.get("npu_origin") or {"pass": ""}
    return Part(name=node.name, operator=operator_name(node.target), place=where(node), rule=origin["pass"])


def _races() -> int:
    """How many accesses in no order the checking mode has found; none where nobody counts."""
    try:
        return counters.read()["races"]
    except RuntimeError:
        return 0


def _first_of_each(found: Sequence[Difference]) -> list[Difference]:
    first: dict[str, Difference] = {}
    for entry in found:
        first.setdefault(entry.what, entry)
    return list(first.values())


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _kind(error: BaseException) -> str:
    """What makes two errors one: the type, and the first line without lists, names in quotes and numbers."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {_PARTICULAR.sub('', first)}"[:200]
