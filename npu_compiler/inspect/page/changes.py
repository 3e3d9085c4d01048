"""What a pass changed, call by call: the difference of two programs in terms of a graph, not of text lines."""

from __future__ import annotations

from bisect import bisect_left
from typing import Literal

from npu_compiler.inspect.program import Call, Data, Program, TensorValue
from npu_compiler.inspect.streams import said

Aspect = Literal[
    "target", "inputs", "arguments", "shape", "layout", "memory", "writes", "once", "layers", "place", "stream"
]
"""In which way a call that stayed is another one: it calls another operator, reads other calls, has other constants,
yields other shapes or dtypes, other strides, lies in or writes other memory, is computed once or at every call, stands
for more or fewer layers, comes from elsewhere, runs on another stream or behind other calls."""


class Changed(Data):
    """A call that both programs have. `before`: what it was, as text, by aspect."""

    name: str
    before: dict[Aspect, str]


class Changes(Data):
    """The difference of two programs.

    Attributes:
        removed, added: names of calls, in the order of their program.
        changed: calls that both have and that differ.
        moved: names of calls that stand elsewhere among those that both have.
    """

    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    changed: tuple[Changed, ...] = ()
    moved: tuple[str, ...] = ()


def changes(before: Program, after: Program) -> Changes:
    """What became of `before`. A call is known by its name, which a pass keeps where it keeps the call."""
    if before is after:
        return Changes()
    old = {call.name: call for call in before.calls}
    new = {call.name: call for call in after.calls}
    owners = _owners(before), _owners(after)
    common = [name for name in new if name in old]
    found = {name: _aspects(old[name], new[name], owners, old, new) for name in common}
    return Changes(
        removed=tuple(name for name in old if name not in new),
        added=tuple(name for name in new if name not in old),
        changed=tuple(Changed(name=name, before=differs) for name, differs in found.items() if differs),
        moved=_moved(list(old), common),
    )


def _owners(program: Program) -> dict[int, str]:
    """The call that has each storage first: storages are numbered anew in every program."""
    found: dict[int, str] = {}
    for call in program.calls:
        for value in call.values:
            if isinstance(value, TensorValue):
                found.setdefault(value.storage, call.name)
    return found


def _aspects(
    old: Call,
    new: Call,
    owners: tuple[dict[int, str], dict[int, str]],
    before: dict[str, Call],
    after: dict[str, Call],
) -> dict[Aspect, str]:
    found: dict[Aspect, str] = {}
    if old.op != new.op or old.target != new.target:
        found["target"] = old.target
    if old.inputs() != new.inputs():
        found["inputs"] = ", ".join(old.inputs())
    elif old.args != new.args or old.kwargs != new.kwargs:
        found["arguments"] = "other constants"
    if [str(value) for value in old.values] != [str(value) for value in new.values]:
        found["shape"] = ", ".join(map(str, old.values))
    elif [_layout(value) for value in old.values] != [_layout(value) for value in new.values]:
        found["layout"] = ", ".join(_layout(value) for value in old.values)
    memory = _memory(old, owners[0]), _memory(new, owners[1])
    # Memory whose first holder was replaced is the same memory under another name.
    if memory[0] != memory[1] and all(
        name in after or other in before for name, other in zip(*memory, strict=False) if name != other
    ):
        found["memory"] = "its own" if set(memory[0]) <= {old.name} else f"of {', '.join(dict.fromkeys(memory[0]))}"
    if bool(old.writes) != bool(new.writes):
        found["writes"] = ", ".join(owners[0].get(number, "") for number in old.writes) or "nothing"
    if old.once != new.once:
        found["once"] = "once" if old.once else "at every call"
    if old.layers != new.layers:
        found["layers"] = str(old.layers)
    if old.place != new.place:
        found["place"] = str(old.place)
    if (old.stream, old.waits) != (new.stream, new.waits):
        found["stream"] = said(old.stream, old.waits)
    return found


def _layout(value: object) -> str:
    return f"strides {list(value.stride)} from {value.offset}" if isinstance(value, TensorValue) else ""


def _memory(call: Call, owners: dict[int, str]) -> list[str]:
    return [owners[value.storage] for value in call.values if isinstance(value, TensorValue)]


def _moved(order: list[str], common: list[str]) -> tuple[str, ...]:
    """The fewest calls that have to be taken out so that the others stand in their old order."""
    position = {name: index for index, name in enumerate(order)}
    ends: list[int] = []  # for each length, the smallest end of a rising sequence
    holders: list[int] = []
    before: list[int] = []
    for index, name in enumerate(common):
        length = bisect_left(ends, position[name])
        before.append(holders[length - 1] if length else -1)
        if length == len(ends):
            ends.append(position[name])
            holders.append(index)
        else:
            ends[length], holders[length] = position[name], index
    kept = set()
    at = holders[-1] if holders else -1
    while at >= 0:
        kept.add(at)
        at = before[at]
    return tuple(name for index, name in enumerate(common) if index not in kept)
