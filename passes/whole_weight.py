"""Weights of which each rank has a part, made whole: once, by a gather in front of the program's first call.

    whole = npu_fused.all_gather_columns(o_proj, "tp:0", 2)     # [out, in], from the [out, in / 2] of each rank

The call is marked to be computed once (graph/once.py). It takes the memory of all ranks' parts on each rank, beside the
part that the rank has. The weight may not be written or replaced on some ranks alone: to gather it anew takes all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from npu_compiler.facts.sizes import Fact, known
from npu_compiler.graph.build import call
from npu_compiler.graph.effects import has_fixed_layout, storage, value, written_storages
from npu_compiler.graph.once import ONCE, is_lasting

PRODUCTS = frozenset({"aten.mm.default", "aten.matmul.default"})
TURNED = frozenset({"aten.t.default", "aten.transpose.int", "aten.permute.default"})


@dataclass(frozen=True)
class Product:
    """A product of rows with a rank's part of a weight.

    Attributes:
        node: the product [rows, out]. `rows`: what is multiplied, [rows, in].
        weight: the program's input.
        turned: the transposition of it that the product reads, for a weight [out, in]; None for one that is [in, out].
    """

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    turned: fx.Node | None

    @property
    def size(self) -> int:
        """Bytes of the rank's part."""
        tensor = value(self.weight)
        assert isinstance(tensor, torch.Tensor)
        return tensor.numel() * tensor.element_size()


def product_of(node: object) -> Product | str:
    """The product that `node` is the result of, or why it is none whose weight can be made whole."""
    if not isinstance(node, fx.Node) or str(node.target) not in PRODUCTS:
        target = node.target if isinstance(node, fx.Node) else type(node).__name__
        return f"{target} is no product of rows and a weight that could be whole"
    rows, second = node.args
    if not isinstance(rows, fx.Node) or not isinstance(second, fx.Node):
        return "it multiplies constants"
    if _dimensions(rows) != 2 or _dimensions(second) != 2:
        return f"{_dimensions(rows)} and {_dimensions(second)} dimensions are multiplied"
    turned = second if str(second.target) in TURNED else None
    weight = second.args[0] if turned is not None else second
    if not isinstance(weight, fx.Node) or not is_lasting(weight):
        return f"{second.name} is no parameter of the model"
    if turned is not None and not _is_transposition(turned, weight):
        return f"{second.name} is another view of the weight than its transposition"
    tensor = value(weight)
    if not isinstance(tensor, torch.Tensor) or not has_fixed_layout(tensor):
        return f"the size of {weight.name} is not fixed"
    return Product(node, rows, weight, turned)


def unwritten(graph: fx.Graph) -> Callable[[Product], Fact]:
    """Whether the program leaves a product's weight as it is."""
    written = {found for node in graph.nodes for found in written_storages(node)}

    def verdict(product: Product) -> Fact:
        tensor = value(product.weight)
        assert isinstance(tensor, torch.Tensor)
        return known(storage(tensor) not in written, f"the program writes {product.weight.name}")

    return verdict


def whole_of_inputs(graph: fx.Graph, product: Product, group: str, ranks: int, made_by: str) -> fx.Node:
    """Adds, at the insertion point, the whole of a weight whose ranks have parts of its inputs: what a product of whole
    rows reads, [ranks * in, out]. The order is the ranks'."""
    fused = torch.ops.npu_fused
    if product.turned is None:
        tensor = value(product.weight)
        assert isinstance(tensor, torch.Tensor)
        arguments = (product.weight, group, ranks, tensor.shape[0] * ranks)
        whole = call(graph, fused.all_gather_rows.default, arguments, replaces=[product.node], made_by=made_by)
        whole.meta[ONCE] = True
        return whole
    arguments = (product.weight, group, ranks)  # type: ignore[assignment]
    whole = call(graph, fused.all_gather_columns.default, arguments, replaces=[product.node], made_by=made_by)
    whole.meta[ONCE] = True
    return call(graph, torch.ops.aten.t.default, (whole,), replaces=[product.turned], made_by=made_by)


def whole_of_outputs(graph: fx.Graph, product: Product, group: str, ranks: int, blocks: int, made_by: str) -> fx.Node:
    """Adds, at the insertion point, the whole of a weight whose ranks have parts of its outputs: what a product of rows
    reads, [in, ranks * out].

    Args:
        blocks: of how many equal parts a rank's outputs are: gate and up are two. The whole has the first parts of all
            ranks in front of their second ones.
    """
    fused, aten = torch.ops.npu_fused, torch.ops.aten

    def add(target: Callable[..., object], *arguments: object, **named: object) -> fx.Node:
        return call(graph, target, arguments, kwargs=named, replaces=[product.node], made_by=made_by)

    tensor = value(product.weight)
    assert isinstance(tensor, torch.Tensor)
    rows, columns = tensor.shape
    if product.turned is not None:
        whole = add(fused.all_gather_rows.default, product.weight, group, ranks, rows * ranks)
        apart, swapped = [ranks, blocks, rows // blocks, columns], (0, 1)
    else:
        whole = add(fused.all_gather_columns.default, product.weight, group, ranks)
        apart, swapped = [rows, ranks, blocks, columns // blocks], (1, 2)
    if blocks > 1:
        whole = add(aten.transpose.int, add(aten.view.default, whole, apart), *swapped)
        whole = add(aten.clone.default, whole, memory_format=torch.contiguous_format)
    whole.meta[ONCE] = True
    if blocks > 1:
        shape = [rows * ranks, columns] if product.turned is not None else [rows, columns * ranks]
        whole = add(aten.view.default, whole, shape)
    return whole if product.turned is None else add(aten.t.default, whole)


def asks_for_rows(node: fx.Node) -> bool:
    """Whether a call asks how many rows there are, as sequence_parallel does."""
    return node.target is torch.ops.aten.sym_size.int and node.args[1] == 0


def _is_transposition(turned: fx.Node, weight: fx.Node) -> bool:
    one, other = value(turned), value(weight)
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or other.dim() != 2:
        return False
    return (*one.shape, *one.stride()) == (*reversed(other.shape), *reversed(other.stride()))


def _dimensions(node: fx.Node) -> int:
    found = value(node)
    return found.dim() if isinstance(found, torch.Tensor) else 0
