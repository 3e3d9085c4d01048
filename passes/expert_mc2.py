"""A layer of experts by MC2: CANN's dispatch, which sends and sorts at once, and its combine.

Before and after: expert_communication.py, whose part this is. Where the sum over the ranks was, a rank's rows are
gathered, as behind an all-to-all (token_drop.py).

Where all that the experts do with the rows is to quantize each to int8 by its largest value, in the routing or behind
it, that is done before they are sent, which is half the bytes and the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from npu_compiler.facts.sizes import at_least
from npu_compiler.fusion_kernels.expert_limits import LIMITS
from npu_compiler.fusion_kernels.expert_limits import refusal as limit
from npu_compiler.fusion_kernels.row_collectives import part_of
from npu_compiler.graph.build import call
from npu_compiler.graph.effects import argument
from npu_compiler.graph.groups import group_of, rank_in, ranks_of
from npu_compiler.passes.expert_choice import Step
from npu_compiler.passes.norm_quant import INT8
from npu_compiler.passes.record import PassRecord
from npu_compiler.passes.token_drop import (
    DYNAMIC,
    Layer,
    put_in_place,
    repeated,
    replaced_by,
    results,
    results_of,
)

OPERATORS = tuple(f"npu_fused.mc2_{name}.default" for name in ("dispatch", "dispatch_quant", "combine"))


def refusal(layer: Layer, step: Step, group: str) -> str:
    """Why a layer can't use MC2; empty if it can.

    Args:
        group: name of a process group for MC2 alone; empty: there is none.
    """
    return _refused_group(layer, group) or _refused_sizes(layer, step)


def _refused_group(layer: Layer, group: str) -> str:
    if not group:
        return "it needs a process group for itself, and the option expert_group names none"
    if ranks_of(group) != layer.ranks or rank_in(group) != rank_in(layer.sum.group):
        return f"the group {group!r} has not the ranks of {layer.sum.group!r}, over which experts are spread"
    nodes = layer.routing.graph.nodes
    other = next((node for node in nodes if group_of(node) == group and str(node.target) not in OPERATORS), None)
    return "" if other is None else f"{other.name} communicates in the group {group!r}, which has to be MC2's alone"


def _refused_sizes(layer: Layer, step: Step) -> str:
    x = argument(layer.routing, "x").meta["val"]
    hidden = x.shape[1]
    if type(hidden) is not int:
        return "how many elements a row has is not known"
    limits = LIMITS.get(step.soc)
    tokens = step.most or (layer.rows if isinstance(layer.rows, int) else 0)
    if limits is not None and not tokens:
        tokens = limits.tokens * layer.ranks
        fits = at_least(tokens, layer.rows, "tokens of a step")
        if not fits:
            return f"at most {limits.tokens} tokens a rank are taken, and {fits.text}"
    return limit(step.soc, layer.ranks, layer.experts, layer.top_k, part_of(tokens, layer.ranks), hidden, x.dtype)


def exchange(graph: fx.Graph, layer: Layer, group: str, record: PassRecord, text: str, name: str) -> None:
    """Rewrites a layer for the pass of this name; `text` says so in the report."""
    quantized = _quantized_rows(layer)
    what = f"{text}, rows sent as int8" if quantized is not None else text
    record.fire(f"{name}: {what}", layer.finish, replaced_by(layer))
    fused = torch.ops.npu_fused
    x, ids, weights = (
        argument(layer.routing, "x"),
        argument(layer.routing, "expert_idx"),
        argument(layer.finish, "scales"),
    )
    world: tuple[Any, ...] = (group, layer.ranks, layer.experts)
    with graph.inserting_before(layer.finish):
        target = fused.mc2_dispatch.default if quantized is None else fused.mc2_dispatch_quant.default
        rows, *sent = results(graph, target, (x, ids, *world), {}, layer.routing, name)
        scales = None if quantized is None else sent.pop(0)
        counts, *noted = sent
        if quantized is None or scales is None or quantized is layer.routing:
            copies = repeated(graph, layer, (rows, None, counts, scales), name)
        else:
            of_call = results_of(quantized)
            instead = {of_call[0]: rows, of_call[1]: scales}
            copies = repeated(graph, layer, (None, None, counts, None), name, instead)
        share = call(
            graph,
            fused.mc2_combine.default,
            (copies[layer.results], ids, weights, *noted, *world),
            replaces=[layer.finish],
            made_by=name,
        )
    put_in_place(graph, layer, share, name)


def _quantized_rows(layer: Layer) -> fx.Node | None:
    """The call whose results are the experts' rows in int8, and their scales: the routing, or the only one that reads
    what it sorts. None: they read the rows as they are."""
    if argument(layer.routing, "quant_mode") == DYNAMIC:
        return layer.routing
    rows = results_of(layer.routing).get(0)
    readers = [] if rows is None else list(rows.users)
    if len(readers) != 1 or str(readers[0].target) != "npu.npu_dynamic_quant.default":
        return None
    (reader,) = readers
    plain = all(argument(reader, name) is None for name in ("smooth_scales", "group_index"))
    to_int8 = argument(reader, "dst_type") in (None, *INT8) and argument(reader, "quant_mode") == "pertoken"
    return reader if plain and to_int8 and set(results_of(reader)) == {0, 1} else None
