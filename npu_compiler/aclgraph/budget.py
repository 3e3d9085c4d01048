"""What captured graphs may take, asked before each capture.

What a capture will take is estimated: its time from the captures before it, per call; its memory from the memory plan.
What the captures before took is measured. A shape that does not fit runs uncaptured, the others stay captured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from npu_compiler.aclgraph.forecast import Forecast
from npu_compiler.config import Options

MIB = 1 << 20
SECONDS_A_CALL = 2e-4
"""What recording one call takes before anything was measured (assumption)."""


@dataclass
class Spent:
    """What the captures so far took, as measured.

    Attributes:
        seconds: of all captures, of graphs that are gone too.
        calls: how many calls were recorded in that time.
        pool, buffers: MiB of the pool in use, and of the buffers that copied inputs are read from.
        streams: of the graphs that are kept.
    """

    seconds: float = 0.0
    calls: int = 0
    pool: float = 0.0
    buffers: float = 0.0
    streams: int = 0

    @property
    def mebibytes(self) -> float:
        """All device memory."""
        return self.pool + self.buffers


@dataclass(frozen=True)
class Price:
    """What one more capture is estimated to take, beyond what was spent."""

    seconds: float
    pool: float
    buffers: float
    streams: int


class Budget:
    """The limits of one compiled graph, and what is left of them.

    Args:
        calls: how many calls a capture records.
    """

    def __init__(self, options: Options, forecast: Forecast, calls: int) -> None:
        self._options = options
        self._forecast = forecast
        self._calls = calls
        self._limited = bool(
            options.capture_budget_seconds or options.capture_budget_mib or options.capture_budget_streams
        )
        self.spent = Spent()

    def refusal(self, key: Sequence[Any], buffers: int, streams: int) -> str:
        """Why a shape does not fit, with the option to change; empty if it fits.

        Args:
            buffers: bytes of new input buffers.
            streams: that its graph uses.
        """
        return self._over(self.spent, self._price(key, buffers, streams)) if self._limited else ""

    def add(self, seconds: float, pool: float, buffers: int, streams: int) -> None:
        """Counts a capture. `pool` in MiB, as measured; `buffers` in bytes."""
        self.spent.seconds += seconds
        self.spent.calls += self._calls
        self.spent.pool += pool
        self.spent.buffers += buffers / MIB
        self.spent.streams += streams

    def room(self, sizes: Sequence[int]) -> int:
        """Bytes of the pool for the largest of the listed sizes that fits; 0 where none is known."""
        limit = self._options.capture_budget_mib * MIB or math.inf
        needed = (self._forecast.pool_bytes(key) for key in self._forecast.keys(sizes))
        return max((size for size in needed if size <= limit - self.spent.buffers * MIB), default=0)

    def outlook(self, sizes: Sequence[int], buffers: int, streams: int) -> str:
        """What captures of the listed sizes are estimated to take, largest first, and which of them don't fit.

        Args:
            buffers: bytes of the input buffers of the first call; those of other sizes are not known yet.
        """
        keys = self._forecast.keys(sizes)
        if not self._limited or not keys:
            return ""
        total, over = Spent(), []
        for key in keys:
            price = self._price(key, buffers if key == keys[0] else 0, streams, total)
            if self._over(total, price):
                over.append(key[0])
                continue
            total.seconds += price.seconds
            total.pool += price.pool
            total.buffers += price.buffers
            total.streams += price.streams
        fits = f"budget: {len(keys) - len(over)} of {len(keys)} sizes fit, estimated {self._text(total)}"
        return fits + (f"; not {', '.join(map(str, over))}" if over else "")

    def _price(self, key: Sequence[Any], buffers: int, streams: int, spent: Spent | None = None) -> Price:
        done = self.spent if spent is None else spent
        each = self.spent.seconds / self.spent.calls if self.spent.calls else SECONDS_A_CALL
        pool = self._forecast.pool_bytes(key) / MIB
        if self._options.clone_outputs:  # shapes share the pool
            pool = max(0.0, pool - done.pool)
        return Price(each * self._calls, pool, buffers / MIB, streams)

    def _over(self, spent: Spent, price: Price) -> str:
        options = self._options
        for option, limit, before, more, unit in (
            ("capture_budget_seconds", options.capture_budget_seconds, spent.seconds, price.seconds, "s"),
            ("capture_budget_mib", options.capture_budget_mib, spent.mebibytes, price.pool + price.buffers, "MiB"),
            ("capture_budget_streams", options.capture_budget_streams, spent.streams, price.streams, "streams"),
        ):
            if limit and before + more > limit:
                return f"{before:.4g} {unit} are taken, about {more:.3g} more are needed, {option} is {limit:g}"
        return ""

    def _text(self, total: Spent) -> str:
        options = self._options
        parts = [
            (total.seconds, options.capture_budget_seconds, "s"),
            (total.mebibytes, options.capture_budget_mib, "MiB"),
            (total.streams, options.capture_budget_streams, "streams"),
        ]
        return ", ".join(
            f"{taken:.3g}" + (f" of {limit:g}" if limit else "") + f" {unit}" for taken, limit, unit in parts
        )
