"""What a node may do besides computing its result: write, draw random numbers, read tensor data on the host."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

GRAPH_SAFE_DRAWS = frozenset(
    f"aten.{name}"
    for name in (
        *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "uniform", "normal_functional"),
        *("random", "exponential", "multinomial", "native_dropout"),
    )
)
"""Random operators that, in a capture, read seed and offset from the generator's device memory, so that every replay
draws what eager would (op-plugin: those that call philox_npu_state; exponential_ is made of uniform_). The others are
refused by torch_npu in a capture, or, like aten.normal, record nothing at all."""
FUNCTIONALIZED = ("auto_functionalized", "auto_functionalized_v2")


def value(node: object) -> object:
    """The fake value of a node, or the constant itself."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def tensors(node: object) -> Iterator[torch.Tensor]:
    """The fake tensors a node stands for (several for a node with several outputs)."""
    found = value(node)
    if isinstance(found, torch.Tensor):  # most are, and looking for leaves takes ten times as long
        yield found
    elif isinstance(found, (list, tuple, dict)):
        yield from (leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor))


def has_fixed_layout(tensor: torch.Tensor) -> bool:
    """Whether no size, stride or offset of a tensor is symbolic."""
    return all(type(number) is int for number in (*tensor.shape, *tensor.stride(), tensor.storage_offset()))


def has_unknown_size(node: object) -> bool:
    """Whether a size of a value, or of a node's, is found at run time only."""
    found = value(node)
    if isinstance(found, torch.Tensor) and found.layout is torch.strided and has_fixed_layout(found):
        return False
    return bool(free_unbacked_symbols(found))


def argument(node: fx.Node, name: int | str) -> Any:
    """An argument of a call to an operator, by position or name: what was given, or the schema's default."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    for index, entry in enumerate(target._schema.arguments):
        if name in (index, entry.name):
            if index < len(node.args):
                return node.args[index]
            default = entry.default_value if entry.has_default_value() else None
            return node.kwargs.get(entry.name, default)
    return None


def addresses_storage(node: fx.Node) -> bool:
    """Whether a call counts from the start of an argument's storage, as as_strided does, whatever it views."""
    if is_functionalized(node):
        return any(name.endswith("_storage_offset") for name in node.kwargs)
    return isinstance(node.target, torch._ops.OpOverload) and "as_strided" in node.target._schema.name


def is_functionalized(node: fx.Node) -> bool:
    """Whether node is AOTAutograd's functional wrapper round a custom operator that mutates its arguments."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in FUNCTIONALIZED


def is_pure(node: fx.Node) -> bool:
    """Whether two equal calls of `node` may be merged: no write, no random number, no hidden effect."""
    if node.op != "call_function":
        return False
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        # operator.getitem and the arithmetic on sizes; higher-order operators may hide anything
        return getattr(target, "__module__", "") in ("_operator", "math", "torch")
    if node.is_impure() or target._schema.is_mutable or not target._schema.returns:
        return False
    unsafe = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    # a fresh, uninitialised tensor is made to be written to: two of them are two
    return not unsafe & set(target.tags) and "empty" not in target._schema.name


def storage(tensor: torch.Tensor) -> int:
    """Identity of a fake tensor's storage: equal for views of one another."""
    return tensor.untyped_storage()._cdata


def draws_on_host(node: fx.Node) -> bool:
    """Whether `node` draws random numbers with a seed that the host decides, which a replay would repeat or lose."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    if argument(node, "dropout_p") == 0:  # attention that drops nothing
        return False
    return str(target.overloadpacket).removesuffix("_") not in GRAPH_SAFE_DRAWS


def written_storages(node: fx.Node) -> set[int]:
    """The storages that a call writes, by its operator's schema; the functional wrapper of a write counts as none."""
    written: set[int] = set()
    for index, name in written_arguments(node.target) if isinstance(node.target, torch._ops.OpOverload) else ():
        given = node.args[index] if index < len(node.args) else node.kwargs.get(name)
        for item in given if isinstance(given, (list, tuple)) else [given]:
            written.update(storage(tensor) for tensor in tensors(item))
    return written


@functools.cache
def written_arguments(operator: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operator writes. Each look at a schema copies it."""
    if not operator._schema.is_mutable:
        return ()
    kinds = [(entry.name, entry.alias_info) for entry in operator._schema.arguments]
    return tuple((index, name) for index, (name, kind) in enumerate(kinds) if kind is not None and kind.is_write)


def may_write(node: fx.Node) -> set[int]:
    """The storages that a call may write: those its schema names; where there is no schema, all of its arguments'."""
    if node.op != "call_function":
        named = node.op in ("placeholder", "get_attr", "output")
    else:
        named = isinstance(node.target, torch._ops.OpOverload) or is_functionalized(node) or is_pure(node)
    if named:
        return written_storages(node)
    return {storage(tensor) for source in node.all_input_nodes for tensor in tensors(source)}


def is_effect(node: fx.Node) -> bool:
    """Whether `node` is AOTAutograd's wrapper of an operator whose effects happen in order, such as a check that
    raises: it takes a token and gives the next one."""
    return node.target is torch.ops.higher_order.with_effects


def is_token(node: fx.Node) -> bool:
    """Whether an input is the token of such operators: no tensor of the caller's, and nobody looks into it."""
    readers = [user for user in node.users if user.op != "output"]
    return bool(readers) and all(is_effect(user) and user.args[0] is node for user in readers)


def host_dependence(node: fx.Node) -> str:
    """Why `node` can't be captured: it brings tensor data to the host or takes it from there. Empty if it doesn't."""
    if node.op != "call_function":
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.data_dependent_output in target.tags:
        return "it reads a tensor's value on the host"
    if any(map(has_unknown_size, tensors(node))):
        return "the shape of its result depends on tensor data"
    inputs = {tensor.device.type for arg in node.all_input_nodes for tensor in tensors(arg) if tensor.dim()}
    outputs = {tensor.device.type for tensor in tensors(node)}
    if outputs and inputs and ("cpu" in inputs) != ("cpu" in outputs):
        source, target_device = sorted(inputs)[0], sorted(outputs)[0]
        return f"it copies between {source} and {target_device}, which the host has to take part in"
    return ""
