"""Compiled ahead of time: what `torch.compile(...).aot_compile(...)` writes to a file and another process loads.

torch keeps Dynamo's part, bytecode and guards, and asks a backend for its own (torch/_dynamo/aot_compile.py). Ours is
the program behind the passes. Captures can't be written: the process that loads a program makes them at its first call.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch._dynamo.aot_compile_types import SerializableCallable
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._graph_pickler import GraphPickler
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from npu_compiler import cache
from npu_compiler.cache import NotStorable, Program
from npu_compiler.compiled import CompiledGraph, Interface
from npu_compiler.config import DEFAULTS, Options
from npu_compiler.errors import StoredProgramError
from npu_compiler.graph.effects import storage
from npu_compiler.graph.values import like
from npu_compiler.key import compiler_parts

Keep = Callable[[Program, str], None]
"""Called with a program behind the passes, and with what AOTAutograd does around it (Functional.convention)."""
APPLIED = ("rules", "passes")
"""Options that hold a user's own objects. A program that is written has what they did."""


@dataclass(frozen=True)
class Written:
    """A compiled graph for another process.

    Attributes:
        program: what cache.write made of it. `inputs`: its fake inputs, see `_described`.
        options: those that differ from the defaults.
        made_by: what has to be the same where it is loaded, part by part.
    """

    program: bytes
    inputs: bytes
    interface: Interface
    options: Mapping[str, Any]
    made_by: Mapping[str, str]


class Portable(SerializableCallable):
    """A compiled graph that torch can write and load. Called, it does what the graph does."""

    def __init__(self, compiled: CompiledGraph) -> None:
        self.compiled = compiled
        self._written: Written | str = "nothing was kept of it"
        self._place = ""

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)

    def keeping(self, interface: Interface, inputs: Sequence[Any], also: Keep | None) -> Keep:
        """What keeps the program as bytes once it is there; `also` is called too.

        Args:
            inputs: the graph's inputs as cache.symbolic_inputs gives them.
        """
        described = _described(inputs)
        self._place = interface.place

        def keep(program: Program, convention: str) -> None:
            options = self.compiled.options
            try:
                self._written = convention or Written(
                    cache.write(program), described, interface, _chosen(options), _made_by(options)
                )
            except NotStorable as reason:
                self._written = str(reason)
            if also is not None:
                also(program, convention)

        return keep

    @classmethod
    def serialize_compile_artifacts(cls, fn: Any) -> bytes:
        """The graph as bytes.

        Raises:
            StoredProgramError: it can't be written; says why.
        """
        if isinstance(fn._written, str):
            raise StoredProgramError(
                f"{fn.compiled.name} can't be written: {fn._written}",
                where=fn._place,
                rule="what is written of a program is plain data, and all that a call takes",
                fix="call it in the process that compiled it; docs/compiler.md lists what is not stored",
            )
        return pickle.dumps(fn._written)

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Portable:
        """The graph that `serialize_compile_artifacts` wrote; it can be written again.

        Raises:
            StoredProgramError: it was compiled for another device, or by other versions.
        """
        written = pickle.loads(data)
        options = Options.of(written.options)
        here = _made_by(options)
        for part, there in written.made_by.items():
            if here[part] != there:
                what = cache.HASHED.get(part) or f"its {part} was {there}, here it is {here[part]}"
                raise StoredProgramError(
                    f"a program that was compiled ahead of time can't be used here: {what}",
                    where=written.interface.place,
                    rule="a stored program is used only where it fits",
                    fix="compile it again, on this device and with these versions",
                )
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        # By its name, as torch.compile finds it: the backend imports this module.
        portable = cls(lookup_backend("ascend").load(written, _made(written.inputs, mode)))  # type: ignore[attr-defined]
        portable._written, portable._place = written, written.interface.place
        return portable


def portable_is_wanted() -> bool:
    """Whether torch compiles ahead of time: then it wants to write what backends return."""
    return bool(functorch_config.bundled_autograd_cache)


def _chosen(options: Options) -> dict[str, Any]:
    values = {entry.name: getattr(options, entry.name) for entry in fields(options) if entry.name not in APPLIED}
    return {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value != getattr(DEFAULTS, name)
    }


def _made_by(options: Options) -> dict[str, str]:
    parts = compiler_parts(options)
    return {"device": str(torch.npu.get_device_name()), **{name: parts[name] for name in ("versions", "sources")}}


def _described(inputs: Sequence[Any]) -> bytes:
    """Sizes and fake tensors as bytes: of a tensor its layout, and the number and bytes of the storage it lies in."""
    numbers: dict[int, int] = {}

    def described(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        number = numbers.setdefault(storage(item), len(numbers))
        layout = (item.dtype, item.device, tuple(item.shape), item.stride(), item.storage_offset())
        return layout, number, item.untyped_storage().nbytes()

    return GraphPickler.dumps([described(item) for item in inputs])


def _made(described: bytes, mode: FakeTensorMode) -> list[Any]:
    memory: dict[int, torch.UntypedStorage] = {}

    def made(item: Any) -> Any:
        if not isinstance(item, tuple):
            return item
        layout, number, bytes_ = item
        if number not in memory:
            memory[number] = torch.empty(bytes_, dtype=torch.uint8, device="meta").untyped_storage()
        dtype, device, size, stride, offset = layout
        return like(mode, dtype, device, size, stride, offset, memory[number])

    return [made(item) for item in GraphPickler.loads(described, mode)]
