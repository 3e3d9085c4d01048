"""Sends tokens to the ranks of their experts, in buffers of a fixed size, where each rank computed its own experts for
all tokens and the results were summed up.

Before, on one of 2 ranks with 2 of 4 experts each::

    routed = npu.npu_moe_init_routing_v2.default(x, ids, expert_num=4, active_expert_range=[0, 2], ...)
    h = npu.npu_grouped_matmul.default([routed[0]], [w13], group_list=routed[2], ...)
    h = npu_fused.swiglu.default(h[0])
    h = npu.npu_grouped_matmul.default([h], [w2], group_list=routed[2], ...)
    h = aten.unsqueeze.default(h[0], 1)
    y = npu.npu_moe_finalize_routing.default(h, None, None, None, weights, routed[1], None, 3)
    y = vllm.all_reduce.default(y, "tp:0")

After::

    came = npu_fused.all_to_all_dispatch(x, ids, weights, "tp:0", 2, 4, 12500, "score", False, True, "")
    routed = npu.npu_moe_init_routing_v2.default(came[0], came[1], expert_num=3, active_expert_range=[0, 2], ...)
    h = npu.npu_grouped_matmul.default([routed[0]], [w13], group_list=routed[2], ...)
    h = npu_fused.swiglu.default(h[0])
    h = npu.npu_grouped_matmul.default([h], [w2], group_list=routed[2], ...)
    y = npu_fused.all_to_all_combine(h[0], routed[1], came[2], came[3], "tp:0", 2)
    y = npu_fused.all_gather_rows(y, "tp:0", 2, rows)

Each rank takes its part of the rows, which are the same on all ranks: else the sum would have no meaning. Where
sequence_parallel has made a reduce-scatter of the sum, its part is what that gave, and nothing is gathered. Where
something is added before the sum (a shared expert), a rank puts its rows between zeros and the sum stays.

What has no room in a buffer is dropped (fusion_kernels/expert_exchange.py), so this is another computation than before,
which the option `token_drop` asks for. Where nothing is dropped, it is the same up to the order of a token's sum.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from npu_compiler.config import TokenDrop
from npu_compiler.facts.sizes import Size
from npu_compiler.fusion_kernels.expert_capacity import FINE, parts_for, parts_of
from npu_compiler.fusion_kernels.expert_exchange import no_expert
from npu_compiler.graph.build import call
from npu_compiler.graph.effects import argument, is_pure, value
from npu_compiler.graph.groups import rank_in, ranks_of
from npu_compiler.passes.record import PassRecord

NAME = "token_drop"
ROUTING, FINISHED = "npu.npu_moe_init_routing_v2.default", "npu.npu_moe_finalize_routing.default"
DEFAULT = TokenDrop(capacity_factor=1.25)
BY_ROW = frozenset(
    {
        "npu.npu_grouped_matmul.default",
        "npu.npu_swiglu.default",
        "npu_fused.swiglu.default",
        "npu_fused.silu_mul.default",
        "npu_fused.geglu.default",
        "npu_fused.fast_gelu.default",
        "npu_fused.swiglu_dynamic_quant.default",
        "npu_fused.geglu_dynamic_quant.default",
        "aten.slice.Tensor",
        "aten.split.Tensor",
        "aten.unsqueeze.default",
        "aten._to_copy.default",
        "prims.convert_element_type.default",
    }
)
"""Calls between routing and combination that compute each row by itself, whatever their number. Elementwise operators
do so too."""
DYNAMIC = 1
"""npu_moe_init_routing_v2's quant_mode for int8 rows with a scale each."""
LINEAR = frozenset({"aten.add.Tensor", "aten._to_copy.default", "prims.convert_element_type.default"})
"""Calls between the experts and the sum over the ranks that leave it a sum."""


class Left(Exception):
    """Why a layer is left as it is."""


@dataclass(frozen=True)
class Sum:
    """Where the ranks' results meet: the calls, and whether the experts' results are summed alone."""

    calls: tuple[fx.Node, ...]
    group: str
    alone: bool

    @property
    def scattered(self) -> bool:
        """Whether each rank gets its rows only."""
        return str(self.calls[0].target) == "npu_fused.reduce_scatter_rows.default"


@dataclass(frozen=True)
class Layer:
    """A layer of experts, of which each rank computes its own for all tokens.

    Attributes:
        routing: sorts the tokens by expert. `between`: what the experts compute, in order. `results`: the last of it.
        finish: adds up a token's results. `sum`: over the ranks.
    """

    routing: fx.Node
    between: tuple[fx.Node, ...]
    results: fx.Node
    finish: fx.Node
    sum: Sum
    ranks: int

    @property
    def experts(self) -> int:
        """On all ranks together."""
        return int(self.routing.kwargs["expert_num"])  # type: ignore[arg-type]  # the schema says int

    @property
    def top_k(self) -> int:
        """How many experts a token has."""
        return int(_tensor(argument(self.routing, "expert_idx")).shape[1])

    @property
    def rows(self) -> Size:
        """Of all ranks."""
        return _tensor(argument(self.routing, "x")).shape[0]


def run(module: fx.GraphModule, record: PassRecord, drop: TokenDrop = DEFAULT) -> None:
    """Rewrites the layers of a program as the option says."""
    for node in list(module.graph.nodes):
        if str(node.target) == ROUTING:
            try:
                layer = layer_of(node)
            except Left as reason:
                record.refuse(NAME, node, str(reason))
            else:
                factor = parts(drop, layer.top_k, layer.experts, layer.ranks) / FINE
                text = f"{layer.ranks} ranks, capacity factor {factor:g}, dropped by {drop.by}"
                exchange(module.graph, layer, drop, record, text)


def parts(drop: TokenDrop, top_k: int, experts: int, ranks: int) -> int:
    """The capacity factor that the option asks for, in parts of FINE."""
    if drop.capacity_factor:
        return parts_of(drop.capacity_factor)
    return parts_for(drop.max_drop_ratio or 0.0, top_k, no_expert(experts, ranks), ranks)


# -- which layers ------------------------------------------------------------------------------------------------------


def layer_of(routing: fx.Node) -> Layer:
    """The layer that a routing belongs to.

    Raises:
        Left: it is none that can be rewritten.
    """
    first, end = argument(routing, "active_expert_range") or (0, 0)
    experts = argument(routing, "expert_num")
    if not end or end - first == experts:
        raise Left("all experts are on this rank")
    _check_settings(routing)
    places = results_of(routing).get(1)
    if places is None or len(places.users) != 1 or str(next(iter(places.users)).target) != FINISHED:
        raise Left("what is routed does not end in one npu_moe_finalize_routing")
    finish = next(iter(places.users))
    if any(argument(finish, name) is not None for name in ("skip1", "skip2", "bias")):
        raise Left("something is added to a token's results before they are summed over the ranks")
    between = _between(routing, finish)
    results = argument(finish, "expanded_permuted_rows")
    if str(results.target) == "aten.unsqueeze.default":
        results = results.args[0]
    summed = _sum_behind(finish)
    ranks = ranks_of(summed.group)
    _check_placement(summed.group, ranks, experts, first, end)
    return Layer(routing, between, results, finish, summed, ranks)


def _check_settings(routing: fx.Node) -> None:
    ids, x = _tensor(argument(routing, "expert_idx")), _tensor(argument(routing, "x"))
    if type(ids.shape[1]) is not int:
        raise Left("how many experts a token has is not known")
    if ids.dtype is not torch.int32 or x.dim() != 2:
        raise Left(f"experts are {ids.dtype}, rows have {x.dim()} dimensions: int32 and 2 are taken")
    if argument(routing, "quant_mode") not in (-1, DYNAMIC):
        raise Left(f"npu_moe_init_routing_v2 has quant_mode={argument(routing, 'quant_mode')}, not -1 or {DYNAMIC}")
    wanted = {"drop_pad_mode": 0, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    for name, setting in {**wanted, "row_idx_type": 0, "scale": None, "offset": None}.items():
        if argument(routing, name) != setting:
            raise Left(f"npu_moe_init_routing_v2 has {name}={argument(routing, name)}, not {setting}")


def _check_placement(group: str, ranks: int, experts: int, first: int, end: int) -> None:
    if not ranks:
        raise Left(f"there is no process group {group!r} in this process")
    rank = rank_in(group)
    each, more = divmod(experts, ranks)
    start = rank * each + min(rank, more)
    if (first, end) != (start, start + each + (rank < more)):
        raise Left(f"rank {rank} of {ranks} has experts {first} to {end - 1} of {experts}, not its share of neighbours")


def _between(routing: fx.Node, finish: fx.Node) -> tuple[fx.Node, ...]:
    """What is computed from what was routed, up to its end.

    Raises:
        Left: something else than the end gets to see it, or it is not computed row by row.
    """
    inside: set[fx.Node] = {routing}
    found: list[fx.Node] = []
    for node in routing.graph.nodes:
        if node in inside or not inside.intersection(node.all_input_nodes):
            continue
        if node is finish:
            break
        if node.op == "output" or not _is_by_row(node):
            raise Left(f"{node.target} sees what is routed, and may not compute it row by row")
        inside.add(node)
        found.append(node)
    outside = next((user for node in found for user in node.users if user not in inside and user is not finish), None)
    if outside is not None:
        raise Left(f"{outside.name} reads what the experts compute, too")
    return tuple(found)


def _is_by_row(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or not is_pure(node):
        return False
    name = str(node.target)
    if name == "npu.npu_dynamic_quant.default":
        # with a smoothing for each expert, which it is has to be known of each row
        return argument(node, "group_index") is None and argument(node, "quant_mode") == "pertoken"
    if name in ("aten.slice.Tensor", "aten.split.Tensor"):
        dimension = argument(node, "dim")
        return bool(dimension == -1 or dimension == _tensor(node.args[0]).dim() - 1 > 0)
    return name in BY_ROW or torch.Tag.pointwise in node.target.tags


def _sum_behind(finish: fx.Node) -> Sum:
    """The sum over ranks that the experts' results go into.

    Raises:
        Left: there is none, or something else reads them.
    """
    node, alone = finish, True
    while True:
        if len(node.users) != 1:
            raise Left(f"{node.name} has {len(node.users)} readers, not the sum over the ranks alone")
        (user,) = node.users
        name = str(user.target)
        if name == "vllm.all_reduce.default":
            return Sum((user,), argument(user, 1), alone)
        if name == "npu_fused.reduce_scatter_rows.default":
            return Sum((user,), argument(user, "group"), alone)
        if name == "_c10d_functional.all_reduce.default" and user.args[1] == "sum":
            waits = list(user.users)
            if len(waits) == 1:
                return Sum((user, waits[0]), argument(user, 2), alone)
        by_number = name in ("aten.mul.Tensor", "aten.mul.Scalar") and not isinstance(user.args[1], fx.Node)
        if not by_number and name not in LINEAR and not _is_view(user, node):
            raise Left(f"{user.name} reads the experts' results before they are summed over the ranks")
        node, alone = user, False


def _is_view(user: fx.Node, node: fx.Node) -> bool:
    return str(user.target) in ("aten.view.default", "aten.reshape.default") and user.args[0] is node


def results_of(node: fx.Node) -> dict[int, fx.Node]:
    """The results of a call that are read, by position."""
    return {user.args[1]: user for user in node.users if user.target is operator.getitem}  # type: ignore[misc]


# -- the rewrite -------------------------------------------------------------------------------------------------------


def exchange(graph: fx.Graph, layer: Layer, drop: TokenDrop, record: PassRecord, text: str, name: str = NAME) -> None:
    """Rewrites a layer for the pass of this name; `text` says so in the report."""
    factor = parts(drop, layer.top_k, layer.experts, layer.ranks)
    record.fire(f"{name}: {text}", layer.finish, replaced_by(layer))
    with graph.inserting_before(layer.finish):
        came = list(_dispatched(graph, layer, factor, drop, name))
        copies, routed = _routed(graph, layer, came, name)
        share = call(
            graph,
            torch.ops.npu_fused.all_to_all_combine.default,
            (copies[layer.results], routed[1], came[2], came[3], layer.sum.group, layer.ranks),
            replaces=[layer.finish],
            made_by=name,
        )
    put_in_place(graph, layer, share, name)


def replaced_by(layer: Layer) -> list[fx.Node]:
    """The calls that a rewrite of a layer takes the place of."""
    return [layer.routing, *layer.between, layer.finish, *(layer.sum.calls if layer.sum.alone else ())]


def put_in_place(graph: fx.Graph, layer: Layer, share: fx.Node, name: str) -> None:
    """Puts `share`, this rank's rows of a layer's result, in the place of the sum over the ranks; `name`: the pass."""
    fused = torch.ops.npu_fused
    if layer.sum.alone and layer.sum.scattered:
        whole, old_result = share, layer.sum.calls[-1]
    else:
        target = fused.all_gather_rows.default if layer.sum.alone else fused.unshard_rows.default
        old_result = layer.sum.calls[-1] if layer.sum.alone else layer.finish
        with graph.inserting_before(layer.finish):
            arguments = (share, layer.sum.group, layer.ranks, _row_count(graph, layer, name))
            whole = call(graph, target, arguments, replaces=[old_result], made_by=name)
    old_result.replace_all_uses_with(whole)
    for node in sorted(replaced_by(layer), reverse=True):
        if not node.users:
            graph.erase_node(node)


def _dispatched(graph: fx.Graph, layer: Layer, factor: int, drop: TokenDrop, name: str) -> Iterator[fx.Node]:
    """Calls for what came to this rank: rows, experts; and for where what it sent went: places, scales."""
    x, ids = argument(layer.routing, "x"), argument(layer.routing, "expert_idx")
    settings = (layer.sum.group, layer.ranks, layer.experts, factor, drop.by, drop.renormalise, True, "")
    yield from results(
        graph,
        torch.ops.npu_fused.all_to_all_dispatch.default,
        (x, ids, argument(layer.finish, "scales"), *settings),
        {},
        layer.routing,
        name,
    )


def _routed(
    graph: fx.Graph, layer: Layer, came: list[fx.Node], name: str
) -> tuple[dict[fx.Node, fx.Node], list[fx.Node]]:
    """The experts' calls again, for what came; by the calls they replace. And the results of their routing."""
    first, end = argument(layer.routing, "active_expert_range")
    settings = dict(layer.routing.kwargs)
    settings["active_num"] = -1  # all rows
    settings["expert_num"] = no_expert(layer.experts, layer.ranks) + 1
    settings["active_expert_range"] = [0, end - first]
    routed = list(results(graph, layer.routing.target, (came[0], came[1]), settings, layer.routing, name))
    return repeated(graph, layer, routed, name), routed


def repeated(
    graph: fx.Graph,
    layer: Layer,
    routed: Sequence[fx.Node | None],
    name: str,
    instead: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
) -> dict[fx.Node, fx.Node]:
    """The experts' calls again, for `routed` in the place of the routing's results; by the calls they replace.

    Args:
        instead: more calls that are there already. What only these would read is not repeated.
    """
    copies = {node: new for index, node in results_of(layer.routing).items() if (new := routed[index]) is not None}
    copies |= instead
    for node in layer.between:
        is_read = not node.users or any(user not in copies for user in node.users)
        if node not in copies and layer.routing not in node.all_input_nodes and is_read:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: copies.get(item, item))
            copies[node] = call(graph, node.target, args, kwargs=kwargs, replaces=[node], made_by=name)  # type: ignore[arg-type]
    return copies


def results(
    graph: fx.Graph, target: Any, args: Any, kwargs: dict[str, Any], replaced: fx.Node, name: str
) -> Iterator[fx.Node]:
    """A call with several results, and a call for each of them."""
    made = call(graph, target, args, kwargs=kwargs, replaces=[replaced], made_by=name)
    for index in range(len(value(made))):  # type: ignore[arg-type]
        yield call(graph, operator.getitem, (made, index), replaces=[replaced], made_by=name)


def _row_count(graph: fx.Graph, layer: Layer, name: str) -> object:
    if isinstance(layer.rows, int):
        return layer.rows
    x = argument(layer.routing, "x")
    return call(graph, torch.ops.aten.sym_size.int, (x, 0), replaces=[layer.routing], made_by=name)


def _tensor(node: Any) -> Tensor:
    found = value(node)
    assert isinstance(found, Tensor), f"{node} is no tensor"
    return found
