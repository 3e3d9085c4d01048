"""What a timeline shows: how busy each stream was, where the gaps are and what each waited for, what took the time."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from npu_compiler.errors import TraceError
from npu_compiler.inspect.bundle import StoredGraph
from npu_compiler.inspect.program import Data

HARDWARE = "Ascend Hardware"
"""What torch_npu's profiler calls the part of its trace that has the device's tasks."""
WAITS = ("aclrtStreamWaitEvent", "aclrtValueWait")
SAID = ("node", "call", "module", "source", "pass", "graph")
"""What a task's label may say (aclgraph/labels.py)."""
SMALLEST_GAP = 1.0
"""Microseconds; a shorter gap is the cost of starting a task, not a wait."""


@dataclass(frozen=True, eq=False)
class Task:
    """A task of the device.

    Attributes:
        start, end: microseconds. `stream`: as text.
        launched: when the host had handed it over, or the graph that it is part of; None where that is not known.
        waits: whether it does nothing but wait for another stream.
        said: what else is known of it: node, call, module, source, pass.
    """

    name: str
    stream: str
    start: float
    end: float
    launched: float | None = None
    waits: bool = False
    said: dict[str, str] = field(default_factory=dict)

    @property
    def microseconds(self) -> float:
        return self.end - self.start


class Stream(Data):
    """A stream in the time from the first task of the trace to the last one's end; microseconds."""

    name: str
    tasks: int
    busy: float
    waiting: float
    idle: float


class Gap(Data):
    """A time in which no stream had a task to run.

    Attributes:
        before, after: the tasks round it.
        host: how much of it passed before the host had launched the next task; None where that is not known.
    """

    start: float
    microseconds: float
    before: str
    after: str
    host: float | None = None


class Total(Data):
    """Tasks of one name, or of one place in the user's model, together."""

    name: str
    count: int
    microseconds: float


class Critical(Data):
    """The chain of tasks that decides how long the run takes, from its end back: before each task comes the one that
    ended last before it began.

    Attributes:
        tasks: microseconds in tasks. `host`: in gaps before the host had launched the next one. `other`: in other gaps.
        longest: what of it took the longest.
    """

    tasks: float
    host: float
    other: float
    longest: tuple[Total, ...] = ()


class Timeline(Data):
    """A trace in figures; times are microseconds.

    Attributes:
        microseconds: from the first task's start to the last one's end.
        together: of that, when two streams or more had a task to run.
        host: calls of the host, by name. `steps`: what the run named.
    """

    file: str
    microseconds: float
    together: float
    streams: tuple[Stream, ...]
    critical: Critical
    gaps: tuple[Gap, ...]
    tasks: tuple[Total, ...]
    places: tuple[Total, ...]
    host: tuple[Total, ...] = ()
    steps: tuple[Total, ...] = ()
    dropped: int = 0

    def __str__(self) -> str:
        lines = [f"{self.file}: {self.microseconds:.1f} us, {sum(stream.tasks for stream in self.streams)} tasks"]
        if self.dropped:
            lines.append(f"{self.dropped} events were dropped: the trace is not whole")
        whole = self.microseconds or 1.0
        lines += [
            f"  {stream.name}: {stream.tasks} tasks, busy {stream.busy:.1f} us ({stream.busy / whole:.0%}), "
            f"waiting {stream.waiting:.1f}, idle {stream.idle:.1f}"
            for stream in self.streams
        ]
        if len(self.streams) > 1:
            lines.append(f"  at once: {self.together:.1f} us ({self.together / whole:.0%}) on two streams or more")
        path = self.critical
        lines.append(
            f"critical path: {path.tasks:.1f} us in tasks, {path.host:.1f} before the host's launch, "
            f"{path.other:.1f} in other gaps"
        )
        for title, totals in (
            ("longest on it", path.longest),
            ("tasks", self.tasks),
            ("places", self.places),
            ("host", self.host),
            ("steps", self.steps),
        ):
            lines += [f"{title}:"] if totals else []
            lines += [f"  {entry.microseconds:10.1f} us {entry.count:6} x {entry.name}" for entry in totals]
        lines += ["gaps:"] if self.gaps else []
        for gap in self.gaps:
            host = "" if gap.host is None else f", {gap.host:.1f} of it before the host's launch"
            lines.append(f"  {gap.microseconds:10.1f} us between {gap.before} and {gap.after}{host}")
        return "\n".join(lines)


def timeline(file: str | Path, top: int = 10, graph: StoredGraph | None = None) -> Timeline:
    """Reads a trace and sums it up.

    Args:
        file: of npu_compiler.trace, or trace_view.json of torch_npu's profiler.
        top: how many entries each list has at most, the largest first.
        graph: a bundle's graph that the trace has replays of (join.py).

    Raises:
        TraceError: it can't be read, or holds no task of a device.
    """
    events = read(file)
    try:
        tasks = tasks_of(events)
        if graph is not None:
            from npu_compiler.inspect.join import join

            tasks = join(tasks, graph)
        return summary(str(file), tasks, events, top)
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{str(file)!r} has an event of another form: {error!r}", rule="as Chrome's format") from error


def read(file: str | Path) -> list[dict[str, Any]]:
    """The events of a trace file in Chrome's format, compressed or not, of `trace` or of any other profiler.

    Raises:
        TraceError: it is none.
    """
    try:
        data = Path(file).read_bytes()
        found = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise _unreadable(file, str(error)) from error
    events = found.get("traceEvents") if isinstance(found, dict) else found
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise _unreadable(file, "it holds no list of events")
    return events


def _unreadable(file: str | Path, why: str) -> TraceError:
    return TraceError(
        f"{str(file)!r} can't be read: {why}",
        rule="a trace is JSON in Chrome's trace event format, or that compressed by gzip",
        fix="name a file of npu_compiler.trace, or trace_view.json of torch_npu's profiler",
    )


def summary(name: str, tasks: Sequence[Task], events: Sequence[dict[str, Any]], top: int = 10) -> Timeline:
    """The figures of these tasks; `events` for what the host did."""
    if not tasks:
        raise TraceError(
            f"{name!r} has no task of a device",
            rule=f"tasks have the category task, or lie in the process {HARDWARE!r}",
            fix="record while the device works",
        )
    start, end = min(task.start for task in tasks), max(task.end for task in tasks)
    by_stream: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        by_stream[task.stream].append(task)
    work = [task for task in tasks if not task.waits]
    host = [event for event in events if event.get("cat") == "call" and event.get("ph") == "X"]
    steps = [event for event in events if event.get("cat") == "step" and event.get("ph") == "X"]
    dropped = [event["args"]["count"] for event in events if event.get("name") == "dropped_events"]
    return Timeline(
        file=name,
        microseconds=end - start,
        together=_together(work),
        streams=tuple(_stream(stream, own, end - start) for stream, own in sorted(by_stream.items())),
        critical=_critical(work, top),
        gaps=tuple(sorted(_gaps(work), key=lambda gap: -gap.microseconds)[:top]),
        tasks=_totals(((task.name, task.microseconds) for task in work), top),
        places=_totals(((_place(task), task.microseconds) for task in work if _place(task)), top),
        host=_totals(((event["name"], float(event["dur"])) for event in host), top),
        steps=_totals(((event["name"], float(event["dur"])) for event in steps), top),
        dropped=sum(dropped),
    )


def tasks_of(events: Sequence[dict[str, Any]]) -> list[Task]:
    """The device's tasks of a trace, by their start. What only runs a graph is left out: its tasks are there."""
    processes = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    lines = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in events if event.get("name") == "thread_name"
    }
    launched = {
        event["args"]["launch"]: _number(event["ts"]) + _number(event["dur"])
        for event in events
        if event.get("cat") == "call" and "launch" in event.get("args", {})
    }
    found = []
    for event in events:
        if event.get("ph") != "X":
            continue
        said = event.get("args") or {}
        own = event.get("cat") == "task"
        if not own and not (HARDWARE in processes.get(event.get("pid"), "") and "Task Type" in said):
            continue
        line = lines.get((event["pid"], event["tid"]), f"stream {said.get('Stream Id', event['tid'])}")
        process = processes.get(event["pid"], "")
        waits = event["name"] in WAITS if own else "WAIT" in str(said["Task Type"]).upper()
        begin = _number(event["ts"])
        found.append(
            Task(
                name=event["name"],
                stream=f"{process}, {line}".lstrip(", "),
                start=begin,
                end=begin + _number(event["dur"]),
                launched=launched.get(said.get("launch")),
                waits=waits,
                said={
                    key: str(said[key]) for key in ("node", "call", "module", "source", "pass", "graph") if key in said
                },
            )
        )
    return sorted(found, key=lambda task: (task.start, task.end))


def _number(text: Any) -> float:
    return float(text)  # msprof writes times as text, so that no digit is lost


def _place(task: Task) -> str:
    return " at ".join(task.said[key] for key in ("module", "source") if key in task.said)


def _stream(name: str, tasks: Sequence[Task], whole: float) -> Stream:
    waiting = sum(task.microseconds for task in tasks if task.waits)
    busy = sum(task.microseconds for task in tasks if not task.waits)
    return Stream(name=name, tasks=len(tasks), busy=busy, waiting=waiting, idle=max(0.0, whole - busy - waiting))


def _together(tasks: Iterable[Task]) -> float:
    """Microseconds in which more than one of these tasks ran; those of a stream run one by one."""
    changes = sorted(change for task in tasks for change in ((task.start, 1), (task.end, -1)))
    total, running, since = 0.0, 0, 0.0
    for when, change in changes:  # of what happens at one time, the ends come first
        if running > 1:
            total += when - since
        running, since = running + change, when
    return total


def _totals(entries: Iterable[tuple[str, float]], top: int) -> tuple[Total, ...]:
    times: dict[str, list[float]] = defaultdict(list)
    for name, microseconds in entries:
        times[name].append(microseconds)
    found = [Total(name=name, count=len(each), microseconds=sum(each)) for name, each in times.items()]
    return tuple(sorted(found, key=lambda entry: -entry.microseconds)[:top])


def _gaps(tasks: Sequence[Task]) -> Iterator[Gap]:
    """The times in which nothing ran, between tasks sorted by their start."""
    last: Task | None = None
    for task in tasks:
        if last is not None and task.start - last.end >= SMALLEST_GAP:
            yield Gap(
                start=last.end,
                microseconds=task.start - last.end,
                before=_described(last),
                after=_described(task),
                host=None if task.launched is None else _late(last, task),
            )
        if last is None or task.end > last.end:
            last = task


def _late(before: Task, task: Task) -> float:
    """How long after `before` the host had launched `task`, as far as that is why it began late."""
    launched = before.end if task.launched is None else task.launched
    return min(max(0.0, launched - before.end), task.start - before.end)


def _described(task: Task) -> str:
    return f"{task.name} ({task.said['node']})" if "node" in task.said else task.name


def _critical(tasks: Sequence[Task], top: int) -> Critical:
    chain = _chain(tasks)
    gaps = [(max(0.0, task.start - before.end), _late(before, task)) for before, task in pairwise(chain)]
    host = sum(min(gap, late) for gap, late in gaps)
    longest = _totals(((_described(task), task.microseconds) for task in chain), top)
    return Critical(
        tasks=sum(task.microseconds for task in chain),
        host=host,
        other=sum(gap for gap, _ in gaps) - host,
        longest=longest,
    )


def _chain(tasks: Sequence[Task]) -> list[Task]:
    """Back from the task that ends last: before each the one that ended last before it began."""
    by_end = sorted(tasks, key=lambda task: (task.end, task.start))
    chain: list[Task] = []
    while by_end:
        task = by_end.pop()
        if not chain or task.end <= chain[-1].start:
            chain.append(task)
    return chain[::-1]
