"""A normal form of size expressions, in which equal sizes look equal and bounds can be read off.

Every symbol is replaced by its progression (s = 8*k + 16), every remainder x % c by x - c*(x // c), and of every floor
division what divides evenly is taken out: (24*k + s + 5) // 8 is 3*k + (s + 5) // 8. What is left is a polynomial with
integer coefficients over the ks and over one atom for each floor division (or other function) that is still there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
from torch.utils._sympy import functions as torch_functions

from npu_compiler.facts.domain import Domain

Bound: TypeAlias = Any  # a sympy number, or one of its infinities
UNBOUNDED = (-sympy.oo, sympy.oo)


@dataclass(frozen=True)
class Floor:
    """The atom that stands for numerator // divisor, with 0 < divisor; numerator is in normal form."""

    numerator: sympy.Expr
    divisor: int


class Normalizer:
    """Brings expressions into normal form, under the domains of their symbols."""

    def __init__(self, domains: Mapping[sympy.Symbol, Domain]) -> None:
        self._domains = domains
        self._substitution: dict[sympy.Symbol, sympy.Expr] = {}
        self._bounds: dict[sympy.Symbol, tuple[Bound, Bound]] = {}
        self._floors: dict[sympy.Symbol, Floor] = {}
        self._atoms: dict[object, sympy.Symbol] = {}
        self._forms: dict[sympy.Expr, sympy.Expr] = {}

    def form(self, expression: sympy.Expr) -> sympy.Expr:
        """The normal form of `expression`."""
        found = self._forms.get(expression)
        if found is None:
            found = self._forms[expression] = sympy.expand(self._form(expression))
        return found

    def range(self, form: sympy.Expr) -> tuple[Bound, Bound]:
        """The least interval that interval arithmetic finds for a normal form: (lowest, highest), maybe infinite."""
        low, high = self._interval(form)
        # A floor between its neighbours: x/c - (c-1)/c <= x // c <= x/c. It keeps what x shares with the other terms.
        atoms = [symbol for symbol in form.free_symbols if symbol in self._floors]
        if atoms and all(sympy.degree(form, symbol) == 1 and not _in_products(form, symbol) for symbol in atoms):
            low = max(low, self._interval(self._relaxed(form, atoms, upper=False))[0])
            high = min(high, self._interval(self._relaxed(form, atoms, upper=True))[1])
        return low, high

    def _form(self, expression: sympy.Expr) -> sympy.Expr:
        if expression.is_Integer:
            return expression
        if expression.is_Symbol:
            return self._symbol(expression)
        parts = [self.form(argument) for argument in expression.args]
        if expression.is_Add or expression.is_Mul:
            return expression.func(*parts)
        if expression.is_Pow and parts[1].is_Integer and parts[1] > 0:
            return parts[0] ** parts[1]
        if isinstance(expression, torch_functions.PowByNatural) and parts[1].is_Integer:
            return parts[0] ** parts[1]
        if isinstance(expression, (torch_functions.FloorDiv, torch_functions.CleanDiv)):
            return self._floor(parts[0], parts[1], expression)
        if isinstance(expression, (torch_functions.Mod, torch_functions.PythonMod, sympy.Mod)):
            return self._remainder(parts[0], parts[1], expression)
        if isinstance(expression, torch_functions.ModularIndexing):
            return self._remainder(self._floor(parts[0], parts[1], expression), parts[2], expression)
        if isinstance(expression, torch_functions.CeilDiv):
            return -self._floor(-parts[0], parts[1], expression)
        if isinstance(expression, torch_functions.Identity):
            return parts[0]
        if isinstance(expression, (torch_functions.Max, torch_functions.Min, sympy.Max, sympy.Min)):
            return self._extreme(expression, parts)
        return self._opaque(expression.func, parts, UNBOUNDED)

    def _symbol(self, symbol: sympy.Symbol) -> sympy.Expr:
        if symbol in self._bounds:  # a k or an atom: in normal form already
            return symbol
        if symbol not in self._substitution:
            written, k, first, last = self._domains.get(symbol, Domain()).parameter(symbol)
            self._substitution[symbol] = written
            if k is not None:
                self._bounds[k] = (
                    -sympy.oo if first is None else sympy.Integer(first),
                    sympy.oo if last is None else sympy.Integer(last),
                )
        return self._substitution[symbol]

    def _floor(self, numerator: sympy.Expr, divisor: sympy.Expr, expression: sympy.Expr) -> sympy.Expr:
        if not divisor.is_Integer or divisor == 0 or not _has_integer_coefficients(numerator):
            whole = sympy.cancel(numerator / divisor) if divisor != 0 and self._positive(divisor) else None
            if whole is not None and _has_integer_coefficients(whole):
                return whole
            return self._opaque(torch_functions.FloorDiv, [numerator, divisor], self._quotient(numerator, divisor))
        if divisor < 0:
            numerator, divisor = sympy.expand(-numerator), -divisor
        even, rest = split(sympy.expand(numerator), int(divisor))
        low, high = self.range(rest)
        if low.is_finite and high.is_finite and low // divisor == high // divisor:
            return even + low // divisor
        # What all of the rest shares with the divisor goes: (4*k + 5) // 8 is (k + 1) // 2.
        shared = math.gcd(int(divisor), *(int(c) for m, c in rest.as_coefficients_dict().items() if m != 1))
        constant = int(rest.as_coefficients_dict().get(sympy.S.One, 0))
        rest = sympy.expand((rest - constant) / shared) + constant // shared
        return even + self._floor_atom(self._flattened(Floor(rest, int(divisor) // shared)))

    def _flattened(self, floor: Floor) -> Floor:
        """(x // a + b) // c as (x + a*b) // (a*c)."""
        inner = next((atom for atom in floor.numerator.free_symbols if atom in self._floors), None)
        if inner is None or not (floor.numerator - inner).is_Integer:
            return floor
        numerator, divisor = self._floors[inner].numerator, self._floors[inner].divisor
        return Floor(sympy.expand(numerator + divisor * (floor.numerator - inner)), divisor * floor.divisor)

    def _floor_atom(self, floor: Floor) -> sympy.Expr:
        if floor.divisor == 1:
            return floor.numerator
        low, high = self.range(floor.numerator)
        atom = self._atom(floor, f"({floor.numerator})//{floor.divisor}", (low, high), floor.divisor)
        self._floors[atom] = floor
        return atom

    def _remainder(self, numerator: sympy.Expr, divisor: sympy.Expr, expression: sympy.Expr) -> sympy.Expr:
        if divisor.is_Integer and divisor > 0:
            return numerator - divisor * self._floor(numerator, divisor, expression)
        bounds = UNBOUNDED
        if self._positive(divisor):
            bounds = (sympy.S.Zero, self.range(divisor)[1] - 1)
            if sympy.rem(numerator, divisor) == 0 and _has_integer_coefficients(sympy.cancel(numerator / divisor)):
                return sympy.S.Zero
        return self._opaque(torch_functions.PythonMod, [numerator, divisor], bounds)

    def _extreme(self, expression: sympy.Expr, parts: list[sympy.Expr]) -> sympy.Expr:
        largest = isinstance(expression, (torch_functions.Max, sympy.Max))
        for one in parts:
            differences = [self.range(sympy.expand(one - other)) for other in parts]
            if all((low >= 0) if largest else (high <= 0) for low, high in differences):
                return one
        lows, highs = zip(*(self.range(part) for part in parts), strict=True)
        pick = max if largest else min
        return self._opaque(sympy.Max if largest else sympy.Min, sorted(parts, key=str), (pick(lows), pick(highs)))

    def _opaque(self, function: object, parts: list[sympy.Expr], bounds: tuple[Bound, Bound]) -> sympy.Expr:
        name = f"{getattr(function, '__name__', function)}({', '.join(map(str, parts))})"
        return self._atom((function, *parts), name, bounds, 1)

    def _atom(self, key: object, name: str, bounds: tuple[Bound, Bound], divisor: int) -> sympy.Symbol:
        if key not in self._atoms:
            symbol = sympy.Symbol(name, integer=True)
            low, high = (bound // divisor if bound.is_finite else bound for bound in bounds)
            self._atoms[key] = symbol
            self._bounds[symbol] = (low, high)
        return self._atoms[key]

    def _quotient(self, numerator: sympy.Expr, divisor: sympy.Expr) -> tuple[Bound, Bound]:
        low, high = self.range(numerator)
        return (sympy.S.Zero, high) if low >= 0 and self._positive(divisor) else UNBOUNDED

    def _positive(self, form: sympy.Expr) -> bool:
        return bool(self.range(form)[0] >= 1)

    def _relaxed(self, form: sympy.Expr, atoms: list[sympy.Symbol], upper: bool) -> sympy.Expr:
        """`form` with each floor replaced by its neighbour that makes the form largest (or smallest)."""
        for atom in atoms:
            floor = self._floors[atom]
            exact = sympy.Rational(1, floor.divisor) * floor.numerator
            below = exact - sympy.Rational(floor.divisor - 1, floor.divisor)
            form = form.subs(atom, exact if (form.coeff(atom) > 0) == upper else below)
        return sympy.expand(form)

    def _interval(self, form: sympy.Expr) -> tuple[Bound, Bound]:
        low = high = sympy.S.Zero
        for monomial, coefficient in form.as_coefficients_dict().items():
            least, most = self._monomial(monomial)
            ends = (
                (coefficient * least, coefficient * most)
                if coefficient > 0
                else (coefficient * most, coefficient * least)
            )
            low, high = low + ends[0], high + ends[1]
        return low, high

    def _monomial(self, monomial: sympy.Expr) -> tuple[Bound, Bound]:
        low = high = sympy.S.One
        for base, exponent in monomial.as_powers_dict().items():
            if base.is_Integer:
                ends = (base**exponent, base**exponent)
            elif not exponent.is_Integer or exponent < 0:
                return UNBOUNDED
            else:
                ends = _power(self._bounds.get(base, UNBOUNDED), int(exponent))
            products = [_times(a, b) for a in (low, high) for b in ends]
            low, high = min(products), max(products)
        return low, high


def split(form: sympy.Expr, divisor: int) -> tuple[sympy.Expr, sympy.Expr]:
    """(q, r) with form = divisor * q + r: q takes what divides evenly, r keeps coefficients in [0, divisor)."""
    even, rest = [], []
    for monomial, coefficient in form.as_coefficients_dict().items():
        if not coefficient.is_Integer:
            return sympy.S.Zero, form
        even.append(coefficient // divisor * monomial)
        rest.append(coefficient % divisor * monomial)
    return sympy.Add(*even), sympy.Add(*rest)


def coefficients(form: sympy.Expr) -> tuple[list[int], int]:
    """The coefficients of the terms with symbols, and the constant. Normal forms have integers only."""
    terms = dict(form.as_coefficients_dict())
    constant = terms.pop(sympy.S.One, sympy.S.Zero)
    return [int(value) for value in terms.values() if value != 0], int(constant)


def _has_integer_coefficients(form: sympy.Expr) -> bool:
    expanded = sympy.expand(form)
    if not expanded.is_polynomial(*expanded.free_symbols):
        return False
    return all(value.is_Integer for value in expanded.as_coefficients_dict().values())


def _in_products(form: sympy.Expr, symbol: sympy.Symbol) -> bool:
    return any(symbol in monomial.free_symbols and monomial != symbol for monomial in form.as_coefficients_dict())


def _power(bounds: tuple[Bound, Bound], exponent: int) -> tuple[Bound, Bound]:
    low, high = bounds
    ends = (low**exponent, high**exponent)
    if exponent % 2:
        return ends
    return (sympy.S.Zero if low < 0 < high else min(ends), max(ends))


def _times(left: Bound, right: Bound) -> Bound:
    """The product, where zero times infinity is zero: the infinite end is never reached."""
    return sympy.S.Zero if left == 0 or right == 0 else left * right
