"""What vLLM's captures may take: asked before each size, largest first. A size that does not fit is served eagerly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.distributed.parallel_state import get_world_group


@dataclass
class CaptureBudget:
    """The limits of one engine's captures, and what its captures took so far.

    Attributes:
        seconds, mebibytes: the limits; 0: none.
    """

    seconds: float
    mebibytes: float
    spent_seconds: float = 0.0
    spent_mebibytes: float = 0.0
    captures: int = 0

    def refusal(self, need: Callable[[], float]) -> str:
        """Why the next capture does not fit, with the option to change; empty if it fits.

        Args:
            need: measures the MiB that a graph of this size uses. Sizes share a pool, and the largest comes first: of
                what a size needs, only what goes beyond the captures before is new.
        """
        if self.seconds:
            next_one = self.spent_seconds / self.captures if self.captures else 0.0
            if self.spent_seconds + next_one > self.seconds:
                return (
                    f"{self.spent_seconds:.3g} s are taken, about {next_one:.3g} more are needed, "
                    f"capture_budget_seconds is {self.seconds:g}"
                )
        if self.mebibytes and self.spent_mebibytes > self.mebibytes:
            return f"{self.spent_mebibytes:.4g} MiB are taken, capture_budget_mib is {self.mebibytes:g}"
        if self.mebibytes and not self.captures and (needed := need()) > self.mebibytes:
            return f"about {needed:.3g} MiB are needed, capture_budget_mib is {self.mebibytes:g}"
        return ""

    def add(self, seconds: float, mebibytes: float) -> None:
        """Counts a capture, as measured."""
        self.spent_seconds += seconds
        self.spent_mebibytes += mebibytes
        self.captures += 1


def agreed(refusal: str) -> str:
    """The refusal for all ranks: what one can't capture none does, as the run before a capture has collectives."""
    group = get_world_group()
    if group.world_size == 1:
        return refusal
    refused = torch.tensor(bool(refusal), dtype=torch.int32)
    torch.distributed.all_reduce(refused, op=torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return refusal or ("another rank's captures don't fit" if refused.item() else "")
