"""Bytes that depend on sizes, as vectors that are quick to add and compare.

An amount is a list of coefficients over a few expressions that are never negative: 1, the distance t of each size from
its smallest value, products of these, and floors where a rounding did not go away. 2048*s with s >= 1 is 2048 + 2048*t,
(2048, 2048) over (1, t). If every coefficient of one amount is at least the other's, so is the amount, for every size;
otherwise the order is unknown, and the larger of each coefficient is an amount that is at least both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TypeAlias

import sympy
from torch.utils._sympy.functions import FloorDiv

from npu_compiler.facts.engine import Facts

Amount: TypeAlias = tuple[int, ...]
Sizes: TypeAlias = Mapping[sympy.Symbol, int]
ZERO: Amount = ()
SMALLEST = 1
"""Dynamo gives dynamic sizes the low bound 2, as it compiles 0 and 1 apart; vLLM calls past its guards with 1 too."""
TYPICAL = 4096
"""What an unbounded size is taken for where an order is unknown; a plan may be better for it, but is right anyway."""
BLOCK = 512
PADDING = 32
"""torch_npu's allocator hands out whole blocks of 512 bytes, with at least 32 spare bytes behind each tensor."""


class Amounts:
    """Makes amounts of expressions, and expressions and numbers of amounts.

    Args:
        facts: what is known of the symbols.
    """

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._basis: list[sympy.Expr] = [sympy.S.One]
        self._places: dict[sympy.Expr, int] = {sympy.S.One: 0}
        self._typical: list[int] = [1]
        self._starts: dict[sympy.Symbol, int] = {}
        self._made: dict[tuple[str, sympy.Expr], Amount] = {}

    def allocated(self, size: sympy.Expr) -> Amount:
        """What the allocator takes for `size` bytes, exactly."""
        key = ("allocated", size)
        if key not in self._made:
            padded = sympy.expand(size + PADDING + BLOCK - 1)
            rest = sympy.Add(*(c % BLOCK * m for m, c in padded.as_coefficients_dict().items()))
            whole = padded - rest
            blocks = whole if rest.is_Integer else BLOCK * FloorDiv(padded, BLOCK)
            self._made[key] = ZERO if size == 0 else self._vector(blocks)
        return self._made[key]

    def room(self, size: sympy.Expr) -> Amount:
        """At least what the allocator takes for `size` bytes, and without floors, so that rooms can be compared: whole
        blocks where these are exact, else every coefficient a multiple of 32, CANN's alignment."""
        key = ("room", size)
        if key not in self._made:
            exact = self.allocated(size)
            if all(isinstance(self._basis[i], FloorDiv) is False for i, value in enumerate(exact) if value):
                self._made[key] = exact
            else:
                vector = self._vector(sympy.expand(size + PADDING + BLOCK - 1))
                self._made[key] = tuple(-(-value // PADDING) * PADDING for value in vector)
        return self._made[key]

    def expression(self, amount: Amount) -> sympy.Expr:
        """The amount in the symbols of the program."""
        starts = self._starts.items()
        terms = (value * self._basis[index] for index, value in enumerate(amount))
        return sympy.expand(sympy.Add(*terms).xreplace({_step(s): s - start for s, start in starts}))

    def evaluate(self, amounts: Iterable[Amount], sizes: Sizes) -> list[int]:
        """The amounts for given sizes.

        Raises:
            KeyError: a symbol has no size.
            ValueError: a size is below its smallest value.
        """
        steps = {}
        for symbol, start in self._starts.items():
            steps[_step(symbol)] = sizes[symbol] - start
            if sizes[symbol] < start:
                raise ValueError(f"{symbol} = {sizes[symbol]} is below {start}, its smallest value")
        values = [int(entry.subs(steps)) for entry in self._basis]
        return [sum(a * b for a, b in zip(amount, values, strict=False)) for amount in amounts]

    def typical(self, amount: Amount) -> int:
        """A number to sort by: consistent with every order that is known."""
        return sum(a * b for a, b in zip(amount, self._typical, strict=False))

    @property
    def typical_sizes(self) -> str:
        """The sizes that `typical` takes, as text."""
        found = self._typical_values().items()
        return ", ".join(f"{symbol}={size}" for symbol, size in sorted(found, key=lambda pair: str(pair[0])))

    def _vector(self, size: sympy.Expr) -> Amount:
        shifted = sympy.expand(size.xreplace({s: _step(s) + self._start(s) for s in size.free_symbols}))
        terms = shifted.as_coefficients_dict()
        if any(not c.is_Integer or not self._is_never_negative(m) for m, c in terms.items()):
            terms = {shifted: sympy.S.One}  # in one piece: a size is never negative
        vector = [0] * len(self._basis)
        for entry, coefficient in sorted(terms.items(), key=lambda item: item[0].sort_key()):
            if entry not in self._places:
                self._places[entry] = len(self._basis)
                self._basis.append(entry)
                self._typical.append(max(1, int(entry.subs(self._typical_steps()))))
            vector += [0] * (len(self._basis) - len(vector))
            vector[self._places[entry]] = int(coefficient)
        return tuple(vector)

    def _start(self, symbol: sympy.Symbol) -> int:
        if symbol not in self._starts:
            low, _ = self._facts.bounds(symbol)
            self._starts[symbol] = 0 if low is None else min(low, SMALLEST) if low <= 2 else low
        return self._starts[symbol]

    def _typical_values(self) -> dict[sympy.Symbol, int]:
        values = {}
        for symbol, start in self._starts.items():
            _, high = self._facts.bounds(symbol)
            values[symbol] = max(start, min(TYPICAL, TYPICAL if high is None else high))
        return values

    def _typical_steps(self) -> dict[sympy.Symbol, int]:
        return {_step(symbol): size - self._starts[symbol] for symbol, size in self._typical_values().items()}

    def _is_never_negative(self, entry: sympy.Expr) -> bool:
        """Whether a term is a product of steps, or a floor of something made of such."""
        if entry.is_Symbol or entry.is_Integer:
            return bool(entry.is_nonnegative)
        if entry.is_Mul or entry.is_Pow or entry.is_Add:
            return all(self._is_never_negative(part) for part in entry.args)
        return isinstance(entry, FloorDiv) and all(self._is_never_negative(part) for part in entry.args)


def _step(symbol: sympy.Symbol) -> sympy.Symbol:
    """The distance of a size from its smallest value."""
    return sympy.Symbol(f"t({symbol.name})", integer=True, nonnegative=True)


def add(left: Amount, right: Amount) -> Amount:
    return tuple(a + b for a, b in zip_longest(left, right, fillvalue=0))


def subtract(left: Amount, right: Amount) -> Amount:
    return tuple(a - b for a, b in zip_longest(left, right, fillvalue=0))


def covers(left: Amount, right: Amount) -> bool:
    """Whether left >= right for all sizes; False says nothing."""
    return all(a >= b for a, b in zip_longest(left, right, fillvalue=0))


def upper(left: Amount, right: Amount) -> Amount:
    """An amount that is at least both."""
    return tuple(max(a, b) for a, b in zip_longest(left, right, fillvalue=0))


def lower(left: Amount, right: Amount) -> Amount:
    """An amount that is at most both."""
    return tuple(min(a, b) for a, b in zip_longest(left, right, fillvalue=0))


def largest(amounts: Iterable[Amount]) -> list[Amount]:
    """The amounts without those that another one covers."""
    kept: list[Amount] = []
    for amount in dict.fromkeys(amounts):
        if not any(covers(other, amount) for other in kept):
            kept = [other for other in kept if not covers(amount, other)]
            kept.append(amount)
    return kept


def never_more(left: Sequence[Amount], right: Sequence[Amount]) -> bool:
    """Whether the largest of `left` is at most the largest of `right`, for all sizes; False says nothing."""
    return all(any(covers(other, amount) for other in right) for amount in left)
