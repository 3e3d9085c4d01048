"""A graph of a program's data, with fake values, so that passes run on it and it runs itself.

Only operators of torch.ops, arithmetic on sizes and `getitem` are looked up, by checked names (names.py). What they do
when the graph is run is up to them: run programs of sources that you trust.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from npu_compiler.errors import BundleError
from npu_compiler.fusion_kernels import register
from npu_compiler.graph.once import LASTING, ONCE
from npu_compiler.graph.source import TIMES
from npu_compiler.inspect import made_up
from npu_compiler.inspect.names import is_function, is_operator
from npu_compiler.inspect.program import Argument, Call, Items, Named, Program, Result, SizeValue, TensorValue

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Div: operator.truediv, ast.Pow: operator.pow, ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.LShift: operator.lshift, ast.RShift: operator.rshift,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_, ast.Invert: operator.invert
}  # fmt: skip
_CALLED: dict[str, Callable[..., Any]] = {
    "max": torch.sym_max, "min": torch.sym_min, "abs": abs, "int": torch.sym_int, "float": torch.sym_float,
    "round": round,
}  # fmt: skip


def graph_of(
    program: Program, constants: Mapping[str, torch.Tensor] | None = None, objects: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """`program` as a graph whose nodes carry fake values, places and origins.

    Args:
        constants: their values by name; those that are missing are made up.
        objects: values of inputs that are neither tensors nor numbers, by name; None where they are missing.

    Raises:
        BundleError: the program calls what is no operator, or an operator that is not there.
    """
    register()
    return _Builder(program, constants or {}, objects or {}).build()


class _Builder:
    def __init__(self, program: Program, constants: Mapping[str, torch.Tensor], objects: Mapping[str, Any]) -> None:
        self._program, self._constants, self._objects = program, constants, objects
        self._environment = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._environment, allow_non_fake_inputs=True)
        self._symbols = {name: self._symbol(name, hint) for name, hint in program.sizes.items()}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._nodes: dict[str, fx.Node] = {}
        self._module = fx.GraphModule(torch.nn.Module(), fx.Graph())

    def build(self) -> fx.GraphModule:
        with self._mode:
            for assumption in self._program.assumptions:
                torch._check(size(assumption, self._symbols))
        for call in self._program.calls:
            self._nodes[call.name] = self._node(call)
            self._nodes[call.name].meta.update(_metadata(call))
        self._module.recompile()
        with self._mode, torch.no_grad():
            _Values(self._module).run(*(node.meta["val"] for node in self._module.graph.find_nodes(op="placeholder")))
        return self._module

    def _symbol(self, name: str, hint: int) -> torch.SymInt | int:
        source = ConstantSource(name)
        symbol = self._environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, positive=None)
        return self._environment.create_symintnode(symbol, hint=hint, source=source)

    def _node(self, call: Call) -> fx.Node:
        graph = self._module.graph
        if call.op == "placeholder":
            node = graph.create_node("placeholder", call.name, name=call.name)
            node.meta["val"] = self._input(call)
            return node
        if call.op == "get_attr":
            name = call.target.replace(".", "_")
            setattr(self._module, name, self._constant(call))
            return graph.create_node("get_attr", name, name=call.name)
        args = tuple(map(self._argument, call.args))
        if call.op == "output":
            return graph.create_node("output", "output", args, name=call.name)
        kwargs = {name: self._argument(given) for name, given in call.kwargs.items()}
        return graph.create_node("call_function", _target(call), args, kwargs, name=call.name)

    def _argument(self, given: Argument) -> Any:
        match given:
            case Result():
                return self._nodes[given.name]
            case Items():
                items = tuple(map(self._argument, given.items))
                return _items(given, items)
            case Named():
                return self._named(given)
        return given

    def _named(self, given: Named) -> Any:
        match given.kind:
            case "size":
                return size(given.text, self._symbols)
            case "float":
                return float(given.text)
            case "device":
                return torch.device(given.text)
            case "operator":
                return _operator(given.text)
            case "other":
                raise BundleError(f"an argument is {given.text}, which a program's data can't hold")
        return getattr(torch, given.text.removeprefix("torch."))

    def _input(self, call: Call) -> Any:
        (found,) = call.values or (None,)
        if isinstance(found, SizeValue):
            return self._size(found.size)
        return self._objects.get(call.name) if found is None else self._fake(found)

    def _fake(self, found: TensorValue) -> torch.Tensor:
        shape, stride = ([self._size(item) for item in sizes] for sizes in (found.shape, found.stride))
        dtype = getattr(torch, found.dtype.removeprefix("torch."))
        offset, memory = self._size(found.offset), self._storages.get(found.storage)
        with unset_fake_temporarily():
            if memory is None:
                whole = reduce(
                    operator.add, ((n - 1) * step for n, step in zip(shape, stride, strict=True)), offset + 1
                )
                memory = torch.empty(whole, dtype=dtype, device="meta").untyped_storage()
                self._storages[found.storage] = memory
            plain = torch.empty(0, dtype=dtype, device="meta").set_(memory, offset, shape, stride)  # type: ignore[call-overload]
        return FakeTensor(self._mode, plain, torch.device(found.device))

    def _constant(self, call: Call) -> torch.Tensor:
        (found,) = call.values or (None,)
        if not isinstance(found, TensorValue):
            raise BundleError(f"{call.name} is no tensor, and other constants are not kept", where=str(call.place))
        if call.target in self._constants:
            return self._constants[call.target].to(found.device)
        shape, stride = ([int(item) for item in sizes] for sizes in (found.shape, found.stride))
        dtype = getattr(torch, found.dtype.removeprefix("torch."))
        return made_up.tensor({}, found.storage, shape, stride, int(found.offset), dtype, found.device)

    def _size(self, given: int | str) -> Any:
        return given if isinstance(given, int) else size(given, self._symbols)


def _metadata(call: Call) -> dict[str, Any]:
    """The metadata that `from_graph` reads."""
    meta: dict[str, Any] = {}
    place = call.place
    if place.file:
        meta["stack_trace"] = f'File "{place.file}", line {place.line}, in {place.function}\n    {place.text}'
    if place.module:
        meta["nn_module_stack"] = {place.module: (place.module, torch.nn.Module)}
    if call.made_by:
        meta["npu_origin"] = {"pass": call.made_by, "nodes": list(call.replaces)}
    if call.layers != 1:
        meta[TIMES] = call.layers
    if call.once:
        meta[ONCE] = True
    if call.lasting:
        meta[LASTING] = True
    return meta


def _items(given: Items, items: tuple[Any, ...]) -> Any:
    match given.kind:
        case "mapping":
            return dict(zip(given.keys, items, strict=True))
        case "slice":
            return slice(*items)
        case "list":
            return list(items)
    return items


class _Values(fx.Interpreter):
    """Puts the value of each node into its metadata."""

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.op == "get_attr":
            found = torch._guards.detect_fake_mode().from_tensor(found)
        if n.op != "output":
            n.meta["val"] = found
        return found


def _target(call: Call) -> Callable[..., Any]:
    if is_operator(call.target):
        return _operator(call.target)
    if not is_function(call.target):
        raise BundleError(
            f"{call.name} calls {call.target}, which is no operator",
            where=str(call.place),
            rule="a program's data names operators of torch.ops and arithmetic on sizes",
            fix="look at the stage, or run the model itself",
        )
    module, _, name = call.target.rpartition(".")
    return getattr({"operator": operator, "math": math, "torch": torch}[module], name)


def _operator(name: str) -> Any:
    try:
        return reduce(getattr, name.split("."), torch.ops)
    except AttributeError as missing:
        raise BundleError(
            f"there is no operator {name} in this process",
            rule="a program runs where its operators are registered",
            fix="import the library that registers it",
        ) from missing


def size(text: str, symbols: Mapping[str, Any]) -> Any:
    """The value of a checked size expression; nothing but arithmetic happens."""

    def of(node: Any) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return symbols[node.id]
            case ast.BinOp():
                return _BINARY[type(node.op)](of(node.left), of(node.right))
            case ast.UnaryOp():
                return _UNARY[type(node.op)](of(node.operand))
            case ast.Compare(comparators=[other]):
                return _BINARY[type(node.ops[0])](of(node.left), of(other))
            case ast.BoolOp():
                combine = operator.and_ if isinstance(node.op, ast.And) else operator.or_
                return reduce(combine, map(of, node.values))
            case ast.IfExp():
                return torch.sym_ite(of(node.test), of(node.body), of(node.orelse))
            case ast.Call(func=ast.Name(id=name)):
                return _CALLED[name](*map(of, node.args))
            case ast.Call(func=ast.Attribute()):
                return of(node.func)(*map(of, node.args))
            case ast.Attribute(value=ast.Name(id=module)):
                return getattr({"math": math, "torch": torch}[module], node.attr)
        raise BundleError(f"the size {text!r} can't be worked out")

    return of(ast.parse(text, mode="eval").body)
