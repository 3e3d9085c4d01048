"""Removes calls that return their argument unchanged, and assertions that were checked when the graph was traced.

Before::

    a = aten.clone.default(x)
    b = aten.view.default(a, [4, 8])     # a is already [4, 8]
    c = aten.add.Tensor(b, 1)

After::

    c = aten.add.Tensor(x, 1)

A view does nothing if it looks at the same memory in the same way. For what makes a new tensor, `RULES` says when its
values are those of an argument; the layouts have to be equal too. A new tensor stays where somebody would notice that
it is gone: an output would come to share memory with an input or another output, or a later write would reach through.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, Truth, equal, known, same_layout
from npu_compiler.graph.effects import addresses_storage, argument, storage, tensors, value, written_storages
from npu_compiler.graph.merged import Merged
from npu_compiler.graph.source import operator_name
from npu_compiler.graph.spec import refresh_alias
from npu_compiler.graph.traffic import is_view
from npu_compiler.passes.record import PassRecord

NAME = "noop"
aten, prims = torch.ops.aten, torch.ops.prims

SAME = Fact(Truth.TRUE, "the values are those of the argument")


def run(module: fx.GraphModule, record: PassRecord) -> None:
    graph = module.graph
    memory = _Memory(graph)
    for node in list(graph.nodes):
        if is_checked_assertion(node):
            _remove(node, None, record)
            continue
        refresh_alias(node)  # it may view what has taken the place of its argument
        source = unchanged_argument(node)
        if source is None:
            continue
        fact = same_values(node, source)
        if fact:
            fact = memory.may_be_one(node, source)
        if fact:
            memory.merge(node, source)
            _remove(node, source, record)
        elif _is_near_miss(node, source, fact):
            record.refuse(f"{NAME}: {operator_name(node.target)}", node, fact.text)


def _remove(node: fx.Node, source: fx.Node | None, record: PassRecord) -> None:
    record.fire(f"{NAME}: {operator_name(node.target)}", node, [node])
    if source is not None:
        node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def is_checked_assertion(node: fx.Node) -> bool:
    """Whether a call asserts what tracing has found to be true. Others are asked at every run, and stay."""
    if node.target is aten._assert_tensor_metadata.default:
        return True
    return node.target is aten._assert_scalar.default and value(node.args[0]) is True


def unchanged_argument(node: fx.Node) -> fx.Node | None:
    """The argument that a call may return unchanged; None for an operator that does not do that."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    found: object
    if is_view(node):
        found = node.args[0] if node.args else None
    elif node.target in RULES:
        found = RULES[node.target][0](node)
    else:
        return None
    pair = isinstance(found, fx.Node) and isinstance(value(found), Tensor) and isinstance(value(node), Tensor)
    return found if pair else None  # type: ignore[return-value]


def same_values(node: fx.Node, source: fx.Node) -> Fact:
    """Whether the result of a call is its argument `source`: values and layout."""
    result, given = _tensor(node), _tensor(source)
    fact = _same_form(result, given, operator_name(node.target))
    if fact and node.target in RULES:
        return RULES[node.target][1](node)
    return fact and equal(result.storage_offset(), given.storage_offset(), f"{operator_name(node.target)}: offset")


def _same_form(result: Tensor, given: Tensor, what: str) -> Fact:
    if result.device != given.device:
        return Fact(Truth.FALSE, f"{what}: from {given.device} to {result.device}")
    if result.is_conj() != given.is_conj() or result.is_neg() != given.is_neg():
        return Fact(Truth.FALSE, f"{what}: it resolves a conjugation or negation")
    return same_layout(result, given, what)


def _is_near_miss(node: fx.Node, source: fx.Node, fact: Fact) -> bool:
    """Whether a refusal is worth a line: the layouts are equal, or nobody knows whether they are."""
    return fact.truth is Truth.UNKNOWN or bool(_same_form(_tensor(node), _tensor(source), ""))


def _tensor(node: object) -> Tensor:
    found = value(node)
    assert isinstance(found, Tensor)
    return found


class _Memory:
    """Which memory the caller sees and when which is written, while values that were two become one."""

    def __init__(self, graph: fx.Graph) -> None:
        self._returned = set(graph.output_node().all_input_nodes)
        self._outputs = {storage(tensor) for node in self._returned for tensor in tensors(node)}
        self._inputs = {
            storage(t) for node in graph.nodes if node.op in ("placeholder", "get_attr") for t in tensors(node)
        }
        self._last_use: dict[int, float] = {}
        self._writes: dict[int, list[int]] = {}
        self._addressed = any(map(addresses_storage, graph.nodes))
        self._position: dict[fx.Node, int] = {}
        for index, node in enumerate(graph.nodes):
            self._position[node] = index
            for source in node.all_input_nodes:
                for tensor in tensors(source):
                    self._last_use[storage(tensor)] = index
            for key in written_storages(node):
                self._writes.setdefault(key, []).append(index)
        self._merged = Merged()

    def may_be_one(self, node: fx.Node, source: fx.Node) -> Fact:
        """Whether nobody notices that `source` takes the place of `node`."""
        mine, its = self._of(node), self._of(source)
        if mine in self._outputs and not _same_strides(_tensor(node), _tensor(source)):
            return Fact(Truth.FALSE, "an output would get other strides in a dimension of size 1")
        if mine == its:
            both = node in self._returned and (source in self._returned or source.op == "placeholder")
            return known(not both, "the caller gets both as tensors of their own")
        if mine in self._outputs and (its in self._outputs or its in self._inputs):
            other = "an input" if its in self._inputs else "another output"
            return Fact(Truth.FALSE, f"an output would come to share memory with {other}")
        if self._addressed and not equal(_tensor(node).storage_offset(), _tensor(source).storage_offset(), "offset"):
            return Fact(Truth.FALSE, "the offset in memory would change, and as_strided counts from its start")
        after = self._position[node]
        if self._read_behind(its, mine, after) or self._read_behind(mine, its, after):
            return Fact(Truth.FALSE, "one of the two is written while the other is still read")
        return SAME

    def _read_behind(self, written: int, read: int, after: int) -> bool:
        """Whether one memory is written behind a position and the other is read behind that write."""
        last = math.inf if read in self._inputs else self._last_use.get(read, -1)
        return any(after < position < last for position in self._writes.get(written, ()))

    def merge(self, node: fx.Node, source: fx.Node) -> None:
        """`source` takes the place of `node`."""
        mine, its = self._of(node), self._of(source)
        if node in self._returned:
            self._returned.add(source)
        if mine == its:
            return
        self._merged.merge(mine, its)
        if mine in self._outputs:
            self._outputs.add(its)
        self._writes[its] = [*self._writes.get(its, ()), *self._writes.get(mine, ())]
        self._last_use[its] = max(self._last_use.get(its, -1), self._last_use.get(mine, -1))

    def _of(self, node: fx.Node) -> int:
        (key,) = self._merged.of(node)
        return key


def _same_strides(one: Tensor, two: Tensor) -> bool:
    return all(bool(equal(left, right, "stride")) for left, right in zip(one.stride(), two.stride(), strict=True))


# Where the argument is, and what has to hold beside equal layouts.
Where = Callable[[fx.Node], Any]
When = Callable[[fx.Node], Fact]


def _always(node: fx.Node) -> Fact:
    return SAME


def _first(node: fx.Node) -> Any:
    return argument(node, 0)


def _second(node: fx.Node) -> Any:
    return argument(node, 1)


def _only_filled_part(node: fx.Node) -> Any:
    """The part of a cat that is not empty: vLLM's rotary embedding appends the unrotated part, often empty."""
    parts = [part for part in argument(node, 0) if not _is_empty(value(part))]
    return parts[0] if len(parts) == 1 else None


def _is_empty(tensor: Any) -> bool:
    return any(isinstance(size, int) and size == 0 for size in tensor.shape)


def _pads_nothing(node: fx.Node) -> Fact:
    return known(all(_is_number(pad, 0) for pad in argument(node, 1)), "it moves the values")


def _strided_whole(node: fx.Node) -> Fact:
    whole = _tensor(argument(node, 0))
    size, stride, offset = (argument(node, index) for index in (2, 3, 4))
    at = whole.storage_offset()
    given = [*size, *stride, at if offset is None else offset]
    places = [*whole.shape, *whole.stride(), at]
    facts = (equal(value(one), two, "it moves the values") for one, two in zip(given, places, strict=True))  # type: ignore[arg-type]
    return next((fact for fact in facts if not fact), SAME)


def _integer(node: fx.Node) -> Any:
    return None if _has_fractions(node) else argument(node, 0)


def _to_the_power_of_one(node: fx.Node) -> Any:
    return argument(node, 0) if _is_number(argument(node, 1), 1) else None


def _and_zero(node: fx.Node) -> Any:
    return argument(node, 0) if _is_number(argument(node, 1), 0) else None


def _without_signs(node: fx.Node) -> Fact:
    return known(not _has_fractions(node), "-0.0 + 0 is 0.0")


def _positive_zero(node: fx.Node) -> Fact:
    return known(math.copysign(1, argument(node, 1)) > 0 or not _has_fractions(node), "-0.0 - -0.0 is 0.0")


def _has_fractions(node: fx.Node) -> bool:
    dtype = _tensor(node).dtype
    return bool(dtype.is_floating_point or dtype.is_complex)


def _is_number(item: object, number: int) -> bool:
    return isinstance(item, (int, float)) and item == number


RULES: dict[torch._ops.OpOverload, tuple[Where, When]] = {
    aten.clone.default: (_first, _always),
    aten.lift_fresh_copy.default: (_first, _always),
    aten.copy.default: (_second, _always),
    aten._to_copy.default: (_first, _always),
    prims.convert_element_type.default: (_first, _always),
    prims.device_put.default: (_first, _always),
    aten.cat.default: (_only_filled_part, _always),
    aten.repeat.default: (_first, _always),
    aten.constant_pad_nd.default: (_first, _pads_nothing),
    aten.slice_scatter.default: (_second, _always),
    aten.as_strided_scatter.default: (_second, _strided_whole),
    aten.ceil.default: (_integer, _always),
    aten.floor.default: (_integer, _always),
    aten.round.default: (_integer, _always),
    aten.trunc.default: (_integer, _always),
    aten.pow.Tensor_Scalar: (_to_the_power_of_one, _always),
    aten.add.Tensor: (_and_zero, _without_signs),
    aten.sub.Tensor: (_and_zero, _positive_zero),
}
"""For each operator the argument that its result may equal, and what that takes beside an equal layout (shape, strides,
dtype, device). A copy or a conversion of an equal layout has equal values; so has repeat, a cat of one part, and a
slice_scatter, which has written all if the part is as large as the whole."""
