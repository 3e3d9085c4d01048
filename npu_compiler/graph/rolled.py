"""A program that holds few of its equal layers, and says what the others do.

`roll` makes it of a short program (graph/layers.py) behind the passes. Nothing is believed: three equal periods of the
rewritten program are asked for (graph/periods.py), so that the step from one layer to the next is seen twice. Fusion
across the border of two layers is fine: a period of the rewritten program begins where it begins. Where the proof
fails, `roll` says why and the caller takes the whole program.

    head | period | ... | period | rest          what the program holds
    head | period | ... | period | period, for the next layer | ... | period, for the last layer | rest

The last period stands for itself and for the layers left out. For each of them it reads the inputs of that layer, and
the results of the period before it. graph/running.py runs a program like that; `whole` writes it out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module
from torch.fx.node import map_aggregate

from npu_compiler.graph.effects import has_unknown_size
from npu_compiler.graph.layers import KEPT, Bindings, Layers, with_all_inputs
from npu_compiler.graph.periods import PROVEN, Binding, Call, Run, calls_of, longest, outputs_of
from npu_compiler.graph.source import PLACES, TIMES
from npu_compiler.graph.spec import refresh_alias
from npu_compiler.graph.values import Repeated


@dataclass(frozen=True)
class Stamped:
    """A call of a layer that a rolled program does not hold, as far as messages and labels go; see fx.Node."""

    op: str
    name: str
    target: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class Origins:
    """Where calls come from: what their templates come from, in their own layers.

    Attributes:
        run: where the layers were in the program before the passes.
        names, places: of its calls; places as metadata of nodes.
    """

    run: Run
    names: tuple[str, ...]
    places: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, layers: Layers) -> Origins:
        """Those of a program's calls."""
        places = tuple({key: node.meta[key] for key in PLACES if key in node.meta} for node in layers.calls)
        return cls(layers.run, tuple(node.name for node in layers.calls), places)

    @functools.cached_property
    def _position(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def meta(self, template: fx.Node, periods: int) -> dict[str, Any]:
        """The metadata of what repeats `template` so many layers later."""
        earlier = template.meta.get("npu_origin")
        names = [self._moved(name, periods) for name in (earlier["nodes"] if earlier else [template.name])]
        found = [self._position[name] for name in names if name in self._position]
        source = self.places[found[-1]] if found else template.meta
        meta = {key: source[key] for key in PLACES if key in source}
        return meta | ({"npu_origin": {**earlier, "nodes": names}} if earlier else {})

    def _moved(self, name: str, periods: int) -> str:
        index = self._position.get(name, -1)
        inside = self.run.start <= index < self.run.end - periods * self.run.length
        return self.names[index + periods * self.run.length] if inside else name


@dataclass(frozen=True)
class Rolled:
    """A program with its layers rolled up.

    Attributes:
        program: the calls that it holds.
        bindings: what each layer has of its own: inputs of `program`, and names.
        origins: where its calls come from.
        periods: the calls of the equal periods, `length` each. The last period is repeated for the layers left out.
        tail: calls behind the periods that are repeated too: writes of inputs that could not be made in place.
        rest: the other calls behind the periods, and the output: they read the last repetition.
    """

    program: fx.GraphModule
    bindings: Bindings
    origins: Origins
    periods: tuple[fx.Node, ...]
    length: int
    tail: tuple[fx.Node, ...]
    rest: tuple[fx.Node, ...]

    @property
    def graph(self) -> fx.Graph:
        """Of the calls that it holds."""
        return self.program.graph

    @property
    def template(self) -> tuple[fx.Node, ...]:
        """The period that is repeated."""
        return self.periods[-self.length :]

    @property
    def repetitions(self) -> range:
        """Numbers of the repetitions: how many layers on they are."""
        return range(1, self.bindings.left_out + 1)

    @property
    def calls(self) -> int:
        """How many calls the whole program makes."""
        held = sum(node.op == "call_function" for node in self.graph.nodes)
        return held + self.bindings.left_out * (self.length + len(self.tail))

    def inputs_of(self, node: fx.Node, source: fx.Node) -> Iterator[fx.Node]:
        """The inputs that a call and its repetitions have where the call has `source`."""
        if node in self._repeated:
            yield from (self.bindings.shifted(source, times) for times in (0, *self.repetitions))
        else:
            yield self.bindings.shifted(source, self.bindings.left_out if node in self._behind else 0)

    @functools.cached_property
    def _repeated(self) -> frozenset[fx.Node]:
        return frozenset((*self.template, *self.tail))

    @functools.cached_property
    def _behind(self) -> frozenset[fx.Node]:
        return frozenset(self.rest)

    def stamped(self, template: fx.Node, times: int) -> fx.Node | Stamped:
        """What `template` stands for so many layers on."""
        if not times:
            return template
        name = self._names.get((template, times), template.name)  # what is behind the layers keeps its name
        return Stamped(template.op, name, template.target, self.origins.meta(template, times))

    @functools.cached_property
    def _names(self) -> dict[tuple[fx.Node, int], str]:
        """The names of repeated calls, as fx gives them one after the other."""
        spaces = fx.Graph()
        for node in self.graph.nodes:
            spaces._graph_namespace.create_name(node.name, None)
        kinds = {node: spaces._target_to_str(node.target) for node in (*self.template, *self.tail)}
        order = chain(
            ((node, times) for times in self.repetitions for node in self.template),
            ((node, times) for times in self.repetitions for node in self.tail),
        )
        return {(node, times): spaces._graph_namespace.create_name(kinds[node], None) for node, times in order}

    @functools.cached_property
    def whole(self) -> fx.GraphModule:
        """The program with all of its layers."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        graph._codegen = self.graph._codegen
        parts = (tuple(copied[node] for node in part) for part in (self.periods, self.tail, self.rest))
        _Writer(self, graph, *parts).write()
        return _make_graph_module(self.program, graph)

    @functools.cached_property
    def repetition(self) -> Repetition | None:
        """How it runs as it is; None where it has to be written out to be run."""
        return Repetition.of(self)

    def proven_again(self) -> Rolled | str:
        """The same behind a change of the order of its calls, or why that is no longer proven."""
        return _proven(self.program, self.bindings, self.origins)


@dataclass(frozen=True)
class Repetition:
    """How the last period of a rolled program runs once more for each layer left out.

    Attributes:
        head, rest: the calls before the last period, and behind it.
        carried: what the period reads of the one before it: that result there, and the same of its own.
        inputs: the inputs of a layer that the period reads, and `inputs_of_rest`, the rest.
        gone: values that nobody reads behind a call of the period; `gone_at_last` in its last repetition.
    """

    head: tuple[fx.Node, ...]
    rest: tuple[fx.Node, ...]
    carried: tuple[tuple[fx.Node, fx.Node], ...]
    inputs: tuple[fx.Node, ...]
    inputs_of_rest: tuple[fx.Node, ...]
    gone: Mapping[fx.Node, Sequence[fx.Node]]
    gone_at_last: Mapping[fx.Node, Sequence[fx.Node]]

    @classmethod
    def of(cls, rolled: Rolled) -> Repetition | None:
        """None for a program that has to be written out to be run: calls behind its layers are repeated too, names tell
        its layers apart, it returns an input of a layer, or a period reads more than the one before it."""
        nodes = list(rolled.graph.nodes)
        first = nodes.index(rolled.template[0])
        head, rest = tuple(nodes[:first]), tuple(nodes[first + rolled.length :])
        own = set(rolled.template)
        before = dict(zip(rolled.periods[-2 * rolled.length : -rolled.length], rolled.template, strict=True))
        early = set(rolled.periods[: -2 * rolled.length])
        last_reader = {source: node for node in rolled.template for source in node.all_input_nodes}
        in_rest = {source for node in rest for source in node.all_input_nodes}
        layer_of = rolled.bindings.layer_of
        named = any(isinstance(binding, str) for binding in layer_of)
        returned = any(source in layer_of for source in rolled.graph.output_node().all_input_nodes)
        if rolled.tail or named or returned or in_rest & before.keys() or early & (last_reader.keys() | in_rest):
            return None
        carried = tuple((there, here) for there, here in before.items() if there in last_reader)
        kept = {here for _, here in carried}
        gone: dict[fx.Node, list[fx.Node]] = {}
        gone_at_last: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last_reader.items():
            if source in before or (source in own and source not in kept):
                gone.setdefault(node, []).append(source)
            if source in before or (source.op == "call_function" and source not in in_rest):
                gone_at_last.setdefault(node, []).append(source)
        inputs = tuple(source for source in last_reader if source in layer_of)
        return cls(head, rest, carried, inputs, tuple(in_rest & layer_of.keys()), gone, gone_at_last)  # type: ignore[arg-type]


def roll(program: fx.GraphModule, layers: Layers) -> Rolled | str:
    """A rewritten short program (layers.shortened) as what all layers do, or why it can't be taken for it."""
    if not with_all_inputs(program.graph, layers):
        return "behind the passes a call has the name of an input"
    return _proven(program, layers.bindings.of(program.graph), Origins.of(layers))


def whole(program: fx.GraphModule | Rolled) -> fx.GraphModule:
    """A program, written out if it is rolled."""
    return program.whole if isinstance(program, Rolled) else program


def held(program: fx.GraphModule | Rolled) -> fx.GraphModule:
    """The calls that a program holds."""
    return program.program if isinstance(program, Rolled) else program


def _proven(program: fx.GraphModule, bindings: Bindings, origins: Origins) -> Rolled | str:
    calls = calls_of(program.graph)
    position = {call.node: index for index, call in enumerate(calls)}
    run = longest(calls, position, bindings.after)
    if run is None or run.count < PROVEN:
        count = 0 if run is None else run.count
        return f"behind the passes {count} of {KEPT} layers are equal, {PROVEN} are needed"
    tail = _tail(calls[run.end :], run, position, bindings)
    if tail is None:
        return "calls behind the layers differ from layer to layer"
    early = {call.node for one in tail[:-1] for call in one}
    rest = [call for call in (*calls[run.end :], *outputs_of(program.graph)) if call.node not in early]
    why_not = _borders(calls, run, rest, position, bindings)
    if why_not:
        return why_not
    expected = sum(call.node.meta.get(TIMES, 1) for call in calls)
    made = len(calls) + bindings.left_out * (run.length + len(tail[-2]))
    if made != expected:
        return f"{expected} calls are due and {made} would be made"
    periods, repeated, behind = (_nodes(part) for part in (calls[run.start : run.end], tail[-2], rest))
    return Rolled(program, bindings, origins, periods, run.length, repeated, behind)


def _nodes(calls: Iterable[Call]) -> tuple[fx.Node, ...]:
    return tuple(call.node for call in calls)


def _tail(
    behind: Sequence[Call], run: Run, position: Mapping[fx.Node, int], bindings: Bindings
) -> list[list[Call]] | None:
    """For each layer of a short program the calls behind the periods that belong to it alone: writes of inputs that
    could not be made in place. None if those of one layer are not those of the next."""
    tail: list[list[Call]] = [[] for _ in range(KEPT)]
    for call in behind:
        of = {bindings.layer_of[leaf] for leaf in call.leaves if leaf in bindings.layer_of}
        if len(of) == 1 and not call.node.users:
            tail[of.pop()].append(call)
    if not any(tail[:-2]):
        return [[] for _ in range(KEPT)]

    def follows(left: Binding, right: Binding) -> bool:
        one, two = (position.get(leaf, -1) for leaf in (left, right))  # type: ignore[call-overload]
        inside = run.start <= one < run.end
        return two - one == run.length if inside else left == right or bindings.after.get(left) == right

    for layer in range(KEPT - 1):
        pairs = list(zip(tail[layer], tail[layer + 1], strict=False))
        alike = len(tail[layer]) == len(tail[layer + 1]) and all(one.form == two.form for one, two in pairs)
        if not alike or (layer and not all(all(map(follows, one.leaves, two.leaves)) for one, two in pairs)):
            return None  # of the first layer, what they read may stand before the periods
    return tail


def _borders(
    calls: Sequence[Call], run: Run, rest: Sequence[Call], position: Mapping[fx.Node, int], bindings: Bindings
) -> str:
    """Why what stands around the periods of a short program keeps it from being rolled; empty if nothing does.

    What stands before them may be bound to the first layers only, and what stands behind them to the last ones: that is
    what tells what is true of one layer from what is true of all.
    """

    def bound(part: Iterable[Call]) -> set[int]:
        return {bindings.layer_of[leaf] for call in part for leaf in call.leaves if leaf in bindings.layer_of}

    if any(layer > 1 for layer in bound(calls[: run.start])) or any(layer < KEPT - 2 for layer in bound(rest)):
        return "calls outside of the layers use inputs of every layer"
    if any(layer > 1 for layer in bound(calls[run.start : run.start + run.length])):
        return "the first equal layer uses inputs of a later one"
    for call in rest:
        for leaf in call.leaves:
            if run.start <= position.get(leaf, -1) < run.end - 2 * run.length:  # type: ignore[call-overload]
                return f"{call.node.name} reads a layer before the last"
    if any(has_unknown_size(call.node) for call in calls[run.start : run.end]):
        return "a size inside of the layers is found at run time"
    return ""


class _Writer:
    """Writes the layers left out into a copy of a rolled program's graph.

    Args:
        graph: the copy. `periods`, `tail`, `rest`: as in Rolled, of the copy.
    """

    def __init__(
        self,
        rolled: Rolled,
        graph: fx.Graph,
        periods: Sequence[fx.Node],
        tail: Sequence[fx.Node],
        rest: Sequence[fx.Node],
    ) -> None:
        self._rolled, self._graph, self._bindings = rolled, graph, rolled.bindings.of(graph)
        self._tail, self._rest = tail, rest
        self._made = list(periods)
        self._length = rolled.length
        self._at = {node: index for index, node in enumerate(periods)}
        inputs = [leaf for leaf in self._bindings.layer_of if isinstance(leaf, fx.Node)]
        self._values = Repeated(self._made, rolled.length, inputs)

    def write(self) -> None:
        template = self._made[-self._length :]
        with self._graph.inserting_before(self._made[-1].next):
            for times in self._rolled.repetitions:
                for node, original in zip(template, self._rolled.template, strict=True):
                    self._made.append(self._repeat(node, original, times))
        if self._tail:
            with self._graph.inserting_before(self._tail[-1].next):
                for times in self._rolled.repetitions:
                    for node, original in zip(self._tail, self._rolled.tail, strict=True):
                        self._repeat(node, original, times)
        times = self._bindings.left_out
        for node, original in zip(self._rest, self._rolled.rest, strict=True):
            node.args, node.kwargs = self._moved(node.args, times), self._moved(node.kwargs, times)
            node.meta.update(self._rolled.origins.meta(original, times))
            refresh_alias(node)
        for node in self._graph.nodes:
            node.meta.pop(TIMES, None)
        self._graph.lint()

    def _repeat(self, node: fx.Node, original: fx.Node, times: int) -> fx.Node:
        args, kwargs = self._moved(node.args, times), self._moved(node.kwargs, times)
        name = self._rolled._names[original, times]
        made = self._graph.create_node("call_function", node.target, args, kwargs, name)
        made.meta.update(self._rolled.origins.meta(original, times))
        made.meta["val"] = self._values.value(node, made, times, lambda item: self._leaf(item, times))
        return made

    def _moved(self, arguments: Any, times: int) -> Any:
        return map_aggregate(arguments, lambda item: self._leaf(item, times))

    def _leaf(self, item: Any, times: int) -> Any:
        """What takes the place of an argument so many layers on."""
        index = self._at.get(item, -1) if isinstance(item, fx.Node) else -1
        if index >= 0:
            return self._made[index + times * self._length]
        return self._bindings.shifted(item, times)
