"""Marks what is the same at every call, so that it is computed once: what depends on constants alone; with the option
`freeze`, on parameters and buffers too.

Before::

    steps = aten.arange.default(64, device=npu)
    scaled = aten.mul.Tensor(steps, 0.5)
    y = aten.mul.Tensor(x, scaled)

After (graph/once.py takes the marked call out)::

    y = aten.mul.Tensor(x, scaled_once)      # scaled_once is an input, computed at the first call

The value that is kept is the last that a call computes: views of it are free. It takes memory for good, so it may be
no larger than what it is made from, or than KEPT_BYTES: an expanded or filled tensor is made anew instead. A value that
the caller gets, or that the program writes, is made anew too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from npu_compiler.facts.sizes import Fact, known
from npu_compiler.graph.effects import is_pure, storage, tensors, written_storages
from npu_compiler.graph.once import FROZEN, ONCE
from npu_compiler.graph.source import operator_name
from npu_compiler.graph.traffic import launches, size_in_bytes
from npu_compiler.passes.record import PassRecord, Saving

NAME = "constant_folding"
KEPT_BYTES = 4 << 20
"""As much as the causal mask of CANN's attention, 2048 x 2048 bytes, which a program with `is_causal` makes."""
NAMESPACES = ("aten", "prims", "npu_fused", "vllm_ir")
"""Of operators that depend on their arguments alone. Others may read anything: a step's context, another rank."""


def run(module: fx.GraphModule, record: PassRecord) -> None:
    graph = module.graph
    made_from = _constants(module)
    taken: set[fx.Node] = set()
    lasting = _lasting(graph)
    kept = []
    for node in sorted(made_from, reverse=True):
        if node.op != "call_function" or all(user in made_from for user in node.users):
            continue
        verdict = lasting(node) if launches(node) else known(False, "")
        if verdict:
            verdict = _affordable(node, made_from[node])
        if verdict:
            kept.append(node)
            continue
        del made_from[node]  # now what it is made from may be kept in its place
        if verdict.text:
            record.refuse(NAME, node, verdict.text)
    for node in reversed(kept):
        gone = [item for item in _behind(node) if item.op == "call_function" and item not in taken]
        taken.update(gone)
        record.fire(f"{NAME}: {operator_name(node.target)}", node, gone, Saving.between(gone, ()))
        node.meta[ONCE] = True


def _constants(module: fx.GraphModule) -> dict[fx.Node, frozenset[fx.Node]]:
    """The nodes whose value is the same at every call, each with the stored tensors that it is made from."""
    written = {found for node in module.graph.nodes for found in written_storages(node)}
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in module.graph.nodes:
        if any(storage(tensor) in written for tensor in tensors(node)):
            continue
        if node.op == "get_attr" or (node.op == "placeholder" and node.meta.get(FROZEN)):
            found[node] = frozenset([node])
        elif _depends_on_arguments_alone(node) and all(source in found for source in node.all_input_nodes):
            found[node] = frozenset().union(*(found[source] for source in node.all_input_nodes))
    return found


def _depends_on_arguments_alone(node: fx.Node) -> bool:
    if not is_pure(node):
        return False
    target = node.target
    return not isinstance(target, torch._ops.OpOverload) or target.namespace in NAMESPACES


def _lasting(graph: fx.Graph) -> Callable[[fx.Node], Fact]:
    """Whether the value of a call may be kept from call to call."""
    returned = {storage(tensor) for node in graph.output_node().all_input_nodes for tensor in tensors(node)}
    devices = {tensor.device.type for node in graph.nodes for tensor in tensors(node)}

    def lasting(node: fx.Node) -> Fact:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return known(False, f"{node.name} has several results")
        verdict = known(storage(value) not in returned, f"the caller gets {node.name}, and may write it")
        on_host = value.device.type == "cpu" and devices != {"cpu"}
        return verdict & known(not on_host, f"{node.name} is in host memory, which a captured graph does not read")

    return lasting


def _affordable(node: fx.Node, sources: frozenset[fx.Node]) -> Fact:
    """Whether the memory that a kept value takes is worth it."""
    size = size_in_bytes(node.meta["val"])
    allowed = max(KEPT_BYTES, sum(_stored(source) for source in sources))
    return known(
        isinstance(size, int) and size <= allowed, f"{node.name} would keep {size} bytes, allowed are {allowed}"
    )


def _stored(source: fx.Node) -> int:
    return sum(int(size_in_bytes(tensor)) for tensor in tensors(source))


def _behind(node: fx.Node) -> list[fx.Node]:
    """The node and everything that it is computed from."""
    found, waiting = {node}, [node]
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in found]
        found.update(new)
        waiting += new
    return sorted(found)
