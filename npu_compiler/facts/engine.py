"""Proofs about symbolic sizes.

    facts = Facts([sympy.Eq(Mod(s, 8), 0), s >= 1])
    facts.holds(sympy.Eq(Mod(3 * s, 8), 0))     # TRUE: 3*s = 24*k + 24 with s = 8*k + 8, a multiple of 8
    facts.holds(s >= 8)                         # TRUE: s - 8 = 8*k lies in [0, oo]
    facts.holds(sympy.Eq(Mod(s, 16), 0))        # UNKNOWN

Assumptions about one symbol become its domain (domain.py). Both sides of a question are brought to a normal form
(normal.py) and subtracted; the answer is read off the difference: it is zero, it can't be zero, its bounds decide, or a
linear assumption about several symbols does. torch's own `statically_known_true` proves little about divisibility.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import sympy
from sympy.logic.boolalg import And, Boolean, BooleanAtom, Not, Or
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions as torch_functions

from npu_compiler.facts.domain import Domain
from npu_compiler.facts.fact import Fact, Truth
from npu_compiler.facts.normal import Normalizer, coefficients

REMAINDERS = (torch_functions.Mod, torch_functions.PythonMod, sympy.Mod)
NEGATED: dict[type, type] = {
    sympy.Eq: sympy.Ne,
    sympy.Ne: sympy.Eq,
    sympy.Ge: sympy.Lt,
    sympy.Lt: sympy.Ge,
    sympy.Gt: sympy.Le,
    sympy.Le: sympy.Gt,
}


class Facts:
    """What is assumed about some symbols, and what follows.

    Args:
        assumptions: relations between integer expressions, each of which holds.
        domains: what else is known about single symbols.

    Raises:
        Contradiction: the assumptions exclude each other.
    """

    def __init__(
        self, assumptions: Iterable[Boolean] = (), domains: Mapping[sympy.Symbol, Domain] | None = None
    ) -> None:
        self.domains: dict[sympy.Symbol, Domain] = dict(domains or {})
        shared = [part for assumption in assumptions for part in _conjuncts(assumption) if not self._absorb(part)]
        self._normal = Normalizer(self.domains)
        # Each is a normal form that is never negative, with the assumption it came from.
        self._never_negative: list[tuple[sympy.Expr, Boolean]] = []
        for assumption in shared:
            self._never_negative += [(self._normal.form(form), assumption) for form in _nonnegative(assumption)]

    @classmethod
    def of(cls, environment: ShapeEnv) -> Facts:
        """Everything a shape environment knows: ranges, guards that hold for the graph, asserts made at run time."""
        domains = {}
        for symbol, interval in environment.var_to_range.items():
            lower, upper = (_finite(bound) for bound in (interval.lower, interval.upper))
            domains[symbol] = Domain().within(lower, upper, f"range of {symbol}: {interval}")
        asserts = [entry.expr for entries in environment.deferred_runtime_asserts.values() for entry in entries]
        return cls([*(guard.expr for guard in environment.guards), *asserts], domains)

    def holds(self, question: Boolean) -> Fact:
        """Whether a relation (==, !=, <, <=, >, >=, or and/or/not of them) holds for all values of its symbols."""
        if isinstance(question, BooleanAtom):
            return Fact(Truth.TRUE if question == sympy.true else Truth.FALSE, str(question))
        if isinstance(question, Not):
            inner = question.args[0]
            if type(inner) in NEGATED:
                return self.holds(NEGATED[type(inner)](*inner.args, evaluate=False))
            return _negated(self.holds(inner))
        if isinstance(question, (And, Or)):
            return self._combined(question)
        if isinstance(question, sympy.Eq):
            return self.equal(*question.args)
        if isinstance(question, sympy.Ne):
            return _negated(self.equal(*question.args))
        difference = _nonnegative(question)
        if not difference:
            return Fact(Truth.UNKNOWN, f"{question} is not a question about sizes")
        return self._never_below_zero(difference[0], str(question))

    def equal(self, left: sympy.Expr, right: sympy.Expr) -> Fact:
        """Whether two sizes are equal for all (TRUE) or for no (FALSE) values of their symbols."""
        form = self._normal.form(left - right)
        claim = f"{left} = {right}"
        if form == 0:
            return Fact(Truth.TRUE, self._because(f"{claim}: both are {self._normal.form(left)}", left, right))
        factors, constant = coefficients(form)
        low, high = self._normal.range(form)
        if low > 0 or high < 0:
            return Fact(Truth.FALSE, self._because(f"{claim} never holds: they differ by {form}", left, right))
        common = math.gcd(*factors)
        if factors and constant % common:
            reason = f"they differ by {form}, which leaves {constant % common} when divided by {common}"
            return Fact(Truth.FALSE, self._because(f"{claim} never holds: {reason}", left, right))
        below, above = (self._by_assumption(sign * form) for sign in (1, -1))
        if below is not None and above is not None:
            return Fact(Truth.TRUE, f"{claim}: follows from {below} and {above}")
        return Fact(Truth.UNKNOWN, self._because(f"{claim} can't be proven: they differ by {form}", left, right))

    def divides(self, divisor: int, size: sympy.Expr) -> Fact:
        """Whether `size` is a multiple of `divisor` (an int >= 1) for all (TRUE) or for no (FALSE) values."""
        form = self._normal.form(size)
        factors, constant = coefficients(form)
        if all(factor % divisor == 0 for factor in factors):
            claim = f"{size} = {form} is a multiple of {divisor}"
            if constant % divisor == 0:
                return Fact(Truth.TRUE, self._because(claim, size))
            return Fact(Truth.FALSE, self._because(f"{size} = {form} leaves {constant % divisor} by {divisor}", size))
        common = math.gcd(divisor, *factors)
        if constant % common:
            return Fact(Truth.FALSE, self._because(f"{size} = {form} is never a multiple of {divisor}", size))
        return self.equal(torch_functions.PythonMod(size, sympy.Integer(divisor)), sympy.S.Zero)

    def at_least(self, size: sympy.Expr, bound: sympy.Expr | int) -> Fact:
        """Whether `size` >= `bound` for all (TRUE) or for no (FALSE) values."""
        return self._never_below_zero(size - bound, f"{size} >= {bound}")

    def less(self, size: sympy.Expr, bound: sympy.Expr | int) -> Fact:
        """Whether `size` < `bound` for all (TRUE) or for no (FALSE) values."""
        return self._never_below_zero(sympy.sympify(bound) - size - 1, f"{size} < {bound}")

    def bounds(self, size: sympy.Expr) -> tuple[int | None, int | None]:
        """The smallest and largest value that are proven for `size`; None is unbounded."""
        low, high = self._normal.range(self._normal.form(size))
        return (
            math.ceil(low) if low.is_finite else None,
            math.floor(high) if high.is_finite else None,
        )

    def __str__(self) -> str:
        lines = [f"{symbol} {domain}" for symbol, domain in sorted(self.domains.items(), key=lambda item: str(item[0]))]
        return "\n".join([*lines, *sorted({str(assumption) for _, assumption in self._never_negative})])

    def _never_below_zero(self, difference: sympy.Expr, claim: str) -> Fact:
        form = self._normal.form(difference)
        low, high = self._normal.range(form)
        interval = f"{form} lies in [{low}, {high}]"
        if low >= 0:
            return Fact(Truth.TRUE, self._because(f"{claim}: {interval}", difference))
        if high < 0:
            return Fact(Truth.FALSE, self._because(f"{claim} never holds: {interval}", difference))
        assumption = self._by_assumption(form)
        if assumption is not None:
            return Fact(Truth.TRUE, f"{claim}: follows from {assumption}")
        if self._by_assumption(-form - 1) is not None:
            return Fact(Truth.FALSE, f"{claim} never holds: follows from {self._by_assumption(-form - 1)}")
        return Fact(Truth.UNKNOWN, self._because(f"{claim} can't be proven: {interval}", difference))

    def _by_assumption(self, form: sympy.Expr) -> str | None:
        """The assumption that, subtracted from `form`, leaves something that is never negative."""
        for other, assumption in self._never_negative:
            if self._normal.range(sympy.expand(form - other))[0] >= 0:
                return str(assumption)
        return None

    def _absorb(self, assumption: Boolean) -> bool:
        """Puts an assumption about one symbol into its domain; False if it says something else too."""
        if isinstance(assumption, BooleanAtom) or len(assumption.free_symbols) != 1:
            return isinstance(assumption, BooleanAtom)
        (symbol,) = assumption.free_symbols
        domain = self.domains.get(symbol, Domain())
        found = _congruence(assumption, symbol)
        if found is not None:
            self.domains[symbol] = domain.congruent(*found, reason=str(assumption))
            return True
        for difference in _nonnegative(assumption):
            slope, start = _line(difference, symbol)
            if slope is None:
                return False
            edge = sympy.Rational(-start, slope)
            lower, upper = (math.ceil(edge), None) if slope > 0 else (None, math.floor(edge))
            domain = domain.within(lower, upper, str(assumption))
        self.domains[symbol] = domain
        return bool(_nonnegative(assumption))

    def _combined(self, question: Boolean) -> Fact:
        parts = [self.holds(part) for part in sorted(question.args, key=str)]
        decisive = Truth.FALSE if isinstance(question, And) else Truth.TRUE
        for part in parts:
            if part.truth is decisive:
                return part
        undecided = next((part for part in parts if part.truth is Truth.UNKNOWN), None)
        return undecided or Fact(parts[0].truth, "; ".join(part.text for part in parts))

    def _because(self, claim: str, *sizes: sympy.Expr) -> str:
        symbols = sorted({symbol for size in sizes for symbol in sympy.sympify(size).free_symbols}, key=str)
        known = [(symbol, self.domains[symbol]) for symbol in symbols if symbol in self.domains]
        return "; ".join([claim, *(f"{symbol} {domain}" for symbol, domain in known if domain != Domain())])


def _negated(fact: Fact) -> Fact:
    opposite = {Truth.TRUE: Truth.FALSE, Truth.FALSE: Truth.TRUE, Truth.UNKNOWN: Truth.UNKNOWN}
    return Fact(opposite[fact.truth], fact.text)


def _conjuncts(assumption: Boolean) -> tuple[Boolean, ...]:
    return assumption.args if isinstance(assumption, And) else (assumption,)


def _nonnegative(relation: Boolean) -> list[sympy.Expr]:
    """Integer expressions that are >= 0 just where `relation` holds; none where it can't be said like that."""
    if isinstance(relation, sympy.Eq):
        return [relation.lhs - relation.rhs, relation.rhs - relation.lhs]
    if isinstance(relation, sympy.Ge):
        return [relation.lhs - relation.rhs]
    if isinstance(relation, sympy.Gt):
        return [relation.lhs - relation.rhs - 1]
    if isinstance(relation, sympy.Le):
        return [relation.rhs - relation.lhs]
    if isinstance(relation, sympy.Lt):
        return [relation.rhs - relation.lhs - 1]
    return []


def _congruence(relation: Boolean, symbol: sympy.Symbol) -> tuple[int, int] | None:
    """(r, m) where the relation says symbol = r (mod m)."""
    if not isinstance(relation, sympy.Eq):
        return None
    remainder, value = relation.args if isinstance(relation.args[0], REMAINDERS) else relation.args[::-1]
    if not isinstance(remainder, REMAINDERS) or not value.is_Integer or not remainder.args[1].is_Integer:
        return None
    modulus = int(remainder.args[1])
    slope, start = _line(remainder.args[0], symbol)
    if slope is None or modulus < 1 or not 0 <= value < modulus:
        return None
    # slope * symbol = value - start (mod modulus)
    common = math.gcd(slope, modulus)
    right, modulus = int(value) - start, modulus
    if right % common:
        return None
    modulus //= common
    return (right // common * pow(slope // common, -1, modulus)) % modulus if modulus > 1 else 0, modulus


def _line(expression: sympy.Expr, symbol: sympy.Symbol) -> tuple[int | None, int]:
    """(a, b) where the expression is a*symbol + b with integers; (None, 0) where it isn't."""
    expanded = sympy.expand(expression)
    slope, start = expanded.coeff(symbol, 1), expanded.coeff(symbol, 0)
    if (
        not slope.is_Integer
        or not start.is_Integer
        or slope == 0
        or sympy.expand(slope * symbol + start - expanded) != 0
    ):
        return None, 0
    return int(slope), int(start)


def _finite(bound: sympy.Expr) -> int | None:
    return int(bound) if bound.is_Integer else None
