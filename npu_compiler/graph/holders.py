"""Who looks at which memory, and whether a write into it would be noticed.

A functional program says `new = write(old)`. Writing in place is right if nobody reads `old`, through whichever view,
behind the call, and if `old` is nobody else's: memory of the program's own, or an input that the program overwrites at
its end (`copy_(input, last)`), in front of which no other value of that input may be needed any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import equal, same_layout
from npu_compiler.graph.effects import addresses_storage, storage, tensors, value
from npu_compiler.graph.overlap import may_overlap
from npu_compiler.graph.spec import refresh_alias
from npu_compiler.graph.traffic import is_view

aten = torch.ops.aten
SIZE_ONLY = (
    aten.sym_size.int,
    aten.sym_stride.int,
    aten.sym_numel.default,
    aten.sym_storage_offset.default,
)
"""Calls that look at a tensor's sizes and not at its elements."""


class Holders:
    """The values of a program by the memory they lie in. It is kept true while writes go in place."""

    def __init__(self, graph: fx.Graph) -> None:
        self._at: dict[int, list[fx.Node]] = {}
        self._last_write: dict[fx.Node, fx.Node] = {}
        self._addressed = any(map(addresses_storage, graph.nodes))
        for node in graph.nodes:
            if node.op == "output":
                continue
            for key in {storage(tensor) for tensor in tensors(node)}:
                self._at.setdefault(key, []).append(node)
            if is_final_write(node):
                self._last_write[node.args[0]] = node  # type: ignore[index]

    def why_not(self, call: fx.Node, old: fx.Node, written: Tensor, new: Iterable[fx.Node]) -> str:
        """Why `call` must not write into the memory of `old`; empty if it may.

        Args:
            old: the value before the call.
            written: the part of that memory that is written, as a view of it.
            new: the values after the call.
        """
        tensor, new = _tensor(old), list(new)
        holders = self._at[storage(tensor)]
        owners = [node for node in holders if node.op in ("placeholder", "get_attr")]
        last = self._last_write.get(owners[0]) if len(owners) == 1 else None
        if owners and last is None:
            return f"{owners[0].name} is not the program's own, and must not change"
        return (
            self._other_layout(tensor, new)
            or self._read_later(call, holders, written, last)
            or self._returned(holders, new, last)
            or self._read_behind_last_write(old, new, last)
        )

    def add(self, node: fx.Node) -> None:
        """Notes a new value, one that took the place of another in its memory."""
        for key in {storage(tensor) for tensor in tensors(node)}:
            self._at.setdefault(key, []).append(node)

    def become(self, memory: Iterable[int], old: fx.Node) -> None:
        """Notes that what lay in the storages `memory` lies in that of `old` from now on: the new value, if it is not
        erased, says so already, and its views are brought up to date here."""
        ours = storage(_tensor(old))
        holders = self._at.setdefault(ours, [old])
        for key in set(memory) - {ours}:
            for node in sorted(node for node in self._at.pop(key, ()) if not node._erased):
                refresh_alias(node)
                if any(storage(tensor) == ours for tensor in tensors(node)):
                    holders.append(node)

    def _other_layout(self, old: Tensor, new: Iterable[fx.Node]) -> str:
        for node in new:
            fact = same_layout(old, _tensor(node), "before and after")
            if fact and self._addressed:
                fact = equal(old.storage_offset(), _tensor(node).storage_offset(), "offset before and after")
            if not fact:
                return fact.text
        return ""

    def _read_later(self, call: fx.Node, holders: Iterable[fx.Node], written: Tensor, last: fx.Node | None) -> str:
        """Who reads what `call` overwrites, behind it and in front of the last write to an input."""
        for holder in holders:
            if not any(may_overlap(tensor, written) for tensor in _in_memory_of(written, holder)):
                continue
            for user in holder.users:
                if not call < user or (last is not None and last < user) or _looks_only(user, holder):
                    continue
                if user is last and last.args[1] is not holder:
                    continue
                return f"the old value is read later, by {user.name}"
        return ""

    def _returned(self, holders: Iterable[fx.Node], new: Iterable[fx.Node], last: fx.Node | None) -> str:
        """Which output would come to lie in the memory of an input, or of another output."""
        other = next(filter(_is_returned, holders), None) if last is None else last.args[0]
        found = next(filter(_is_returned, self._holding(new)), None)
        return f"{found.name} is returned, and would share memory with {other}" if found and other else ""

    def _holding(self, new: Iterable[fx.Node]) -> Iterator[fx.Node]:
        """The values in the memory of `new`."""
        return (node for key in {storage(_tensor(one)) for one in new} for node in self._at.get(key, ()))

    def _read_behind_last_write(self, old: fx.Node, new: list[fx.Node], last: fx.Node | None) -> str:
        """Who reads the new value behind the last write to the input that it would lie in."""
        if last is None or (same_place(last.args[0], old) and last.args[1] in new):  # that write goes: it is done
            return ""
        for holder in self._holding(new):
            for user in holder.users:
                if last < user:
                    return f"{holder.name} is read by {user.name}, behind the last write to {last.args[0]}"
        return ""


def is_final_write(node: fx.Node) -> bool:
    """Whether a call gives an input its value at the end of the program."""
    if node.target is not aten.copy_.default:
        return False
    target = node.args[0]
    return isinstance(target, fx.Node) and target.op in ("placeholder", "get_attr")


def same_place(one: object, other: object) -> bool:
    """Whether two values are the same elements of the same memory in the same layout."""
    left, right = value(one), value(other)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or storage(left) != storage(right):
        return False
    offset = equal(left.storage_offset(), right.storage_offset(), "offset")
    return bool(offset and same_layout(left, right, "layout"))


def _is_returned(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _tensor(node: fx.Node) -> Tensor:
    found = value(node)
    assert isinstance(found, Tensor)
    return found


def _in_memory_of(tensor: Tensor, node: fx.Node) -> Iterator[Tensor]:
    return (found for found in tensors(node) if storage(found) == storage(tensor))


def _looks_only(user: fx.Node, holder: fx.Node) -> bool:
    """Whether a use reads no element: it asks for a size, or is a view, whose own uses count."""
    if user.target in SIZE_ONLY:
        return True
    memory = {storage(tensor) for tensor in tensors(holder)}
    found = {storage(tensor) for tensor in tensors(user)}
    return is_view(user) and bool(found) and found <= memory
