"""Patterns over FX programs, as data; matching.py matches them.

A pattern mirrors the expression it matches::

    Call("aten.mul.Tensor", Call("aten.silu.default", Any("gate")), Any("up"), commutes=True)

matches `silu(gate) * up` in either order. Operators are named by text, so a pattern may name one that is not loaded.
Arguments that a pattern does not mention must have their defaults: `add(x, y, alpha=2)` is not `x + y`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

Bindings = dict[str, object]
VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
CASTS = ("aten._to_copy.default", "prims.convert_element_type.default", "npu._npu_dtype_cast.default")
SPLITS = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")


class Pattern:
    """Base of all patterns."""


@dataclass(frozen=True)
class Any(Pattern):
    """Any value; it is bound to `name`, and a name that is bound already must meet the same value again."""

    name: str


@dataclass(frozen=True)
class Number(Pattern):
    """A Python number, bound to `name`."""

    name: str


@dataclass(frozen=True)
class Exactly(Pattern):
    """This constant."""

    value: object


@dataclass(frozen=True)
class Size(Pattern):
    """A number or symbolic size that equals this one whatever the symbols are."""

    value: object


@dataclass(frozen=True, init=False)
class Call(Pattern):
    """A call of one of `targets` (names joined by "|") with these arguments; `name` binds the node."""

    targets: tuple[str, ...]
    args: tuple[object, ...]
    commutes: bool
    name: str

    def __init__(
        self, targets: str | torch._ops.OpOverload, *args: object, commutes: bool = False, name: str = ""
    ) -> None:
        object.__setattr__(self, "targets", tuple(str(targets).split("|")))
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "commutes", commutes)
        object.__setattr__(self, "name", name)


@dataclass(frozen=True)
class Result(Pattern):
    """What a call of one of `targets` (names joined by "|") computed, bound to `name`. The call itself is not part of
    the match: it stays, and others may use it."""

    targets: str
    name: str


@dataclass(frozen=True)
class Among(Pattern):
    """A list of values, bound to `name`, at least one of which is a Result of `targets`."""

    targets: str
    name: str


@dataclass(frozen=True)
class Cast(Pattern):
    """A conversion of `inner` to another dtype, or `inner` itself. What lies before the conversion is tried first."""

    inner: Pattern


@dataclass(frozen=True)
class Viewed(Pattern):
    """`inner`, or a chain of reshapes of it."""

    inner: Pattern


@dataclass(frozen=True)
class Half(Pattern):
    """The first (0) or second (1) half of `inner` along the last dimension: a slice or a part of a split."""

    inner: Pattern
    index: int


@dataclass(frozen=True)
class Item(Pattern):
    """Output `index` of a call that has several; `name` binds it. `others` binds further outputs of the same call, as
    pairs of index and name, where the program uses them."""

    inner: Pattern
    index: int
    name: str = ""
    others: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class OneOf(Pattern):
    """The first alternative that matches."""

    options: tuple[Pattern, ...]


@dataclass(frozen=True)
class Together(Pattern):
    """Several results of one computation: the first option is the root, each other one uses what those before it
    covered."""

    results: tuple[Pattern, ...]


@dataclass(frozen=True)
class Match:
    """A found pattern: what its names are bound to, and the calls it covers, in program order."""

    bindings: Bindings
    nodes: tuple[fx.Node, ...]
    root: fx.Node

    def node(self, name: str) -> fx.Node:
        """The node bound to `name`."""
        found = self.bindings[name]
        assert isinstance(found, fx.Node), f"{name} is bound to {found!r}, not to a node"
        return found

    def is_tensor(self, name: str) -> bool:
        """Whether `name` is bound to a tensor: a number or a size may stand in its place."""
        found = self.bindings[name]
        return isinstance(found, fx.Node) and isinstance(found.meta.get("val"), torch.Tensor)

    def tensor(self, name: str) -> torch.Tensor:
        """The fake tensor of the node bound to `name`."""
        value = self.node(name).meta["val"]
        assert isinstance(value, torch.Tensor)
        return value


def root_targets(pattern: Pattern) -> set[str]:
    """The operators a match's root can be; empty for a pattern that any node may start."""
    match pattern:
        case Call():
            return set(pattern.targets)
        case Cast():
            return set(CASTS) | root_targets(pattern.inner)
        case Viewed():
            return set(VIEWS) | root_targets(pattern.inner)
        case Item():
            return {str(operator.getitem)}
        case OneOf():
            return set().union(*(root_targets(option) for option in pattern.options))
        case Together():
            return root_targets(pattern.results[0])
    return set()


def call_count(pattern: object) -> int:
    """How many calls a pattern has in its longest form, without the casts and views that it looks through."""
    match pattern:
        case Call():
            return 1 + sum(map(call_count, pattern.args))
        case Item() | Half():
            return 1 + call_count(pattern.inner)
        case Cast() | Viewed():
            return call_count(pattern.inner)
        case OneOf():
            return max(map(call_count, pattern.options))
        case Together():
            return call_count(pattern.results[0])  # the others may share its calls
        case list() | tuple():
            return sum(map(call_count, pattern))
    return 0
