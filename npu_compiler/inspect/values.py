"""The inputs of a dumped program: saved ones, as they lay in memory, or made-up ones; and other values at their places.

Tensors that share memory keep sharing it. A program is run several times on the same memory, each time with other
values in it, because what is wrong in a captured graph is often right at the first call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_compiler.inspect.contents import Inputs, SavedTensor
from npu_compiler.inspect.made_up import filled
from npu_compiler.inspect.program import Argument, Call, Items, Named, Program, SizeValue, TensorValue
from npu_compiler.inspect.to_graph import size

ALIGNED = 16
"""Bytes: a piece of saved memory begins at a multiple of this, so that elements of every dtype lie where they lay."""
SHIFT = 7
"""By how many elements saved values are turned from one run to the next."""


def saved(arguments: Sequence[Any]) -> tuple[list[SavedTensor | bool | int | float | None], dict[str, Tensor]]:
    """A call's arguments as data, and the memory of its tensors: of each storage the part that they reach."""
    reach: dict[int, tuple[int, int]] = {}
    for tensor in filter(_is_plain, arguments):
        begin, end = _extent(tensor)
        low, high = reach.get(_memory(tensor), (begin, end))
        reach[_memory(tensor)] = (min(low, begin) // ALIGNED * ALIGNED, max(high, end))
    names = {key: f"memory_{index}" for index, key in enumerate(reach)}
    pieces: dict[str, Tensor] = {}
    found: list[SavedTensor | bool | int | float | None] = []
    for argument in arguments:
        if not _is_plain(argument):
            found.append(argument if isinstance(argument, (bool, int, float)) else None)
            continue
        key, size_of = _memory(argument), argument.element_size()
        name, (low, high) = names[key], reach[key]
        if name not in pieces:
            whole = torch.empty(0, dtype=torch.uint8, device=argument.device).set_(argument.untyped_storage())
            pieces[name] = whole[low:high].cpu().clone()
        layout = SavedTensor(
            memory=name,
            dtype=str(argument.dtype),
            device=str(argument.device),
            shape=tuple(argument.shape),
            stride=argument.stride(),
            offset=argument.storage_offset() - low // size_of,
        )
        found.append(layout)
    return found, pieces


def _is_plain(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.layout is torch.strided


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor in its storage, and the one behind its last."""
    begin = tensor.storage_offset()
    last = begin + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = begin if tensor.numel() == 0 else last + 1
    return begin * tensor.element_size(), end * tensor.element_size()


@dataclass(frozen=True)
class Place:
    """A tensor's place in a piece of memory; `stride` and `offset` count elements."""

    memory: str
    dtype: torch.dtype
    device: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        """How many elements of its dtype the memory must have."""
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset if 0 in self.shape else self.offset + reach + 1

    def on(self, memory: Tensor) -> Tensor:
        """The tensor, in memory given as elements of its dtype."""
        return memory.as_strided(self.shape, self.stride, self.offset)


Given = Place | bool | int | float | None


class Values:
    """What a program is called with.

    Attributes:
        given: an entry an input: a tensor's place, a number, or nothing.
        saved: whether the values were saved, all but those of `made_up`, which are names of inputs.
    """

    def __init__(
        self, program: Program, inputs: Inputs | None = None, pieces: Mapping[str, Tensor] | None = None
    ) -> None:
        self.given: list[Given] = []
        self.made_up: list[str] = []
        self.saved = inputs is not None
        self._pieces = dict(pieces or {})
        self._lasting: set[str] = set()
        self._seeds: dict[str, int] = {}
        self.count_integers = True
        for index, call in enumerate(program.inputs):
            kept = inputs.inputs[index] if inputs is not None else None
            found: Given = _place(kept) if isinstance(kept, SavedTensor) else kept
            if found is None and call.values:
                found = _made_up(call, program.sizes)
                self.made_up += [call.name]
            self.given.append(found)
            if isinstance(found, Place) and call.lasting:
                self._lasting.add(found.memory)
        self._sizes: dict[str, int] = {}
        for place in self.places():
            bytes_needed = place.elements * place.dtype.itemsize
            self._sizes[place.memory] = max(self._sizes.get(place.memory, 0), bytes_needed)
            self._seeds.setdefault(place.memory, len(self._seeds))
        self._dtypes = {name: {place.dtype for place in self.places() if place.memory == name} for name in self._sizes}

    def places(self) -> Iterator[Place]:
        """The places of the tensors."""
        return (entry for entry in self.given if isinstance(entry, Place))

    def bytes_of(self, memory: str, turn: int) -> Tensor:
        """What a piece of memory holds at the start of a run, as bytes on the host."""
        dtypes = self._dtypes[memory]
        dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
        if memory in self._pieces:
            found = self._pieces[memory]
            if turn and dtype is not None and dtype.is_floating_point and memory not in self._lasting:
                whole = found.numel() // dtype.itemsize * dtype.itemsize
                turned = found[:whole].view(dtype).roll(SHIFT * turn).view(torch.uint8)
                found = torch.cat([turned, found[whole:]])
            return found
        return self._filled(memory, dtype or torch.uint8, 0 if memory in self._lasting else turn)

    def memory(self, turn: int) -> dict[str, Tensor]:
        """All pieces, as bytes on the device that they are for."""
        devices = {place.memory: place.device for place in self.places()}
        return {name: self.bytes_of(name, turn).to(device, copy=True) for name, device in devices.items()}

    def arguments(self, memory: Mapping[str, Tensor]) -> list[Any]:
        """The arguments in memory as `memory` made it."""
        return [
            entry.on(_elements(memory[entry.memory], entry.dtype)) if isinstance(entry, Place) else entry
            for entry in self.given
        ]

    def in_float64(self, turn: int) -> list[Any] | None:
        """The arguments on the host with floats widened, sharing memory alike; None where tensors of several dtypes
        share a piece."""
        if any(len(dtypes) > 1 for dtypes in self._dtypes.values()):
            return None
        wide: dict[str, Tensor] = {}
        for name, dtypes in self._dtypes.items():
            (dtype,) = dtypes
            plain = _elements(self.bytes_of(name, turn), dtype)
            wide[name] = plain.double() if dtype.is_floating_point else plain.clone()
        return [entry.on(wide[entry.memory]) if isinstance(entry, Place) else entry for entry in self.given]

    def _filled(self, memory: str, dtype: torch.dtype, turn: int) -> Tensor:
        count = -(-self._sizes[memory] // dtype.itemsize)
        return filled(count, dtype, self._seeds[memory] + 1000 * turn, self.count_integers).view(torch.uint8)


def _elements(whole: Tensor, dtype: torch.dtype) -> Tensor:
    return whole[: whole.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _place(kept: SavedTensor) -> Place:
    dtype = getattr(torch, kept.dtype.removeprefix("torch."))
    return Place(kept.memory, dtype, kept.device, kept.shape, kept.stride, kept.offset)


def _made_up(call: Call, sizes: Mapping[str, int]) -> Given:
    (found,) = call.values
    if isinstance(found, SizeValue):
        return _number(found.size, sizes)
    assert isinstance(found, TensorValue)
    dtype = getattr(torch, found.dtype.removeprefix("torch."))
    shape, stride = (tuple(_number(item, sizes) for item in part) for part in (found.shape, found.stride))
    return Place(f"made_up_{found.storage}", dtype, found.device, shape, stride, _number(found.offset, sizes))


def _number(given: int | str, sizes: Mapping[str, int]) -> Any:
    return given if isinstance(given, int) else size(given, sizes)


def known_sizes(program: Program) -> Program:
    """`program` with every symbol replaced by its value in the call that was compiled."""

    def argument(given: Argument) -> Argument:
        if isinstance(given, Named) and given.kind == "size":
            return _number(given.text, program.sizes)  # type: ignore[no-any-return]
        if isinstance(given, Items):
            return given.model_copy(update={"items": tuple(map(argument, given.items))})
        return given

    def value(found: TensorValue | SizeValue) -> TensorValue | SizeValue:
        if isinstance(found, SizeValue):
            return found.model_copy(update={"size": _number(found.size, program.sizes)})
        shape, stride = (tuple(_number(item, program.sizes) for item in part) for part in (found.shape, found.stride))
        return found.model_copy(
            update={"shape": shape, "stride": stride, "offset": _number(found.offset, program.sizes)}
        )

    calls = [
        call.model_copy(
            update={
                "args": tuple(map(argument, call.args)),
                "kwargs": {name: argument(given) for name, given in call.kwargs.items()},
                "values": tuple(map(value, call.values)),
            }
        )
        for call in program.calls
    ]
    return program.model_copy(update={"calls": tuple(calls), "sizes": {}, "assumptions": ()})
