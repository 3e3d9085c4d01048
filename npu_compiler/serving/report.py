"""What a run did: graphs captured, steps replayed or run eagerly and why, padding, tokens a second."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npu_compiler.backend import Dropped
from npu_compiler.inspect.run import ExpertRows, SplitWeights
from npu_compiler.reasons import FIRST_SHAPE
from npu_compiler.serving.steps import EAGER, FULL, PIECEWISE, Step, StepCounts

IDLE_SECONDS = 1.0
"""A longer gap between two steps means that there was nothing to do; it does not count as serving time."""


@dataclasses.dataclass
class GraphRecord:
    """One captured graph. `mebibytes` is what the graphs' pool grew by; `streams` how many its tasks are on, 0 where
    CANN doesn't tell; `reason` says why it was captured (npu_compiler/reasons.py)."""

    mode: str
    tokens: int
    requests: int | None
    milliseconds: float
    mebibytes: float
    updated_operators: int = 0
    streams: int = 0
    replays: int = 0
    reason: str = FIRST_SHAPE.text


@dataclasses.dataclass
class RunReport:
    """Counters of one worker since its start or the last `clear`."""

    device: str = ""
    model: str = ""
    graphs: list[GraphRecord] = dataclasses.field(default_factory=list)
    steps: StepCounts = dataclasses.field(default_factory=StepCounts)
    not_captured: dict[str, str] = dataclasses.field(default_factory=dict)
    """Sizes that have no graph, such as "FULL 8 tokens", and why."""
    passes: Counter[str] = dataclasses.field(default_factory=Counter)
    """How often each pass rewrote something, by name, in the order of the passes."""
    generated_tokens: int = 0
    serving_seconds: float = 0.0
    input_waits: int = 0
    """Steps whose host buffers were still being read by the step before, so that the host had to wait for it."""
    dropped: list[Dropped] = dataclasses.field(default_factory=list)
    """What each layer of experts dropped, of all ranks' tokens, where the option `token_drop` lets it."""
    experts: list[ExpertRows] = dataclasses.field(default_factory=list)
    """How even the ranks of each layer of experts are, where the option `expert_map` places them."""
    split_weights: list[SplitWeights] = dataclasses.field(default_factory=list)
    """What engines have parts of, where the option `fine_grained_tp` splits it."""
    _last_step: float | None = None

    def add(self, step: Step) -> None:
        """Counts one step that has just been given to the device."""
        now = time.perf_counter()
        if self._last_step is not None and now - self._last_step < IDLE_SECONDS:
            self.serving_seconds += now - self._last_step
        self._last_step = now
        self.steps.add(step)
        self.generated_tokens += step.generated

    def clear(self) -> None:
        """Starts counting again; graphs stay, with their replays at 0."""
        for graph in self.graphs:
            graph.replays = 0
        self.steps.clear()
        self.generated_tokens = self.input_waits = 0
        self.serving_seconds, self._last_step = 0.0, None
        self.dropped, self.experts = [], []

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types; docs/serving.md describes the fields."""
        steps = self.steps
        return {
            "model": self.model,
            "device": self.device,
            "graphs": [dataclasses.asdict(graph) for graph in self._summed_graphs()],
            "not_captured": dict(self.not_captured),
            "passes": dict(self.passes),
            "capture_milliseconds": round(sum(graph.milliseconds for graph in self.graphs), 3),
            "capture_mebibytes": round(sum(graph.mebibytes for graph in self.graphs), 3),
            "decode_steps": _by_mode(steps.decode),
            "other_steps": _by_mode(steps.other),
            "not_replayed": [group.as_dict() for group in steps.groups.values()],
            "padding_waste": steps.padding / steps.tokens if steps.tokens else 0.0,
            "generated_tokens": self.generated_tokens,
            "serving_seconds": round(self.serving_seconds, 6),
            "tokens_per_second": self.generated_tokens / self.serving_seconds if self.serving_seconds else 0.0,
            "input_waits": self.input_waits,
            "dropped": [
                {"layer": entry.layer, "routed": entry.routed, "dropped": entry.dropped, "needed": entry.needed}
                for entry in self.dropped
            ],
            "experts": [entry.model_dump() for entry in self.experts],
            "split_weights": [entry.model_dump() for entry in self.split_weights],
        }

    def text(self) -> str:
        """The report as the lines a person reads."""
        data = self.as_dict()
        decode, other = data["decode_steps"], data["other_steps"]
        lines = [
            f"graphs captured: {len(data['graphs'])}; the captures alone took {data['capture_milliseconds']:.0f} ms, "
            f"{data['capture_mebibytes']:.1f} MiB of the graphs' pool",
            *(
                f"  {g['mode']} {g['tokens']} tokens: {g['milliseconds']:.1f} ms, {g['mebibytes']:.2f} MiB, "
                f"{g['replays']} replays" + (f", {g['streams']} streams" if g["streams"] > 1 else "")
                for g in data["graphs"]
            ),
            *(f"  {size} not captured: {reason}" for size, reason in data["not_captured"].items()),
            f"passes that fired: {', '.join(f'{name} {times}' for name, times in self.passes.items()) or 'none'}",
            f"decode steps: {decode['replayed']} replayed, {decode['piecewise']} piecewise, {decode['eager']} eager",
            f"other steps: {other['replayed']} replayed, {other['piecewise']} piecewise, {other['eager']} eager",
            self.steps.line(),
            f"padding waste: {data['padding_waste']:.1%} of the replayed tokens",
            f"generated: {data['generated_tokens']} tokens in {data['serving_seconds']:.2f} s, "
            f"{data['tokens_per_second']:.1f} tokens/s",
            *map(str, self.dropped),
            *map(str, self.experts),
            *map(str, self.split_weights),
        ]
        return "\n".join(lines)

    def _summed_graphs(self) -> list[GraphRecord]:
        """One row a mode and size: a piecewise model has a graph a piece, replayed together."""
        rows: dict[tuple[str, int, int | None], GraphRecord] = {}
        for graph in self.graphs:
            key = (graph.mode, graph.tokens, graph.requests)
            if key not in rows:
                rows[key] = dataclasses.replace(graph)
                continue
            row = rows[key]
            row.milliseconds += graph.milliseconds
            row.mebibytes += graph.mebibytes
            row.updated_operators += graph.updated_operators
            row.streams = max(row.streams, graph.streams)
        return list(rows.values())


def _by_mode(steps: Counter[str]) -> dict[str, int]:
    return {
        "total": steps.total(),
        "replayed": steps[FULL],
        "piecewise": steps[PIECEWISE],
        "eager": steps[EAGER],
    }


class ReportFile:
    """Keeps JSON files up to date. A reader never sees half a report: a file is replaced, not rewritten."""

    def __init__(self, paths: Sequence[str], interval: float) -> None:
        self._paths = [Path(path) for path in paths]
        self._interval = interval
        self._next = time.monotonic() + interval if interval else float("inf")

    def update(self, report: RunReport) -> None:
        """Writes the report if the interval has passed."""
        if time.monotonic() >= self._next:
            self.write(report)

    def write(self, report: RunReport) -> None:
        """Writes the report now."""
        if self._interval:
            self._next = time.monotonic() + self._interval
        text = json.dumps(report.as_dict(), indent=2) + "\n"
        for path in self._paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            temporary.write_text(text)
            temporary.replace(path)
