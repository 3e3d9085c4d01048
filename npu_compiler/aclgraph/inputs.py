"""How each input of a program reaches its captured graph.

A captured graph reads and writes fixed addresses. A parameter is there already; an input that the program writes must
be written where the caller has it; every other tensor is copied into a buffer that the graph reads. A size is not an
input of a captured graph at all: it is its key (see sizes.py for the exception).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from npu_compiler.aclgraph.sizes import deciding
from npu_compiler.errors import DeviceError
from npu_compiler.graph.effects import is_token, storage, tensors, written_storages
from npu_compiler.graph.rolled import Rolled
from npu_compiler.graph.source import first_use

DEVICE = "npu"


@dataclass(frozen=True)
class InputPlan:
    """Positions in the argument list, by how they are treated.

    Attributes:
        names: for messages, one an input.
        sizes: numbers that decide what is captured: they are the key of a captured graph.
        stable: tensors on the device whose address is expected to stay.
        written: tensors on the device that the program writes.
        copied: all other tensors on the device.
        host: tensors in host memory (tokens of effects are none).
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    stable: tuple[int, ...]
    written: tuple[int, ...]
    copied: tuple[int, ...]
    host: tuple[int, ...]

    @classmethod
    def of(cls, program: fx.GraphModule | Rolled, stable: Sequence[int], names: Sequence[str]) -> InputPlan:
        """Reads the plan off a program.

        Raises:
            DeviceError: a tensor in host memory is mixed with tensors on the device, or two devices are mixed.
        """
        graph = program.graph
        placeholders = graph.find_nodes(op="placeholder")
        names = tuple(names) if len(names) == len(placeholders) else tuple(node.name for node in placeholders)
        values = [node.meta.get("val") for node in placeholders]
        on_device = {
            i for i, value in enumerate(values) if isinstance(value, torch.Tensor) and value.device.type == DEVICE
        }
        written = written_inputs(program) & on_device
        fixed = (set(stable) & on_device) - written
        host = [
            i
            for i, value in enumerate(values)
            if isinstance(value, torch.Tensor)
            and i not in on_device
            and placeholders[i].users
            and not is_token(placeholders[i])
        ]
        _refuse_mixed(graph, names, values, on_device, host)
        return cls(
            names=names,
            sizes=tuple(sorted(deciding(graph))),
            stable=tuple(sorted(fixed)),
            written=tuple(sorted(written)),
            copied=tuple(sorted(on_device - fixed - written)),
            host=tuple(host),
        )


def written_inputs(program: fx.GraphModule | Rolled) -> set[int]:
    """Positions of the inputs whose memory the program writes."""
    inputs = program.graph.find_nodes(op="placeholder")
    owner = {storage(tensor): node for node in inputs for tensor in tensors(node)}
    found = ((node, owner[key]) for node in program.graph.nodes for key in written_storages(node) if key in owner)
    if isinstance(program, Rolled):
        written = {there for node, of in found for there in program.inputs_of(node, of)}
    else:
        written = {of for _, of in found}
    return {position for position, node in enumerate(inputs) if node in written}


def _refuse_mixed(
    graph: fx.Graph, names: Sequence[str], values: Sequence[Any], on_device: set[int], host: Sequence[int]
) -> None:
    placeholders = graph.find_nodes(op="placeholder")
    devices = sorted({str(values[i].device) for i in on_device})
    if len(devices) > 1:
        raise DeviceError(
            f"the graph's tensors lie on {' and '.join(devices)}",
            where=first_use(graph, (placeholders[i] for i in on_device if str(values[i].device) == devices[-1])),
            rule="one captured graph runs on one device",
            fix="compile the parts of the model that run on different devices separately",
        )
    wide = [i for i in host if values[i].dim()]
    if on_device and wide:
        listed = ", ".join(f"{names[i]} {tuple(values[i].shape)}" for i in wide)
        raise DeviceError(
            f"tensors in host memory are mixed with tensors on {devices[0]}: {listed}",
            where=first_use(graph, (placeholders[i] for i in wide)),
            rule="a captured graph can't read host memory: a replay would see the values of the capture",
            fix="move them to the device before the call, for example x = x.to('npu')",
        )


class Buffers:
    """The memory captured graphs read their copied inputs from.

    One flat piece an input, shared by all shapes: shapes never run at the same time. A larger shape gets a new piece;
    graphs captured before keep theirs alive.
    """

    def __init__(self) -> None:
        self._flat: dict[int, torch.Tensor] = {}

    def growth(self, position: int, example: torch.Tensor) -> int:
        """Bytes that `like` would newly take for this input."""
        flat = self._flat.get(position)
        needed = _needed(example)
        return needed if flat is None or flat.numel() < needed else 0

    def like(self, position: int, example: torch.Tensor) -> torch.Tensor:
        """A tensor of example's dtype, shape and strides in the memory of input `position`."""
        needed = _needed(example)
        # A tensor made in inference mode could not be written in a later call outside it.
        with torch.inference_mode(False):
            flat = self._flat.get(position)
            if flat is None or flat.numel() < needed:
                flat = self._flat[position] = torch.empty(needed, dtype=torch.uint8, device=example.device)
            typed = flat[: flat.numel() // example.element_size() * example.element_size()].view(example.dtype)
            return typed.as_strided(example.shape, example.stride())


def _needed(example: torch.Tensor) -> int:
    """Bytes from a tensor's first to its last element."""
    extent = 1 + sum((size - 1) * step for size, step in zip(example.shape, example.stride(), strict=True))
    return max(0 if example.numel() == 0 else extent, 1) * example.element_size()


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that has one element a memory location: expanded dimensions are cut to one."""
    for dimension, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor
