"""Chooses how the tokens of a layer of experts get to the ranks of their experts, and rewrites the layer for it.

Before, on one of 2 ranks with 2 of 4 experts each: ALLGATHER, where every rank has all tokens ::

    routed = npu.npu_moe_init_routing_v2.default(x, ids, expert_num=4, active_expert_range=[0, 2], ...)
    h = npu.npu_grouped_matmul.default([routed[0]], [w13], group_list=routed[2], ...)
    h = npu_fused.swiglu.default(h[0])
    h = npu.npu_grouped_matmul.default([h], [w2], group_list=routed[2], ...)
    h = aten.unsqueeze.default(h[0], 1)
    y = npu.npu_moe_finalize_routing.default(h, None, None, None, weights, routed[1], None, 3)
    y = vllm.all_reduce.default(y, "tp:0")

After, where ALLTOALL is chosen::

    came = npu_fused.all_to_all_dispatch(x, ids, weights, "tp:0", 2, 4, 20000, "score", False, True, "")
    routed = npu.npu_moe_init_routing_v2.default(came[0], came[1], expert_num=3, active_expert_range=[0, 2], ...)
    h = npu.npu_grouped_matmul.default([routed[0]], [w13], group_list=routed[2], ...)
    h = npu_fused.swiglu.default(h[0])
    h = npu.npu_grouped_matmul.default([h], [w2], group_list=routed[2], ...)
    y = npu_fused.all_to_all_combine(h[0], routed[1], came[2], came[3], "tp:0", 2)
    y = npu_fused.all_gather_rows(y, "tp:0", 2, rows)

Where MC2 is chosen, the routing goes too (expert_mc2.py)::

    came = npu_fused.mc2_dispatch(x, ids, "ep:0", 2, 4)
    h = npu.npu_grouped_matmul.default([came[0]], [w13], group_list=came[1], ...)
    h = npu_fused.swiglu.default(h[0])
    h = npu.npu_grouped_matmul.default([h], [w2], group_list=came[1], ...)
    y = npu_fused.mc2_combine(h[0], ids, weights, came[2], came[3], "ep:0", 2, 4)
    y = npu_fused.all_gather_rows(y, "tp:0", 2, rows)

ALLTOALL is the rewrite of the pass token_drop with buffers in which every routing has room: nothing is dropped. Shapes
follow from the number of tokens, and a captured graph holds it. The choice is made by a table (expert_choice.py) from
what is known about the layer and the chip, or by the option `expert_communication`. Layers that stay as they are have
the choice and its reasons in the report, too.
"""

from __future__ import annotations

from torch import fx

from npu_compiler.config import TokenDrop
from npu_compiler.errors import OptionError
from npu_compiler.graph.effects import argument
from npu_compiler.graph.soc import family
from npu_compiler.graph.source import where
from npu_compiler.passes import expert_mc2, token_drop
from npu_compiler.passes.expert_choice import ALLGATHER, ALLTOALL, MC2, MISSING, Step, choose
from npu_compiler.passes.record import PassRecord

NAME = "expert_communication"
AUTO = "auto"
EXACT = TokenDrop(max_drop_ratio=0.0)


def run(
    module: fx.GraphModule,
    record: PassRecord,
    asked: str = AUTO,
    tokens: int = 0,
    captured: int = 0,
    soc: str | None = None,
    alone: str = "",
) -> None:
    """Rewrites the layers of a program.

    Args:
        asked: a method (expert_choice.METHODS), or "auto" for what the table says.
        tokens: no call of the program has more; 0: only its sizes say. `captured`: the most of a captured graph.
        soc: the family of chips; None: of this process's.
        alone: name of a process group of the experts' ranks that nothing else uses, for MC2; empty: there is none.

    Raises:
        OptionError: the method that was asked for by name can't be used.
    """
    for routing in [node for node in module.graph.nodes if str(node.target) == token_drop.ROUTING]:
        if not _is_spread(routing):
            record.refuse(NAME, routing, "nothing is sent: all experts are on this rank")
            continue
        try:
            layer = token_drop.layer_of(routing)
        except token_drop.Left as reason:
            _refuse_what_was_asked(asked, routing, str(reason))
            record.refuse(NAME, routing, f"{ALLGATHER.upper()} stays: {reason}")
            continue
        chip = family() if soc is None else soc
        step = Step(layer.rows, tokens, layer.ranks, layer.experts, layer.top_k, chip, captured)
        no_mc2 = expert_mc2.refusal(layer, step, alone)
        here = {MC2: no_mc2} if no_mc2 else {}
        choice = choose(step, "" if asked == AUTO else asked, here)
        if missing := {**here, **MISSING}.get(choice.method):
            _refuse_what_was_asked(asked, routing, missing)
        text = f"{choice}, {layer.experts} experts on {layer.ranks} ranks, {layer.top_k} a token"
        if choice.method == ALLTOALL:
            token_drop.exchange(module.graph, layer, EXACT, record, text, NAME)
        elif choice.method == MC2:
            expert_mc2.exchange(module.graph, layer, alone, record, text, NAME)
        else:
            record.refuse(NAME, routing, text)


def _is_spread(routing: fx.Node) -> bool:
    first, end = argument(routing, "active_expert_range") or (0, 0)
    return bool(end) and end - first != argument(routing, "expert_num")


def _refuse_what_was_asked(asked: str, routing: fx.Node, reason: str) -> None:
    """Raises OptionError if a method other than what is there was asked for by name."""
    if asked not in (AUTO, ALLGATHER):
        raise OptionError(
            f"expert_communication={asked!r} can't be done: {reason}",
            where=where(routing),
            rule="a method that is asked for by name is used in every layer whose experts are spread over ranks",
            fix="leave the option out: auto takes the next method that can be used, and the report says why",
        )
