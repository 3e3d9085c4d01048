"""A hash of what a value is made of: data, and functions with everything they refer to.

Two values with the same hash do the same. That is what a cache key needs from rules and passes that a user wrote: the
name of a function says nothing about its body, and a constant key would hand out somebody else's program.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import importlib.metadata
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from npu_compiler.errors import OptionError
from npu_compiler.graph.constants import to_bytes

_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch._ops.OpOverload)
_PLAIN = (type(None), type(...), bool, int, float, complex, str, bytes)
_BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_OWN = "npu_compiler"  # covered by the hash over the compiler's sources
_INSTALLED = tuple(str(Path(sysconfig.get_path(kind)).resolve()) for kind in ("stdlib", "purelib", "platlib"))


def of_content(value: object, what: str) -> str:
    """The hash of `value`.

    Functions count by their code, defaults, closure and the globals they use; classes by their members; objects by
    class and attributes, or by what their `uuid()` returns where they have one (torch's convention for custom passes).
    What lies in an installed package counts by name and the package's version.

    Args:
        what: the value's name in messages.

    Raises:
        OptionError: a part has no content to go by; it says which.
    """
    return _Hasher().of(value, what)


class _Hasher:
    def __init__(self) -> None:
        self._open: dict[int, int] = {}

    def of(self, value: Any, what: str) -> str:
        """The hash of one value. A value inside itself counts by how far up it is."""
        if id(value) in self._open:
            return f"up {len(self._open) - self._open[id(value)]}"
        self._open[id(value)] = len(self._open)
        digest = hashlib.sha256(type(value).__qualname__.encode())
        for part in self._parts(value, what):
            digest.update(part.encode(errors="surrogatepass") + b"\0")
        del self._open[id(value)]
        return digest.hexdigest()

    def _parts(self, value: Any, what: str) -> Iterator[str]:
        if isinstance(value, _PLAIN):
            yield repr(value)
        elif isinstance(value, _NAMED):
            yield str(value)
        elif isinstance(value, (sympy.Basic, enum.Enum)):
            yield sympy.srepr(value) if isinstance(value, sympy.Basic) else str(value)
        elif isinstance(value, (list, tuple)):
            yield from (self.of(item, f"{what}[{index}]") for index, item in enumerate(value))
        elif isinstance(value, (set, frozenset)):
            yield from sorted(self.of(item, f"an item of {what}") for item in value)
        elif isinstance(value, (dict, types.MappingProxyType)):
            yield from (self.of(pair, f"{what}[{pair[0]!r}]") for pair in value.items())
        elif isinstance(value, torch.Tensor):
            yield f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device}"
            if not value.is_meta and not isinstance(value, FakeTensor):
                yield hashlib.sha256(to_bytes(value)).hexdigest()
        elif isinstance(value, (fx.GraphModule, fx.Graph)):
            yield from self._program(value, what)
        else:
            yield from self._code_parts(value, what)

    def _code_parts(self, value: Any, what: str) -> Iterator[str]:
        if isinstance(value, types.ModuleType):
            yield from _module(value)
        elif isinstance(value, (types.FunctionType, type)) and _installed(value.__module__):
            yield _reference(value)
        elif isinstance(value, types.FunctionType):
            yield from self._function(value, what)
        elif isinstance(value, types.MethodType):
            yield from (self.of(value.__func__, what), self.of(value.__self__, f"the object of {what}"))
        elif isinstance(value, functools.partial):
            yield self.of((value.func, value.args, value.keywords), f"the parts of {what}")
        elif isinstance(value, type):
            yield from self._class(value, what)
        elif isinstance(value, _BUILT_IN):
            yield f"{getattr(value, '__module__', '')}.{value.__qualname__}"
        else:
            yield from self._object(value, what)

    def _function(self, function: types.FunctionType, what: str) -> Iterator[str]:
        yield from self._code(function.__code__, what)
        yield self.of((function.__defaults__, function.__kwdefaults__), f"defaults of {what}")
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            yield self.of(cell.cell_contents, f"{name}, which {what} closes over")
        for name in _globals(function.__code__):
            if name in function.__globals__:
                yield name
                yield self.of(function.__globals__[name], f"global {name}, which {what} uses")

    def _code(self, code: types.CodeType, what: str) -> Iterator[str]:
        yield code.co_code.hex()
        yield repr((code.co_names, code.co_varnames, code.co_freevars))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from self._code(constant, what)
            else:
                yield self.of(constant, f"a constant of {what}")

    def _class(self, kind: type, what: str) -> Iterator[str]:
        yield kind.__qualname__
        yield from (self.of(base, f"base {base.__name__} of {what}") for base in kind.__bases__)
        generated = set() if not dataclasses.is_dataclass(kind) else {"__eq__", "__hash__", "__init__", "__repr__"}
        for name, member in sorted(vars(kind).items()):
            plain = name not in ("__dict__", "__weakref__", "__doc__", "__module__", "__dataclass_fields__")
            if plain and name not in generated and not name.startswith("__dataclass"):
                yield name
                yield self.of(_unwrapped(member), f"{what}.{name}")

    def _object(self, value: Any, what: str) -> Iterator[str]:
        yield self.of(type(value), f"the class of {what}")
        if callable(getattr(value, "uuid", None)):
            identity = value.uuid()
            if identity is None:
                raise _no_content(what, value, "its uuid() returns None")
            yield self.of(identity, f"{what}.uuid()")
        elif dataclasses.is_dataclass(value):
            for entry in dataclasses.fields(value):
                yield self.of(getattr(value, entry.name), f"{what}.{entry.name}")
        elif isinstance(value, torch._ops.OperatorBase):
            yield str(value)
        elif hasattr(value, "__dict__") and not _installed(type(value).__module__):
            yield self.of(vars(value), f"attributes of {what}")
        else:
            raise _no_content(what, value, f"a {type(value).__qualname__} has no attributes to go by")

    def _program(self, value: fx.GraphModule | fx.Graph, what: str) -> Iterator[str]:
        graph = value if isinstance(value, fx.Graph) else value.graph
        for node in graph.nodes:
            yield f"{node.name} {node.op} {node.target if isinstance(node.target, str) else _reference(node.target)}"
            yield self.of(fx.node.map_arg((node.args, dict(node.kwargs)), str), f"arguments of {node.name} in {what}")
            if node.op == "get_attr" and isinstance(value, fx.GraphModule):
                yield self.of(functools.reduce(getattr, node.target.split("."), value), f"{what}.{node.target}")


def _no_content(what: str, value: object, why: str) -> OptionError:
    return OptionError(
        f"{what} can't enter the cache key: {why} ({value!r:.80})",
        rule="what decides the compiled program is part of its key, by content",
        fix="make it data or a function of data, or give its class a uuid() that changes when its behaviour does",
    )


def _globals(code: types.CodeType) -> list[str]:
    """Names of the globals that a code object reads, nested functions included."""
    found = {entry.argval for entry in dis.get_instructions(code) if entry.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.update(_globals(constant))
    return sorted(found)


def _unwrapped(member: object) -> object:
    """The function behind a method, property or descriptor of a class."""
    if isinstance(member, (staticmethod, classmethod)):
        return member.__func__
    if isinstance(member, property):
        return (member.fget, member.fset, member.fdel)
    if isinstance(member, (types.MemberDescriptorType, types.GetSetDescriptorType)):
        return member.__name__
    return member


def _module(module: types.ModuleType) -> Iterator[str]:
    yield f"{module.__name__} {_version(module.__name__)}"
    file = getattr(module, "__file__", None)
    if file and Path(file).is_file() and not _installed(module.__name__):  # torch.ops names files that do not exist
        yield hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _reference(value: Any) -> str:
    module = getattr(value, "__module__", "") or ""
    return f"{module}.{getattr(value, '__qualname__', value)} {_version(module)}"


def _installed(module: str) -> bool:
    """Whether a module is the compiler's, Python's or an installed package's, so that a version tells its content."""
    if module.split(".")[0] == _OWN or module in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and str(Path(file).resolve()).startswith(_INSTALLED)


@functools.cache
def _version(module: str) -> str:
    top = module.split(".")[0]
    found = _distributions().get(top)
    return importlib.metadata.version(found[0]) if found else ""


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())
