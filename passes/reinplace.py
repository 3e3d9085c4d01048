"""Turns functional copies back into writes in place.

AOTAutograd wraps a custom operator that mutates (`op(x!, y)`) as `auto_functionalized_v2(op, y, _all_bases=[x])`, which
stands for clone, call, use the clone. This pass proves where the clone is needless and puts the plain call back.

Before::

    out = aten.empty.memory_format([8, 64])
    pair = auto_functionalized_v2(attention_with_output, q, k, v, _output_base_index=0, _all_bases=[out])
    result = operator.getitem(pair, 1)

After::

    out = aten.empty.memory_format([8, 64])
    attention_with_output(q, k, v, out)

The analysis is Inductor's (`reinplace_inplaceable_ops`, `decompose_auto_functionalized`). It asks whether a later call
reads the old value, but not whether the same call does through another argument; `_separate_reads` closes that hole by
giving such a call a copy to read.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from npu_compiler.graph.build import call
from npu_compiler.graph.effects import is_functionalized, storage, tensors, written_storages
from npu_compiler.graph.spec import refresh_aliases
from npu_compiler.passes.record import PassRecord

NAME = "reinplace"
aten = torch.ops.aten
SCATTERS = (
    aten.index_copy.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    aten.as_strided_scatter.default,
    aten.diagonal_scatter.default,
)
"""Functional writes that the analysis knows in another form."""


def run(module: fx.GraphModule, record: PassRecord) -> None:
    from torch._inductor.fx_passes.post_grad import decompose_auto_functionalized
    from torch._inductor.fx_passes.reinplace import inplaceable_ops, reinplace_inplaceable_ops
    from torch._inductor.fx_utils import FakeTensorUpdater
    from torch._inductor.virtualized import V

    graph = module.graph
    mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes])
    if mode is None:  # a program over sizes only writes nothing
        return
    functional = {node: str(node.target) for node in graph.nodes}
    kept = _keep_outputs(graph, inplaceable_ops)
    index_copies = graph.find_nodes(op="call_function", target=aten.index_copy.default)
    dimensions = {node: _as_index_put(node) for node in index_copies}
    for node in list(graph.nodes):
        if is_functionalized(node):
            _separate_reads(graph, node, _written(node), record)
        elif node.target in inplaceable_ops:
            positions = inplaceable_ops[node.target].mutated_args
            _separate_reads(graph, node, [node.args[position] for position in positions], record)
    with V.set_fake_mode(mode):
        reinplace_inplaceable_ops(FakeTensorUpdater(module), graph)
    for node, dimension in dimensions.items():
        _as_index_copy(node, dimension)
    for node in graph.nodes:
        if is_functionalized(node):
            _note(node, record)
        elif node in functional and str(node.target) != functional[node]:
            record.fire(f"{NAME}: {functional[node]}", node, [node])
    with V.set_fake_mode(mode):
        decompose_auto_functionalized(graph)
    for node in list(graph.nodes):
        if node.target is aten.copy_.default and node.args[0] is node.args[1]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _drop_needless(graph, kept, record)


def _keep_outputs(graph: fx.Graph, inplaceable_ops: Container[Any]) -> list[fx.Node]:
    """Clones, where they are made, the outputs that a write in place may leave in an input's memory, which the program
    writes again at its end: `x[0] = 1; y = x.clone(); x[0] = 2; return y` must return neither x nor what x is then."""
    inputs = _storages(graph.find_nodes(op="placeholder"))
    written = _storages(node for node in graph.nodes if _may_be_in_place(node, inplaceable_ops)) - inputs
    output = graph.output_node()
    copies: dict[fx.Node, fx.Node] = {}
    for node in output.all_input_nodes:
        if _storages([node]) & written:
            with graph.inserting_after(node):
                copies[node] = call(graph, aten.clone.default, (node,), replaces=[node], made_by=NAME)
    output.args = fx.node.map_arg(output.args, lambda node: copies.get(node, node))
    return list(copies.values())


def _may_be_in_place(node: fx.Node, inplaceable_ops: Container[Any]) -> bool:
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return is_functionalized(node.args[0])
    return node.target in inplaceable_ops or node.target in SCATTERS


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    return {storage(tensor) for node in nodes for tensor in tensors(node)}


def _drop_needless(graph: fx.Graph, copies: Iterable[fx.Node], record: PassRecord) -> None:
    """Drops those of `_keep_outputs`'s clones whose source is the program's own and is not written any more."""
    refresh_aliases(graph)
    inputs = _storages(graph.find_nodes(op="placeholder"))
    for copy in copies:
        source = copy.args[0]
        assert isinstance(source, fx.Node)
        shared = _storages([source])
        if shared & inputs or any(written_storages(node) & shared for node in _behind(copy)):
            record.refuse(NAME, source, "an output became an input's memory, or is written again; it got a copy")
        else:
            copy.replace_all_uses_with(source)
            graph.erase_node(copy)


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    while node.next.op != "root":
        node = node.next
        yield node


def _as_index_put(node: fx.Node) -> int:
    """Makes an index_copy an equal index_put, which Inductor's analysis knows; returns the dimension.

    transformers' static KV cache is written by index_copy_; left functional, it would be copied whole at every token.
    """
    source, dimension, index, values = node.args
    dimension %= max(source.meta["val"].dim(), 1)
    node.target = aten.index_put.default
    node.args = (source, [None] * dimension + [index], values)
    return dimension


def _as_index_copy(node: fx.Node, dimension: int) -> None:
    """Takes `_as_index_put` back; what was found to be in place stays in place."""
    source, indices, values = node.args
    in_place = node.target is not aten.index_put.default
    node.target = aten.index_copy_.default if in_place else aten.index_copy.default
    node.args = (source, dimension, indices[-1], values)


def _note(node: fx.Node, record: PassRecord) -> None:
    """Notes what Inductor's analysis decided: it leaves the arguments that still need a clone in the node's meta."""
    operator_name = str(node.args[0])
    cloned = node.meta.get("only_clone_these_tensors")
    if cloned is None or len(cloned):
        count = "every" if cloned is None else len(cloned)
        record.refuse(
            f"{NAME}: {operator_name}", node, f"{count} written argument(s) cloned: the old value is read later"
        )
    else:
        record.fire(f"{NAME}: {operator_name}", node, [node])


def _separate_reads(graph: fx.Graph, node: fx.Node, written: list[Any], record: PassRecord) -> None:
    """Gives `node` a copy of every argument that it reads and that shares memory with one it writes."""
    written = [base for base in written if isinstance(base, fx.Node)]
    positions = {id(base) for base in written}
    done: dict[fx.Node, fx.Node] = {}

    def separate(arg: fx.Node) -> fx.Node:
        if not any(_shares(arg, base) for base in written):
            return arg
        if arg not in done:
            with graph.inserting_before(node):
                done[arg] = call(graph, aten.clone.default, (arg,), replaces=[arg], made_by=NAME)
            record.refuse(NAME, node, f"{arg.name} is read from memory that the same call writes; it got a copy")
        return done[arg]

    if is_functionalized(node):
        names = _written_names(node)
        node.kwargs = {
            name: value if name in names else fx.node.map_arg(value, separate) for name, value in node.kwargs.items()
        }
    else:
        first = next(index for index, arg in enumerate(node.args) if id(arg) in positions)
        node.args = tuple(
            arg if index == first else fx.node.map_arg(arg, separate) for index, arg in enumerate(node.args)
        )


def _written_names(node: fx.Node) -> set[str]:
    if "_all_bases" in node.kwargs:
        return {"_all_bases"}
    schema = node.args[0]._schema  # type: ignore[union-attr]
    return {arg.name for arg in schema.arguments if arg.alias_info is not None and arg.alias_info.is_write}


def _written(node: fx.Node) -> list[Any]:
    found: list[Any] = []
    for name in _written_names(node):
        value = node.kwargs.get(name)
        found += value if isinstance(value, (list, tuple)) else [value]
    return found


def _shares(read: fx.Node, base: fx.Node) -> bool:
    """Whether the two may overlap in memory; unknown counts as yes."""
    from torch._C._dynamo.guards import compute_overlapping_tensors

    left, right = list(tensors(read)), list(tensors(base))
    if not any(storage(one) == storage(other) for one in left for other in right):
        return False
    try:
        return bool(compute_overlapping_tensors([*left, *right]))
    except GuardOnDataDependentSymNode:
        return True
