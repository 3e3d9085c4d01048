"""Questions about sizes, answered True, False or Unknown, each with the reason as text.

A legality check never guesses: only a proven True lets a rewrite happen. Nothing here adds a guard to the shape
environment; a proof holds for every value the symbols may take.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch

Size: TypeAlias = "int | torch.SymInt"


class Truth(enum.Enum):
    """A three-valued answer."""

    TRUE = "true"
    FALSE = "false"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Fact:
    """An answer and why. It is truthy only when proven true."""

    truth: Truth
    text: str

    def __bool__(self) -> bool:
        return self.truth is Truth.TRUE

    def __and__(self, other: Fact) -> Fact:
        """The conjunction; the text is that of the first part that is not true."""
        return other if self else self


def known(holds: bool, text: str) -> Fact:
    """A fact that needs no proof; `text` says what is the case if it does not hold."""
    return Fact(Truth.TRUE if holds else Truth.FALSE, text)


def equal(left: Size, right: Size, what: str) -> Fact:
    """Whether two sizes are equal for all values of their symbols."""
    a, b = expression(left), expression(right)
    difference = sympy.simplify(a - b)
    if difference == 0:
        return Fact(Truth.TRUE, f"{what}: {a} = {b}")
    if difference.is_number:
        return Fact(Truth.FALSE, f"{what}: {a} is not {b}")
    if difference.is_positive or difference.is_negative:
        return Fact(Truth.FALSE, f"{what}: {a} never equals {b}")
    return Fact(Truth.UNKNOWN, f"{what}: {a} = {b} can't be proven")


def same_shape(left: Sequence[Size], right: Sequence[Size], what: str) -> Fact:
    """Whether two shapes are equal dimension by dimension."""
    if len(left) != len(right):
        return Fact(Truth.FALSE, f"{what}: {len(left)} and {len(right)} dimensions")
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        fact = equal(a, b, f"{what}, dimension {index}")
        if not fact:
            return fact
    return Fact(Truth.TRUE, f"{what}: equal")


def same_layout(left: torch.Tensor, right: torch.Tensor, what: str) -> Fact:
    """Whether two tensors have equal shapes, dtypes and strides (strides of dimensions of size 1 don't count)."""
    if left.dtype != right.dtype:
        return Fact(Truth.FALSE, f"{what}: dtypes {left.dtype} and {right.dtype}")
    shape = same_shape(left.shape, right.shape, f"{what}: shape")
    if not shape:
        return shape
    for index, (a, b) in enumerate(zip(left.stride(), right.stride(), strict=True)):
        if equal(left.shape[index], 1, "size"):
            continue
        fact = equal(a, b, f"{what}: stride of dimension {index}")
        if not fact:
            return fact
    return Fact(Truth.TRUE, f"{what}: same layout")


def expression(size: Size) -> sympy.Expr:
    """The sympy expression of a size; its symbols are integers and not negative."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(size)
