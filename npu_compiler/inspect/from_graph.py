"""A graph as data: its calls with what they yield, where they come from, and what they write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.printers import PythonPrinter

from npu_compiler.graph import groups
from npu_compiler.graph.constants import constant_of, is_kept
from npu_compiler.graph.device import Device
from npu_compiler.graph.effects import storage, value, written_storages
from npu_compiler.graph.once import LASTING, ONCE
from npu_compiler.graph.source import TIMES, operator_name, place
from npu_compiler.inspect.names import is_size, names_in
from npu_compiler.inspect.program import Argument, Call, Cost, Items, Named, Program, Result, SizeValue, TensorValue
from npu_compiler.plan.engines import Engine
from npu_compiler.plan.estimate import Sizes, estimate


def program_of(graph: fx.Graph) -> Program:
    """`graph` as data; its nodes carry fake values.

    It is not checked here, which costs as much as making it: whoever reads it does.
    """
    numbering: dict[int, int] = {}
    known = sizes_of(graph)
    sizes = {str(symbol): size for symbol, size in known.items()}
    calls = tuple(_call(node, numbering, known) for node in graph.nodes)
    kept = constants_of(graph)
    made_up = tuple(dict.fromkeys(node.target for node in graph.find_nodes(op="get_attr") if node.target not in kept))
    return Program.model_construct(
        calls=calls,
        sizes=sizes,
        assumptions=_assumptions(graph, sizes),
        made_up=made_up,
        groups=groups.places_in(graph),
    )


def sizes_of(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """The values that the symbols of a program's inputs had in the call that was compiled."""
    found: dict[sympy.Symbol, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        for leaf in tree_leaves(value(node)):
            found |= _hints(leaf)
    return found


def constants_of(graph: fx.Graph) -> dict[str, torch.Tensor]:
    """The constants that a program reads and that are small enough to be kept, by name, in memory of the host."""
    found: dict[str, torch.Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        constant = constant_of(node)
        if is_kept(constant):
            with unset_fake_temporarily():  # the compiler works on fake values meanwhile
                found[node.target] = constant.detach().cpu().contiguous().clone()
    return found


def _call(node: fx.Node, numbering: dict[int, int], sizes: Sizes) -> Call:
    origin: Mapping[str, Any] = node.meta.get("npu_origin") or {"pass": "", "nodes": ()}
    leaves = tree_leaves(value(node)) if node.op != "output" else []
    return Call.model_construct(
        name=node.name,
        op=node.op,
        target=operator_name(node.target),
        args=tuple(map(_argument, node.args)),
        kwargs={name: _argument(given) for name, given in node.kwargs.items()},
        values=tuple(_value(leaf, numbering) for leaf in leaves if isinstance(leaf, (torch.Tensor, *_NUMBERS))),
        place=place(node),
        made_by=origin["pass"],
        replaces=tuple(origin["nodes"]),
        writes=tuple(sorted(_number(found, numbering) for found in written_storages(node))),
        once=bool(node.meta.get(ONCE)),
        lasting=bool(node.meta.get(LASTING)),
        layers=node.meta.get(TIMES, 1),
        cost=_cost(node, sizes) if node.op == "call_function" else None,
    )


def _cost(node: fx.Node, sizes: Sizes) -> Cost | None:
    found = estimate(node, sizes, Device())
    if found.engine is Engine.HOST:
        return None
    microseconds = round(found.microseconds, 3)
    return Cost.model_construct(engine=found.engine.value, bytes=int(found.bytes), microseconds=microseconds)


_INTEGERS, _FLOATS = (bool, int, torch.SymInt, torch.SymBool), (float, torch.SymFloat)
_NUMBERS = (*_INTEGERS, *_FLOATS)
_NAMED = {
    torch.dtype: "dtype",
    torch.device: "device",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
    torch._ops.OpOverload: "operator",
}


def _argument(given: Any) -> Argument:
    if isinstance(given, fx.Node):
        return Result.model_construct(name=given.name)
    if given is None or isinstance(given, (bool, int, str)):
        return given
    if isinstance(given, float):
        return given if math.isfinite(given) else _named("float", str(given))
    if isinstance(given, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _named("size", str(_size(given)))
    for kind, name in _NAMED.items():
        if isinstance(given, kind):
            return _named(name, str(given))
    if isinstance(given, slice):
        return _items("slice", (given.start, given.stop, given.step))
    if isinstance(given, (list, tuple)):
        return _items("tuple" if isinstance(given, tuple) else "list", given)
    if isinstance(given, Mapping):
        return _items("mapping", given.values(), tuple(map(str, given)))
    return _named("other", repr(given))


def _named(kind: str, text: str) -> Named:
    return Named.model_construct(kind=kind, text=text)


def _items(kind: str, items: Any, keys: tuple[str, ...] = ()) -> Items:
    return Items.model_construct(kind=kind, items=tuple(map(_argument, items)), keys=keys)


def _value(leaf: Any, numbering: dict[int, int]) -> TensorValue | SizeValue:
    if not isinstance(leaf, torch.Tensor):
        truth = isinstance(leaf, (bool, torch.SymBool))
        kind = "float" if isinstance(leaf, _FLOATS) else "bool" if truth else "int"
        return SizeValue.model_construct(size=_size(leaf), kind=kind)
    return TensorValue.model_construct(
        dtype=str(leaf.dtype),
        device=str(leaf.device),
        shape=tuple(map(_size, leaf.shape)),
        stride=tuple(map(_size, leaf.stride())) if leaf.layout is torch.strided else (),
        offset=_size(leaf.storage_offset()) if leaf.layout is torch.strided else 0,
        storage=_number(storage(leaf), numbering),
    )


def _size(number: Any) -> int | str:
    """A number, or the Python expression of its symbols."""
    if isinstance(number, (bool, int)):
        return int(number)
    if isinstance(number, float):
        return repr(number) if math.isfinite(number) else f"math.{number}".replace("math.-", "-math.")
    expression = number.node.expr
    if expression.is_Integer:
        return int(expression)
    text = _printed(expression)
    return text if is_size(text) else int(number.node.hint or 0)


def _printed(expression: sympy.Basic) -> str:
    return expression.name if isinstance(expression, sympy.Symbol) else PythonPrinter().doprint(expression)


def _hints(leaf: Any) -> dict[sympy.Symbol, int]:
    """The values that the symbols of a tensor's shape, or of a size, had in the call that was compiled."""
    found: dict[sympy.Symbol, int] = {}
    for number in (*leaf.shape, *leaf.stride()) if isinstance(leaf, torch.Tensor) else (leaf,):
        if isinstance(number, torch.SymInt):
            known: Mapping[sympy.Symbol, Any] = number.node.shape_env.backed_var_to_val
            found |= {symbol: int(known[symbol]) for symbol in number.node.expr.free_symbols if symbol in known}
    return found


def _assumptions(graph: fx.Graph, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """What the shape environment knows of the symbols: their ranges, and guards."""
    numbers = (item for node in graph.find_nodes(op="placeholder") for item in _sizes_in(value(node)))
    environment = next((item.node.shape_env for item in numbers), None)
    if environment is None:
        return ()
    ranges = []
    for symbol, interval in environment.var_to_range.items():
        ranges += [f"{symbol} >= {interval.lower}"] if interval.lower.is_Integer else []
        ranges += [f"{symbol} <= {interval.upper}"] if interval.upper.is_Integer else []
    asserts = [entry.expr for entries in environment.deferred_runtime_asserts.values() for entry in entries]
    texts = [*ranges, *(_printed(found) for found in (*(guard.expr for guard in environment.guards), *asserts))]
    return tuple(text for text in dict.fromkeys(texts) if is_size(text) and names_in(text) <= sizes.keys())


def _sizes_in(found: Any) -> list[torch.SymInt]:
    leaves = [number for leaf in tree_leaves(found) for number in (leaf.shape if hasattr(leaf, "shape") else (leaf,))]
    return [number for number in leaves if isinstance(number, torch.SymInt)]


def _number(key: int, numbering: dict[int, int]) -> int:
    return numbering.setdefault(key, len(numbering))
