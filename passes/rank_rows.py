"""Rows that the ranks of a group put together from their parts, and cut into them, as vLLM and torch write it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from npu_compiler.facts.sizes import at_least
from npu_compiler.graph.effects import argument, value
from npu_compiler.graph.groups import ranks_of


@dataclass(frozen=True)
class Gather:
    """Rows put together: the node that has them all, a rank's part of them, and the calls that go with it.

    Each rank has ceil(rows / ranks) of them, in the order of the ranks; what the last ones have beyond the rows is cut
    off.
    """

    result: fx.Node
    part: fx.Node
    group: str
    ranks: int
    nodes: tuple[fx.Node, ...]


def gather_of(node: fx.Node) -> Gather | str:
    """The gather that `node` has the rows of; or why it is none whose parts can be worked on, empty for no gather."""
    head = _is_head(node)
    source = node.args[0] if head else node
    if not isinstance(source, fx.Node):
        return ""
    found = _gathered(source)
    if found is None:
        return ""
    if head and len(source.users) > 1:
        return "what is gathered is read before filled-up rows are cut off"
    if not head and any(_is_head(user) for user in source.users):
        return ""  # the slice has the rows
    part, group, calls = found
    ranks = ranks_of(group)
    rows, own = (_rows(item) for item in (node, part))
    if ranks < 2 or rows is None or own is None:
        return ""
    whole = own * ranks
    if not (
        at_least(whole, rows, "gathered rows") and at_least(rows + ranks - 1, whole, "rows and the filled-up ones")
    ):
        return f"parts of {own} rows are not known to be {rows} divided by {ranks}, rounded up"
    return Gather(node, part, group, ranks, (*calls, node) if head else calls)


def cut_of(node: fx.Node, group: str) -> fx.Node | None:
    """The whole rows that `node` is this rank's part of, in a group of ranks; None for anything else."""
    target = str(node.target)
    # vLLM's operator names no group: it is always that of tensor parallelism.
    ours = target == "vllm.sequence_parallel_chunk_impl.default" and group.partition(":")[0] == "tp"
    if ours or (target == "npu_fused.shard_rows.default" and argument(node, "group") == group):
        (whole,) = node.all_input_nodes
        return whole
    return None


def _gathered(node: fx.Node) -> tuple[fx.Node, str, tuple[fx.Node, ...]] | None:
    """What a call puts together along the rows, in which group, and the calls that do it."""
    target = str(node.target)
    if target == "vllm.all_gather.default":
        part, group = argument(node, 0), argument(node, "group_name")
        return (part, group, (node,)) if argument(node, 1) == 0 else None
    if target == "_c10d_functional.wait_tensor.default":
        start = node.args[0]
        if (
            isinstance(start, fx.Node)
            and str(start.target) == "_c10d_functional.all_gather_into_tensor.default"
            and len(start.users) == 1
        ):
            part, group = start.args[0], argument(start, 2)
            assert isinstance(part, fx.Node)
            return part, group, (start, node)
    return None


def _is_head(node: fx.Node) -> bool:
    """Whether a call takes the first rows of something."""
    if str(node.target) != "aten.slice.Tensor":
        return False
    dim, start, step = (argument(node, name) for name in ("dim", "start", "step"))
    return dim == 0 and start in (0, None) and step == 1


def _rows(node: fx.Node) -> int | torch.SymInt | None:
    found = value(node)
    return found.shape[0] if isinstance(found, torch.Tensor) and found.dim() >= 2 else None
