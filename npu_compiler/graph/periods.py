"""Equal layers of a program: found, left out but for a few, and stamped out again behind the passes.

A model of N equal layers is a program of N equal stretches of calls that differ in what they are bound to: each layer
has its own weights, caches, names. Such a program is `head, layer 0, ..., layer N-1, rest`, and everything a pass can
see of a layer in the middle it can see of the next one too. So it is enough to rewrite a program of `KEPT` layers:

    find(program)         the layers, and for each input and name of one layer that of the next (`after`)
    shortened(layers)     the program without the layers behind the first KEPT
    expand(layers, ...)   the rewritten short program with its last whole period repeated for the layers left out

Nothing is believed. A period counts only if each call of it has the same operator, constants, shapes, strides and
dtypes as its counterpart in the period before, reads the counterpart of each argument, and is bound to the next
layer's inputs and names where that one is bound to a layer's. That has to hold for three periods of the
rewritten program, so that the step from one layer to the next is seen twice. Fusion across the border of two layers is
fine: a period of the rewritten
program begins where it begins. Where the proof fails, `expand` says why and the caller takes the whole program.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._library.fake_class_registry import FakeScriptObject
from torch.fx.node import map_aggregate

from npu_compiler.graph.effects import has_fixed_layout, has_unknown_size, storage, tensors
from npu_compiler.graph.source import TIMES
from npu_compiler.graph.spec import refresh_alias, refresh_aliases
from npu_compiler.graph.values import Repeated

KEPT = 4
"""Layers of the short program: the first and the last differ from the others behind fusion, and three periods must be
left."""
WORTH = KEPT + 2
"""Fewer layers than that are compiled one by one."""
PROVEN = 3
"""Equal periods that the rewritten short program must have."""

Binding: TypeAlias = fx.Node | str
"""What one layer has and another has not: an input, or a name such as that of an attention layer."""


@dataclass(frozen=True)
class _Call:
    """A call taken apart: `form` is equal for calls that differ in arguments and names only."""

    node: fx.Node
    form: Hashable
    leaves: tuple[Binding, ...]


@dataclass(frozen=True)
class _Run:
    """Equal periods in a list of calls: `count` of them, `length` calls each, from position `start` on."""

    start: int
    length: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.length * self.count


@dataclass(frozen=True)
class Layers:
    """The equal layers of a program.

    Attributes:
        calls: the calls of the program, in order.
        run: where the layers are among them.
        after: for an input or a name of a layer, that of the next layer.
        layer_of: the layer that an input or name belongs to.
        tail: calls behind the layers that belong to one of them, such as the write of a cache.
    """

    graph: fx.Graph
    calls: tuple[fx.Node, ...]
    run: _Run
    after: Mapping[Binding, Binding]
    layer_of: Mapping[Binding, int]
    tail: Mapping[fx.Node, int]

    @property
    def left_out(self) -> int:
        return self.run.count - KEPT

    def shifted(self, binding: Any, layers: int) -> Any:
        """What takes the place of a binding so many layers on; anything else stays itself."""
        if not isinstance(binding, (fx.Node, str)) or binding not in self.layer_of:
            return binding
        for _ in range(layers):
            binding = self.after[binding]
        return binding


def find(graph: fx.Graph) -> Layers | str:
    """The equal layers of a functional program, or why it has none; empty text where there is nothing to say."""
    calls = _calls(graph)
    position = {call.node: index for index, call in enumerate(calls)}
    run = _longest(calls, position, None)
    if run is None or run.count < WORTH:
        return ""
    after = _steps(calls, run)
    layer_of = None if after is None else _numbered(after, calls[run.start : run.start + run.length], run.count)
    if after is None or layer_of is None or _shares_memory(graph, layer_of):
        return "an input or a name is shared by some of the layers"
    nodes = tuple(call.node for call in calls)
    tail: dict[fx.Node, int] = {}
    for call in (*calls[: run.start], *calls[run.end :], *_outputs(graph)):
        of = {layer_of[leaf] for leaf in call.leaves if leaf in layer_of}
        reads = [position[leaf] for leaf in call.leaves if leaf in position and run.start <= position[leaf] < run.end]
        if not of:
            if any(index < run.end - run.length for index in reads):
                return f"{call.node.name} reads a layer before the last"
            continue
        layers = of | {(index - run.start) // run.length for index in reads}
        if len(layers) > 1 or call.node.users or call.node.op == "output" or not reads:
            return f"{call.node.name} stands outside of the layers and uses an input of one"
        tail[call.node] = layers.pop()
    forms: list[list[Hashable]] = [[] for _ in range(run.count)]
    for call in calls:
        if call.node in tail:
            forms[tail[call.node]].append(call.form)
    if any(one != two for one, two in pairwise(forms)):
        return "calls behind the layers differ from layer to layer"
    return Layers(graph, nodes, run, after, layer_of, tail)


def shortened(layers: Layers) -> fx.Graph:
    """A copy of the program with the first KEPT layers only. Node names are kept; a call of the layer that is repeated
    later carries in its metadata how many layers it stands for."""
    run = layers.run
    gone = set(layers.calls[run.start + KEPT * run.length : run.end])
    gone.update(node for node, layer in layers.tail.items() if layer >= KEPT)
    last = run.start + (KEPT - 1) * run.length
    standing_for = set(layers.calls[last - run.length : last])
    standing_for.update(node for node, layer in layers.tail.items() if layer == KEPT - 2)
    instead = dict(
        zip(layers.calls[run.end - run.length : run.end], layers.calls[last : last + run.length], strict=True)
    )
    short = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in layers.graph.nodes:
        if node not in gone:
            copied[node] = short.node_copy(node, lambda source: copied[source if source in copied else instead[source]])
            if node in standing_for:
                copied[node].meta[TIMES] = layers.left_out + 1
    short._codegen = layers.graph._codegen
    refresh_aliases(short)
    return short


def expand(layers: Layers, short: fx.Graph) -> str:
    """Puts the layers that were left out into the rewritten short program, in place.

    Returns:
        Why that can't be done; empty if it was done. What can't be done leaves the program as it is.
    """
    of_name = {node.name: node for node in short.find_nodes(op="placeholder")}
    inputs = {node: of_name[node.name] for node in layers.graph.find_nodes(op="placeholder")}
    after = {inputs.get(one, one): inputs.get(two, two) for one, two in layers.after.items()}  # type: ignore[call-overload]
    layer_of = {inputs.get(one, one): layer for one, layer in layers.layer_of.items()}  # type: ignore[call-overload]
    bound = Layers(short, layers.calls, layers.run, after, layer_of, {})
    calls = _calls(short)
    position = {call.node: index for index, call in enumerate(calls)}
    run = _longest(calls, position, after)
    if run is None or run.count < PROVEN:
        count = 0 if run is None else run.count
        return f"behind the passes {count} of {KEPT} layers are equal, {PROVEN} are needed"
    tail = _tail(calls[run.end :], run, position, bound)
    if tail is None:
        return "calls behind the layers differ from layer to layer"
    early = {call.node for one in tail[:-1] for call in one}
    rest = [call for call in (*calls[run.end :], *_outputs(short)) if call.node not in early]
    why_not = _borders(calls, run, rest, position, bound)
    if why_not:
        return why_not
    expected = sum(call.node.meta.get(TIMES, 1) for call in calls)
    made = len(calls) + bound.left_out * (run.length + len(tail[-2]))
    if made != expected:
        return f"{expected} calls are due and {made} would be made"
    _stamp(calls, run, rest, tail[-2], position, bound, _Origins(layers))
    return ""


def _tail(
    behind: Sequence[_Call], run: _Run, position: Mapping[fx.Node, int], layers: Layers
) -> list[list[_Call]] | None:
    """For each layer of a short program the calls behind the periods that belong to it alone: writes of inputs that
    could not be made in place. None if those of one layer are not those of the next."""
    tail: list[list[_Call]] = [[] for _ in range(KEPT)]
    for call in behind:
        of = {layers.layer_of[leaf] for leaf in call.leaves if leaf in layers.layer_of}
        if len(of) == 1 and not call.node.users:
            tail[of.pop()].append(call)
    if not any(tail[:-2]):
        return [[] for _ in range(KEPT)]

    def follows(left: Binding, right: Binding) -> bool:
        one, two = (position.get(leaf, -1) for leaf in (left, right))  # type: ignore[call-overload]
        inside = run.start <= one < run.end
        return two - one == run.length if inside else left == right or layers.after.get(left) == right

    for layer in range(KEPT - 1):
        pairs = list(zip(tail[layer], tail[layer + 1], strict=False))
        alike = len(tail[layer]) == len(tail[layer + 1]) and all(one.form == two.form for one, two in pairs)
        if not alike or (layer and not all(all(map(follows, one.leaves, two.leaves)) for one, two in pairs)):
            return None  # of the first layer, what they read may stand before the periods
    return tail


def _borders(
    calls: Sequence[_Call], run: _Run, rest: Sequence[_Call], position: Mapping[fx.Node, int], layers: Layers
) -> str:
    """Why what stands around the periods of a short program keeps it from being expanded; empty if nothing does.

    What stands before them may be bound to the first layers only, and what stands behind them to the last ones: that is
    what tells what is true of one layer from what is true of all.
    """

    def bound(part: Iterable[_Call]) -> set[int]:
        return {layers.layer_of[leaf] for call in part for leaf in call.leaves if leaf in layers.layer_of}

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


def _stamp(
    calls: Sequence[_Call],
    run: _Run,
    rest: Sequence[_Call],
    tail: Sequence[_Call],
    position: Mapping[fx.Node, int],
    layers: Layers,
    origins: _Origins,
) -> None:
    """Repeats the last period, and the tail of the last layer but one, and lets the rest read the last repetition."""
    graph = layers.graph
    made = [call.node for call in calls[run.start : run.end]]
    behind = made[-1].next
    values = Repeated(made, run.length, [leaf for leaf in layers.layer_of if isinstance(leaf, fx.Node)])

    def moved(periods: int) -> Any:
        def leaf(item: Any) -> Any:
            index = position.get(item, -1) if isinstance(item, fx.Node) else -1
            if run.start <= index < run.end:
                return made[index - run.start + periods * run.length]
            return layers.shifted(item, periods)

        return leaf

    def stamped(template: fx.Node, periods: int) -> fx.Node:
        leaf = moved(periods)
        args, kwargs = map_aggregate(template.args, leaf), map_aggregate(template.kwargs, leaf)
        node = graph.call_function(template.target, args, kwargs)  # type: ignore[arg-type]
        node.meta.update(origins.of(template, periods))
        return node

    templates = made[-run.length :]
    repetitions = range(1, layers.left_out + 1)
    with graph.inserting_before(behind):
        for periods in repetitions:
            leaf = moved(periods)
            for template in templates:
                node = stamped(template, periods)
                node.meta["val"] = values.value(template, node, periods, leaf)
                made.append(node)
    if tail:
        with graph.inserting_before(tail[-1].node.next):
            for periods in repetitions:
                leaf = moved(periods)
                for call in tail:
                    node = stamped(call.node, periods)
                    node.meta["val"] = values.value(call.node, node, periods, leaf)
    leaf = moved(layers.left_out)
    for call in rest:
        node = call.node
        node.args, node.kwargs = map_aggregate(node.args, leaf), map_aggregate(node.kwargs, leaf)  # type: ignore[assignment]
        node.meta.update(origins.of(node, layers.left_out))
        refresh_alias(node)
    for node in graph.nodes:
        node.meta.pop(TIMES, None)
    graph.lint()


class _Origins:
    """Where a stamped call comes from: what its template comes from, in its own layer."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._position = {node.name: index for index, node in enumerate(layers.calls)}

    def of(self, template: fx.Node, periods: int) -> dict[str, Any]:
        earlier = template.meta.get("npu_origin")
        names = [self._moved(name, periods) for name in (earlier["nodes"] if earlier else [template.name])]
        found = [self._layers.calls[self._position[name]] for name in names if name in self._position]
        source = found[-1] if found else template
        meta = {key: source.meta[key] for key in ("stack_trace", "nn_module_stack") if key in source.meta}
        return meta | ({"npu_origin": {**earlier, "nodes": names}} if earlier else {})

    def _moved(self, name: str, periods: int) -> str:
        run, index = self._layers.run, self._position.get(name, -1)
        inside = run.start <= index < run.end - periods * run.length
        return self._layers.calls[index + periods * run.length].name if inside else name


def _calls(graph: fx.Graph) -> list[_Call]:
    return [_taken_apart(node) for node in graph.nodes if node.op not in ("placeholder", "output")]


def _outputs(graph: fx.Graph) -> list[_Call]:
    return [_taken_apart(graph.output_node())]


def _taken_apart(node: fx.Node) -> _Call:
    leaves: list[Binding] = []

    def leaf(item: Any) -> Any:
        if isinstance(item, (fx.Node, str)):
            leaves.append(item)
            return "*"
        return item

    arguments = map_aggregate((node.args, node.kwargs), leaf)
    target = node.target if node.op == "call_function" else f"{node.op} {node.name}"  # a constant is like no other
    return _Call(node, (target, repr(arguments), _layout(node)), tuple(leaves))  # repr: 1, 1.0 and True are three


def _layout(node: fx.Node) -> Hashable:
    """What the value of a node looks like."""
    value = node.meta.get("val")
    found = tuple(map(_layout_of, tensors(node)))
    return (type(value), found) if found else repr(value)


def _layout_of(tensor: torch.Tensor) -> Hashable:
    layout = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    return tensor.dtype, tensor.device, layout if has_fixed_layout(tensor) else str(layout)


def _longest(
    calls: Sequence[_Call], position: Mapping[fx.Node, int], after: Mapping[Binding, Binding] | None
) -> _Run | None:
    """The most calls in equal periods; the shortest period of equals."""
    best: _Run | None = None
    for length, most in _lengths(calls):
        if best is None or most >= best.length * best.count:
            found = _runs(calls, position, length, after)
            runs = (run for run in (best, *found) if run is not None)
            best = max(runs, key=lambda run: (run.length * run.count, -run.length), default=None)
    return best


def _lengths(calls: Sequence[_Call]) -> list[tuple[int, int]]:
    """Lengths that a period may have: the commonest distances between neighbours of one form that occurs as often as
    there could be layers. With each the most calls that its periods can have together; the longest first."""
    seen: dict[Hashable, list[int]] = {}
    for index, call in enumerate(calls):
        seen.setdefault(call.form, []).append(index)
    distances: Counter[int] = Counter()
    for indices in seen.values():
        distances.update(two - one for one, two in pairwise(indices))
    numbers = {form: number for number, form in enumerate(seen)}
    forms = [numbers[call.form] for call in calls]
    lengths = [length for length, times in distances.most_common(8) if times >= PROVEN - 1]
    most = {length: length + sum(map(operator.eq, forms, forms[length:])) for length in lengths}
    return sorted(most.items(), key=lambda item: (-item[1], item[0]))


def _runs(
    calls: Sequence[_Call], position: Mapping[fx.Node, int], length: int, after: Mapping[Binding, Binding] | None
) -> Iterator[_Run]:
    """The runs of periods of one length that are as long as can be."""
    steps = [_Step.between(one, two, length, position, after) for one, two in zip(calls, calls[length:], strict=False)]
    index = 0
    while index < len(steps):
        end = index
        while end < len(steps) and steps[end] is not None:
            end += 1
        start = _start(steps, index, end, length)
        count = (end + length - start) // length
        if count >= 2:
            yield _Run(start, length, count)
        index = end + 1


@dataclass(frozen=True)
class _Step:
    """What the step from a call to its counterpart in the next period asks of where the periods start.

    Attributes:
        fixed: the last call that both read: it has to stand before the periods; -1 for none.
        entering: the first call that the later one reads where the earlier reads something that is no counterpart. That
            is right in the first period only, which gets from outside what the others get from the period before it.
    """

    fixed: int = -1
    entering: int | None = None

    @classmethod
    def between(
        cls,
        one: _Call,
        two: _Call,
        length: int,
        position: Mapping[fx.Node, int],
        after: Mapping[Binding, Binding] | None,
    ) -> _Step | None:
        """None if the calls are no counterparts. Without `after`, any two inputs of one layout may be counterparts."""
        if one.form != two.form:
            return None
        fixed, entering = -1, None
        for left, right in zip(one.leaves, two.leaves, strict=True):
            at = position.get(right, -1)  # type: ignore[call-overload]
            if left is right or (isinstance(left, str) and left == right):
                if after is not None and left in after:
                    return None
                fixed = max(fixed, at)
            elif at >= 0:
                if position.get(left, -1) != at - length:  # type: ignore[call-overload]
                    entering = at if entering is None else min(entering, at)
            elif not _may_follow(left, right, after):
                return None
        return cls(fixed, entering)


def _may_follow(left: Binding, right: Binding, after: Mapping[Binding, Binding] | None) -> bool:
    if after is not None:
        return left in after and after[left] == right
    if isinstance(left, str) or isinstance(right, str):
        return isinstance(left, str) and isinstance(right, str)
    if not left.op == "placeholder" == right.op:
        return False
    if isinstance(left.meta.get("val"), FakeScriptObject):
        return _script_class(left) == _script_class(right)
    return any(True for _ in tensors(left)) and _layout(left) == _layout(right)


def _script_class(node: fx.Node) -> str:
    """The class of an input that is an object to torch, as vLLM's name of an attention layer is; empty for another."""
    value = node.meta.get("val")
    return str(value.script_class_name) if isinstance(value, FakeScriptObject) else ""


def _start(steps: Sequence[_Step | None], start: int, end: int, length: int) -> int:
    """The first place from `start` on where periods may start."""
    while True:
        moved = start
        for index in range(start, end):
            step = steps[index]
            assert step is not None
            moved = max(moved, step.fixed + 1)
            if step.entering is not None and (index >= moved + length or step.entering < moved):
                moved = max(moved, index + 1)
        if moved == start or moved >= end:
            return min(moved, end)
        start = moved


def _steps(calls: Sequence[_Call], run: _Run) -> dict[Binding, Binding] | None:
    """For each input and name of a layer that of the next; None if they are not one to one."""
    after: dict[Binding, Binding] = {}
    before: dict[Binding, Binding] = {}
    shared: set[Binding] = set()
    for index in range(run.start, run.end - run.length):
        for left, right in zip(calls[index].leaves, calls[index + run.length].leaves, strict=True):
            if isinstance(left, fx.Node) and left.op != "placeholder":
                continue
            if (isinstance(right, fx.Node) and right.op != "placeholder") or left == right:  # enters the first layer
                shared.add(left)
            elif after.setdefault(left, right) != right or before.setdefault(right, left) != left:
                return None
    return None if shared & (after.keys() | before.keys()) else after


def _numbered(after: Mapping[Binding, Binding], first: Sequence[_Call], count: int) -> dict[Binding, int] | None:
    """The layer of each input and name; None if a layer lacks one."""
    layer_of: dict[Binding, int] = {}
    for binding in dict.fromkeys(chain.from_iterable(call.leaves for call in first)):
        if binding not in after:
            continue
        for layer in range(count):
            if binding in layer_of:
                return None
            layer_of[binding] = layer
            if layer < count - 1:
                if binding not in after:
                    return None
                binding = after[binding]
    return layer_of if layer_of.keys() >= after.keys() else None


def _shares_memory(graph: fx.Graph, layer_of: Mapping[Binding, int]) -> bool:
    """Whether an input of a layer shares memory with another input."""
    times = Counter(storage(tensor) for node in graph.find_nodes(op="placeholder") for tensor in tensors(node))
    return any(times[storage(tensor)] > 1 for node in layer_of if isinstance(node, fx.Node) for tensor in tensors(node))
