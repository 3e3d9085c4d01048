"""What is known about one symbol: the integers it may be.

A domain is the intersection of an arithmetic progression and an interval: s = modulus * k + remainder,
lower <= s <= upper. That is what torch._check(s % 8 == 0) and torch._check(s <= 512) say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
from sympy.ntheory.modular import solve_congruence


class Contradiction(Exception):
    """No integer satisfies what was assumed."""


@dataclass(frozen=True)
class Domain:
    """The integers `modulus * k + remainder` in [lower, upper].

    Attributes:
        lower, upper: None is unbounded. Both are members of the progression where they are given.
        reasons: the assumptions that say so, as text.
    """

    modulus: int = 1
    remainder: int = 0
    lower: int | None = None
    upper: int | None = None
    reasons: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.lower is not None:
            object.__setattr__(self, "lower", self.lower + (self.remainder - self.lower) % self.modulus)
        if self.upper is not None:
            object.__setattr__(self, "upper", self.upper - (self.upper - self.remainder) % self.modulus)
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            raise Contradiction(f"nothing is left between {self.lower} and {self.upper}: {'; '.join(self.reasons)}")

    def within(self, lower: int | None, upper: int | None, reason: str) -> Domain:
        """The part of the domain in [lower, upper].

        Raises:
            Contradiction: it is empty.
        """
        low = lower if self.lower is None else self.lower if lower is None else max(lower, self.lower)
        high = upper if self.upper is None else self.upper if upper is None else min(upper, self.upper)
        if (low, high) == (self.lower, self.upper):
            return self
        return Domain(self.modulus, self.remainder, low, high, (*self.reasons, reason))

    def congruent(self, remainder: int, modulus: int, reason: str) -> Domain:
        """The part of the domain with s = remainder (mod modulus), by the Chinese remainder theorem.

        Raises:
            Contradiction: it is empty.
        """
        joined = solve_congruence((self.remainder, self.modulus), (remainder, modulus))
        if joined is None:
            raise Contradiction(f"{reason} contradicts {'; '.join(self.reasons)}")
        found, period = (int(part) for part in joined)
        if period == self.modulus:
            return self
        return Domain(period, found, self.lower, self.upper, (*self.reasons, reason))

    @property
    def value(self) -> int | None:
        """The only integer in the domain, if there is just one."""
        return self.lower if self.lower is not None and self.lower == self.upper else None

    def parameter(self, symbol: sympy.Symbol) -> tuple[sympy.Expr, sympy.Symbol | None, int | None, int | None]:
        """`symbol` written as modulus * k + offset: (that expression, k, smallest k, largest k).

        Where there is a lower bound, k counts from it, so that k >= 0.
        """
        if self.value is not None:
            return sympy.Integer(self.value), None, None, None
        start = self.lower if self.lower is not None else self.remainder
        first = 0 if self.lower is not None else None
        last = None if self.upper is None else (self.upper - start) // self.modulus
        k = sympy.Symbol(f"k_{symbol.name}", integer=True, nonnegative=True if first == 0 else None)
        return self.modulus * k + start, k, first, last

    def __str__(self) -> str:
        parts = [f"= {self.modulus}*k + {self.remainder}" if self.remainder else f"= {self.modulus}*k"]
        parts = parts if self.modulus > 1 else []
        parts += [f">= {self.lower}"] if self.lower is not None else []
        parts += [f"<= {self.upper}"] if self.upper is not None else []
        return ", ".join(parts) or "any integer"
