"""Collectives of a program that runs alone: their order, and calls that take their place.

A replay has one rank. Each collective is replaced by what it gives where all ranks have the same values, so that a
program of many ranks runs without them: passes see how many ranks the groups have (graph/groups.py), and nothing is
sent. What other ranks rely on is the order in which a rank calls its collectives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from npu_compiler.errors import OptionError
from npu_compiler.graph.build import call
from npu_compiler.graph.effects import argument, tensors
from npu_compiler.graph.groups import group_of
from npu_compiler.graph.source import where
from npu_compiler.graph.spec import refresh_aliases
from npu_compiler.plan.engines import Engine, engine_of

aten = torch.ops.aten


def in_order(graph: fx.Graph) -> list[str]:
    """Names of the collectives, in the order in which they are called."""
    return [node.name for node in _collectives(graph)]


def disorder(graph: fx.Graph, expected: list[str]) -> str:
    """What is wrong with the order of a rewritten program's collectives; empty if nothing is.

    Args:
        expected: the lowered program's (in_order).
    """
    position = {name: index for index, name in enumerate(expected)}
    last, before = -1, ""
    for node in _collectives(graph):
        origin = node.meta.get("npu_origin") or {"nodes": ()}
        known = [position[name] for name in (node.name, *origin["nodes"]) if name in position]
        if not known:
            continue
        if min(known) < last:
            return (
                f"{expected[min(known)]} is called behind {before}, in the lowered program before it: ranks that "
                f"differ in that wait for one another ({where(node)})"
            )
        last, before = max(known), expected[max(known)]
    return ""


def replace(module: fx.GraphModule, ranks: int, groups: Mapping[str, tuple[int, int]] = MappingProxyType({})) -> None:
    """Puts calls that need no other rank in the place of collectives.

    Args:
        ranks: how many there are; the size of a group that is not among `groups`.
        groups: the process's number in a group, and how many ranks that has, by name.

    Raises:
        OptionError: a call needs what other ranks have.
    """
    replaced = False
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        alone = _ALONE.get(node.target._schema.name)
        if alone is None:
            _refuse_others(node)
            continue
        _, size = groups.get(group_of(node), (0, ranks))
        with module.graph.inserting_before(node):
            new = alone(functools.partial(_add, module.graph, node), node, size)
        if new not in node.all_input_nodes:  # a wait is its argument
            new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
        replaced = True
    if replaced:
        refresh_aliases(module.graph)
        module.recompile()


def _refuse_others(node: fx.Node) -> None:
    """A call that names a group, and has nothing that takes its place."""
    if group_of(node):
        made_by = (node.meta.get("npu_origin") or {"pass": ""})["pass"]
        without = f"leave its pass out: --option 'disabled_passes=[\"{made_by}\"]'"
        raise OptionError(
            f"{node.target} gives each rank what others have, and can't be run alone",
            where=where(node),
            rule="a replay has one rank: a collective is replaced by what it gives where all ranks have equal values",
            fix=without if made_by else "look at other graphs",
        )


def _add(graph: fx.Graph, node: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    return call(graph, target, args, replaces=[node], made_by="alone")


def _collectives(graph: fx.Graph) -> list[fx.Node]:
    found = [node for node in graph.nodes if node.op == "call_function" and engine_of(node) is Engine.LINK]
    return [node for node in found if "wait_tensor" not in str(node.target) and list(tensors(node))]


Add = Callable[..., fx.Node]
Alone = Callable[[Add, fx.Node, int], fx.Node]


def _summed(add: Add, node: fx.Node, ranks: int) -> fx.Node:
    return add(aten.mul.Tensor, node.args[0], ranks if _sums(node) else 1)


def _summed_in_place(add: Add, node: fx.Node, ranks: int) -> fx.Node:
    return add(aten.mul_.Tensor, node.args[0], ranks if _sums(node) else 1)


def _gathered(add: Add, node: fx.Node, ranks: int) -> fx.Node:
    count: Any = node.args[1]
    return add(aten.cat.default, [node.args[0]] * count, 0)


def _scattered(add: Add, node: fx.Node, ranks: int) -> fx.Node:
    (result,) = tensors(node)
    part = add(aten.slice.Tensor, node.args[0], 0, 0, result.shape[0])
    return add(aten.mul.Tensor, part, node.args[2] if _sums(node) else 1)


def _gathered_along(add: Add, node: fx.Node, ranks: int) -> fx.Node:
    dim, count = argument(node, "dim"), argument(node, "world_size")
    return add(aten.cat.default, [node.args[0]] * count, dim)


def _scattered_along(add: Add, node: fx.Node, ranks: int) -> fx.Node:
    (result,) = tensors(node)
    dim, count = argument(node, "dim"), argument(node, "world_size")
    part = add(aten.slice.Tensor, node.args[0], dim, 0, result.shape[dim])
    return add(aten.mul.Tensor, part, count)


def _copied(add: Add, node: fx.Node, ranks: int) -> fx.Node:
    return add(aten.clone.default, node.args[0])


def _waited(add: Add, node: fx.Node, ranks: int) -> fx.Node:
    (source,) = node.args
    assert isinstance(source, fx.Node)
    return source


def _product_summed(add: Add, node: fx.Node, ranks: int) -> fx.Node:
    x, weight, bias, *_ = node.args
    product = add(aten.matmul.default, x, weight)
    if bias is not None:
        product = add(aten.add.Tensor, product, bias)
    return add(aten.mul.Tensor, product, ranks)


def _rows_summed(add: Add, node: fx.Node, ranks: int) -> fx.Node:
    """All rows instead of a rank's: what is done to them before they are gathered is done to each row by itself."""
    return add(aten.mul.Tensor, node.args[0], ranks)


def _rows_gathered(add: Add, node: fx.Node, ranks: int) -> fx.Node:
    return add(aten.slice.Tensor, node.args[0], 0, 0, node.args[3])


def _columns_gathered(add: Add, node: fx.Node, ranks: int) -> fx.Node:
    """All rows, as of `_rows_summed`."""
    count: Any = node.args[2]
    return add(aten.cat.default, [node.args[0]] * count, 1)


def _sums(node: fx.Node) -> bool:
    """Whether a reduction is a sum; vLLM's name no other."""
    return len(node.args) < 3 or node.args[1] == "sum"


_ALONE: dict[str, Alone] = {
    "_c10d_functional::all_reduce": _summed,
    "_c10d_functional::all_reduce_": _summed_in_place,
    "_c10d_functional::all_gather_into_tensor": _gathered,
    "_c10d_functional::reduce_scatter_tensor": _scattered,
    "_c10d_functional::all_to_all_single": _copied,
    "_c10d_functional::broadcast": _copied,
    "_c10d_functional::wait_tensor": _waited,
    "vllm::all_reduce": _summed,
    "vllm::all_gather": _gathered_along,
    "vllm::reduce_scatter": _scattered_along,
    "npu_fused::matmul_all_reduce": _product_summed,
    "npu_fused::reduce_scatter_rows": _rows_summed,
    "npu_fused::all_gather_rows": _rows_gathered,
    "npu_fused::shard_rows": _copied,
    "npu_fused::all_to_all_rows": _columns_gathered,
    "npu_fused::all_gather_columns": _columns_gathered,
}
