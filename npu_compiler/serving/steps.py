"""Counting steps: replayed ones, and the others by their reason."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from npu_compiler.reasons import Reason

FULL, PIECEWISE, EAGER = "FULL", "PIECEWISE", "NONE"
"""What a step ran as: vLLM's names of CUDAGraphMode."""
COMMON_SIZES = 8
"""Of the sizes of a group this many are listed, the most frequent ones."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the engine. `mode` is FULL, PIECEWISE or NONE (eager); `padded_tokens` includes the padding.

    `reason`, with its `detail`, says why it was not a replay of one graph; None where it was.
    """

    decode: bool
    mode: str
    tokens: int
    padded_tokens: int
    generated: int = 0
    reason: Reason | None = None
    detail: str = ""


@dataclasses.dataclass
class StepGroup:
    """Steps that were no replay for the same reason.

    Attributes:
        first, last: their numbers, counted from 0. `sizes`: how many had how many tokens.
    """

    reason: Reason
    detail: str
    decode: bool
    mode: str
    first: int
    last: int = 0
    sizes: Counter[int] = dataclasses.field(default_factory=Counter)

    @property
    def steps(self) -> int:
        """How many they are."""
        return self.sizes.total()

    @property
    def said(self) -> str:
        """How many they are, why, and of what sizes."""
        smallest, largest = min(self.sizes), max(self.sizes)
        sizes = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
        return f"{self.steps:,} not: {self.reason.said(self.detail)} ({sizes} tokens)"

    def as_dict(self) -> dict[str, Any]:
        """The group as JSON types (npu_compiler/inspect/run.py)."""
        return {
            "reason": self.reason.name,
            "detail": self.detail,
            "kind": "decode" if self.decode else "other",
            "mode": self.mode,
            "steps": self.steps,
            "smallest": min(self.sizes),
            "largest": max(self.sizes),
            "sizes": [list(entry) for entry in self.sizes.most_common(COMMON_SIZES)],
            "first": self.first,
            "last": self.last,
        }


class StepCounts:
    """Steps since the start or the last `clear`.

    Attributes:
        decode, other: how many steps of one token a request, and how many other ones, ran in each mode.
        groups: those that were no replay of one graph.
        tokens, padding: of the steps that replayed something.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts again at 0."""
        self.decode: Counter[str] = Counter()
        self.other: Counter[str] = Counter()
        self.groups: dict[tuple[str, str, bool, str], StepGroup] = {}
        self.tokens = self.padding = 0

    @property
    def total(self) -> int:
        """All steps."""
        return self.decode.total() + self.other.total()

    def add(self, step: Step) -> None:
        """Counts a step."""
        number = self.total
        (self.decode if step.decode else self.other)[step.mode] += 1
        if step.mode != EAGER:
            self.tokens += step.padded_tokens
            self.padding += step.padded_tokens - step.tokens
        if step.reason is None:
            return
        key = (step.reason.name, step.detail, step.decode, step.mode)
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = StepGroup(step.reason, step.detail, step.decode, step.mode, number)
        group.last = number
        group.sizes[step.tokens] += 1

    def line(self) -> str:
        """What happened, for a log: every reason with what to change, on one line."""
        parts = [f"{self.decode[FULL]:,} of {self.decode.total():,} decode steps replayed"]
        parts += [f"{group.said}, {group.reason.change}" for group in self._of(True)]
        if self.other:
            parts.append(f"{self.other[FULL]:,} of {self.other.total():,} other steps replayed")
            parts += [group.said for group in self._of(False)]
        return "ascend: " + "; ".join(parts)

    def _of(self, decode: bool) -> list[StepGroup]:
        found = [group for group in self.groups.values() if group.decode == decode]
        return sorted(found, key=lambda group: -group.steps)
