"""A program as bytes, so that another process can go on where this one stopped.

What is written is plain data: a tuple a call, in which other calls are numbers and operators are names. Layers repeat
one another, so lines of code and layouts are written once. Fake values are written as layouts and numbers of storages,
and made anew on the reader's fake inputs; those with symbolic sizes are inferred from their arguments. Of the modules
that a call lies in, the paths are written: what torch notes of them holds live objects. Small constants are written by
value.
"""

from __future__ import annotations

import enum
import functools
import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx
from torch._library.opaque_object import is_opaque_value_type
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx._lazy_graph_module import _make_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph_module import _assign_attr
from torch.utils._pytree import tree_map

from npu_compiler.graph.constants import LARGEST, constant_of, from_bytes, to_bytes
from npu_compiler.graph.effects import has_fixed_layout, has_unknown_size, storage, tensors, value
from npu_compiler.graph.layers import Bindings
from npu_compiler.graph.once import ONCE
from npu_compiler.graph.periods import Run
from npu_compiler.graph.rolled import Origins, Rolled
from npu_compiler.graph.source import traced_paths, where
from npu_compiler.graph.values import like
from npu_compiler.units import in_bytes

KEPT = ("npu_origin", ONCE)
"""What is written of a node's metadata besides its place."""
_PLAIN = frozenset((int, float, complex, bool, str, bytes, type(None), type(...)))
_CONSTANTS = (torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum)
_OPERATORS = (torch._ops.OpOverload, torch._ops.HigherOrderOperator)
Layout: TypeAlias = tuple[torch.dtype, torch.device, tuple[int, ...], tuple[int, ...], int]


class NotStorable(ValueError):
    """A program can't be written; the text says why."""


class _Node(NamedTuple):
    """The node at that position, as an argument."""

    position: int


class _Operator(NamedTuple):
    """`torch.ops.<path>`."""

    path: str


class _Tensor(NamedTuple):
    """A fake tensor in a storage, which has a number."""

    storage: int
    layout: Layout


class _Inferred(NamedTuple):
    """A value that is not written, with the storages of its tensors."""

    storages: tuple[int, ...]


class _Constant(NamedTuple):
    """A contiguous tensor."""

    data: bytes
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device


class _Place(NamedTuple):
    """Where in the user's model a call comes from: lines of code, and the paths of the modules."""

    trace: str
    modules: tuple[str, ...]


class _Rolled(NamedTuple):
    """A rolled program without its calls, which are numbers: see Rolled."""

    bindings: tuple[int, Mapping[Any, Any], Mapping[Any, int]]
    origins: tuple[tuple[int, int, int], tuple[str, ...], Sequence[_Place]]
    length: int
    periods: Sequence[int]
    tail: Sequence[int]
    rest: Sequence[int]


def dumps(program: fx.GraphModule | Rolled) -> bytes:
    """The program as bytes.

    Raises:
        NotStorable: its constants take more than constants.LARGEST bytes, or it holds something that no other process
            knows; says at which place of the model.
    """
    writer, calls = _Writer(), []
    for node in program.graph.nodes:
        try:
            calls.append(writer.call(node))
        except NotStorable as reason:
            raise NotStorable(f"{reason} ({where(node)})") from None
    rolled = writer.rolled(program) if isinstance(program, Rolled) else None
    return pickle.dumps((writer.inputs, calls, rolled), protocol=5)


def loads(data: bytes, inputs: Sequence[Any]) -> fx.GraphModule | Rolled:
    """The program that `dumps` wrote.

    Args:
        inputs: the program's inputs as fake tensors and sizes, in placeholder order.

    Raises:
        AttributeError: an operator of the program is not there.
    """
    written, calls, rolled = pickle.loads(data)
    reader = _Reader(written, inputs)
    with unset_fake_temporarily():
        for call in calls:
            reader.add(*call)
    program = _make_graph_module(reader.constants, reader.graph)
    return program if rolled is None else reader.rolled(program, rolled)


class _Storages:
    """Numbers for the storages of a program, in the order in which its values come."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def number(self, tensor: torch.Tensor) -> int:
        return self._numbers.setdefault(storage(tensor), len(self._numbers))

    def knows(self, tensor: torch.Tensor) -> bool:
        return storage(tensor) in self._numbers

    def input(self, item: object) -> tuple[_Tensor | None, ...]:
        """What a value that is inferred or made may depend on of an input: its memory and, if no size of it is
        symbolic, its layout."""
        found = []
        for tensor in tensors(item):
            layout = _layout(tensor)
            found.append(_Tensor(self.number(tensor), layout) if layout is not None else None)
        return tuple(found)


class _Writer:
    """Attributes:
    inputs: what is written of the inputs.
    """

    def __init__(self) -> None:
        self.inputs: list[tuple[_Tensor | None, ...]] = []
        self._storages = _Storages()
        self._positions: dict[fx.Node, _Node] = {}
        self._equal: dict[Any, Any] = {}  # equal things are one object, which pickle writes once
        self._constants: set[str] = set()
        self._bytes = 0  # of constants

    def call(self, node: fx.Node) -> tuple[Any, ...]:
        """A node as data: operation, name, target, arguments, place, other metadata, value."""
        if node.op in ("call_module", "call_method"):
            raise NotStorable(f"it calls the module or method {node.target}")
        if node.op == "placeholder":
            self.inputs.append(self._storages.input(node))
        if node.op == "get_attr":
            value_of: Any = self._constant(node)
        else:
            value_of = None if node.op in ("placeholder", "output") else self._value(node)
        target = self._target(node.target) if node.op == "call_function" else node.target
        meta = {key: self._once(node.meta[key]) for key in KEPT if node.meta.get(key) is not None}
        args, kwargs = self._argument(node.args), self._argument(node.kwargs)
        self._positions[node] = _Node(len(self._positions))
        return node.op, node.name, target, args, kwargs, self._place(node.meta), meta, value_of

    def rolled(self, program: Rolled) -> _Rolled:
        """What a rolled program is besides the calls that it holds."""
        positions = self._positions
        after = {self._argument(one): self._argument(two) for one, two in program.bindings.after.items()}
        layer_of = {self._argument(one): layer for one, layer in program.bindings.layer_of.items()}
        places = [self._place(meta) for meta in program.origins.places]
        run = program.origins.run
        parts = ([positions[node].position for node in part] for part in (program.periods, program.tail, program.rest))
        return _Rolled(
            (program.bindings.layers, after, layer_of),
            ((run.start, run.length, run.count), program.origins.names, places),
            program.length,
            *parts,
        )

    def _place(self, meta: Mapping[str, Any]) -> _Place:
        modules = tuple(map(self._once, traced_paths(meta)))
        return self._once(_Place(self._once(meta.get("stack_trace") or ""), self._once(modules)))  # type: ignore[no-any-return]

    def _constant(self, node: fx.Node) -> tuple[_Constant | None, _Inferred]:
        """A constant where it is read first, and its memory."""
        memory = _Inferred(tuple(self._storages.number(tensor) for tensor in tensors(node)))
        if node.target in self._constants:
            return None, memory
        self._constants.add(str(node.target))
        constant = constant_of(node)
        if type(constant) is not torch.Tensor or not constant.is_contiguous():
            raise NotStorable(f"it holds the constant {node.target}")
        self._bytes += constant.nbytes
        if self._bytes > LARGEST:
            limit = f"more than {in_bytes(LARGEST)} of constants are not stored"
            raise NotStorable(f"it holds the constant {node.target}; {limit}")
        return _Constant(to_bytes(constant), constant.dtype, tuple(constant.shape), constant.device), memory

    def _once(self, item: Any) -> Any:
        return self._equal.setdefault(item, item) if isinstance(item, (str, tuple)) else item

    def _target(self, target: Any) -> Any:
        if isinstance(target, _OPERATORS):
            return self._once(_path(target))
        module = sys.modules.get(getattr(target, "__module__", None) or "")
        if getattr(module, getattr(target, "__name__", ""), None) is not target:
            raise NotStorable(f"it calls {target}, which has no name")
        return target

    def _argument(self, item: Any) -> Any:
        if isinstance(item, fx.Node):
            return self._positions[item]
        if type(item) in _PLAIN or isinstance(item, _CONSTANTS) or is_opaque_value_type(type(item)):
            return item
        if isinstance(item, (list, tuple)):
            parts = [self._argument(part) for part in item]
            return tuple(parts) if isinstance(item, tuple) else parts
        if isinstance(item, Mapping):
            return {key: self._argument(part) for key, part in item.items()}
        if isinstance(item, slice):
            return slice(*map(self._argument, (item.start, item.stop, item.step)))
        if isinstance(item, _OPERATORS):
            return _path(item)
        raise NotStorable(f"it has the argument {item!r:.80}, which is no plain data")

    def _value(self, node: fx.Node) -> Any:
        if has_unknown_size(node):
            raise NotStorable(f"the size of {node.name} is found at run time")
        found = list(tensors(node))
        layouts = [self._made(tensor) for tensor in found]
        numbers = [self._storages.number(tensor) for tensor in found]
        made = [_Tensor(number, layout) for number, layout in zip(numbers, layouts, strict=True) if layout is not None]
        if not made or len(made) < len(found) or not _is_plain(value(node)):
            return self._once(_Inferred(tuple(numbers)))
        parts = iter(made)
        return tree_map(lambda item: next(parts) if isinstance(item, torch.Tensor) else item, value(node))

    def _made(self, tensor: torch.Tensor) -> Layout | None:
        """The layout by which the tensor can be made again; None if that does not say everything."""
        layout = _layout(tensor)
        if layout is None or tensor.is_conj() or tensor.is_neg() or type(tensor) is not FakeTensor:
            return None
        if not self._storages.knows(tensor):
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            elements = last + 1 if tensor.numel() else 0
            if tensor.storage_offset() or tensor.untyped_storage().nbytes() != elements * tensor.element_size():
                return None  # it is part of something larger
        return self._once(layout)  # type: ignore[no-any-return]


class _Reader:
    """Attributes:
    graph: the calls added so far.
    constants: a module with what they read as its attributes.
    """

    def __init__(self, written: Sequence[Any], inputs: Sequence[Any]) -> None:
        # The inputs' own mode, which need not be the one that torch's tracing context holds behind dynamo.
        mode = next((item.fake_mode for item in inputs if isinstance(item, FakeTensor)), None)
        self._mode = mode or FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.graph = fx.Graph()
        self.constants = torch.nn.Module()
        self._constants: dict[str, FakeTensor] = {}
        self._inputs = iter(inputs)
        self._nodes: list[fx.Node] = []
        self._memory: dict[int, torch.UntypedStorage] = {}
        numbers = _Storages()
        # Layouts that were written are good for inputs that lie in memory as the writer's did.
        self._fits = [numbers.input(item) for item in inputs] == list(written)
        for item in inputs:
            for tensor in tensors(item):
                self._memory.setdefault(numbers.number(tensor), tensor.untyped_storage())

    def add(
        self,
        op: str,
        name: str,
        target: Any,
        args: Any,
        kwargs: Any,
        place: _Place,
        meta: dict[str, Any],
        value_of: Any,
    ) -> None:
        """Adds a node that `_Writer.call` wrote."""
        target, args, kwargs = self._argument(target), self._argument(args), self._argument(kwargs)
        node = self.graph.create_node(op, target, args, kwargs, name)
        node.meta.update(_meta_of(place), **meta)
        if op == "placeholder":
            node.meta["val"] = next(self._inputs)
        elif op == "get_attr":
            node.meta["val"] = self._constant(target, *value_of)
        elif op != "output":
            node.meta["val"] = self._value(node, value_of)
        self._nodes.append(node)

    def rolled(self, program: fx.GraphModule, written: _Rolled) -> Rolled:
        """The rolled program that `_Writer.rolled` wrote."""
        layers, after, layer_of = written.bindings
        bindings = Bindings(
            layers,
            {self._argument(one): self._argument(two) for one, two in after.items()},
            {self._argument(one): layer for one, layer in layer_of.items()},
        )
        run, names, places = written.origins
        origins = Origins(Run(*run), names, tuple(map(_meta_of, places)))
        parts = (tuple(self._nodes[at] for at in part) for part in (written.periods, written.tail, written.rest))
        periods, tail, rest = parts
        return Rolled(program, bindings, origins, periods, written.length, tail, rest)

    def _constant(self, target: str, written: _Constant | None, memory: _Inferred) -> FakeTensor:
        if written is not None:
            made = from_bytes(*written)
            _assign_attr(made, self.constants, target)
            self._constants[target] = self._mode.from_tensor(made, static_shapes=True)
            self._remember(memory, self._constants[target])
        return self._constants[target]

    def _remember(self, inferred: _Inferred, found: Any) -> None:
        """Notes the memory of a value, for those that are written as lying in it."""
        if self._fits:
            for number, tensor in zip(inferred.storages, tensors(found), strict=True):
                self._memory.setdefault(number, tensor.untyped_storage())

    def _argument(self, item: Any) -> Any:
        kind = type(item)
        if kind is _Node:
            return self._nodes[item.position]
        if kind is _Operator:
            return _operator(item.path)
        if kind in (tuple, list):
            return kind(map(self._argument, item))
        if kind is dict:
            return {key: self._argument(part) for key, part in item.items()}
        if kind is slice:
            return slice(*map(self._argument, (item.start, item.stop, item.step)))
        return item

    def _value(self, node: fx.Node, written: Any) -> Any:
        if isinstance(written, _Inferred) or not self._fits:
            given = node.args, dict(node.kwargs)
            args, kwargs = tree_map(value, given, is_leaf=lambda item: isinstance(item, fx.Node))
            with self._mode, torch.no_grad():
                found = node.target(*args, **kwargs)  # type: ignore[operator]
            self._remember(written, found)
            return found
        return self._made(written)

    def _made(self, item: Any) -> Any:
        if isinstance(item, _Tensor):
            made = like(self._mode, *item.layout, self._memory.get(item.storage))
            self._memory.setdefault(item.storage, made.untyped_storage())
            return made
        return type(item)(map(self._made, item)) if isinstance(item, (list, tuple)) else item


def _layout(tensor: torch.Tensor) -> Layout | None:
    """Everything about where its elements lie; None if a size is symbolic or the tensor is not strided."""
    if tensor.layout is not torch.strided or not has_fixed_layout(tensor):
        return None
    return tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


@functools.lru_cache(maxsize=1024)
def _meta_of(place: _Place) -> dict[str, Any]:
    """A place as metadata of a node; of the modules' classes, nothing is known."""
    found: dict[str, Any] = {"stack_trace": place.trace} if place.trace else {}
    if place.modules:
        found["nn_module_stack"] = {path: (path, torch.nn.Module) for path in place.modules}
    return found


def _is_plain(item: Any) -> bool:
    """Whether a value is a tensor, or lists and tuples of tensors and None."""
    if type(item) in (list, tuple):
        return all(map(_is_plain, item))
    return item is None or isinstance(item, torch.Tensor)


def _path(operator: Any) -> _Operator:
    if isinstance(operator, torch._ops.HigherOrderOperator):
        return _Operator(f"{operator.namespace}.{operator.name()}")
    return _Operator(str(operator))


def _operator(path: str) -> Any:
    found: Any = torch.ops
    for name in path.split("."):
        found = getattr(found, name)
    return found
