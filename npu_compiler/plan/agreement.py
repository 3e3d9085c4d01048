"""What the ranks of a group have to agree on before they run a program together.

Ranks that call different collectives, or the same ones in another order, wait for one another until a timeout says
nothing about the cause. And what `sequence_parallel` makes of a program is exact only if some inputs are the same on
all ranks. Both are compared over the ranks, once, in front of a program's first call.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.distributed_c10d import _resolve_process_group

from npu_compiler.errors import RankError
from npu_compiler.facts.sizes import expression
from npu_compiler.graph.effects import tensors, value
from npu_compiler.graph.groups import group_of, ranks_of
from npu_compiler.graph.source import where
from npu_compiler.plan.engines import Engine, engine_of
from npu_compiler.plan.first_call import before_first

PARTS = frozenset(
    f"npu_fused::{name}"
    for name in ("reduce_scatter_rows", "shard_rows", "all_to_all_combine", "all_to_all_rows", "mc2_combine")
)
FILLED_UP = "npu_fused::unshard_rows"
ALONE = ("npu_fused.mc2_dispatch", "npu_fused.mc2_combine")
"""Whose group may have nothing else communicate in it."""


@dataclass(frozen=True)
class Planned:
    """What one rank has planned for a group.

    Attributes:
        collectives: operator, dtype and shape of each, in order.
        places: where in the model each is.
        equal: which inputs have to be equal: position and name.
    """

    collectives: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    equal: tuple[tuple[int, str], ...] = ()


def planned(graph: fx.Graph) -> dict[str, Planned]:
    """What a program asks of each group of ranks, by the group's name."""
    names: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        group = _collective(node)
        if group:
            names.setdefault(group, []).append(node)
    inputs = {node: index for index, node in enumerate(graph.find_nodes(op="placeholder"))}
    return {
        group: Planned(
            tuple(map(_text, nodes)),
            tuple(map(where, nodes)),
            tuple((inputs[node], node.name) for node in sorted(_beside_parts(graph, group))),
        )
        for group, nodes in names.items()
    }


def agreed(call: Callable[..., Any], plans: Mapping[str, Planned]) -> Callable[..., Any]:
    """`call`, which at its first call compares over the ranks what they planned; `call` itself where nothing is sent.
    What MC2's group has is compared in another group of the same ranks: behind the experts the program gathers in one.

    Args:
        plans: of this rank, by group (planned).

    Raises:
        RankError: from the call, on all ranks: they differ.
    """
    shared = {group: plan for group, plan in plans.items() if ranks_of(group) > 1}
    if not shared:
        return call

    def check(args: Sequence[Any]) -> bool:
        for group, plan in sorted(shared.items()):
            over = _talk_in(group, shared)
            if over:
                compare(group, plan, args, over)
        return True

    return before_first(call, check)


def _talk_in(group: str, plans: Mapping[str, Planned]) -> str:
    """The group in which a group's ranks compare their plans: itself, or another one of the same ranks where it may
    have nothing but the program's own calls; empty if there is none."""
    if not any(text.startswith(ALONE) for text in plans[group].collectives):
        return group
    ranks = dist.get_process_group_ranks(_resolve_process_group(group))
    others = (name for name in sorted(plans) if not any(text.startswith(ALONE) for text in plans[name].collectives))
    return next((o for o in others if dist.get_process_group_ranks(_resolve_process_group(o)) == ranks), "")


def compare(group: str, plan: Planned, args: Sequence[Any], over: str = "") -> None:
    """Compares this rank's plan with those of the others; all of the group's ranks have to call it.

    Args:
        over: the group to do it in; empty: the group itself.

    Raises:
        RankError: they differ; names the first two ranks that do, and what differs first.
    """
    handle = _resolve_process_group(over or group)
    mine = (plan, [_digest(args[index]) for index, _ in plan.equal])
    found: list[Any] = [None] * handle.size()
    dist.all_gather_object(found, mine, group=handle)
    for rank, (other, _) in enumerate(found[1:], start=1):
        _same_plan(group, found[0][0], other, rank)  # of all ranks, before anything is read of one
    for rank, (_, digests) in enumerate(found[1:], start=1):
        for (_, name), left, right in zip(plan.equal, found[0][1], digests, strict=True):
            if left != right:
                raise RankError(
                    f"input {name} is not the same on ranks 0 and {rank} of group {group!r}",
                    rule="where each rank computes its part of the rows, what stands beside them is the same on all",
                    fix="leave out the option that parts them: sequence_parallel, attention_exchange, token_drop or "
                    "expert_communication",
                )


def _same_plan(group: str, first: Planned, other: Planned, rank: int) -> None:
    pairs = itertools.zip_longest(first.collectives, other.collectives, fillvalue="none")
    for index, (left, right) in enumerate(pairs):
        if left != right:
            longer = first if len(first.places) > index else other
            raise RankError(
                f"ranks 0 and {rank} of group {group!r} planned different collectives: number {index + 1} is {left} on "
                f"rank 0 and {right} on rank {rank}",
                where=longer.places[index],
                rule="all ranks of a group call the same collectives in the same order",
                fix="give all ranks the same model, options, versions and sizes; `npu-compiler diff` compares bundles",
            )


def _collective(node: fx.Node) -> str:
    """The name of the group that a call communicates with; empty for other calls."""
    return group_of(node) if node.op == "call_function" and engine_of(node) is Engine.LINK else ""


def _text(node: fx.Node) -> str:
    """A collective as text that is equal on all ranks: symbols have other names on each. Of ours with its settings, on
    which the number of rows that it sends may depend."""
    found = next(tensors(node), None)
    shape = "" if found is None else f" {str(found.dtype).removeprefix('torch.')}[{_shape(found)}]"
    settings = [str(item) for item in node.args if type(item) in (int, bool, str)] if _is_ours(node) else []
    return " ".join([f"{node.target}{shape}", *filter(None, settings)])


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "npu_fused"


def _shape(tensor: torch.Tensor) -> str:
    return ", ".join(str(size) if expression(size).is_Integer else "*" for size in tensor.shape)


def _beside_parts(graph: fx.Graph, group: str) -> set[fx.Node]:
    """The program's inputs that meet a rank's part of the rows, or are cut into parts."""
    parts: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in graph.nodes:
        name = _name(node)
        if name in PARTS and group_of(node) == group:
            parts.add(node)
            if name == "npu_fused::shard_rows":
                found |= set(_inputs(node.all_input_nodes, parts))
        elif not _ends_parts(node) and parts.intersection(node.all_input_nodes):
            parts.add(node)
            found |= set(_inputs([item for item in node.all_input_nodes if item not in parts], parts))
    return found


def _inputs(nodes: Sequence[fx.Node], parts: set[fx.Node]) -> Iterator[fx.Node]:
    """The tensors among a program's inputs that `nodes` are made of, but for what came from other ranks."""
    todo, seen = list(nodes), set()
    while todo:
        node = todo.pop()
        if node in seen or node in parts or _ends_parts(node):
            continue
        seen.add(node)
        if node.op == "placeholder" and isinstance(value(node), torch.Tensor):
            yield node
        todo += node.all_input_nodes


def _ends_parts(node: fx.Node) -> bool:
    """Whether a call's result is no part of the rows any more: what is sent is the business of who receives it."""
    return _name(node) == FILLED_UP or bool(_collective(node))


def _name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _digest(given: Any) -> str:
    if not isinstance(given, torch.Tensor):
        return repr(given)
    host = given.detach().cpu().contiguous().view(-1).view(torch.uint8) if given.numel() else given.cpu()
    return hashlib.blake2b(host.numpy().tobytes(), digest_size=16).hexdigest() + str(tuple(given.shape))
