"""Independent calls on side streams, where the estimate says that it pays.

A list scheduler in program order: each call goes to the stream on which it would end first, given when its inputs are
there, when the stream is free, whether its engine has room beside what runs already, and what the events cost. The plan
is kept only if it is estimated to end earlier than one stream would. The order in which calls are issued stays the
program's, so the same program and sizes give the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from npu_compiler.graph.effects import storage, tensors
from npu_compiler.graph.traffic import launches
from npu_compiler.plan.accesses import HIDDEN, Accesses, accesses, is_pinned
from npu_compiler.plan.engines import Engine
from npu_compiler.plan.estimate import Device, Estimate, Sizes, estimate

MAIN = 0
FORK = 0
"""The event recorded on the main stream before the first call."""
LEAST_GAIN = 0.02
"""A plan must be estimated to save this part of the time of one stream."""
Clock = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One launch: the stream waits for the events `waits`, runs `node`, and records the event `record` (0: none)."""

    node: fx.Node
    stream: int
    waits: tuple[int, ...] = ()
    record: int = 0


@dataclass(frozen=True)
class StreamPlan:
    """What runs where.

    Attributes:
        steps: the launches in program order. `streams`: how many streams they use, the main one (0) included.
        joins: events the main stream waits for at the end.
        releases: for a node of the program (in program order), the values let go once it has been issued. A value made
            on one stream and read on another is kept until its own stream is known to be behind the reader.
        microseconds, alone: the estimate with these streams, and with one.
    """

    steps: tuple[Step, ...]
    streams: int
    joins: tuple[int, ...]
    releases: Mapping[fx.Node, tuple[fx.Node, ...]]
    microseconds: float
    alone: float

    @property
    def events(self) -> int:
        """How many events the plan uses, FORK included."""
        return 1 + max((step.record for step in self.steps), default=0)

    def __str__(self) -> str:
        lines = [f"{self.streams} streams, estimated {self.microseconds:.1f} us, {self.alone:.1f} us on one stream"]
        for step in self.steps:
            waits = "".join(f" waits for {event}" for event in step.waits)
            record = f" records {step.record}" if step.record else ""
            lines.append(f"  {step.stream}: {step.node.name}{waits}{record}")
        lines.append(f"  0: waits for {', '.join(map(str, self.joins)) or 'nothing'} at the end")
        for node, gone in self.releases.items():
            lines.append(f"  after {node.name}: lets go of {', '.join(item.name for item in gone)}")
        return "\n".join(lines)


def schedule(graph: fx.Graph, sizes: Sizes, streams: int, device: Device | None = None) -> StreamPlan | None:
    """Plans `graph` for at most `streams` streams; None if one stream is estimated to be as good.

    Args:
        sizes: values of the program's symbols, for the estimate.
    """
    plan = place(graph, sizes, streams, device or Device())
    if plan.streams == 1 or plan.microseconds > (1 - LEAST_GAIN) * plan.alone:
        return None
    return plan


def place(graph: fx.Graph, sizes: Sizes, streams: int, device: Device) -> StreamPlan:
    """The plan that the scheduler finds, whether it pays or not."""
    calls = [node for node in graph.nodes if launches(node)]
    estimates = {node: estimate(node, sizes, device) for node in calls}
    return _Builder(graph, calls, estimates, streams, device).plan()


@dataclass
class _Draft:
    """A step that may still get an event to record."""

    node: fx.Node
    stream: int
    tick: int
    end: float
    clock: Clock
    waits: tuple[int, ...]
    record: int = 0


@dataclass
class _History:
    """The accesses of one buffer that a later one has to be behind."""

    write: _Draft | None = None
    reads: list[_Draft] = field(default_factory=list)


class _Builder:
    """Places one call after the other."""

    def __init__(
        self,
        graph: fx.Graph,
        calls: Sequence[fx.Node],
        estimates: Mapping[fx.Node, Estimate],
        streams: int,
        device: Device,
    ) -> None:
        self._graph, self._calls, self._estimates, self._device = graph, calls, estimates, device
        self._clocks: list[Clock] = [(0,) * streams for _ in range(streams)]
        self._free = [0.0] * streams
        self._used = [stream == MAIN for stream in range(streams)]
        self._engines: dict[Engine, list[tuple[float, float, float]]] = {engine: [] for engine in Engine}
        self._buffers: dict[int, _History] = {}
        self._drafts: list[_Draft] = []
        self._events = FORK

    def plan(self) -> StreamPlan:
        for node in self._calls:
            self._place(node)
        joins, end = self._join()
        return StreamPlan(
            tuple(Step(draft.node, draft.stream, draft.waits, draft.record) for draft in self._drafts),
            sum(self._used),
            joins,
            _releases(self._graph, self._drafts),
            end,
            sum(entry.microseconds for entry in self._estimates.values()),
        )

    def _place(self, node: fx.Node) -> None:
        touched = accesses(node)
        before = self._before(touched)
        candidates = [MAIN] if is_pinned(node) else range(len(self._free))
        stream = min(candidates, key=lambda choice: (*self._timing(node, choice, before), choice))
        start_and_end = self._timing(node, stream, before)
        missing = self._missing(stream, before)
        waits = tuple(self._event_of(draft) for draft in missing)
        if not self._used[stream]:
            self._used[stream] = True
            waits = waits if any(draft.stream == MAIN for draft in missing) else (FORK, *waits)
        clock = _merged(self._clocks[stream], *(draft.clock for draft in missing))
        tick = clock[stream] + 1
        clock = (*clock[:stream], tick, *clock[stream + 1 :])
        draft = _Draft(node, stream, tick, start_and_end[0], clock, waits)
        self._clocks[stream], self._free[stream] = clock, draft.end
        entry = self._estimates[node]
        self._engines[entry.engine].append((draft.end - entry.microseconds, draft.end, entry.part))
        self._drafts.append(draft)
        self._note(touched, draft)

    def _before(self, touched: Accesses) -> list[_Draft]:
        """What a call with these accesses has to be behind, the latest first."""
        found: dict[int, _Draft] = {}
        for buffer in touched.reads | touched.writes:
            history = self._buffers.get(buffer)
            if history is not None:
                drafts = [history.write, *(history.reads if buffer in touched.writes else ())]
                found.update({id(draft): draft for draft in drafts if draft is not None})
        return sorted(found.values(), key=lambda draft: (-draft.tick, draft.stream))

    def _missing(self, stream: int, before: Sequence[_Draft]) -> list[_Draft]:
        """Those of `before` that the stream is not known to be behind."""
        clock, found = self._clocks[stream], []
        for draft in before:
            if clock[draft.stream] < draft.tick:
                found.append(draft)
                clock = _merged(clock, draft.clock)
        return found

    def _timing(self, node: fx.Node, stream: int, before: Sequence[_Draft]) -> tuple[float, int]:
        """When the call would end on a stream, and how many events that takes."""
        missing = self._missing(stream, before)
        events = len(missing) + (not self._used[stream])
        entry = self._estimates[node]
        ready = max([self._free[stream], *(draft.end + self._device.event for draft in missing)])
        start = self._room(entry, ready + self._device.event * bool(events))
        return start + entry.microseconds, events

    def _room(self, entry: Estimate, ready: float) -> float:
        """The first moment from `ready` on at which the engine has room for the call beside what it runs."""
        busy = self._engines[entry.engine]
        for start in sorted({ready, *(end for _, end, _ in busy if end > ready)}):
            end = start + entry.microseconds
            points = [start, *(begin for begin, _, _ in busy if start < begin < end)]
            if all(_load(busy, point) + entry.part <= 1.0 + 1e-9 for point in points):
                return start
        return ready

    def _event_of(self, draft: _Draft) -> int:
        if not draft.record:
            self._events += 1
            draft.record = self._events
        return draft.record

    def _note(self, touched: Accesses, draft: _Draft) -> None:
        for buffer in touched.reads:
            self._buffers.setdefault(buffer, _History()).reads.append(draft)
        for buffer in touched.writes:
            self._buffers[buffer] = _History(draft)

    def _join(self) -> tuple[tuple[int, ...], float]:
        """The main stream waits for the last call of every side stream that it is not behind yet."""
        last = {draft.stream: draft for draft in self._drafts}
        clock = self._clocks[MAIN]
        waiting = [draft for stream, draft in sorted(last.items()) if stream != MAIN and clock[stream] < draft.tick]
        end = max([self._free[MAIN], *(draft.end + self._device.event for draft in waiting)])
        return tuple(self._event_of(draft) for draft in waiting), end


def _merged(*clocks: Clock) -> Clock:
    return tuple(map(max, zip(*clocks, strict=True)))


def _load(busy: Sequence[tuple[float, float, float]], moment: float) -> float:
    return sum(part for begin, end, part in busy if begin <= moment < end)


def _releases(graph: fx.Graph, drafts: Sequence[_Draft]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """When each value can be let go: its last reader is issued, and the stream that made it is behind all readers."""
    by_node = {draft.node: draft for draft in drafts}
    order = {node: index for index, node in enumerate(graph.nodes)}
    free_from = _buffer_releases(graph, by_node)
    releases: dict[fx.Node, list[fx.Node]] = {}
    nodes = list(graph.nodes)
    for node in nodes:
        buffers = {storage(tensor) for tensor in tensors(node)}
        if node.op != "call_function" or not buffers or any(buffer not in free_from for buffer in buffers):
            continue
        last_use = max((order[user] for user in node.users), default=order[node])
        at = max([last_use, *(free_from[buffer] for buffer in buffers)])
        if nodes[at].op != "output":
            releases.setdefault(nodes[at], []).append(node)
    return {node: tuple(releases[node]) for node in nodes if node in releases}


def _buffer_releases(graph: fx.Graph, drafts: Mapping[fx.Node, _Draft]) -> dict[int, int]:
    """For each buffer made inside the program: the position from which its memory may be used again on its stream."""
    kept = [*graph.find_nodes(op="placeholder"), *graph.find_nodes(op="get_attr"), *graph.output_node().all_input_nodes]
    outside = {storage(tensor) for node in kept for tensor in tensors(node)}
    made_on: dict[int, int] = {}
    readers: dict[int, Clock] = {}
    last: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        if node in drafts:
            draft, touched = drafts[node], accesses(node)
            for buffer in (touched.reads | touched.writes) - outside - HIDDEN:
                made_on.setdefault(buffer, draft.stream)
                only = tuple(draft.tick if stream == draft.stream else 0 for stream in range(len(draft.clock)))
                readers[buffer] = _merged(readers.get(buffer, only), only)
                last[buffer] = index
    ending: dict[int, list[int]] = {}
    for buffer, index in last.items():
        ending.setdefault(index, []).append(buffer)
    free_from: dict[int, int] = {}
    clocks: dict[int, Clock] = {}
    waiting: list[int] = []
    for index, node in enumerate(graph.nodes):
        if node in drafts:
            clocks[drafts[node].stream] = drafts[node].clock
            waiting += ending.get(index, [])
            done = [buffer for buffer in waiting if _behind(clocks[made_on[buffer]], readers[buffer])]
            free_from.update(dict.fromkeys(done, index))
            waiting = [buffer for buffer in waiting if buffer not in free_from]
    return free_from


def _behind(clock: Clock, other: Clock) -> bool:
    return all(have >= need for have, need in zip(clock, other, strict=True))
