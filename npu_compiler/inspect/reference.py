"""What a program means: run on the CPU, in float64, call by call.

Floats are widened where they come in and stay wide: a conversion to another floating dtype keeps float64. A call that
the CPU has no kernel for, or that draws random numbers, runs on the device in its own dtypes; its results are widened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.utils._pytree import tree_map

from npu_compiler.graph.effects import value
from npu_compiler.graph.functionalized import Wrapped
from npu_compiler.inspect.surroundings import Meanings

DTYPE_CASTS = frozenset({"npu::npu_dtype_cast", "npu::_npu_dtype_cast"})
NO_KERNEL = (NotImplementedError, RuntimeError, ValueError)
"""What torch raises where the CPU has no kernel for a call, or none for float64."""


class Reference(fx.Interpreter):
    """Runs a program with fake values recorded, on widened arguments that lie on the CPU.

    Args:
        meanings: what operators do, in float64, that the CPU can't call.

    Attributes:
        on_device: names of the calls that ran on the device, in its own dtypes.
    """

    def __init__(self, program: fx.GraphModule, meanings: Meanings) -> None:
        super().__init__(program)
        self._meanings = meanings
        self.on_device: list[str] = []
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            return tree_map(_wide, super().run_node(n))
        if n.op != "call_function" or not isinstance(n.target, torch._ops.OperatorBase):
            return super().run_node(n)
        args, kwargs = tree_map(_on_cpu, self.fetch_args_kwargs_from_env(n), is_leaf=_is_leaf)
        if n.target in self._meanings:
            return self._meanings[n.target](*args, **kwargs)
        if _casts_to_float(n):
            return args[0].double()
        draws = isinstance(n.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in n.target.tags
        if not draws:
            try:
                return tree_map(_wide, n.target(*args, **kwargs))
            except IndexError:
                raise
            except NO_KERNEL:
                pass
        self.on_device.append(n.name)
        return self._run_on_device(n)

    def _run_on_device(self, node: fx.Node) -> Any:
        """The call in its own dtypes on its own device; what it writes is copied back."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        moved: dict[int, tuple[Tensor, Tensor]] = {}
        likes = iter(_leaves((node.args, node.kwargs)))
        given = [_narrow(item, value(like), moved) for item, like in zip(_leaves((args, kwargs)), likes, strict=True)]
        rest = iter(given)
        args, kwargs = tree_map(lambda item: next(rest), (args, kwargs), is_leaf=_is_leaf)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        for wide, narrow in moved.values():
            wide.copy_(narrow)
        return tree_map(_wide, result)


def run(
    program: fx.GraphModule, arguments: Sequence[Any], meanings: Meanings | None = None
) -> tuple[list[Any], list[str]]:
    """The outputs, and the names of the calls that ran on the device. Tensors among the arguments are written.

    Args:
        program: AOTAutograd's wrappers are taken off calls that have a meaning of their own.
    """
    _unwrap(program, meanings or {})
    reference = Reference(program, meanings or {})
    with torch.no_grad():
        outputs = reference.run(*arguments)
    return list(outputs), reference.on_device


def _unwrap(program: fx.GraphModule, meanings: Meanings) -> None:
    """Calls what has a meaning of its own itself, on copies of what it writes."""
    graph = program.graph
    for node in list(graph.find_nodes(op="call_function", target=auto_functionalized_v2)):
        wrapped = Wrapped.of(node)
        if wrapped is None or wrapped.operator not in meanings:
            continue
        copies = {}
        with graph.inserting_before(node):
            for base in wrapped.bases:
                copies[base.path] = graph.call_function(torch.ops.aten.clone.default, (base.node,))
                copies[base.path].meta["val"] = value(base.node)
        wrapped.take_off(copies, "")
    program.recompile()


def _casts_to_float(node: fx.Node) -> bool:
    """Whether a call is torch_npu's own conversion to a floating dtype, for which the CPU has no kernel."""
    target, found = node.target, value(node)
    named = isinstance(target, torch._ops.OpOverload) and target._schema.name in DTYPE_CASTS
    return named and isinstance(found, Tensor) and found.dtype.is_floating_point


def _leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    tree_map(found.append, tree, is_leaf=_is_leaf)
    return found


def _is_leaf(item: Any) -> bool:
    return not isinstance(item, (list, tuple, dict))


def _narrow(item: Any, like: Any, moved: dict[int, tuple[Tensor, Tensor]]) -> Any:
    if not isinstance(item, Tensor) or not isinstance(like, Tensor):
        return item
    if id(item) not in moved:
        narrow = torch.empty_strided(item.shape, item.stride(), dtype=like.dtype, device=like.device)
        moved[id(item)] = item, narrow.copy_(item)
    return moved[id(item)][1]


def _on_cpu(item: Any) -> Any:
    if isinstance(item, torch.device):
        return torch.device("cpu")
    if isinstance(item, torch.dtype) and item.is_floating_point:
        return torch.float64
    return item


def _wide(item: Any) -> Any:
    if not isinstance(item, Tensor):
        return item
    item = item.cpu()
    return item.double() if item.is_floating_point() else item
