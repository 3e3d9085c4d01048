"""A three-valued answer with its reason."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Truth(enum.Enum):
    """A three-valued answer."""

    TRUE = "true"
    FALSE = "false"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Fact:
    """An answer and why. It is truthy only when proven true.

    TRUE: it holds for all values the symbols may take. FALSE: it holds for none of them. UNKNOWN: neither is proven.
    """

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
