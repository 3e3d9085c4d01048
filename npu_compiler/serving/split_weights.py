"""What engines keep of weights that they split (fine_grained_tp.py), for the run report."""

from __future__ import annotations

from dataclasses import dataclass

from npu_compiler.units import in_bytes


@dataclass(frozen=True)
class SplitWeights:
    """Weights of one kind, split over engines: how many, and bytes of what an engine has and of the whole ones."""

    kind: str
    engines: int
    weights: int
    here: int
    whole: int

    def __str__(self) -> str:
        return (
            f"fine_grained_tp: {self.kind}: {self.weights} weights split over {self.engines} engines, "
            f"{in_bytes(self.here)} on each instead of {in_bytes(self.whole)}"
        )
