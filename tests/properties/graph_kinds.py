"""What the steps of random graphs are made of: the values that they take, and the calls that many of them add."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

END = sys.maxsize
"""What AOTAutograd writes for "to the end"."""
aten = torch.ops.aten


class Build(Protocol):
    """Adds calls to a graph under construction."""

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call and infers its value."""

    def size(self, node: fx.Node, dimension: int) -> Any:
        """A size as calls take it: a number, or the node that holds it."""


@dataclass(frozen=True)
class Kind:
    """What decides whether a step takes a value.

    Attributes:
        key: equal for values of one dtype and shape, symbols included.
        sizes: of each dimension; None for a symbolic one.
        given: the value is an input, or a view of one.
    """

    key: tuple[str, ...]
    dtype: torch.dtype
    device: str
    sizes: tuple[int | None, ...]
    contiguous: bool
    overlaps: bool
    given: bool

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def matrix(self) -> bool:
        return self.rank == 2

    @property
    def even_columns(self) -> bool:
        return self.rank > 1 and self.sizes[-1] is not None and self.sizes[-1] >= 2 and self.sizes[-1] % 2 == 0

    @property
    def static(self) -> bool:
        return None not in self.sizes


Takes = Callable[[Kind], bool]
Emit = Callable[..., "fx.Node | Sequence[fx.Node]"]


@dataclass(frozen=True)
class Step:
    """`operands` values of one kind; `takes` tells whether the step takes the first one, and for the first `written`
    of them."""

    emit: Emit
    takes: Takes
    operands: int = 1
    written: int = 1


def floating(kind: Kind) -> bool:
    return kind.dtype.is_floating_point and kind.rank > 0


def matrix(kind: Kind) -> bool:
    return kind.matrix and floating(kind)


def anything(kind: Kind) -> bool:
    return kind.rank > 0


def halves(kind: Kind) -> bool:
    return kind.even_columns and floating(kind)


def writable(kind: Kind) -> bool:
    return floating(kind) and kind.rank > 1 and not kind.overlaps


def writable_matrix(kind: Kind) -> bool:
    return kind.matrix and writable(kind)


def static(takes: Takes) -> Takes:
    return lambda kind: kind.static and takes(kind)


def float32(takes: Takes) -> Takes:
    return lambda kind: kind.dtype is torch.float32 and takes(kind)


def on_host(takes: Takes) -> Takes:
    """For steps that draw: only the host's generator is seeded alike for the program and its float64 form."""
    return lambda kind: kind.device == "cpu" and takes(kind)


def given(takes: Takes) -> Takes:
    """For steps that make a large difference of a small one: only of what is the same in every form of a program."""
    return lambda kind: kind.given and takes(kind)


def two_rows(kind: Kind) -> bool:
    """At least two rows; a symbolic size is never 0 or 1."""
    return writable_matrix(kind) and kind.sizes[0] != 1 and "-" not in kind.key[1] and "//" not in kind.key[1]


def contiguous(takes: Takes) -> Takes:
    return lambda kind: kind.contiguous and takes(kind)


def known_columns(kind: Kind) -> bool:
    return matrix(kind) and kind.sizes[1] is not None


def kind_of(tensor: Tensor, given: bool) -> Kind:
    """What a fake tensor is to the steps; asks the shape environment nothing."""
    sizes = tuple(int(size) if is_concrete_int(size) else None for size in tensor.shape)
    strides = [str(stride) for stride in tensor.stride()]
    expected, dense = 1, True
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        dense = dense and str(stride) == str(expected)
        expected = expected * size
    return Kind(
        (str(tensor.dtype), *map(str, tensor.shape)),
        tensor.dtype,
        tensor.device.type,
        sizes,
        dense,
        "0" in strides,
        given,
    )


def calls(target: Callable[..., Any], *rest: Any, **kwargs: Any) -> Emit:
    return lambda b, *nodes: b(target, *nodes, *rest, **kwargs)


def shape_of(b: Build, x: fx.Node) -> list[Any]:
    return [b.size(x, dimension) for dimension in range(x.meta["val"].dim())]


def filled(b: Build, x: fx.Node, shape: Sequence[Any], number: float, dtype: torch.dtype | None = None) -> fx.Node:
    tensor = x.meta["val"]
    return b(
        aten.full.default,
        list(shape),
        number,
        dtype=dtype or tensor.dtype,
        device=tensor.device,
        pin_memory=False,
    )


def first_index(b: Build, x: fx.Node) -> fx.Node:
    """The index 0 as a tensor."""
    return filled(b, x, [1], 0, torch.int64)


def rows_of(b: Build, x: fx.Node, start: Any, end: Any) -> fx.Node:
    return b(aten.slice.Tensor, x, 0, start, end)
