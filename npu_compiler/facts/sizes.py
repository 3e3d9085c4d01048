"""Questions about the sizes of tensors, answered True, False or Unknown, each with the reason as text.

A legality check never guesses: only a proven True lets a rewrite happen. Nothing here adds a guard to the shape
environment; a proof holds for every value the symbols may take under the guards that are there.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TypeAlias

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from npu_compiler.facts.engine import Facts
from npu_compiler.facts.fact import Fact, Truth, known

__all__ = [
    "Fact", "Size", "Truth", "at_least", "contiguous", "divisible", "equal", "expression", "facts_of", "known",
    "listening", "same_layout", "same_shape",
]  # fmt: skip

Size: TypeAlias = "int | torch.SymInt"
_NO_FACTS = Facts()
# What was gathered from an environment is kept until it learns more.
_gathered: weakref.WeakKeyDictionary[ShapeEnv, tuple[tuple[int, ...], Facts]] = weakref.WeakKeyDictionary()

_listener: ContextVar[Callable[[Fact], None] | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(hear: Callable[[Fact], None]) -> Iterator[None]:
    """Tells `hear` of every answer to a question about symbolic sizes that is asked inside."""
    before = _listener.set(hear)
    try:
        yield
    finally:
        _listener.reset(before)


def facts_of(*sizes: Size) -> Facts:
    """What the shape environment of the sizes knows; nothing where all of them are numbers."""
    environment = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
    if environment is None:
        return _NO_FACTS
    asserts = sum(map(len, environment.deferred_runtime_asserts.values()))
    state = (len(environment.guards), asserts, len(environment.var_to_range), environment._version_counter)
    found = _gathered.get(environment)
    if found is None or found[0] != state:
        found = _gathered[environment] = (state, Facts.of(environment))
    return found[1]


def equal(left: Size, right: Size, what: str) -> Fact:
    """Whether two sizes are equal for all values of their symbols."""
    if type(left) is int and type(right) is int:  # the common case, without sympy
        return known(left == right, f"{what}: {left} {'=' if left == right else 'is not'} {right}")
    a, b = expression(left), expression(right)
    if a == b:
        return Fact(Truth.TRUE, f"{what}: {a} = {b}")
    if a.is_Integer and b.is_Integer:
        return Fact(Truth.FALSE, f"{what}: {a} is not {b}")
    return _about(what, facts_of(left, right).equal(a, b))


def divisible(size: Size, divisor: int, what: str) -> Fact:
    """Whether a size is a multiple of `divisor` for all values of its symbols."""
    return _about(what, facts_of(size).divides(divisor, expression(size)))


def at_least(size: Size, bound: Size, what: str) -> Fact:
    """Whether `size` >= `bound` for all values of their symbols."""
    return _about(what, facts_of(size, bound).at_least(expression(size), expression(bound)))


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
        fact = equal(a, b, f"{what}: stride of dimension {index}")
        if not fact and not equal(left.shape[index], 1, "size"):
            return fact
    return Fact(Truth.TRUE, f"{what}: same layout")


def contiguous(tensor: torch.Tensor, what: str) -> Fact:
    """Whether a tensor's elements lie side by side in the order of its dimensions (strides of dimensions of size 1
    don't count). torch's own answer adds a guard where strides are symbolic."""
    expected: Size = 1
    for index in reversed(range(tensor.dim())):
        fact = equal(tensor.stride(index), expected, f"{what}: stride of dimension {index}")
        if not fact and not equal(tensor.shape[index], 1, "size"):
            return fact
        expected = expected * tensor.shape[index]
    return Fact(Truth.TRUE, f"{what}: contiguous")


def expression(size: Size) -> sympy.Expr:
    """The sympy expression of a size; its symbols are integers and not negative."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(size)


def _about(what: str, fact: Fact) -> Fact:
    answer = Fact(fact.truth, f"{what}: {fact.text}")
    hear = _listener.get()
    if hear is not None:
        hear(answer)
    return answer
