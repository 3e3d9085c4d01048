"""Works on each rank's own rows between the sums of tensor parallelism: reduce-scatter, norm, all-gather.

Before::

    y = vllm.all_reduce.default(partial, "tp:0")
    normed, residual = npu_fused.add_rms_norm(y, residual, weight, 1e-06)
    out = aten.mm(normed, up)

After, with two ranks::

    part = npu_fused.reduce_scatter_rows(partial, "tp:0", 2)
    normed_part, residual_part = npu_fused.add_rms_norm(part, residual_part, weight, 1e-06)
    normed = npu_fused.all_gather_rows(normed_part, "tp:0", 2, aten.sym_size.int(partial, 0))
    out = aten.mm(normed, up)

A sum over ranks is a reduce-scatter and an all-gather. What stands behind it and works on each row by itself (norms,
casts, quantization, additions of what has been scattered too) is done between the two, on a rank's part of the rows,
and what is gathered is what comes out: an int8 row where it is quantized. The residual is never gathered between
layers. vllm-ascend called it FlashComm1; vLLM calls it sequence parallelism.

Rows that the program itself gathers, as vLLM does behind experts whose tokens it divides, are not gathered: a region
goes on with their parts. What the program cuts into parts again takes those of the region.

The option `sequence_parallel` switches the pass on, and is the fewest rows at which it is worth it. A region of such
calls is rewritten as a whole, or left with the reason: where it would send more bytes than before, only if what its
calls no longer move in device memory is estimated to take longer. So a stage of a pipeline, whose residual is gathered
for the next one, is rewritten if it has layers enough. The rewrite is exact if weights beside the rows, and inputs that
rows are made of, are the same on all ranks. In tensor parallelism they are, and the ranks compare them at the first
call (plan/agreement.py).

Where the ranks don't divide the rows, the operators pad (fusion_kernels/row_collectives.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from npu_compiler.facts.sizes import Fact, Size, at_least, divisible, equal, known
from npu_compiler.graph.build import call
from npu_compiler.graph.device import Device
from npu_compiler.graph.effects import is_pure, tensors, value
from npu_compiler.graph.source import TIMES, where
from npu_compiler.graph.traffic import Amount, is_view, moved_bytes, size_in_bytes
from npu_compiler.passes.rank_rows import Gather, cut_of, gather_of
from npu_compiler.passes.rank_sums import Sum, sum_of
from npu_compiler.passes.record import PassRecord, Saving

NAME = "sequence_parallel"
ROWS: dict[str, tuple[int, ...]] = {
    "npu_fused.rms_norm.default": (0,),
    "npu_fused.gemma_rms_norm.default": (0,),
    "npu_fused.add_rms_norm.default": (0, 1),
    "npu_fused.gemma_add_rms_norm.default": (0, 1),
    "npu_fused.add_rms_norm_cast.default": (0, 1),
    "npu_fused.add_rms_norm_bias.default": (0, 1),
    "npu_fused.add_rms_norm_quant.default": (0, 1),
    "npu_fused.add_rms_norm_dynamic_quant.default": (0, 1),
    "npu_fused.rms_norm_dynamic_quant.default": (0,),
    "npu_fused.rms_norm_quant.default": (0,),
    "npu_fused.add_layer_norm.default": (0, 1),
    "npu.npu_dynamic_quant.default": (0,),
    "aten._to_copy.default": (0,),
    "prims.convert_element_type.default": (0,),
}
"""Operators that compute each row by itself, and which of their arguments have the rows. Elementwise operators do so
too; where rows are among their arguments follows from the shapes."""


@dataclass
class Region:
    """Calls that work on parts of the rows, between sums and gathers.

    Attributes:
        sources: sums, and gathers of the program, where the parts come from.
        calls: in program order.
        gathered: results that the rest of the program reads whole.
        cuts: calls that cut a result into parts again.
        sliced: whole values that all ranks have, of which each takes its part.
    """

    sources: list[Sum | Gather]
    calls: list[fx.Node] = field(default_factory=list)
    gathered: list[fx.Node] = field(default_factory=list)
    cuts: list[fx.Node] = field(default_factory=list)
    sliced: list[fx.Node] = field(default_factory=list)

    @property
    def sums(self) -> list[Sum]:
        """Of the sources."""
        return [entry for entry in self.sources if isinstance(entry, Sum)]

    @property
    def gathers(self) -> list[Gather]:
        """Of the sources."""
        return [entry for entry in self.sources if isinstance(entry, Gather)]

    @property
    def first(self) -> Sum | Gather:
        """The first source in program order."""
        return self.sources[0]

    @property
    def rows(self) -> Size:
        """How many rows there are on all ranks together."""
        return _tensor(self.first.result).shape[0]


def run(module: fx.GraphModule, record: PassRecord, rows: int = 1) -> None:
    """Rewrites the regions of programs that are proven to have `rows` rows or more."""
    for region in _regions(module.graph, record):
        verdict = _worth_it(region, rows)
        if not verdict:
            record.refuse(NAME, region.first.result, verdict.text)
        else:
            _rewrite(module.graph, region, record)


# -- which calls ------------------------------------------------------------------------------------------------------


def _regions(graph: fx.Graph, record: PassRecord) -> list[Region]:
    """The sums with the calls behind them, joined where a call takes rows from several, and with what is gathered
    between them. Behind gathers alone nothing would be sent less."""
    region_of: dict[fx.Node, Region] = {}
    for node in graph.nodes:
        found = sum_of(node) or gather_of(node)
        if isinstance(found, (Sum, Gather)):
            region_of[node] = Region([found])
        elif found:
            record.refuse(NAME, node, found)
        else:
            _join(node, region_of, record)
    regions = [region for region in {id(one): one for one in region_of.values()}.values() if region.sums]
    for region in regions:
        _retreat(region)
    return [region for region in regions if region.calls]


def _join(node: fx.Node, region_of: dict[fx.Node, Region], record: PassRecord) -> None:
    """Puts a call that works on each row by itself into the region of its rows."""
    rows = row_arguments(node)
    regions = list({id(region_of[item]): region_of[item] for item in rows if item in region_of}.values())
    if not regions:
        return
    first = regions[0]
    verdict = _can_join(node, rows, regions, region_of)
    if not verdict:
        if verdict.text:
            record.refuse(NAME, node, verdict.text)
        return
    for other in regions[1:]:
        first.sources += other.sources
        first.calls += other.calls
        first.sliced += other.sliced
        for member in [item for item, region in region_of.items() if region is other]:
            region_of[member] = first
    first.sources.sort(key=lambda entry: entry.result)
    first.calls = sorted([*first.calls, node])
    first.sliced += [item for item in rows if item not in region_of and item not in first.sliced]
    region_of[node] = first


def row_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments of a call that has a row for each of theirs; empty if it does anything else with them."""
    if node.op != "call_function":
        return []
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return [node.args[0]] if isinstance(value(node.args[0]), tuple) else []
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not is_pure(node):
        return []
    places = ROWS.get(str(target))
    if places is not None:
        given = [node.args[place] for place in places if place < len(node.args)]
        return [item for item in given if isinstance(item, fx.Node)]
    if torch.Tag.pointwise not in target.tags:
        return []
    result = _tensor(node)
    return [item for item in node.all_input_nodes if _has_rows_of(item, result)]


def works_by_row(node: fx.Node) -> bool:
    """Whether a call computes each row of its result from the same row of its arguments, and weights."""
    return bool(row_arguments(node))


def _has_rows_of(item: fx.Node, result: torch.Tensor) -> bool:
    found = value(item)
    if not isinstance(found, torch.Tensor) or found.dim() != result.dim() or not found.dim():
        return False
    return bool(equal(found.shape[0], result.shape[0], "rows"))


def _can_join(node: fx.Node, rows: list[fx.Node], regions: list[Region], region_of: dict[fx.Node, Region]) -> Fact:
    """Whether the call can work on parts of the rows: all of its rows are there in parts, the rest is one weight for
    all rows."""
    first = regions[0].first
    verdict = known(True, "rows by themselves")
    for region in regions[1:]:
        other = region.first
        verdict = verdict & known(other.group == first.group, f"rows of groups {first.group!r} and {other.group!r}")
        verdict = verdict & equal(region.rows, regions[0].rows, "rows")
    for item in rows:
        if item not in region_of:
            verdict = verdict & _is_replicated(item)
    if isinstance(node.target, torch._ops.OpOverload):
        for item in (item for item in node.all_input_nodes if item not in rows):
            verdict = verdict & is_weight(item, node)
    return verdict


def is_weight(item: fx.Node, node: fx.Node) -> Fact:
    """Whether an argument without rows is one for all rows, and an input of the program or a view or cast of one."""
    found, result = value(item), value(node)
    if isinstance(found, torch.Tensor) and isinstance(result, torch.Tensor):
        one = found.dim() < result.dim() or equal(found.shape[0], 1, "rows")
        if not one:
            return known(False, f"{item.name} may have a row for each")
    source = item
    while is_view(source) or str(source.target) == "aten._to_copy.default":
        if len(source.all_input_nodes) != 1:
            break
        (source,) = source.all_input_nodes
    ours = source.op in ("placeholder", "get_attr")
    return known(ours, f"{item.name} is computed, and may differ between the ranks")


def _is_replicated(item: fx.Node) -> Fact:
    """Whether a whole value is the same on all ranks if the program's inputs are: made of them row by row, or looked
    up. A product with a weight is not: the weight may be a rank's own."""
    todo, seen = [item], set()
    while todo:
        node = todo.pop()
        if node in seen or node.op in ("placeholder", "get_attr"):
            continue
        seen.add(node)
        looked_up = str(node.target) == "aten.embedding.default"
        if not (looked_up or is_view(node) or row_arguments(node)):
            return known(False, f"{node.name} may differ between the ranks")
        todo += node.all_input_nodes
    return known(True, f"{item.name} is the same on all ranks")


def _retreat(region: Region) -> None:
    """Leaves calls at the end of a region out of it where less is sent if the result before them is gathered: behind a
    cast to a wider type, say. Notes what is gathered then."""
    inside = set(region.calls)
    sources = {entry.result for entry in region.sources}

    def leaves(node: fx.Node) -> bool:
        return any(user not in inside and cut_of(user, region.first.group) is not node for user in node.users)

    for node in reversed(region.calls):
        if (
            node.target is operator.getitem
            or isinstance(value(node), tuple)
            or any(user in inside for user in node.users)
        ):
            continue
        rows = [item for item in row_arguments(node) if item in inside or item in sources]
        elsewhere = [item for item in rows if not leaves(item)]
        if _less(elsewhere, node):
            inside.discard(node)
    region.calls = [node for node in region.calls if node in inside]
    values = [*(entry.result for entry in region.sources), *region.calls]
    region.gathered = [node for node in values if not isinstance(value(node), tuple) and leaves(node)]
    users = {user: node for node in values for user in node.users}
    region.cuts = [user for user, node in users.items() if cut_of(user, region.first.group) is node]
    needed = {item for node in region.calls for item in node.all_input_nodes}
    region.sliced = [item for item in region.sliced if item in needed]


def _less(some: list[fx.Node], node: fx.Node) -> bool:
    """Whether `some` are proven to have fewer bytes together than `node`."""
    return bool(sympy.expand(_bytes(node) - sum(map(_bytes, some), sympy.Integer(0))).is_positive)


def _bytes(node: fx.Node) -> sympy.Expr:
    return sympy.sympify(sum(map(size_in_bytes, tensors(node)), 0))


def _in_all(nodes: Sequence[fx.Node], amount: Callable[[fx.Node], Amount]) -> sympy.Expr:
    """The amounts of calls together, in all of the layers that each stands for."""
    return sympy.expand(sum((node.meta.get(TIMES, 1) * amount(node) for node in nodes), sympy.Integer(0)))


# -- whether ----------------------------------------------------------------------------------------------------------


def _worth_it(region: Region, rows: int) -> Fact:
    ranks = region.first.ranks
    # A sum sends as much as a scatter and a gather of the same rows.
    sent = _in_all([entry.result for entry in region.sources], _bytes)
    more = sympy.expand(_in_all(region.gathered, _bytes) - sent)
    return (
        at_least(region.rows, rows, f"option sequence_parallel={rows}: rows")
        & known(not at_least(ranks - 1, region.rows, "rows"), f"{region.rows} rows for {ranks} ranks")
        & known(
            bool(more.is_nonpositive) or _is_made_up_for(region, more),
            f"{_count(region.gathered, 'result')} would be gathered for {_sources(region)}: {more} bytes more, which "
            "are estimated to take longer than what a rank's calls no longer move in device memory",
        )
    )


def _is_made_up_for(region: Region, more: sympy.Expr) -> bool:
    """Whether sending so many bytes more is estimated to take no longer than what is saved: of both, a rank has all but
    its own part."""
    device = Device()
    slower = int(device.memory // device.link)
    return bool(sympy.expand(more * slower - _in_all(region.calls, moved_bytes)).is_nonpositive)


# -- the rewrite ------------------------------------------------------------------------------------------------------


def _rewrite(graph: fx.Graph, region: Region, record: PassRecord) -> None:
    first = region.sums[0]
    group, ranks = first.group, first.ranks
    old = [*(node for entry in region.sources for node in entry.nodes), *region.calls, *region.cuts]
    record.fire(f"{NAME}: {_text(region)}", first.result, old, _saving(region))
    part: dict[fx.Node, fx.Node] = {}
    fused = torch.ops.npu_fused
    count: object = region.rows
    if not isinstance(count, int):
        with graph.inserting_before(first.nodes[0]):
            count = call(graph, torch.ops.aten.sym_size.int, (first.partial, 0), replaces=[first.result], made_by=NAME)
    partials = {entry.result: entry.partial for entry in region.sums}
    gathers = {entry.result: entry.part for entry in region.gathers}
    inside = {*region.calls, *region.cuts}
    for node in sorted([*partials, *gathers, *region.calls]):
        with graph.inserting_before(node):
            if node in partials:
                arguments = (partials[node], group, ranks)
                part[node] = call(graph, fused.reduce_scatter_rows.default, arguments, replaces=[node], made_by=NAME)
            elif node in gathers:
                part[node] = gathers[node]
            else:
                for whole in (item for item in region.sliced if item in node.all_input_nodes and item not in part):
                    arguments = (whole, group, ranks)
                    part[whole] = call(graph, fused.shard_rows.default, arguments, replaces=[node], made_by=NAME)
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: part.get(item, item))
                part[node] = call(graph, node.target, args, kwargs=kwargs, replaces=[node], made_by=NAME)  # type: ignore[arg-type]
            if node in region.gathered:
                arguments = (part[node], group, ranks, count)  # type: ignore[assignment]
                whole = call(graph, fused.all_gather_rows.default, arguments, replaces=[node], made_by=NAME)
                node.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in inside)
    for cut in region.cuts:
        (node,) = cut.all_input_nodes
        cut.replace_all_uses_with(part[node])
    for node in sorted(old, reverse=True):
        graph.erase_node(node)


def _text(region: Region) -> str:
    padded = divisible(region.rows, region.first.ranks, "rows")
    cuts = f", {_count(region.cuts, 'cut')} left out" if region.cuts else ""
    return (
        f"{_sources(region)}, {_count(region.gathered, 'gather')} over {region.first.ranks} ranks{cuts}, "
        f"{'no padding' if padded else 'padded where the ranks do not divide the rows'}"
    )


def _sources(region: Region) -> str:
    sums = _count(region.sums, "sum")
    return f"{sums} and {_count(region.gathers, 'gather')} of the program" if region.gathers else sums


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _saving(region: Region) -> Saving:
    """Kernels, and bytes of device memory: a rank reads and writes its part only."""
    ranks = region.first.ranks
    moved = sum(map(moved_bytes, region.calls), sympy.Integer(0))
    kernels = len(region.gathers) + len(region.cuts) - len(region.gathered) - len(region.sliced)
    return Saving(kernels, sympy.expand(moved * (ranks - 1) / ranks))


def _tensor(node: fx.Node) -> torch.Tensor:
    found = value(node)
    assert isinstance(found, torch.Tensor), f"{node.name} at {where(node)} is no tensor"
    return found
