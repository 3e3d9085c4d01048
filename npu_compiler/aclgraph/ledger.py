"""What was captured, why and at what price, and what was replayed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from npu_compiler.plan.schedule import StreamPlan
from npu_compiler.reasons import Why

logger = logging.getLogger(__name__)


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
        graph_id: by which runtime.trace.nodes knows the captured graph; 0 where CANN tells no such thing.
    """

    key: str
    reason: Why
    milliseconds: float
    mebibytes: float
    calls: int
    streams: str = ""
    graph_id: int = 0

    def __str__(self) -> str:
        price = f"{self.calls} calls, {self.milliseconds:.1f} ms, {self.mebibytes:.1f} MiB"
        return f"captured {self.key}: {price} ({self.reason})" + (f"; {self.streams}" if self.streams else "")


@dataclass
class Ledger:
    """Everything that happened to one compiled graph at run time.

    Attributes:
        of: the compiled graph, and where it begins in the user's model, for the log.
        captures: in order. `evicted`: keys whose captured graph was dropped for capture_limit, in order.
        replays: calls served by a replay.
        uncaptured: calls that ran operator by operator, counted by reason; the run before each capture is one of them.
        outlook: what captures of the listed sizes were estimated to take before the first; empty without a budget.
        watch: told of each capture, with its plan of streams (None: one), when it has been made.
    """

    of: str = ""
    captures: list[Capture] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)
    replays: int = 0
    uncaptured: Counter[Why] = field(default_factory=Counter)
    outlook: str = ""
    watch: Callable[[Capture, StreamPlan | None], None] | None = None

    def add(self, capture: Capture, plan: StreamPlan | None) -> None:
        """Notes a capture."""
        logger.info("%s: %s", self.of, capture)
        self.captures.append(capture)
        if self.watch is not None:
            self.watch(capture, plan)

    def __str__(self) -> str:
        lines = [self.outlook] if self.outlook else []
        lines += map(str, self.captures)
        lines += [f"evicted {key}" for key in self.evicted]
        lines.append(f"{self.replays} replays")
        lines += [f"{count} uncaptured: {reason}" for reason, count in self.uncaptured.items()]
        return "\n".join(lines)
