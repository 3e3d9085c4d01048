"""Matching a pattern (pattern.py) with a program, with the deepest failure kept."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from npu_compiler.facts.sizes import equal
from npu_compiler.graph.source import operator_name
from npu_compiler.passes.pattern import (
    CASTS,
    SPLITS,
    VIEWS,
    Among,
    Any,
    Bindings,
    Call,
    Cast,
    Exactly,
    Half,
    Item,
    Match,
    Number,
    OneOf,
    Pattern,
    Result,
    Size,
    Together,
    Viewed,
    root_targets,
)


@dataclass
class Miss:
    """The failure after the most matched calls, for a report of near misses.

    Attributes:
        node: the call that the reason is about, where it is about one.
        whole: whether the pattern was found after all, and the reason is the rule's legality.
        stopped: the furthest that any attempt got, as (calls found, part of the pattern, value): finer than the reason.
    """

    depth: int = 0
    reason: str = ""
    node: fx.Node | None = None
    whole: bool = False
    stopped: tuple[tuple[fx.Node, ...], object, object] | None = None

    def note(self, depth: int, reason: str, node: fx.Node) -> None:
        """Keeps the deepest failure."""
        if depth > self.depth:
            self.depth, self.reason, self.node = depth, reason, node

    def stop(self, state: _State, pattern: object, value: object) -> None:
        """Keeps the furthest value that did not fit a part of the pattern."""
        if self.stopped is None or len(state.nodes) > len(self.stopped[0]):
            self.stopped = (state.nodes, pattern, value)

    def furthest(self) -> Miss:
        """The miss with the furthest stop as its reason, where that lies behind the deepest failure."""
        if self.stopped is None or self.whole or len(self.stopped[0]) <= self.depth:
            return self
        nodes, pattern, value = self.stopped
        reader = nodes[-1]  # the call whose argument it is, or one that leads there
        led = f"which {reader.name} ({operator_name(reader.target)}) leads to"
        reason = f"{_shown(value)}, {led}, is {_wanted_instead(pattern)}"
        return Miss(len(nodes), reason, value if isinstance(value, fx.Node) else reader)


def _shown(value: object) -> str:
    return f"{value.name} ({_kind(value)})" if isinstance(value, fx.Node) else repr(value)


def _kind(node: fx.Node) -> str:
    """What a node is: its operator, or that it is no call."""
    return {"placeholder": "an input", "get_attr": "a constant"}.get(node.op, operator_name(node.target))


def _wanted_instead(pattern: object) -> str:
    match pattern:
        case Any() | Item():
            return f"not what `{pattern.name}` is bound to already: the rule has the same value in both places"
        case Number():
            return f"no Python number, which the rule has for `{pattern.name}`"
        case Exactly() | Size():
            return f"not {pattern.value}, which the rule has there"
        case Result() | Among():
            return f"not computed by {pattern.targets.replace('|', ' or ')}, which the rule has for `{pattern.name}`"
        case Half():
            return f"not the {('first', 'second')[pattern.index]} half of a tensor along its last dimension"
        case Call():
            return f"no call of {' or '.join(pattern.targets)}"
    return "not as many values as the rule has"


@dataclass(frozen=True)
class _State:
    bindings: Bindings = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()

    def bind(self, name: str, value: object) -> _State | None:
        if not name:
            return self
        if name in self.bindings:
            bound = self.bindings[name]
            return self if bound is value or (not isinstance(value, fx.Node) and bound == value) else None
        return _State({**self.bindings, name: value}, self.nodes)

    def cover(self, *nodes: fx.Node) -> _State:
        return _State(self.bindings, self.nodes + tuple(node for node in nodes if node not in self.nodes))


def find(pattern: Pattern, root: fx.Node) -> tuple[Match | None, Miss]:
    """Matches `pattern` with `root` as its root. Returns the first match, or None and the deepest failure."""
    miss = Miss()
    for state in _match(pattern, root, _State(), miss):
        nodes = tuple(sorted(state.nodes))
        if root in nodes:
            return Match(state.bindings, nodes, root), miss
    return None, miss


def _match(pattern: object, value: object, state: _State, miss: Miss) -> Iterator[_State]:
    match pattern:
        case Any():
            yield from _bound(pattern, value, value, state, miss)
        case Number():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield from _bound(pattern, value, value, state, miss)
            else:
                miss.stop(state, pattern, value)
        case Exactly():
            if not isinstance(value, fx.Node) and value == pattern.value:
                yield state
            else:
                miss.stop(state, pattern, value)
        case OneOf():
            for option in pattern.options:
                yield from _match(option, value, state, miss)
        case Size():
            yield from _match_size(pattern, value, state, miss)
        case Together():
            for matched in _match(pattern.results[0], value, state, miss):
                yield from _match_together(pattern.results[1:], matched, miss)
        case Result():
            if _is_result(value, pattern.targets):
                yield from _bound(pattern, value, value, state, miss)
            else:
                miss.stop(state, pattern, value)
        case Among():
            if isinstance(value, (list, tuple)) and any(_is_result(item, pattern.targets) for item in value):
                yield from _bound(pattern, value, list(value), state, miss)
            else:
                miss.stop(state, pattern, value)
        case Cast():
            if isinstance(value, fx.Node) and _is_cast(value):
                yield from _match(pattern.inner, value.args[0], state.cover(value), miss)
            yield from _match(pattern.inner, value, state, miss)
        case Viewed():
            yield from _match(pattern.inner, value, state, miss)
            if isinstance(value, fx.Node) and str(value.target) in VIEWS:
                yield from _match(pattern, value.args[0], state.cover(value), miss)
        case Half():
            yield from _match_half(pattern, value, state, miss)
        case Item():
            yield from _match_item(pattern, value, state, miss)
        case Call():
            yield from _match_call(pattern, value, state, miss)
        case list() | tuple():
            if isinstance(value, (list, tuple)) and len(value) == len(pattern):
                yield from _match_all(pattern, value, state, miss)
            else:
                miss.stop(state, pattern, value)
        case _:
            raise TypeError(f"not a pattern: {pattern!r}")


def _is_result(value: object, targets: str) -> bool:
    return isinstance(value, fx.Node) and str(value.target) in targets.split("|")


def _bound(
    pattern: Any | Number | Result | Among, value: object, bound: object, state: _State, miss: Miss
) -> Iterator[_State]:
    """The state with `bound` under the pattern's name, if it may have that."""
    found = state.bind(pattern.name, bound)
    if found is not None:
        yield found
    else:
        miss.stop(state, pattern, value)


def _match_all(patterns: Sequence[object], values: Sequence[object], state: _State, miss: Miss) -> Iterator[_State]:
    if not patterns:
        yield state
        return
    for matched in _match(patterns[0], values[0], state, miss):
        yield from _match_all(patterns[1:], values[1:], matched, miss)


def _match_call(pattern: Call, value: object, state: _State, miss: Miss) -> Iterator[_State]:
    depth = len(state.nodes)
    if not isinstance(value, fx.Node):
        miss.stop(state, pattern, value)
        return
    if str(value.target) not in pattern.targets:
        miss.note(depth, f"{value.name} is {_kind(value)}, the rule wants {' or '.join(pattern.targets)}", value)
        return
    args = _arguments(value, len(pattern.args))
    if args is None:
        miss.note(depth, f"{value.name} ({operator_name(value.target)}) has arguments the rule does not know", value)
        return
    bound = state.bind(pattern.name, value)
    if bound is None:
        return
    covered = bound.cover(value)
    orders = [args]
    if pattern.commutes:
        orders.append([args[1], args[0], *args[2:]])
    for order in orders:
        yield from _match_all(pattern.args, order, covered, miss)


def _match_size(pattern: Size, value: object, state: _State, miss: Miss) -> Iterator[_State]:
    found = value.meta.get("val") if isinstance(value, fx.Node) else value
    wanted = pattern.value
    if isinstance(found, (int, torch.SymInt)) and isinstance(wanted, (int, torch.SymInt)) and equal(found, wanted, ""):
        yield state
    else:
        miss.stop(state, pattern, value)


def _match_together(patterns: Sequence[Pattern], state: _State, miss: Miss) -> Iterator[_State]:
    """The further results, each searched among the calls behind what is covered."""
    if not patterns:
        yield state
        return
    targets = root_targets(patterns[0])
    for candidate in _behind(state.nodes, _depth(patterns[0])):
        if str(candidate.target) in targets:
            for matched in _match(patterns[0], candidate, state, miss):
                yield from _match_together(patterns[1:], matched, miss)


def _behind(nodes: Sequence[fx.Node], depth: int) -> list[fx.Node]:
    """The nodes and their users, up to `depth` steps on, in program order."""
    found = set(nodes)
    for _ in range(depth):
        found |= {user for node in found for user in node.users}
    return sorted(found)


def _depth(pattern: object) -> int:
    """How many calls lie behind one another in a pattern, at least."""
    if isinstance(pattern, Call):
        return 1 + max(map(_depth, pattern.args), default=0)
    if isinstance(pattern, (list, tuple)):
        return max(map(_depth, pattern), default=0)
    return 1 + _depth(pattern.inner) if isinstance(pattern, Item) else 0


def _match_item(pattern: Item, value: object, state: _State, miss: Miss) -> Iterator[_State]:
    if not isinstance(value, fx.Node) or value.target is not operator.getitem or value.args[1] != pattern.index:
        miss.stop(state, Call(f"output {pattern.index} of several"), value)
        return
    source = value.args[0]
    assert isinstance(source, fx.Node)
    bound = state.bind(pattern.name, value)
    names = dict(pattern.others)
    for user in source.users:
        name = names.get(user.args[1]) if user.target is operator.getitem else None  # type: ignore[call-overload]
        if bound is not None and name is not None:
            bound = bound.bind(name, user)
            bound = bound and bound.cover(user)
    if bound is not None:
        yield from _match(pattern.inner, source, bound.cover(value), miss)
    else:
        miss.stop(state, pattern, value)


def _arguments(node: fx.Node, count: int) -> list[object] | None:
    """The first `count` arguments in schema order, or None if one behind them is not at its default."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return list(node.args) if len(node.args) == count and not node.kwargs else None
    values = []
    for position, argument in enumerate(target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name, default)
        if position < count:
            values.append(given)
        elif isinstance(given, fx.Node) or given != default:
            return None
    return values if len(values) == count else None


def _is_cast(node: fx.Node) -> bool:
    """Whether `node` converts the dtype of its argument and nothing else."""
    if str(node.target) not in CASTS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    return before.device == after.device and before.layout == after.layout and not node.kwargs.get("memory_format")


def _match_half(pattern: Half, value: object, state: _State, miss: Miss) -> Iterator[_State]:
    found = _whole_of(pattern, value)
    if found is None:
        miss.stop(state, pattern, value)
        return
    whole, covered = found
    yield from _match(pattern.inner, whole, state.cover(*covered), miss)


def _whole_of(pattern: Half, value: object) -> tuple[object, tuple[fx.Node, ...]] | None:
    """What `value` is that half of, and the calls that take it; None if it isn't."""
    if not isinstance(value, fx.Node):
        return None
    if value.target is operator.getitem and isinstance(value.args[0], fx.Node):
        split, index = value.args[0], value.args[1]
        fits = str(split.target) in SPLITS and index == pattern.index and _is_half(value, split.args[0])
        return (split.args[0], (split, value)) if fits else None
    if str(value.target) != "aten.slice.Tensor" or not _is_half(value, value.args[0]):
        return None
    args = _arguments(value, 5)
    assert args is not None
    source, _, start, _, step = args
    half = value.meta["val"].shape[-1]
    expected = 0 if pattern.index == 0 else half
    fits = step == 1 and not isinstance(start, fx.Node) and bool(equal(start or 0, expected, "start"))  # type: ignore[arg-type]
    return (source, (value,)) if fits else None


def _is_half(part: fx.Node, whole: object) -> bool:
    """Whether `part` differs from `whole` only by half the size of the last dimension."""
    if not isinstance(whole, fx.Node):
        return False
    small, large = part.meta["val"].shape, whole.meta["val"].shape
    if len(small) != len(large) or not small:
        return False
    rest = all(equal(a, b, "size") for a, b in zip(small[:-1], large[:-1], strict=True))
    return rest and bool(equal(small[-1] * 2, large[-1], "half"))
