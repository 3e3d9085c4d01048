"""A program as plain data: what a bundle holds of each stage.

Names, numbers and texts only, checked when they are read: a bundle from a stranger can be looked at without running
anything that is in it. `python_text.py` writes the same data as a Python program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import sympy
import torch
from pydantic import BaseModel, ConfigDict
from torch import fx
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.printers import PythonPrinter

from npu_compiler.graph.effects import storage, value, written_storages
from npu_compiler.graph.source import Place, place


class Data(BaseModel):
    """Base of all data of a bundle: immutable, and nothing but what is declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Result(Data):
    """The result of a call, in place of an argument."""

    name: str


class Named(Data):
    """A constant that JSON has no form for, by its name in torch: a dtype, a device, an operator, an infinite float."""

    kind: Literal["dtype", "device", "layout", "memory_format", "operator", "float", "size", "other"]
    text: str


class Items(Data):
    """A tuple, list or slice, or the values of a mapping, whose `keys` are then given."""

    kind: Literal["tuple", "list", "slice", "mapping"]
    items: tuple[Argument, ...]
    keys: tuple[str, ...] = ()


Argument = None | bool | int | float | str | Result | Named | Items
Items.model_rebuild()


class TensorValue(Data):
    """A tensor's metadata. Sizes are numbers, or Python expressions of the program's symbols.

    Attributes:
        storage: equal for tensors that share memory.
    """

    dtype: str
    device: str
    shape: tuple[int | str, ...]
    stride: tuple[int | str, ...]
    offset: int | str = 0
    storage: int

    def __str__(self) -> str:
        return f"{self.dtype.removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


class SizeValue(Data):
    """A number that is known when the program is called: a Python expression of its symbols."""

    size: int | str

    def __str__(self) -> str:
        return str(self.size)


class Call(Data):
    """One node.

    Attributes:
        op: as in FX: placeholder, get_attr, call_function, output.
        target: the operator's name with its overload, or the name of an input or constant.
        values: what it yields: one entry for each tensor or number.
        place: where it comes from in the user's model.
        made_by, replaces: the pass that made it, and the lowered program's nodes that it stands for.
        writes: storages that it writes.
    """

    name: str
    op: Literal["placeholder", "get_attr", "call_function", "output"]
    target: str
    args: tuple[Argument, ...] = ()
    kwargs: dict[str, Argument] = {}
    values: tuple[TensorValue | SizeValue, ...] = ()
    place: Place = Place()
    made_by: str = ""
    replaces: tuple[str, ...] = ()
    writes: tuple[int, ...] = ()

    def inputs(self) -> list[str]:
        """Names of the calls whose results it reads, in order, each once."""
        return list(dict.fromkeys(_names_in((self.args, tuple(self.kwargs.values())))))


class Program(Data):
    """A graph at one stage.

    Attributes:
        sizes: the value of each symbol in the call that was compiled; for a run with made-up inputs.
    """

    calls: tuple[Call, ...]
    sizes: dict[str, int] = {}


def of_graph(graph: fx.Graph) -> Program:
    """`graph` as data; its nodes carry fake values."""
    numbering: dict[int, int] = {}
    sizes: dict[str, int] = {}
    calls = tuple(_call(node, numbering) for node in graph.nodes)
    for node in graph.find_nodes(op="placeholder"):
        for leaf in tree_leaves(value(node)):
            sizes |= _hints(leaf)
    return Program(calls=calls, sizes=sizes)


def _call(node: fx.Node, numbering: dict[int, int]) -> Call:
    origin: Mapping[str, Any] = node.meta.get("npu_origin") or {"pass": "", "nodes": ()}
    fields: dict[str, Any] = {
        "name": node.name,
        "op": node.op,
        "target": _target(node.target),
        "args": tuple(map(_argument, node.args)),
        "kwargs": {name: _argument(given) for name, given in node.kwargs.items()},
        "values": tuple(
            _value(leaf, numbering) for leaf in tree_leaves(value(node)) if isinstance(leaf, (torch.Tensor, *_NUMBERS))
        )
        if node.op != "output"
        else (),
        "place": place(node),
        "made_by": origin["pass"],
        "replaces": tuple(origin["nodes"]),
        "writes": tuple(sorted(_number(found, numbering) for found in written_storages(node))),
    }
    return Call.model_construct(**fields)


_NUMBERS = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_NAMED = {
    torch.dtype: "dtype",
    torch.device: "device",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
    torch._ops.OpOverload: "operator",
}


def _argument(given: Any) -> Argument:
    if isinstance(given, fx.Node):
        return Result(name=given.name)
    if given is None or isinstance(given, (bool, int, str)):
        return given
    if isinstance(given, float):
        return given if math.isfinite(given) else Named(kind="float", text=str(given))
    if isinstance(given, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return Named(kind="size", text=str(_size(given)))
    for kind, name in _NAMED.items():
        if isinstance(given, kind):
            return Named(kind=name, text=str(given))  # type: ignore[arg-type]
    if isinstance(given, slice):
        return Items(kind="slice", items=tuple(map(_argument, (given.start, given.stop, given.step))))
    if isinstance(given, (list, tuple)):
        return Items(kind="tuple" if isinstance(given, tuple) else "list", items=tuple(map(_argument, given)))
    if isinstance(given, Mapping):
        return Items(kind="mapping", items=tuple(map(_argument, given.values())), keys=tuple(map(str, given)))
    return Named(kind="other", text=repr(given))


def _value(leaf: Any, numbering: dict[int, int]) -> TensorValue | SizeValue:
    if not isinstance(leaf, torch.Tensor):
        return SizeValue(size=_size(leaf))
    return TensorValue(
        dtype=str(leaf.dtype),
        device=str(leaf.device),
        shape=tuple(map(_size, leaf.shape)),
        stride=tuple(map(_size, leaf.stride())),
        offset=_size(leaf.storage_offset()),
        storage=_number(storage(leaf), numbering),
    )


def _size(number: Any) -> int | str:
    """A number, or the Python expression of its symbols."""
    if isinstance(number, (bool, int)):
        return int(number)
    if isinstance(number, float):
        return str(number)
    expression = number.node.expr
    return int(expression) if expression.is_Integer else PythonPrinter().doprint(expression)


def _hints(leaf: Any) -> dict[str, int]:
    """The values that the symbols of a tensor's shape, or of a size, had in the call that was compiled."""
    found: dict[str, int] = {}
    for number in (*leaf.shape, *leaf.stride()) if isinstance(leaf, torch.Tensor) else (leaf,):
        if isinstance(number, torch.SymInt):
            known: Mapping[sympy.Symbol, Any] = number.node.shape_env.backed_var_to_val
            found |= {str(symbol): int(known[symbol]) for symbol in number.node.expr.free_symbols if symbol in known}
    return found


def _number(key: int, numbering: dict[int, int]) -> int:
    return numbering.setdefault(key, len(numbering))


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    return f"{target.__module__.removeprefix('_')}.{target.__qualname__}"


def _names_in(argument: Any) -> list[str]:
    if isinstance(argument, Result):
        return [argument.name]
    if isinstance(argument, (tuple, list)):
        return [name for item in argument for name in _names_in(item)]
    return _names_in(argument.items) if isinstance(argument, Items) else []
