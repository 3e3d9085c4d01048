"""What a call costs to run, read off its fake values: whether it launches a kernel at all, and the bytes it moves."""

from __future__ import annotations

import functools
import operator
from typing import TypeAlias

import sympy
import torch
from torch import fx

from npu_compiler.facts.sizes import expression
from npu_compiler.graph.effects import storage, tensors

UNDECLARED_VIEW = "aten._unsafe_view.default"
"""A view whose schema does not say so: autograd is not to track it."""

Amount: TypeAlias = "int | sympy.Expr"
"""A number, or an expression of the program's symbols; sympy only where there is a symbol, for speed."""


def is_view(node: fx.Node) -> bool:
    """Whether a call only looks at memory in another way (split and getitem included)."""
    if not may_be_view(node):
        return False
    target = node.target
    return not (isinstance(target, torch._ops.OpOverload) and _may_copy(target) and _copies(node))


def may_be_view(node: fx.Node) -> bool:
    """Whether a call's operator views what can be viewed: of a reshape, the layout of its argument decides."""
    target = node.target
    return target is operator.getitem or (isinstance(target, torch._ops.OpOverload) and is_view_operator(target))


@functools.cache
def _may_copy(target: torch._ops.OpOverload) -> bool:
    """Whether a view operator is made of others, as reshape is, which copies what can't be viewed."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")


def _copies(node: fx.Node) -> bool:
    made = {storage(tensor) for tensor in tensors(node)}
    return made.isdisjoint(storage(tensor) for source in node.all_input_nodes for tensor in tensors(source))


@functools.cache
def is_view_operator(target: torch._ops.OpOverload) -> bool:
    """Whether every result of an operator is a view of an argument. Each look at a schema copies it."""
    if str(target) == UNDECLARED_VIEW:
        return True
    returns = target._schema.returns
    return bool(returns) and not target._schema.is_mutable and all(entry.alias_info is not None for entry in returns)


def launches(node: fx.Node) -> bool:
    """Whether a call runs something on the device: neither a view nor arithmetic on sizes."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OperatorBase) and not is_view(node)


def size_in_bytes(tensor: torch.Tensor) -> Amount:
    """Elements times item size, in the symbols of the tensor's shape."""
    total: Amount = tensor.element_size()
    for size in tensor.shape:
        total = total * (size if isinstance(size, int) else expression(size))
    return total


def moved_bytes(node: fx.Node) -> Amount:
    """Bytes that a call reads and writes: each argument once, each result once. 0 for what launches nothing."""
    if not launches(node):
        return 0
    read = [tensor for source in node.all_input_nodes for tensor in tensors(source)]
    return sum(map(size_in_bytes, (*read, *tensors(node))), 0)
