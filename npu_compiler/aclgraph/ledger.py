"""What was captured, why and at what price, and what was replayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from npu_compiler.plan.schedule import StreamPlan


@dataclass(frozen=True)
class Capture:
    """One capture.

    Attributes:
        key: the sizes it serves, as text: "s0=4", or "static" without any.
        reason: why it was made: which size is new, from the capture before to this one; which input moved, from which
            address to which; or the option that drove its graph out.
        milliseconds: from the synchronisation before to the end of the capture.
        mebibytes: by how much the device memory reserved by this process grew.
        calls: how many operators were recorded.
        streams: what several streams are estimated to save; empty where one is used.
    """

    key: str
    reason: str
    milliseconds: float
    mebibytes: float
    calls: int
    streams: str = ""


@dataclass
class Ledger:
    """Everything that happened to one compiled graph at run time.

    Attributes:
        captures: in order. `evicted`: keys whose captured graph was dropped for capture_limit, in order.
        replays: calls served by a replay.
        uncaptured: calls that ran operator by operator, counted by reason; the run before each capture is one of them.
        outlook: what captures of the listed sizes were estimated to take before the first; empty without a budget.
        watch: told of each capture, with its plan of streams (None: one), when it has been made.
    """

    captures: list[Capture] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)
    replays: int = 0
    uncaptured: Counter[str] = field(default_factory=Counter)
    outlook: str = ""
    watch: Callable[[Capture, StreamPlan | None], None] | None = None

    def add(self, capture: Capture, plan: StreamPlan | None) -> None:
        """Notes a capture."""
        self.captures.append(capture)
        if self.watch is not None:
            self.watch(capture, plan)

    def __str__(self) -> str:
        lines = [self.outlook] if self.outlook else []
        lines += [
            f"captured {entry.key}: {entry.calls} calls, {entry.milliseconds:.1f} ms, {entry.mebibytes:.1f} MiB "
            f"({entry.reason})" + (f"; {entry.streams}" if entry.streams else "")
            for entry in self.captures
        ]
        lines += [f"evicted {key}" for key in self.evicted]
        lines.append(f"{self.replays} replays")
        lines += [f"{count} uncaptured: {reason}" for reason, count in self.uncaptured.items()]
        return "\n".join(lines)
