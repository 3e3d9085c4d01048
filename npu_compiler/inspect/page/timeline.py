"""When each launch of a capture is estimated to run, what it waits for, and how much later it could."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from npu_compiler.inspect.contents import Captured
from npu_compiler.inspect.program import Call, Data, Program, TensorValue

NEAR = 1e-3
"""Microseconds that count as the same moment: what a bundle rounds by."""


class Launch(Data):
    """A task of a captured graph.

    Attributes:
        call: position of its call in the program. `start`, `microseconds`: the estimate.
        waits: positions in the timeline of launches on other streams that it waits for.
        slack: by how many microseconds it could end later without the graph ending later; 0 on the critical path.
    """

    call: int
    stream: int
    start: float
    microseconds: float
    waits: tuple[int, ...] = ()
    slack: float = 0.0


class Timeline(Data):
    """The launches of a captured graph in the order of their issue.

    Attributes:
        microseconds: when all have run. `alone`: what they take one after the other.
        chain: the longest chain of launches that need one another, in microseconds: no streams can beat it.
    """

    launches: tuple[Launch, ...]
    streams: int
    microseconds: float
    alone: float
    chain: float


def timeline(program: Program, capture: Captured | None) -> Timeline:
    """The timeline of one capture of `program`; without a capture, or with one that uses a single stream, that of its
    launches one after the other, with the slack that their dependencies would leave them on streams of their own."""
    calls = program.calls
    if capture is None or not any(step.end for step in capture.steps):
        placed = _in_order(calls)
    else:
        placed = _as_planned(program, capture)
    needs = _needs(calls, placed)
    chain = _chain(placed, needs)
    end = max((launch.start + launch.microseconds for launch in placed), default=0.0)
    streams = 1 + max((launch.stream for launch in placed), default=0)
    if streams == 1:
        slack = _slack(placed, needs, _ends(placed, needs), chain)
    else:
        slack = _slack(placed, _behind(placed, calls), None, end)
    return Timeline(
        launches=tuple(
            launch.model_copy(update={"slack": round(free, 3)}) for launch, free in zip(placed, slack, strict=True)
        ),
        streams=streams,
        microseconds=round(end, 3),
        alone=round(sum(launch.microseconds for launch in placed), 3),
        chain=round(chain, 3),
    )


def _in_order(calls: Sequence[Call]) -> list[Launch]:
    found, now = [], 0.0
    for index, call in enumerate(calls):
        if call.cost is not None:
            found.append(Launch(call=index, stream=0, start=round(now, 3), microseconds=call.cost.microseconds))
            now += call.cost.microseconds
    return found


def _as_planned(program: Program, capture: Captured) -> list[Launch]:
    position = {call.name: index for index, call in enumerate(program.calls)}
    recorded: dict[int, int] = {}
    found: list[Launch] = []
    for step in capture.steps:
        if step.node not in position:  # a bundle that is not of one piece
            continue
        index = position[step.node]
        cost = program.calls[index].cost
        taken = cost.microseconds if cost is not None else 0.0
        waits = tuple(recorded[event] for event in step.waits if event in recorded)
        start = max(0.0, round(step.end - taken, 3))
        found.append(Launch(call=index, stream=step.stream, start=start, microseconds=taken, waits=waits))
        if step.record:
            recorded[step.record] = len(found) - 1
    return found


def _needs(calls: Sequence[Call], placed: Sequence[Launch]) -> list[list[int]]:
    """For each launch, those that it has to be behind: they wrote what it touches, or read what it writes."""
    memory: Mapping[str, frozenset[int]] = {
        call.name: frozenset(value.storage for value in call.values if isinstance(value, TensorValue)) for call in calls
    }
    writer: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    found: list[list[int]] = []
    for index, launch in enumerate(placed):
        call = calls[launch.call]
        own = memory[call.name]
        reads = frozenset().union(*(memory[name] for name in call.inputs()))
        writes = frozenset(call.writes) | (own - reads)
        before = {writer[storage] for storage in reads | writes if storage in writer}
        before |= {reader for storage in writes for reader in readers.get(storage, ())}
        for storage in writes:
            writer[storage], readers[storage] = index, []
        for storage in reads - writes:
            readers.setdefault(storage, []).append(index)
        found.append(sorted(before - {index}))
    return found


def _ends(placed: Sequence[Launch], before: Sequence[Sequence[int]]) -> list[float]:
    """When each would end if nothing but its dependencies held it back."""
    ends: list[float] = []
    for launch, earlier in zip(placed, before, strict=True):
        ends.append(launch.microseconds + max((ends[index] for index in earlier), default=0.0))
    return ends


def _chain(placed: Sequence[Launch], before: Sequence[Sequence[int]]) -> float:
    return max(_ends(placed, before), default=0.0)


def _behind(placed: Sequence[Launch], calls: Sequence[Call]) -> list[list[int]]:
    """For each launch, what it starts behind: its events, the launch before it on its stream, and where it starts
    later than those let it, the launch that held its engine until then."""
    last: dict[int, int] = {}
    found: list[list[int]] = []
    for index, launch in enumerate(placed):
        before = [*launch.waits, *([last[launch.stream]] if launch.stream in last else [])]
        last[launch.stream] = index
        cost = calls[launch.call].cost
        for other in range(max(0, index - 64), index):
            held = calls[placed[other].call].cost
            end = placed[other].start + placed[other].microseconds
            if held is not None and cost is not None and held.engine == cost.engine and abs(end - launch.start) < NEAR:
                before.append(other)
        found.append(sorted(set(before)))
    return found


def _slack(
    placed: Sequence[Launch], before: Sequence[Sequence[int]], ends: Sequence[float] | None, total: float
) -> list[float]:
    """From the end backwards: how late each may end. Where one starts later than what it is behind ends (an event
    takes time), that distance stays."""
    done = [launch.start + launch.microseconds for launch in placed] if ends is None else list(ends)
    latest = [total] * len(placed)
    for index in range(len(placed) - 1, -1, -1):
        start = latest[index] - placed[index].microseconds
        began = done[index] - placed[index].microseconds
        gap = began - max((done[other] for other in before[index]), default=began)
        for other in before[index]:
            latest[other] = min(latest[other], start - max(0.0, gap))
    return [max(0.0, late - end) for late, end in zip(latest, done, strict=True)]
