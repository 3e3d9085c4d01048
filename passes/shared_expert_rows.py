"""Computes a shared expert on each rank's own rows, with whole weights: it needs no sum over the ranks.

Before, behind the pass `sequence_parallel`::

    whole = npu_fused.all_gather_rows(normed, "tp:0", 2, rows)
    h = npu_fused.swiglu(aten.mm.default(whole, gate_up))           # this rank's part of the shared expert, all rows
    total = aten.add.Tensor(aten.mm.default(h, down), routed)
    part = npu_fused.reduce_scatter_rows(total, "tp:0", 2)

After::

    all_gate_up, all_down = ...                                     # once (passes/whole_weight.py)
    h = npu_fused.swiglu(aten.mm.default(normed, all_gate_up))      # the whole shared expert, this rank's rows
    alone = npu_fused.reduce_scatter_rows(routed, "tp:0", 2)
    part = aten.add.Tensor(aten.mm.default(h, all_down), alone)

The products are as large as before: fewer rows of more columns. What it is for is the sum that is left. It has the
routed experts alone, and where their tokens are exchanged (expert_communication, token_drop), their result comes back
by rows and nothing is summed; with a shared expert in it, the sum has to stay. It costs memory: each rank has the whole
shared expert beside its part. vllm-ascend calls it shared-expert DP.

The sum over the ranks of act(x @ a_r) @ b_r is act(x @ a) @ b with all a_r side by side and all b_r one below the
other, whatever they are, if `act` computes each column by itself, and gate and up are kept apart. A factor of each row,
such as a gate's, is computed on the rows too; its weights have to be the same on all ranks, which compare them at the
first call (plan/agreement.py).

Where the ranks do not divide the rows, the last ones have rows that nobody reads: what they hold is another value than
before, which was zero.

The option `shared_expert_rows` switches the pass on, and is the fewest rows at which it is worth it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from npu_compiler.facts.sizes import Fact, at_least, equal, known
from npu_compiler.graph.build import call
from npu_compiler.graph.effects import argument, value
from npu_compiler.graph.once import is_lasting
from npu_compiler.passes.record import PassRecord
from npu_compiler.passes.sequence_parallel import works_by_row
from npu_compiler.passes.token_drop import FINISHED
from npu_compiler.passes.whole_weight import (
    TURNED,
    Product,
    asks_for_rows,
    product_of,
    unwritten,
    whole_of_inputs,
    whole_of_outputs,
)
from npu_compiler.units import in_bytes

NAME = "shared_expert_rows"
SCATTERED, GATHERED = "npu_fused.reduce_scatter_rows.default", "npu_fused.all_gather_rows.default"
OF_HALVES = ("npu_fused.swiglu.default", "npu.npu_swiglu.default", "npu_fused.geglu.default")
"""Activations of the two halves of their argument's columns."""
CASTS = ("aten._to_copy.default", "prims.convert_element_type.default")
OF_ENGINES = (
    "vllm.reduce_scatter.default",
    "_c10d_functional.reduce_scatter_tensor.default",
    "_c10d_functional.wait_tensor.default",
)
"""How data-parallel engines, which gather their tokens for the experts, sum up the results."""


class Left(Exception):
    """Why a shared expert is left as it is."""


@dataclass(frozen=True)
class Chain:
    """A shared expert: act(rows @ first) @ second, and what its result is multiplied by.

    Attributes:
        blocks: how many parts of the first product's columns the activation tells apart.
        path: the calls from the first product to the end, of which each is read by the next one alone.
    """

    first: Product
    second: Product
    blocks: int
    path: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Shared:
    """A shared expert in the sum over the ranks.

    Attributes:
        chain: what is computed. `calls`: it and its factors, in order: what is done on a rank's rows.
        gather: gives the rows. `scatter`: the sum. `total`: what is summed, of `term` and `routed`.
    """

    chain: Chain
    calls: tuple[fx.Node, ...]
    gather: fx.Node
    scatter: fx.Node
    total: fx.Node
    term: fx.Node
    routed: fx.Node

    @property
    def group(self) -> str:
        """The group of ranks."""
        return str(argument(self.scatter, "group"))

    @property
    def ranks(self) -> int:
        """How many they are."""
        return int(argument(self.scatter, "ranks"))


def run(module: fx.GraphModule, record: PassRecord, rows: int = 1) -> None:
    """Rewrites the shared experts of programs that are proven to have `rows` rows or more."""
    graph = module.graph
    is_left_alone = unwritten(graph)
    for scatter in [node for node in graph.nodes if str(node.target) == SCATTERED]:
        try:
            found = _shared(scatter)
        except Left as reason:
            record.refuse(NAME, scatter, str(reason))
            continue
        if found is None:
            continue
        verdict = (
            at_least(_tensor(found.gather).shape[0], rows, f"option {NAME}={rows}: rows")
            & is_left_alone(found.chain.first)
            & is_left_alone(found.chain.second)
        )
        if verdict:
            _rewrite(graph, found, record)
        else:
            record.refuse(NAME, scatter, verdict.text)


# -- which calls ------------------------------------------------------------------------------------------------------


def _shared(scatter: fx.Node) -> Shared | None:
    """The shared expert in a scattered sum; None where the sum has no routed experts and another term.

    Raises:
        Left: there is another term, and it is no shared expert that could be computed on a rank's rows.
    """
    total = scatter.args[0]
    if not isinstance(total, fx.Node) or str(total.target) != "aten.add.Tensor" or total.kwargs:
        return None
    terms = [item for item in total.args if isinstance(item, fx.Node)]
    routed = [item for item in terms if _is_of_experts(item)]
    if len(terms) != 2 or len(routed) != 1:
        return None
    (term,) = (item for item in terms if item is not routed[0])
    if str(routed[0].target) != FINISHED:
        raise Left(f"{routed[0].name} changes the routed experts' result, so its sum would stay where it is exchanged")
    if not _alike(term, routed[0]):
        raise Left(f"{term.name} and {routed[0].name} are not alike")
    _read_by(total, scatter)
    chain = _chain(term)
    if chain is None:
        raise Left(f"{term.name} is not made of two products with an activation between them")
    for node, reader in zip(chain.path, (*chain.path[1:], total), strict=True):
        _read_by(node, reader)
    gather = chain.first.rows
    if str(gather.target) != GATHERED or argument(gather, "group") != argument(scatter, "group"):
        raise Left(f"{gather.name} is not gathered from the rows of the same ranks (option sequence_parallel)")
    calls = _calls(term, gather, chain)
    return Shared(chain, calls, gather, scatter, total, term, routed[0])


def _is_of_experts(node: fx.Node) -> bool:
    """Whether a value is the result of routed experts, perhaps times a number, cast, or summed over engines."""
    while str(node.target) in ("aten.mul.Tensor", "aten.mul.Scalar", *CASTS, "aten.view.default", *OF_ENGINES):
        if len(node.all_input_nodes) != 1:
            return False
        (node,) = node.all_input_nodes
    return str(node.target) == FINISHED


def _alike(one: fx.Node, other: fx.Node) -> Fact:
    left, right = _tensor(one), _tensor(other)
    return known(left.dtype == right.dtype and left.dim() == right.dim() == 2, "dtypes and dimensions") & equal(
        left.shape[0], right.shape[0], "rows"
    )


def _read_by(node: fx.Node, reader: fx.Node) -> None:
    other = next((user for user in node.users if user is not reader and not asks_for_rows(user)), None)
    if other is not None:
        raise Left(f"{node.name} is also read by {other.name}")


def _chain(node: fx.Node) -> Chain | None:
    """The two products that a value is made of, through casts and factors."""
    if str(node.target) in (*CASTS, "aten.mul.Tensor", "aten.mul.Scalar"):
        found = [chain for item in node.all_input_nodes if (chain := _chain(item)) is not None]
        if len(found) != 1:
            return None
        (chain,) = found
        return Chain(chain.first, chain.second, chain.blocks, (*chain.path, node))
    second = product_of(node)
    if isinstance(second, str):
        return None
    activation = second.rows
    blocks = _blocks(activation)
    first = product_of(activation.all_input_nodes[0]) if blocks else ""
    if isinstance(first, str):
        return None
    return Chain(first, second, blocks, (first.node, activation, node))


def _blocks(activation: fx.Node) -> int:
    """How many parts of the columns an activation tells apart, computing each column of them by itself; 0 for what is
    no activation."""
    target = activation.target
    if str(target) in OF_HALVES:
        return 2
    alone = len(activation.all_input_nodes) == 1
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return int(alone and pointwise)


def _calls(term: fx.Node, gather: fx.Node, chain: Chain) -> tuple[fx.Node, ...]:
    """What is computed between the gathered rows and `term`, in order.

    Raises:
        Left: a call of it is not known to work on each row by itself.
    """
    found: set[fx.Node] = set()
    todo = [term]
    weights = {node for product in (chain.first, chain.second) for node in (product.weight, product.turned)}
    while todo:
        node = todo.pop()
        if node in found or node is gather or node in weights:
            continue
        if _is_weight(node):
            continue
        _check_by_row(node, gather)
        found.add(node)
        todo += node.all_input_nodes
    return tuple(sorted(found))


def _check_by_row(node: fx.Node, gather: fx.Node) -> None:
    tensor = value(node)
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
        raise Left(f"{node.name} has no rows")
    if not equal(tensor.shape[0], _tensor(gather).shape[0], "rows"):
        raise Left(f"{node.name} has other rows than {gather.name}")
    if not (isinstance(product_of(node), Product) or works_by_row(node) or _blocks(node)):
        raise Left(f"{node.name} may do more than to compute each row by itself")


def _is_weight(node: fx.Node) -> bool:
    """Whether a value is a parameter, or a transposed one, that has no rows of its own."""
    source = node.args[0] if str(node.target) in TURNED else node
    if not is_lasting(source):
        return False
    readers_multiply = all(isinstance(product_of(user), Product) for user in node.users)
    return readers_multiply or str(node.target) in TURNED or _tensor(node).dim() < 2


# -- the rewrite ------------------------------------------------------------------------------------------------------


def _rewrite(graph: fx.Graph, found: Shared, record: PassRecord) -> None:
    chain, group, ranks = found.chain, found.group, found.ranks
    record.fire(f"{NAME}: {_text(found)}", found.scatter, [*found.calls, found.total, found.scatter])
    with graph.inserting_before(found.scatter):
        wholes = {
            chain.first.node: whole_of_outputs(graph, chain.first, group, ranks, chain.blocks, NAME),
            chain.second.node: whole_of_inputs(graph, chain.second, group, ranks, NAME),
        }
        here = {found.gather: found.gather.args[0]}
        for node in found.calls:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: here.get(item, item))
            args = (args[0], wholes[node]) if node in wholes else args
            target = node.target
            assert callable(target)
            here[node] = call(graph, target, args, kwargs=kwargs, replaces=[node], made_by=NAME)
        arguments = (found.routed, group, ranks)
        scatter = torch.ops.npu_fused.reduce_scatter_rows.default
        here[found.routed] = call(graph, scatter, arguments, replaces=[found.scatter], made_by=NAME)
        terms = fx.node.map_arg(found.total.args, lambda item: here.get(item, item))
        part = call(graph, torch.ops.aten.add.Tensor, terms, replaces=[found.total], made_by=NAME)
    for node in (found.total, *found.calls):
        for user in [user for user in node.users if asks_for_rows(user)]:
            user.replace_input_with(node, found.gather)
    found.scatter.replace_all_uses_with(part)
    for node in (found.scatter, found.total, *sorted(found.calls, reverse=True)):
        if not node.users:
            graph.erase_node(node)


def _text(found: Shared) -> str:
    whole, part = (in_bytes((found.chain.first.size + found.chain.second.size) * count) for count in (found.ranks, 1))
    return f"on the rows of {found.ranks} ranks, whole weights of {whole} beside the part of {part}"


def _tensor(node: fx.Node) -> torch.Tensor:
    found = value(node)
    assert isinstance(found, torch.Tensor), f"{node.name} is no tensor"
    return found
