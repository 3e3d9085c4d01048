"""Equal periods in a list of calls.

A period counts only if each call of it has the same operator, constants, shapes, strides and dtypes as its counterpart
in the period before, reads the counterpart of each argument, and is bound to the next layer's inputs and names where
that one is bound to a layer's. graph/layers.py finds the layers of a program by it, graph/rolled.py proves that
they are equal still when the passes have run.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._library.fake_class_registry import FakeScriptObject

from npu_compiler.graph.effects import tensors

PROVEN = 3
"""Equal periods that a program needs, so that the step from one to the next is seen twice."""

Binding: TypeAlias = fx.Node | str
"""What one layer has and another has not: an input, or a name such as that of an attention layer."""


@dataclass(frozen=True)
class Call:
    """A call taken apart: `form` is equal for calls that differ in arguments and names only."""

    node: fx.Node
    form: Hashable
    leaves: tuple[Binding, ...]


@dataclass(frozen=True)
class Run:
    """Equal periods in a list of calls: `count` of them, `length` calls each, from position `start` on."""

    start: int
    length: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.length * self.count


def calls_of(graph: fx.Graph) -> list[Call]:
    return [_taken_apart(node) for node in graph.nodes if node.op not in ("placeholder", "output")]


def outputs_of(graph: fx.Graph) -> list[Call]:
    return [_taken_apart(graph.output_node())]


def _taken_apart(node: fx.Node) -> Call:
    leaves: list[Binding] = []
    arguments = _form(node.args, leaves), _form(node.kwargs, leaves) if node.kwargs else None
    target = node.target if node.op == "call_function" else f"{node.op} {node.name}"  # a constant is like no other
    return Call(node, (target, arguments, _layout(node)), tuple(leaves))


def _form(item: Any, leaves: list[Binding]) -> Hashable:
    """What arguments are besides the nodes and names in them, which are put behind `leaves`."""
    kind = type(item)
    if kind is fx.Node or kind is str:
        leaves.append(item)
        return "*"
    if kind is int:
        return item  # type: ignore[no-any-return]
    if isinstance(item, (list, tuple)):
        return isinstance(item, list), *[_form(part, leaves) for part in item]
    if isinstance(item, dict):
        return tuple([(key, _form(part, leaves)) for key, part in item.items()])
    if kind is slice:
        return "slice", *[_form(part, leaves) for part in (item.start, item.stop, item.step)]
    return repr(item)  # 1.0 and True are neither each other nor 1


def _layout(node: fx.Node) -> Hashable:
    """What the value of a node looks like."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return _layout_of(value)
    found = tuple(map(_layout_of, tensors(node)))
    return (type(value), found) if found else repr(value)


def _layout_of(tensor: torch.Tensor) -> Hashable:
    numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return tensor.dtype, tensor.device, numbers if set(map(type, numbers)) == {int} else str(numbers)


def longest(
    calls: Sequence[Call], position: Mapping[fx.Node, int], after: Mapping[Binding, Binding] | None
) -> Run | None:
    """The most calls in equal periods; the shortest period of equals."""
    best: Run | None = None
    forms = _numbered(calls)
    for length, most in _lengths(forms):
        if best is None or most >= best.length * best.count:
            found = _runs(calls, forms, position, length, after)
            runs = (run for run in (best, *found) if run is not None)
            best = max(runs, key=lambda run: (run.length * run.count, -run.length), default=None)
    return best


def _numbered(calls: Sequence[Call]) -> list[int]:
    """A number for the form of each call: numbers are quick to compare."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(call.form, len(numbers)) for call in calls]


def _lengths(forms: Sequence[int]) -> list[tuple[int, int]]:
    """Lengths that a period may have: the commonest distances between neighbours of one form that occurs as often as
    there could be layers. With each the most calls that its periods can have together; the longest first."""
    seen: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for index, form in enumerate(forms):
        if form in seen:
            distances[index - seen[form]] += 1
        seen[form] = index
    lengths = [length for length, times in distances.most_common(8) if times >= PROVEN - 1]
    most = {length: length + sum(map(operator.eq, forms, forms[length:])) for length in lengths}
    return sorted(most.items(), key=lambda item: (-item[1], item[0]))


def _runs(
    calls: Sequence[Call],
    forms: Sequence[int],
    position: Mapping[fx.Node, int],
    length: int,
    after: Mapping[Binding, Binding] | None,
) -> Iterator[Run]:
    """The runs of periods of one length that are as long as can be."""
    steps = [
        _Step.between(one, two, length, position, after) if form == next_form else None
        for one, two, form, next_form in zip(calls, calls[length:], forms, forms[length:], strict=False)
    ]
    index = 0
    while index < len(steps):
        end = index
        while end < len(steps) and steps[end] is not None:
            end += 1
        start = _start(steps, index, end, length)
        count = (end + length - start) // length
        if count >= 2:
            yield Run(start, length, count)
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
        one: Call,
        two: Call,
        length: int,
        position: Mapping[fx.Node, int],
        after: Mapping[Binding, Binding] | None,
    ) -> _Step | None:
        """Of two calls of one form; None if they are no counterparts. Without `after`, any two inputs of one layout may
        be counterparts."""
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
        return _FREE if fixed < 0 and entering is None else cls(fixed, entering)


_FREE = _Step()
"""The step between calls that read nothing but counterparts: nearly all of them, so it is made once."""


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
