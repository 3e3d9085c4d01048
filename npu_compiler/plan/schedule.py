"""Independent calls on side streams, where the estimate says that it pays.

Two ways of choosing streams are tried, and the plan that is estimated to end first wins, if it beats one stream:

* call by call, in program order: each goes to the stream on which it would end first;
* chain by chain: the program falls into chains of calls that wait for one another; those long enough to pay for their
  events go to side streams, whole.

A call starts when its inputs are there, its stream is free and its engine has room beside what runs already. The order
in which calls are issued stays the program's, so the same program and sizes give the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from npu_compiler.graph.device import Device
from npu_compiler.graph.effects import storage, tensors
from npu_compiler.plan.dependencies import Dependencies
from npu_compiler.plan.engines import Engine
from npu_compiler.plan.estimate import Estimate, Sizes, estimate

MAIN = 0
FORK = 0
"""The event recorded on the main stream before the first call."""
LEAST_GAIN = 0.02
"""A plan must be estimated to save this part of the time of one stream."""
CHAIN_EVENTS = (2, 6, 16)
"""A chain goes to a side stream if it lasts as long as this many events; each is tried."""
RECENT = 64
"""How many of an engine's latest calls may still be running when the next one is placed."""
Clock = tuple[int, ...]
Choice = Callable[["_Builder", int], int]
"""The stream of a call, given what is placed already."""


@dataclass(frozen=True)
class Step:
    """One launch: the stream waits for the events `waits`, runs `node`, and records the event `record` (0: none).
    `end`: when it is estimated to end, in microseconds from the start."""

    node: fx.Node
    stream: int
    waits: tuple[int, ...] = ()
    record: int = 0
    end: float = 0.0


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


def schedule(program: Dependencies, sizes: Sizes, streams: int, device: Device | None = None) -> StreamPlan | None:
    """Plans a program for at most `streams` streams; None if one stream is estimated to be as good.

    Args:
        sizes: values of the program's symbols, for the estimate.
    """
    plan = place(program, sizes, streams, device or Device())
    if plan.streams == 1 or plan.microseconds > (1 - LEAST_GAIN) * plan.alone:
        return None
    return plan


def place(program: Dependencies, sizes: Sizes, streams: int, device: Device) -> StreamPlan:
    """The best plan that the scheduler finds, whether it pays or not."""
    estimates = [estimate(node, sizes, device) for node in program.calls]
    choices: list[Choice] = [_ends_first]
    choices += [_by_chain(program, estimates, length * device.event) for length in CHAIN_EVENTS]
    best = min((_placed(program, estimates, streams, device, choice) for choice in choices), key=lambda one: one.end())
    return best.plan()


def _placed(
    program: Dependencies, estimates: Sequence[Estimate], streams: int, device: Device, choice: Choice
) -> _Builder:
    """Places the calls twice: only then it is known which of them record an event, which takes time too."""
    first = _Builder(program, estimates, streams, device, frozenset())
    first.place_all(choice)
    recording = frozenset(index for index, draft in enumerate(first.drafts) if draft.record)
    second = _Builder(program, estimates, streams, device, recording)
    second.place_all(lambda builder, index: first.drafts[index].stream)
    return second


def _ends_first(builder: _Builder, index: int) -> int:
    return min(range(builder.streams), key=lambda stream: (*builder.timing(index, stream), stream))


def _by_chain(program: Dependencies, estimates: Sequence[Estimate], least: float) -> Choice:
    """Keeps a chain on one stream: on a side stream if it lasts at least `least` microseconds."""
    chain_of = _chains(program)
    lasts: dict[int, float] = {}
    for chain, entry in zip(chain_of, estimates, strict=True):
        lasts[chain] = lasts.get(chain, 0.0) + entry.microseconds
    on_main = {0, *(chain_of[index] for index in program.pinned)}
    on_main |= {chain for chain, microseconds in lasts.items() if microseconds < least}
    chosen: dict[int, int] = {}

    def choice(builder: _Builder, index: int) -> int:
        chain = chain_of[index]
        if chain in on_main or builder.streams == 1:
            return MAIN
        if chain not in chosen:
            chosen[chain] = min(range(1, builder.streams), key=lambda side: (*builder.timing(index, side), side))
        return chosen[chain]

    return choice


def _chains(program: Dependencies) -> list[int]:
    """The chain of each call: it continues the oldest chain that ends in a call it waits for, or begins one."""
    chain_of: list[int] = []
    ends: dict[int, int] = {}
    for index, before in enumerate(program.before):
        chain = min((ends[other] for other in before if other in ends), default=len(chain_of))
        ends = {other: found for other, found in ends.items() if found != chain}
        ends[index] = chain
        chain_of.append(chain)
    return chain_of


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


class _Builder:
    """Places one call after the other.

    Attributes:
        drafts: the calls placed so far. `free`: when each stream has run what it was given.
    """

    def __init__(
        self,
        program: Dependencies,
        estimates: Sequence[Estimate],
        streams: int,
        device: Device,
        recording: frozenset[int],
    ) -> None:
        self.streams = streams
        self.drafts: list[_Draft] = []
        self.free = [0.0] * streams
        self._program, self._estimates, self._device, self._recording = program, estimates, device, recording
        self._clocks: list[Clock] = [(0,) * streams for _ in range(streams)]
        self._used = [stream == MAIN for stream in range(streams)]
        self._engines: dict[Engine, list[tuple[float, float, float]]] = {engine: [] for engine in Engine}
        self._events = FORK

    def place_all(self, choice: Choice) -> None:
        for index in range(len(self._program.calls)):
            self._place(index, MAIN if index in self._program.pinned else choice(self, index))

    def timing(self, index: int, stream: int) -> tuple[float, int]:
        """When a call would end on a stream, and how many events that takes."""
        missing = self._missing(stream, self._program.before[index])
        events = len(missing) + (not self._used[stream])
        entry = self._estimates[index]
        ready = max([self.free[stream], *(draft.end + self._device.event for draft in missing)])
        start = self._room(entry, ready + self._device.event * bool(events))
        return start + entry.microseconds, events

    def end(self) -> float:
        """When everything has run and the side streams are joined."""
        return max([self.free[MAIN], *(draft.end + self._device.event for draft in self._unjoined())])

    def plan(self) -> StreamPlan:
        end = self.end()
        joins = tuple(self._event_of(draft) for draft in self._unjoined())
        return StreamPlan(
            tuple(Step(draft.node, draft.stream, draft.waits, draft.record, draft.end) for draft in self.drafts),
            sum(self._used),
            joins,
            _releases(self._program, self.drafts),
            end,
            sum(entry.microseconds for entry in self._estimates),
        )

    def _place(self, index: int, stream: int) -> None:
        end, _ = self.timing(index, stream)
        missing = self._missing(stream, self._program.before[index])
        waits = tuple(self._event_of(draft) for draft in missing)
        if not self._used[stream]:
            self._used[stream] = True
            waits = waits if any(draft.stream == MAIN for draft in missing) else (FORK, *waits)
        clock = _merged(self._clocks[stream], *(draft.clock for draft in missing))
        tick = clock[stream] + 1
        clock = (*clock[:stream], tick, *clock[stream + 1 :])
        entry = self._estimates[index]
        self.drafts.append(_Draft(self._program.calls[index], stream, tick, end, clock, waits))
        self._clocks[stream] = clock
        self.free[stream] = end + self._device.event * (index in self._recording)
        self._engines[entry.engine].append((end - entry.microseconds, end, entry.part))

    def _missing(self, stream: int, before: Sequence[int]) -> list[_Draft]:
        """Those of `before` that the stream is not known to be behind."""
        clock, found = self._clocks[stream], []
        for index in before:
            draft = self.drafts[index]
            if clock[draft.stream] < draft.tick:
                found.append(draft)
                clock = _merged(clock, draft.clock)
        return found

    def _room(self, entry: Estimate, ready: float) -> float:
        """The first moment from `ready` on at which the engine has room for the call beside what it runs."""
        busy = self._engines[entry.engine]
        later = [interval for interval in busy[-RECENT:] if interval[1] > ready]
        for start in sorted({ready, *(end for _, end, _ in later)}):
            end = start + entry.microseconds
            points = [start, *(begin for begin, _, _ in later if start < begin < end)]
            if all(_load(later, point) + entry.part <= 1.0 + 1e-9 for point in points):
                return start
        return ready

    def _event_of(self, draft: _Draft) -> int:
        if not draft.record:
            self._events += 1
            draft.record = self._events
        return draft.record

    def _unjoined(self) -> list[_Draft]:
        """The last call of each side stream that the main stream is not known to be behind."""
        last = {draft.stream: draft for draft in self.drafts}
        clock = self._clocks[MAIN]
        return [draft for stream, draft in sorted(last.items()) if stream != MAIN and clock[stream] < draft.tick]


def _merged(*clocks: Clock) -> Clock:
    return tuple(map(max, zip(*clocks, strict=True)))


def _load(busy: Sequence[tuple[float, float, float]], moment: float) -> float:
    return sum(part for begin, end, part in busy if begin <= moment < end)


def _releases(program: Dependencies, drafts: Sequence[_Draft]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """When each value can be let go: its last reader is issued, and the stream that made it is behind all readers."""
    nodes = list(program.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    free_from = _buffer_releases(program, drafts)
    releases: dict[int, list[fx.Node]] = {}
    for node in dict.fromkeys(node for holders in program.holders.values() for node in holders):
        buffers = {storage(tensor) for tensor in tensors(node)}
        if any(buffer not in free_from for buffer in buffers):
            continue
        uses = [order[user] for user in node.users]
        at = max([order[node], *uses, *(program.position[free_from[buffer]] for buffer in buffers)])
        if nodes[at].op != "output":
            releases.setdefault(at, []).append(node)
    return {nodes[at]: tuple(sorted(releases[at])) for at in sorted(releases)}


def _buffer_releases(program: Dependencies, drafts: Sequence[_Draft]) -> dict[int, int]:
    """For each buffer: the call from which on its memory may be used again on the stream that made it."""
    made_on: dict[int, int] = {}
    readers: dict[int, Clock] = {}
    last: dict[int, int] = {}
    for index, draft in enumerate(drafts):
        for buffer in program.touches[index]:
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
    for index, draft in enumerate(drafts):
        clocks[draft.stream] = draft.clock
        waiting += ending.get(index, [])
        free_from.update({one: index for one in waiting if _behind(clocks[made_on[one]], readers[one])})
        waiting = [buffer for buffer in waiting if buffer not in free_from]
    return free_from


def _behind(clock: Clock, other: Clock) -> bool:
    return all(have >= need for have, need in zip(clock, other, strict=True))
