"""Equal layers of a program: found, and left out but for a few.

A model of N equal layers is a program of N equal stretches of calls that differ in what they are bound to: each layer
has its own weights, caches, names. Such a program is `head, layer 0, ..., layer N-1, rest`, and everything a pass can
see of a layer in the middle it can see of the next one too. So it is enough to rewrite a program of `KEPT` layers:

    find(program)         the layers, and for each input and name of one layer that of the next (Bindings)
    shortened(layers)     the program without the layers behind the first KEPT
    roll(short, ...)      the rewritten short program, with_all_inputs again, proven to say what all layers do
                          (graph/rolled.py)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from torch import fx

from npu_compiler.graph.effects import storage, tensors
from npu_compiler.graph.periods import Binding, Call, Run, calls_of, longest, outputs_of
from npu_compiler.graph.source import TIMES
from npu_compiler.graph.spec import refresh_aliases

KEPT = 4
"""Layers of the short program: the first and the last differ from the others behind fusion, and three periods must be
left."""
WORTH = KEPT + 2
"""Fewer layers than that are compiled one by one."""


@dataclass(frozen=True)
class Bindings:
    """What each layer has of its own.

    Attributes:
        layers: how many the program has.
        after: for an input or a name of a layer, that of the next layer.
        layer_of: the layer that an input or name belongs to.
    """

    layers: int
    after: Mapping[Binding, Binding]
    layer_of: Mapping[Binding, int]

    @property
    def left_out(self) -> int:
        """How many layers a short program does not have."""
        return self.layers - KEPT

    def shifted(self, binding: Any, layers: int) -> Any:
        """What takes the place of a binding so many layers on; anything else stays itself."""
        if not isinstance(binding, (fx.Node, str)) or binding not in self.layer_of:
            return binding
        for _ in range(layers):
            binding = self.after[binding]
        return binding

    def of(self, graph: fx.Graph) -> Bindings:
        """The same for another graph with inputs of the same names."""
        named = {node.name: node for node in graph.find_nodes(op="placeholder")}

        def there(binding: Binding) -> Binding:
            return named[binding.name] if isinstance(binding, fx.Node) else binding

        after = {there(one): there(two) for one, two in self.after.items()}
        return Bindings(self.layers, after, {there(one): layer for one, layer in self.layer_of.items()})


@dataclass(frozen=True)
class Layers:
    """The equal layers of a program.

    Attributes:
        calls: the calls of the program, in order.
        run: where the layers are among them.
        bindings: what each has of its own.
        tail: calls behind the layers that belong to one of them, such as the write of a cache.
    """

    graph: fx.Graph
    calls: tuple[fx.Node, ...]
    run: Run
    bindings: Bindings
    tail: Mapping[fx.Node, int]


def find(graph: fx.Graph) -> Layers | str:
    """The equal layers of a functional program, or why it has none; empty text where there is nothing to say."""
    calls = calls_of(graph)
    position = {call.node: index for index, call in enumerate(calls)}
    run = longest(calls, position, None)
    if run is None or run.count < WORTH:
        return ""
    after = _steps(calls, run)
    layer_of = None if after is None else _numbered(after, calls[run.start : run.start + run.length], run.count)
    if after is None or layer_of is None or _shares_memory(graph, layer_of):
        return "an input or a name is shared by some of the layers"
    nodes = tuple(call.node for call in calls)
    tail: dict[fx.Node, int] = {}
    for call in (*calls[: run.start], *calls[run.end :], *outputs_of(graph)):
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
    return Layers(graph, nodes, run, Bindings(run.count, after, layer_of), tail)


def shortened(layers: Layers) -> fx.Graph:
    """A copy of the program with the first KEPT layers only, and their inputs. Node names are kept; a call of the
    layer that is repeated later carries in its metadata how many layers it stands for."""
    run = layers.run
    gone = set(layers.calls[run.start + KEPT * run.length : run.end])
    owners = chain(layers.tail.items(), layers.bindings.layer_of.items())
    gone.update(node for node, layer in owners if layer >= KEPT)  # type: ignore[misc]  # names of layers are in no graph
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
                copied[node].meta[TIMES] = layers.bindings.left_out + 1
    short._codegen = layers.graph._codegen
    refresh_aliases(short)
    return short


def with_all_inputs(short: fx.Graph, layers: Layers) -> bool:
    """Gives a short program the inputs of the layers left out, each in its place. False if a call has the name of one
    by now; then the program is no good any more."""
    kept = {node.name: node for node in short.find_nodes(op="placeholder")}
    following = next(node for node in short.nodes if node.op != "placeholder")
    for node in reversed(layers.graph.find_nodes(op="placeholder")):
        if node.name not in kept:
            with short.inserting_before(following):
                kept[node.name] = short.node_copy(node)
            if kept[node.name].name != node.name:
                return False
        following = kept[node.name]
    return True


def _steps(calls: Sequence[Call], run: Run) -> dict[Binding, Binding] | None:
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


def _numbered(after: Mapping[Binding, Binding], first: Sequence[Call], count: int) -> dict[Binding, int] | None:
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
