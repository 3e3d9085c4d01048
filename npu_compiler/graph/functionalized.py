"""AOTAutograd's functional wrapper of an operator that writes its arguments, read and taken off.

`auto_functionalized_v2(op, ..., _x_base_index=0, _all_bases=[a])` stands for: copy `a`, call `op` with x=copy, give its
results and the copy. What `op` gets of a base is described by arguments named after its own: nothing else (the base
itself), `_x_alias`, `_x_slice_dim/_start/_end`, or `_x_size/_stride/_storage_offset`; `_x_length` and `_x_0_...` where
it takes a list. `auto_functionalized(op, x=a, ...)` is the older form: the base stands where `op` has it.
Source: torch/_higher_order_ops/auto_functionalize.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from npu_compiler.graph.effects import is_functionalized
from npu_compiler.graph.source import origin_of
from npu_compiler.graph.spec import infer

BASES = "_all_bases"


@dataclass(frozen=True)
class Base:
    """A tensor that a wrapped call writes.

    Attributes:
        node: its value before the call.
        path: where its value after the call stands in what the wrapper returns: an index, and one more in a list.
    """

    node: fx.Node
    path: tuple[int, ...]


@dataclass(frozen=True)
class Wrapped:
    """A call of the wrapper: the operator inside, and what it writes."""

    node: fx.Node
    operator: torch._ops.OpOverload
    bases: tuple[Base, ...]

    @classmethod
    def of(cls, node: fx.Node) -> Wrapped | None:
        """None where `node` is no wrapped operator (a wrapped higher-order operator is none either)."""
        if not is_functionalized(node) or not isinstance(node.args[0], torch._ops.OpOverload):
            return None
        inner = node.args[0]
        first = max(len(inner._schema.returns), 1)  # an operator that returns nothing returns None
        given = node.kwargs[BASES] if BASES in node.kwargs else [node.kwargs.get(name) for name in _written(inner)]
        bases = []
        for index, item in enumerate(given):  # type: ignore[arg-type]
            if isinstance(item, (list, tuple)):
                bases += [Base(one, (first + index, at)) for at, one in enumerate(item) if isinstance(one, fx.Node)]
            elif isinstance(item, fx.Node):
                bases.append(Base(item, (first + index,)))
        return cls(node, inner, tuple(bases))

    @property
    def reads(self) -> dict[str, Any]:
        """The arguments that are not written."""
        written = {BASES} if BASES in self.node.kwargs else set(_written(self.operator))
        return {name: item for name, item in self.node.kwargs.items() if name not in written}

    def values_after(self, base: Base) -> list[fx.Node]:
        """The nodes that take the value of `base` after the call out of what the wrapper returns."""
        found = [self.node]
        for index in base.path:
            found = [user for node in found for user in node.users if _takes(user, node, index)]
        return found

    def take_off(self, instead: Mapping[tuple[int, ...], fx.Node], made_by: str) -> fx.Node:
        """Puts the plain call in the place of the wrapper.

        Args:
            instead: for the path of each base what is written in its place: the base itself or a copy of it.
        """
        graph, node = self.node.graph, self.node
        with graph.inserting_before(node):
            arguments = dict(self.reads)
            for name in _written(self.operator):
                arguments[name] = self._argument(name, arguments, instead, made_by)
            args, kwargs = _in_order(self.operator, arguments)
            plain = graph.call_function(self.operator, args, kwargs)
            plain.meta.update(origin_of([node], made_by))
            returned = node.meta.get("val")
            count = len(self.operator._schema.returns)
            if not self._returns_results_only:
                returned = None if returned is None or not count else returned[0] if count == 1 else returned[:count]
            plain.meta["val"] = returned
        for base in self.bases:
            for taken in self.values_after(base):
                taken.replace_all_uses_with(instead[base.path])
        self._hand_over(plain, count)
        return plain

    @property
    def _returns_results_only(self) -> bool:
        """An operator with out= arguments gets new tensors, and its results are those."""
        return torch._library.utils.is_out(self.operator)

    def _argument(
        self, name: str, given: dict[str, Any], instead: Mapping[tuple[int, ...], fx.Node], made_by: str
    ) -> Any:
        first = max(len(self.operator._schema.returns), 1)
        if self._returns_results_only and BASES in self.node.kwargs:
            size, stride, dtype, device = (
                given.pop(f"_{name}_{part}") for part in ("size", "stride", "dtype", "device")
            )
            kwargs = {"dtype": dtype, "device": device}
            return _added(self.node, torch.ops.aten.empty_strided.default, (size, stride), kwargs, made_by)
        if BASES in self.node.kwargs:
            return self._regenerated(f"_{name}", given, lambda index: instead[(first + index,)], made_by)
        index = _written(self.operator).index(name)
        value = self.node.kwargs.get(name)
        if isinstance(value, (list, tuple)):
            return [one if one is None else instead[(first + index, at)] for at, one in enumerate(value)]
        return None if value is None else instead[(first + index,)]

    def _regenerated(self, prefix: str, given: dict[str, Any], base_of: Callable[[int], fx.Node], made_by: str) -> Any:
        """What the operator gets of a base, from the arguments that describe it, which are taken out of `given`."""
        if f"{prefix}_length" in given:
            length = given.pop(f"{prefix}_length")
            items = range(length or 0)
            found = [self._regenerated(f"{prefix}_{item}", given, base_of, made_by) for item in items]
            return None if length is None else found
        index = given.pop(f"{prefix}_base_index")
        if index is None:
            return None
        base = base_of(index)
        if given.pop(f"{prefix}_alias", False):
            return base
        if f"{prefix}_slice_dim" in given:
            part = tuple(given.pop(f"{prefix}_slice_{name}") for name in ("dim", "start", "end"))
            return _added(self.node, torch.ops.aten.slice.Tensor, (base, *part), {}, made_by)
        if f"{prefix}_storage_offset" in given:
            part = tuple(given.pop(f"{prefix}_{name}") for name in ("size", "stride", "storage_offset"))
            return _added(self.node, torch.ops.aten.as_strided.default, (base, *part), {}, made_by)
        return base

    def _hand_over(self, plain: fx.Node, count: int) -> None:
        """Lets those that used a result of the wrapper use the plain call's, and erases the wrapper."""
        graph = self.node.graph
        if self._returns_results_only:
            self.node.replace_all_uses_with(plain)
        for user in list(self.node.users):
            if count > 1 and user.args[1] < count:  # type: ignore[operator]
                user.replace_input_with(self.node, plain)
                continue
            if count == 1 and user.args[1] == 0:
                user.replace_all_uses_with(plain)
            for inner in list(user.users):
                graph.erase_node(inner)  # takes a tensor out of a list of bases
            graph.erase_node(user)
        graph.erase_node(self.node)


def _added(
    like: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], made_by: str
) -> fx.Node:
    """A call at the graph's insertion point that comes from where `like` comes from; no guard is added."""
    made = like.graph.call_function(target, args, kwargs)
    made.meta.update(origin_of([like], made_by))
    made.meta["val"] = infer(made)
    return made


def _takes(user: fx.Node, node: fx.Node, index: int) -> bool:
    return user.target is operator.getitem and user.args == (node, index)


def _written(target: torch._ops.OpOverload) -> list[str]:
    arguments = target._schema.arguments
    return [entry.name for entry in arguments if entry.alias_info is not None and entry.alias_info.is_write]


def _in_order(target: torch._ops.OpOverload, given: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name as a call has them: by position where they may, without defaults at the end."""
    entries = target._schema.arguments

    def is_default(entry: Any) -> bool:
        return entry.has_default_value() and (entry.name not in given or _equal(given[entry.name], entry.default_value))

    positional = [entry for entry in entries if not entry.kwarg_only]
    while positional and is_default(positional[-1]):
        positional.pop()
    args = tuple(given.get(entry.name, entry.default_value) for entry in positional)
    return args, {entry.name: given[entry.name] for entry in entries if entry.kwarg_only and not is_default(entry)}


def _equal(one: Any, default: Any) -> bool:
    return type(one) is type(default) and not isinstance(one, fx.Node) and one == default
