"""Sums over the ranks of a group, as vLLM and torch write them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from npu_compiler.graph.effects import argument, value
from npu_compiler.graph.groups import ranks_of
from npu_compiler.graph.source import where


@dataclass(frozen=True)
class Sum:
    """A sum over the ranks of a group: the node that has it, what is summed, and the calls that go with it."""

    result: fx.Node
    partial: fx.Node
    group: str
    ranks: int
    nodes: tuple[fx.Node, ...]


def sum_of(node: fx.Node) -> Sum | str:
    """The sum over ranks that `node` is the result of; or why it is none that can be scattered, empty for no sum."""
    target = str(node.target)
    if target == "vllm.all_reduce.default":
        partial, group, nodes = argument(node, 0), argument(node, 1), [node]
    elif target == "_c10d_functional.wait_tensor.default" and _is_sum(node.args[0]):
        start = node.args[0]
        assert isinstance(start, fx.Node)
        if len(start.users) > 1:
            return "the sum is read before it is waited for"
        partial, group, nodes = start.args[0], start.args[2], [start, node]
    else:
        return ""
    if not isinstance(group, str):
        return "the group has no name"
    ranks = ranks_of(group)
    if not ranks:
        return f"there is no process group {group!r} in this process"
    if ranks == 1:
        return f"group {group!r} has one rank"
    found = value(node)
    assert isinstance(found, torch.Tensor), f"{node.name} at {where(node)} is no tensor"
    if found.dim() < 2:
        return f"the sum has {found.dim()} dimensions, rows need two"
    return Sum(node, partial, group, ranks, tuple(nodes))


def _is_sum(node: object) -> bool:
    if not isinstance(node, fx.Node) or str(node.target) != "_c10d_functional.all_reduce.default":
        return False
    return node.args[1] == "sum"
