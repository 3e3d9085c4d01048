"""Multiplies attention's output with the whole output projection, on each rank's own rows: no sums over the ranks.

Before, behind the pass `sequence_parallel`::

    partial = aten.mm.default(heads, o_proj)                        # this rank's heads of all rows
    part = npu_fused.reduce_scatter_rows(partial, "tp:0", 2)

After::

    whole = npu_fused.all_gather_rows(o_proj, "tp:0", 2, 4096)      # once (passes/whole_weight.py)
    rows = npu_fused.all_to_all_rows(heads, "tp:0", 2)              # all heads of this rank's rows
    part = aten.mm.default(rows, whole)

A sum that is not scattered becomes the same and a gather::

    y = npu_fused.all_gather_rows(part, "tp:0", 2, rows)

That sends a rank's heads in the place of the whole width: with n ranks, and heads that are as wide as the model, an
n-th of the reduce-scatter. It costs memory: each rank has the whole weight beside its part. vllm-ascend called it
FlashComm2.

The sum over the ranks of x_r @ w_r is the product of all x_r side by side with all w_r one below the other, so it is
the same but for the order in which products are added up: in one product, where before each rank's was rounded.

The option `attention_exchange` switches the pass on, and is the fewest rows at which it is worth it. All ranks have to
take the same way. They do, since they compile the same program but for a bias, which vLLM adds on rank 0 alone: there
this pass leaves the product, the other ranks don't, and the ranks say so at the first call (plan/agreement.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import fx

from npu_compiler.facts.sizes import Fact, at_least, expression, known
from npu_compiler.graph.build import call
from npu_compiler.graph.effects import argument, is_functionalized, value
from npu_compiler.graph.source import operator_name
from npu_compiler.graph.traffic import is_view
from npu_compiler.passes.rank_sums import sum_of
from npu_compiler.passes.record import PassRecord, Saving
from npu_compiler.passes.sequence_parallel import works_by_row
from npu_compiler.passes.whole_weight import Product, asks_for_rows, product_of, unwritten, whole_of_inputs
from npu_compiler.units import in_bytes

NAME = "attention_exchange"
SCATTERED = "npu_fused.reduce_scatter_rows.default"


@dataclass(frozen=True)
class Projection:
    """An output projection and the sum over the ranks behind it.

    Attributes:
        result: the node that has the sum. `nodes`: the calls of the sum.
        scattered: whether each rank gets its rows of it only.
    """

    product: Product
    result: fx.Node
    nodes: tuple[fx.Node, ...]
    group: str
    ranks: int
    scattered: bool


def run(module: fx.GraphModule, record: PassRecord, rows: int = 1) -> None:
    """Rewrites the projections that are proven to have `rows` rows or more."""
    graph = module.graph
    is_left_alone = unwritten(graph)
    for node in list(graph.nodes):
        found = _projection(node)
        if isinstance(found, Projection):
            verdict = is_left_alone(found.product) & _worth_it(found, rows)
            if verdict:
                _rewrite(graph, found, record)
                continue
            found = verdict.text
        if found:
            record.refuse(NAME, node, found)


# -- which calls ------------------------------------------------------------------------------------------------------


def _projection(node: fx.Node) -> Projection | str:
    """The projection whose sum is `node`; or why it is left, empty for what is none."""
    if str(node.target) == SCATTERED:
        partial, group, ranks, nodes, scattered = *(argument(node, index) for index in range(3)), (node,), True
    else:
        found = sum_of(node)
        if isinstance(found, str):
            return ""  # what sums there are, and which of them can't be parted, sequence_parallel says
        partial, group, ranks, nodes, scattered = found.partial, found.group, found.ranks, found.nodes, False
    if not _is_made_of_attention(partial):
        return ""
    product = product_of(partial)
    if isinstance(product, str):
        return product
    readers = [user for user in product.node.users if user not in nodes]
    other = next((user for user in readers if not asks_for_rows(user)), None)
    if other is not None:
        return f"the product is also used by {other.name}"
    return Projection(product, node, nodes, group, ranks, scattered)


def _is_made_of_attention(partial: fx.Node) -> bool:
    """Whether an attention, and behind it only calls that work on each row by itself, leads to what is multiplied."""
    todo, seen = list(_behind_views(partial).all_input_nodes), set()
    while todo:
        node = todo.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        target = node.args[0] if is_functionalized(node) else node.target
        if "attention" in operator_name(target) or _is_written_out(node):
            return True
        if _looks_only(node) or works_by_row(node):
            todo += node.all_input_nodes
    return False


def _is_written_out(node: fx.Node) -> bool:
    """Whether a call is the product of a softmax and values, which AOTAutograd makes of PyTorch's own attention."""
    factor = node.args[0] if str(node.target) in ("aten.matmul.default", "aten.bmm.default") else None
    return isinstance(factor, fx.Node) and "softmax" in operator_name(_behind_views(factor).target)


def _behind_views(node: fx.Node) -> fx.Node:
    while _looks_only(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _looks_only(node: fx.Node) -> bool:
    return is_view(node) or str(node.target) in ("aten.clone.default", "aten._to_copy.default", "aten.expand.default")


# -- whether ----------------------------------------------------------------------------------------------------------


def _worth_it(found: Projection, rows: int) -> Fact:
    count, columns = _shape(found.product.rows)
    _, width = _shape(found.product.node)
    return (
        at_least(count, rows, f"option {NAME}={rows}: rows")
        & known(not at_least(found.ranks - 1, count, "rows"), f"{count} rows for {found.ranks} ranks")
        & known(bool(at_least(width, columns, "columns")), f"{columns} columns would be sent instead of {width}")
    )


def _shape(node: fx.Node) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    found = value(node)
    assert isinstance(found, torch.Tensor)
    rows, columns = found.shape
    return rows, columns


# -- the rewrite ------------------------------------------------------------------------------------------------------


def _rewrite(graph: fx.Graph, found: Projection, record: PassRecord) -> None:
    product, group, ranks = found.product, found.group, found.ranks
    old = [product.node, *found.nodes]
    record.fire(f"{NAME}: {_text(found)}", found.result, old, _saving(found))
    fused = torch.ops.npu_fused
    with graph.inserting_before(product.node):
        whole = whole_of_inputs(graph, product, group, ranks, NAME)
        arguments = (product.rows, group, ranks)
        rows = call(graph, fused.all_to_all_rows.default, arguments, replaces=[found.result], made_by=NAME)
        target = product.node.target
        assert callable(target)
        part = call(graph, target, (rows, whole), replaces=[product.node], made_by=NAME)
        if not found.scattered:
            count: object = _shape(product.rows)[0]
            if not isinstance(count, int):
                size = torch.ops.aten.sym_size.int
                count = call(graph, size, (product.rows, 0), replaces=[found.result], made_by=NAME)
            gathered = (part, group, ranks, count)
            part = call(graph, fused.all_gather_rows.default, gathered, replaces=[found.result], made_by=NAME)
    for user in list(product.node.users):
        if asks_for_rows(user):
            user.replace_input_with(product.node, product.rows)
    found.result.replace_all_uses_with(part)
    for node in reversed(old):
        graph.erase_node(node)
    if product.turned is not None and not product.turned.users:
        graph.erase_node(product.turned)


def _text(found: Projection) -> str:
    (_, columns), (_, width) = _shape(found.product.rows), _shape(found.product.node)
    gathered = "" if found.scattered else f" and {width} gathered"
    whole, part = (in_bytes(found.product.size * count) for count in (found.ranks, 1))
    return (
        f"{columns} columns exchanged{gathered} over {found.ranks} ranks instead of {width} summed, a whole weight of "
        f"{whole} beside the part of {part}"
    )


def _saving(found: Projection) -> Saving:
    """Kernels, and bytes of device memory at each call: fewer of the result, more of the weight."""
    product, ranks = found.product, found.ranks
    tensor = value(product.node)
    assert isinstance(tensor, torch.Tensor)
    written = expression(tensor.shape[0]) * tensor.shape[1] * tensor.element_size()
    fewer = written * (ranks - 1) / ranks if found.scattered else 0
    return Saving(0 if found.scattered else -1, sympy.expand(fewer - product.size * (ranks - 1)))
