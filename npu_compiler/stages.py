"""What a compilation costs, stage by stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

LOWERING, PASSES, ORDER, STORE, PLAN = "lowering", "passes", "order", "store", "plan"
FIRST_CALL, CAPTURE = "first call", "capture"


@dataclass
class Cost:
    """Seconds of the wall clock, and of CPU: those of all threads of the process, user and system."""

    seconds: float = 0.0
    cpu: float = 0.0

    def add(self, seconds: float, cpu: float) -> None:
        self.seconds += seconds
        self.cpu += cpu


class Stages:
    """The cost of each stage by name, in order; a stage within another counts for itself only.

    Attributes:
        costs: LOWERING (AOTAutograd), PASSES, ORDER, STORE, PLAN (everything else up to the callable); for each new
            shape FIRST_CALL and CAPTURE.
    """

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}
        self._within = Cost()  # of the stages that ended within the one that runs

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what runs inside for `name`."""
        cost = self.costs.setdefault(name, Cost())
        around, self._within = self._within, Cost()
        seconds, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            seconds, cpu = time.perf_counter() - seconds, time.process_time() - cpu
            cost.add(seconds - self._within.seconds, cpu - self._within.cpu)
            around.add(seconds, cpu)
            self._within = around

    @property
    def after_lowering(self) -> Cost:
        """What came behind AOTAutograd."""
        total = Cost()
        for name, cost in self.costs.items():
            if name != LOWERING:
                total.add(cost.seconds, cost.cpu)
        return total

    def __str__(self) -> str:
        return "CPU seconds: " + ", ".join(f"{name} {cost.cpu:.2f}" for name, cost in self.costs.items())
