"""Keeps each layer's whole weight on one rank, and broadcasts it to the others before the layer runs.

Before, behind the pass `attention_exchange` on two ranks::

    whole = npu_fused.all_gather_columns(o_proj_0, "tp:0", 2)       # once, and kept on each rank
    y = aten.mm.default(rows, aten.t.default(whole))
    whole_1 = npu_fused.all_gather_columns(o_proj_1, "tp:0", 2)     # once, and kept on each rank
    y_1 = aten.mm.default(rows_1, aten.t.default(whole_1))

After::

    whole = npu_fused.all_gather_columns(o_proj_0, "tp:0", 2)       # once, and let go
    whole_1 = npu_fused.all_gather_columns(o_proj_1, "tp:0", 2)     # once, and let go
    own = npu_fused.own_layer([whole, whole_1], "tp:0")             # once: rank 0 keeps the first, rank 1 the second
    came = _c10d_functional.wait_tensor(_c10d_functional.broadcast(own, 0, "tp:0"))
    y = aten.mm.default(rows, aten.t.default(came))
    came_1 = _c10d_functional.wait_tensor(_c10d_functional.broadcast(own, 1, "tp:0"))
    y_1 = aten.mm.default(rows_1, aten.t.default(came_1))

A series is whole weights that are made alike and have one shape: those of the layers of a model. With n ranks each
keeps an n-th of them, and memory for one that is on its way; it is taken when the broadcast begins and given back
behind the layer's product, so a captured graph has it at one address. What is multiplied is the same bits.

The broadcast and the wait for it stand together here. plan/ahead.py moves them apart, to where there is something to
compute meanwhile. vllm-ascend called it layer sharding.

The option `layer_sharding` switches the pass on.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from npu_compiler.graph.build import call
from npu_compiler.graph.effects import argument, value
from npu_compiler.graph.groups import group_of
from npu_compiler.graph.once import ONCE
from npu_compiler.graph.source import operator_name
from npu_compiler.passes.record import PassRecord, Saving
from npu_compiler.units import in_bytes

NAME = "layer_sharding"
GATHERS = ("npu_fused.all_gather_rows.default", "npu_fused.all_gather_columns.default")


@dataclass(frozen=True)
class Whole:
    """A weight that every rank keeps whole.

    Attributes:
        node: its value, computed once. `calls`: what computes it, in order, the gather over the ranks first.
    """

    node: fx.Node
    calls: tuple[fx.Node, ...]

    @property
    def gather(self) -> fx.Node:
        """The call that makes it whole."""
        return self.calls[0]

    @property
    def size(self) -> int:
        """Bytes."""
        tensor = value(self.node)
        assert isinstance(tensor, torch.Tensor)
        return tensor.numel() * tensor.element_size()

    def made_like(self) -> Hashable:
        """Equal for the weights of a series."""
        tensor = value(self.node)
        assert isinstance(tensor, torch.Tensor)
        settings = [(operator_name(node.target), str(_without_nodes(node))) for node in self.calls]
        return *settings, *tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def run(module: fx.GraphModule, record: PassRecord) -> None:
    """Spreads each series of whole weights over the ranks that have them."""
    series: dict[Hashable, list[Whole]] = {}
    for node in module.graph.nodes:
        found = _whole(node)
        if found is not None:
            series.setdefault(found.made_like(), []).append(found)
    for layers in series.values():
        _spread(module.graph, layers, record)


def _whole(node: fx.Node) -> Whole | None:
    """The weight that is a call's result, if it is computed once from a gather over the ranks and nothing else."""
    if not node.meta.get(ONCE):
        return None
    calls = [node]
    while str(calls[0].target) not in GATHERS:
        sources = calls[0].all_input_nodes
        if len(sources) != 1 or sources[0].op != "call_function" or list(sources[0].users) != [calls[0]]:
            return None
        calls.insert(0, sources[0])
    return Whole(node, tuple(calls))


def _without_nodes(node: fx.Node) -> object:
    return fx.node.map_arg((node.args, node.kwargs), lambda item: None)  # type: ignore[arg-type,return-value]


def _spread(graph: fx.Graph, layers: Sequence[Whole], record: PassRecord) -> None:
    group, ranks = group_of(layers[0].gather), int(argument(layers[0].gather, "ranks"))
    kept, size = -(-len(layers) // ranks), layers[0].size
    now, then = in_bytes(len(layers) * size), in_bytes((kept + 1) * size)
    if kept + 1 >= len(layers):
        record.refuse(
            NAME,
            layers[0].node,
            f"{len(layers)} equal weights on {ranks} ranks: {kept} and one on its way take {then} instead of {now}",
        )
        return
    text = f"{len(layers)} weights of {in_bytes(size)} spread over {ranks} ranks, {then} on each instead of {now}"
    saves = Saving(-len(layers), sympy.Integer(-2 * len(layers) * size))
    record.fire(f"{NAME}: {text}", layers[0].node, [layer.node for layer in layers], saves)
    sends = [_sent(graph, layer, group, index % ranks) for index, layer in enumerate(layers)]
    chains = {node for layer in layers for node in layer.calls}
    first = next(node for node in graph.nodes if node.op == "call_function" and node not in chains)
    for start in range(0, len(layers), ranks):
        some = layers[start : start + ranks]
        own = _kept(graph, some, group, first)
        for layer, (send, came) in zip(some, sends[start : start + ranks], strict=True):
            for reader in [user for user in layer.node.users if user not in (own, send)]:
                reader.replace_input_with(layer.node, came)
            send.replace_input_with(layer.node, own)
            del layer.node.meta[ONCE]


def _sent(graph: fx.Graph, layer: Whole, group: str, owner: int) -> tuple[fx.Node, fx.Node]:
    """Adds, in front of a weight's first reader, its broadcast and the wait for it."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    c10d = torch.ops._c10d_functional
    with graph.inserting_before(min(layer.node.users, key=order.__getitem__)):
        send = call(graph, c10d.broadcast.default, (layer.node, owner, group), replaces=[layer.node], made_by=NAME)
        return send, call(graph, c10d.wait_tensor.default, (send,), replaces=[layer.node], made_by=NAME)


def _kept(graph: fx.Graph, layers: Sequence[Whole], group: str, first: fx.Node) -> fx.Node:
    """Adds what a rank keeps of as many layers as there are ranks, in front of `first`, the program's first call. What
    it is computed from goes there too: that depends on parameters alone."""
    for node in (node for layer in layers for node in layer.calls):
        first.prepend(node)
    nodes = [layer.node for layer in layers]
    with graph.inserting_before(first):
        own = call(graph, torch.ops.npu_fused.own_layer.default, (nodes, group), replaces=nodes, made_by=NAME)
    own.meta[ONCE] = True
    return own
