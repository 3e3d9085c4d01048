"""Computes the rows of a batch in two halves between attentions, so that one half's sums over the ranks run beside
what is computed of the other.

Before, on two ranks::

    y = vllm.all_reduce.default(aten.mm.default(heads, o_proj), "tp:0")
    normed, residual = npu_fused.add_rms_norm(y, residual, weight, 1e-06)
    qkv = aten.mm.default(normed, qkv_proj)

After, with `one` for the first half of the rows and `two` for the second::

    sent_one = _c10d_functional.all_reduce(aten.mm.default(heads_one, o_proj), "sum", "tp:0")
    sent_two = _c10d_functional.all_reduce(aten.mm.default(heads_two, o_proj), "sum", "tp:0")
    y_one = _c10d_functional.wait_tensor(sent_one)
    normed_one, next_one = npu_fused.add_rms_norm(y_one, residual_one, weight, 1e-06)
    qkv_one = aten.mm.default(normed_one, qkv_proj)
    y_two = _c10d_functional.wait_tensor(sent_two)
    normed_two, next_two = npu_fused.add_rms_norm(y_two, residual_two, weight, 1e-06)
    qkv = aten.cat.default([qkv_one, aten.mm.default(normed_two, qkv_proj)])

A functional collective runs on a stream that torch_npu has for the communicator, until the program waits for it. The
sum of the first half runs beside the products in front of that of the second, and the second one beside the products
behind the first.

A region is made of sums and of the calls around them that compute each row by itself: products with weights, norms,
activations. It ends where another call reads what is in it: attention, which reads all rows at once. There halves are
put together, but for what the next region wants in halves again, such as the residual. Each half reads the weights, and
launches the kernels: that pays where rows are many.

The option `dual_batch_overlap` switches the pass on, and is the fewest rows at which it is worth it. vLLM and
vllm-ascend call it dual batch overlap; theirs splits requests, and attention with them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from npu_compiler.facts.sizes import Fact, Size, at_least, equal, known
from npu_compiler.graph.build import call
from npu_compiler.graph.effects import tensors, value
from npu_compiler.graph.traffic import launches, size_in_bytes
from npu_compiler.passes.rank_sums import Sum, sum_of
from npu_compiler.passes.record import PassRecord, Saving
from npu_compiler.passes.sequence_parallel import is_weight, row_arguments

NAME = "dual_batch_overlap"
PRODUCTS = {"aten.mm.default": 0, "aten.matmul.default": 0, "aten.addmm.default": 1}
"""Products, and which argument has the rows."""
ACTIVATIONS = {
    "npu_fused.swiglu.default": (0,),
    "npu_fused.silu_mul.default": (0, 1),
    "npu_fused.geglu.default": (0,),
    "npu_fused.fast_gelu.default": (0,),
    "npu.npu_swiglu.default": (0,),
}
"""Activations that sequence_parallel, whose regions end at products, has no use for; and their arguments with rows."""
Halves = tuple[fx.Node, fx.Node]


@dataclass
class Region:
    """Calls that compute each row by itself, and sums over the ranks.

    Attributes:
        rows: how many rows there are.
        calls: in program order; of a sum, the call that has its result.
        sums: by that call.
        views: what only looks at results, and stands between the calls.
    """

    rows: Size
    calls: list[fx.Node] = field(default_factory=list)
    sums: dict[fx.Node, Sum] = field(default_factory=dict)
    views: list[fx.Node] = field(default_factory=list)

    @property
    def products(self) -> list[fx.Node]:
        """The products among the calls."""
        return [node for node in self.calls if str(node.target) in PRODUCTS]

    @property
    def inside(self) -> set[fx.Node]:
        """The calls, with all that sums are made of."""
        return {*self.calls, *(node for entry in self.sums.values() for node in entry.nodes)}


def run(module: fx.GraphModule, record: PassRecord, rows: int = 1) -> None:
    """Rewrites the regions of programs that are proven to have `rows` rows or more."""
    joined: dict[fx.Node, Halves] = {}
    for region in list(_regions(module.graph)):
        verdict = _worth_it(region, rows)
        if verdict:
            _Rewrite(module.graph, region, joined).run(record)
        else:
            record.refuse(NAME, next(iter(region.sums)), verdict.text)


# -- which calls ------------------------------------------------------------------------------------------------------


def _regions(graph: fx.Graph) -> Iterator[Region]:
    """The regions that have a sum, in program order."""
    sums = {node: found for node in graph.nodes if isinstance(found := sum_of(node), Sum) and _is_waited_for(found)}
    begun = {node for entry in sums.values() for node in entry.nodes} - sums.keys()
    region: Region | None = None
    for node in graph.nodes:
        if node.op != "call_function" or node in begun:
            continue
        given = [sums[node].partial] if node in sums else _rows_of(node)
        inside = region is not None and any(
            item in region.calls or item in region.views for item in node.all_input_nodes
        )
        inside = inside or (region is not None and node in sums and sums[node].partial in region.calls)
        if region is not None and inside and not _may_join(node, given, region):
            if launches(node):
                yield from _trimmed(region)
                region = None
            else:
                region.views.append(node)
                continue
        begins = node in sums or str(node.target) in PRODUCTS
        if not given or not ((inside and region is not None) or begins):
            continue
        if region is None:
            region = Region(_count(given[0]))
        elif not inside and not _may_join(node, given, region):
            continue
        region.calls.append(node)
        if node in sums:
            region.sums[node] = sums[node]
    if region is not None:
        yield from _trimmed(region)


def _is_waited_for(entry: Sum) -> bool:
    """Whether nothing stands between a sum's beginning and the wait for it: else the model has put it there."""
    return entry.nodes[0] is entry.result or entry.nodes[0].next is entry.result


def _rows_of(node: fx.Node) -> list[fx.Node]:
    """The arguments of a call that computes each row by itself that have the rows; empty for every other call."""
    target = str(node.target)
    if target in PRODUCTS:
        rows = node.args[PRODUCTS[target]]
        found = [rows] if isinstance(rows, fx.Node) else []
    elif target in ACTIVATIONS:
        found = [node.args[place] for place in ACTIVATIONS[target]]  # type: ignore[misc]
    else:
        found = row_arguments(node)
    rest = [item for item in node.all_input_nodes if item not in found]
    others = [value(item) for item in (*found, *rest) if not (item in found and isinstance(value(item), tuple))]
    if not all(isinstance(tensor, torch.Tensor) for tensor in others):
        return []  # a number of rows, say
    if target in PRODUCTS:
        plain = all(tensor.dim() == 2 for item in node.args[-2:] for tensor in tensors(item))
        return found if plain and rest and not any(item in found for item in rest) else []
    return found if all(is_weight(item, node) for item in rest) else []


def _may_join(node: fx.Node, given: list[fx.Node], region: Region) -> bool:
    """Whether a call can be made in halves with the calls of a region."""
    others = [item for item in node.all_input_nodes if item not in given]
    return (
        bool(given)
        and not any(item in region.views for item in node.all_input_nodes)
        and not any(item in region.calls for item in others if node not in region.sums)
        and all(equal(_count(item), region.rows, "rows") for item in given)
    )


def _count(node: fx.Node) -> Size:
    """How many rows a value has; of several values, the first."""
    found = value(node)
    first = found[0] if isinstance(found, tuple) else found
    assert isinstance(first, torch.Tensor)
    return first.shape[0]


def _trimmed(region: Region) -> Iterator[Region]:
    """The region without calls that have nothing to do with a sum; nothing if it has no sum. What reads a call of it
    is behind all of them, or one of its views."""
    near = set(region.sums)
    for node in reversed(region.calls):
        readers = {*node.users, *(entry.result for entry in region.sums.values() if entry.partial is node)}
        if near.intersection(readers):
            near.add(node)
    for node in (*region.calls, *region.views):
        if near.intersection(node.all_input_nodes):
            near.add(node)
    region.calls = [node for node in region.calls if node in near]
    if not region.sums:
        return
    last = region.calls[-1]
    region.views = [node for node in region.views if node in near and node < last]
    yield region


def _worth_it(region: Region, rows: int) -> Fact:
    enough = at_least(region.rows, max(rows, 2), f"option {NAME}={rows}: rows")
    return enough & known(bool(region.products), "there is nothing to compute beside the sum")


def _saving(region: Region) -> Saving:
    """Every kernel is launched once more, and weights are read once more."""
    calls = [node for node in region.calls if launches(node)]
    weights = {item for node in region.products for item in node.all_input_nodes if item not in _rows_of(node)}
    sizes = [size_in_bytes(tensor) for item in weights for tensor in tensors(item)]
    return Saving(-len(calls), -sum(map(sympy.sympify, sizes), sympy.Integer(0)))


# -- the rewrite ------------------------------------------------------------------------------------------------------


class _Rewrite:
    """Writes a region in halves behind its last call, and takes the region out."""

    def __init__(self, graph: fx.Graph, region: Region, joined: dict[fx.Node, Halves]) -> None:
        self._graph, self._region, self._joined = graph, region, joined
        self._halves: tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]] = ({}, {})
        self._sent: tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]] = ({}, {})

    def run(self, record: PassRecord) -> None:
        region, inside = self._region, self._region.inside
        region.sums = {
            node: found for node in region.sums if isinstance(found := sum_of(node), Sum)
        }  # of what is read now
        first = next(iter(region.sums))
        old = sorted(inside)
        text = f"{len(region.sums)} sums and {len(region.products)} products of two halves of the rows"
        record.fire(f"{NAME}: {text}", first, old, _saving(region))
        behind = region.calls[-1].next
        with self._graph.inserting_before(behind):
            self._cut(first)
            self._write()
            for node in region.calls:
                outside = [user for user in node.users if user not in inside]
                if outside and isinstance(value(node), torch.Tensor):
                    one, two = (half[node] for half in self._halves)
                    whole = self._add(torch.ops.aten.cat.default, [one, two], at=node)
                    self._joined[whole] = (one, two)
                    for user in outside:
                        user.replace_input_with(node, whole)
        for node in region.views:
            behind.prepend(node)
        for node in reversed(old):
            self._graph.erase_node(node)

    def _cut(self, at: fx.Node) -> None:
        """Adds the halves of what the region reads: those that a region before it made, or views."""
        inside = self._region.inside
        rows = (item for node in self._region.calls for item in self._given(node) if item not in inside)
        count, half = None, None
        for item in dict.fromkeys(rows):
            if item not in self._joined:
                if half is None:
                    count, half = self._middle(item, at)
                slices = ((0, 0, half), (0, half, count))
                self._joined[item] = tuple(  # type: ignore[assignment]
                    self._add(torch.ops.aten.slice.Tensor, item, *place, at=at) for place in slices
                )
            for known_halves, part in zip(self._halves, self._joined[item], strict=True):
                known_halves[item] = part

    def _middle(self, item: fx.Node, at: fx.Node) -> tuple[object, object]:
        """How many rows there are, and how many of them are in the first half."""
        count: object = self._region.rows
        if isinstance(count, int):
            return count, count // 2
        count = self._add(torch.ops.aten.sym_size.int, item, 0, at=at)
        return count, self._add(operator.floordiv, count, 2, at=at)

    def _given(self, node: fx.Node) -> list[fx.Node]:
        return [self._region.sums[node].partial] if node in self._region.sums else _rows_of(node)

    def _write(self) -> None:
        """The calls up to each sum for one half, then for the other: what one waits for runs beside the other's."""
        begins = {entry.partial: entry for entry in self._region.sums.values()}
        outside = [entry for partial, entry in begins.items() if partial not in self._region.calls]
        for half, sent in zip(self._halves, self._sent, strict=True):
            for entry in outside:
                self._send(entry, half, sent)
        for stage in self._stages():
            for half, sent in zip(self._halves, self._sent, strict=True):
                for node in stage:
                    self._write_one(node, half, sent)
                    if node in begins:
                        self._send(begins[node], half, sent)

    def _stages(self) -> list[list[fx.Node]]:
        """The region's calls; each stage but the first begins with a sum's result."""
        stages: list[list[fx.Node]] = [[]]
        for node in self._region.calls:
            if node in self._region.sums:
                stages.append([])
            stages[-1].append(node)
        return stages

    def _send(self, entry: Sum, half: Mapping[fx.Node, fx.Node], sent: dict[fx.Node, fx.Node]) -> None:
        begin = torch.ops._c10d_functional.all_reduce.default
        sent[entry.partial] = self._add(begin, half[entry.partial], "sum", entry.group, at=entry.result)

    def _write_one(self, node: fx.Node, half: dict[fx.Node, fx.Node], sent: Mapping[fx.Node, fx.Node]) -> None:
        if node in self._region.sums:
            wait = torch.ops._c10d_functional.wait_tensor.default
            half[node] = self._add(wait, sent[self._region.sums[node].partial], at=node)
            return
        given = self._given(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: half[item] if item in given else item)
        half[node] = call(self._graph, node.target, args, kwargs=kwargs, replaces=[node], made_by=NAME)  # type: ignore[arg-type]

    def _add(self, target: object, *args: object, at: fx.Node) -> fx.Node:
        return call(self._graph, target, args, replaces=[at], made_by=NAME)  # type: ignore[arg-type]
