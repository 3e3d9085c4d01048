"""What ran when: calls of the host, tasks on streams, tasks of replayed graphs.

    recorder().start()
    ...
    events = recorder().stop()

The events are those of the Chrome trace event format, as dicts; chrome://tracing and ui.perfetto.dev show them. They
come from the host runtime, or, where a card's CANN is used, from torch_npu's profiler.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from npu_compiler.runtime import loader

Event = dict[str, Any]
LIMIT = 4_000_000
"""Spans that are recorded at most, 88 bytes each in memory."""
HOST, DEVICE = "host", "device"
CALL, TASK, REPLAY = "call", "task", "replay"
"""Categories of events: a call of the host, a task of the device, and one that runs a graph, whose tasks lie within."""
SPAN = np.dtype(
    [
        *((name, "<i8") for name in ("start", "end", "submitted")),
        ("launch", "<u8"),
        *((name, "<u4") for name in ("kind", "name", "label")),
        *((name, "<i4") for name in ("device", "stream")),
        *((name, "<u4") for name in ("graph", "node", "graph_stream")),
        ("thread", "<u8"),
    ]
)
"""One span as the host runtime has it (runtime/acl/trace.h)."""
_KIND_CALL, _KIND_TASK, _KIND_NODE = range(3)
_GRAPH_LAUNCHES = ("aclmdlRIExecuteAsync",)


class Recorder(Protocol):
    """What records a run; one recording at a time in a process."""

    def start(self, limit: int = LIMIT) -> None:
        """Begins to record, up to so many spans. Raises RuntimeError when it records already."""

    def stop(self) -> list[Event]:
        """Ends the recording and returns its events. The device should have finished what it was given."""


def recorder() -> Recorder:
    """The recorder of the CANN that this process uses."""
    return _host() if loader.choose().runtime == "host" else _cann()


def recording() -> bool:
    """Whether somebody records just now."""
    return _State.active


def label(stream: Any, text: bytes) -> int:
    """Says what the tasks given to `stream` from now on belong to: JSON of an object, which becomes part of the events.
    During a capture that holds for all its streams, and lasts as long as the graph.

    torch_npu hands tasks over on a thread of its own; this waits until it has handed over what came before.

    Returns:
        The captured graph's id (`nodes`); 0 outside of captures, and where CANN, which has no such thing, is used.
    """
    function = _label_function()
    return 0 if function is None else int(function(stream.npu_stream, text))


def nodes(graph: int) -> list[dict[str, Any]]:
    """The tasks of a captured graph in their order: name, stream (of the graph's), and what their label says. Empty
    where they can't be told."""
    if not graph or _label_function() is None:
        return []
    texts = _Texts()
    return [
        {"name": texts[span["name"]], "stream": int(span["graph_stream"]), **texts.arguments(span["label"])}
        for span in _nodes(graph)
    ]


def label_nodes(graph: int, first: int, texts: Sequence[bytes]) -> None:
    """Says what tasks of a captured graph belong to, from task number `first` on, as `label` would have.

    Raises:
        ValueError: the graph has not as many.
    """
    given = (ctypes.c_char_p * len(texts))(*texts)
    if _library().hostRuntimeLabelNodes(graph, first, len(texts), given) != len(texts):
        raise ValueError(f"graph {graph} has no {len(texts)} tasks behind number {first}")


def labels(graph: int) -> list[str]:
    """The label of each task of a captured graph, in their order; empty where they can't be told."""
    if not graph or _label_function() is None:
        return []
    spans, texts = _nodes(graph), _Texts()
    return [texts[number] for number in spans["label"].tolist()]


def _nodes(graph: int) -> Any:
    library = _library()
    spans = np.zeros(library.hostRuntimeGraphNodes(graph, None, 0), SPAN)
    library.hostRuntimeGraphNodes(graph, spans.ctypes.data, len(spans))
    return spans


class _State:
    active = False


class _HostRecorder:
    def start(self, limit: int = LIMIT) -> None:
        _begin()
        _library().hostRuntimeTraceStart(limit)

    def stop(self) -> list[Event]:
        library = _library()
        library.hostRuntimeTraceStop()
        _State.active = False
        spans = np.zeros(library.hostRuntimeTraceTake(None, 0), SPAN)
        library.hostRuntimeTraceTake(spans.ctypes.data, len(spans))
        events = list(_events(np.sort(spans, order="start"), _Texts()))
        dropped = int(library.hostRuntimeTraceDropped())
        if dropped:
            events.append({"ph": "M", "name": "dropped_events", "pid": 0, "tid": 0, "args": {"count": dropped}})
        return events


class _CannRecorder:
    """Through torch_npu's profiler, whose trace names kernels and streams, and no nodes."""

    def start(self, limit: int = LIMIT) -> None:
        import torch_npu

        _begin()
        profiler = torch_npu.profiler
        activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
        self._folder = tempfile.TemporaryDirectory(prefix="npu_compiler_trace")
        self._profile = profiler.profile(activities=activities)
        self._profile.start()

    def stop(self) -> list[Event]:
        self._profile.stop()
        _State.active = False
        file = Path(self._folder.name) / "trace.json"
        self._profile.export_chrome_trace(str(file))
        with self._folder:
            found = json.loads(file.read_bytes())
        return list(found["traceEvents"] if isinstance(found, dict) else found)


def _begin() -> None:
    if _State.active:
        raise RuntimeError("a trace of this process is being recorded already; one at a time")
    _State.active = True


@functools.cache
def _host() -> Recorder:
    return _HostRecorder()


@functools.cache
def _cann() -> Recorder:
    return _CannRecorder()


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.hostRuntimeTraceStart.argtypes = [ctypes.c_uint64]
    library.hostRuntimeTraceTake.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.hostRuntimeTraceTake.restype = ctypes.c_size_t
    library.hostRuntimeTraceDropped.restype = ctypes.c_uint64
    library.hostRuntimeTraceText.argtypes = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t]
    library.hostRuntimeTraceText.restype = ctypes.c_size_t
    library.hostRuntimeLabel.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.hostRuntimeLabel.restype = ctypes.c_uint32
    library.hostRuntimeLabelNodes.argtypes = [
        ctypes.c_uint32,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_char_p),
    ]
    library.hostRuntimeLabelNodes.restype = ctypes.c_size_t
    library.hostRuntimeGraphNodes.argtypes = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t]
    library.hostRuntimeGraphNodes.restype = ctypes.c_size_t
    return library


@functools.cache
def _label_function() -> Any:
    """None where tasks can't be labelled: where CANN is used, or nothing is loaded yet that knows of labels."""
    known = loader.choose().runtime == "host" and hasattr(ctypes.CDLL(None), "hostRuntimeLabel")
    return _library().hostRuntimeLabel if known else None


class _Texts(dict[int, str]):
    """The recorded texts by number, each read once."""

    def __missing__(self, number: int) -> str:
        library = _library()
        size = library.hostRuntimeTraceText(int(number), None, 0)
        text = ctypes.create_string_buffer(size)
        library.hostRuntimeTraceText(int(number), text, size)
        self[number] = text.raw.decode()
        return self[number]

    @functools.cached_property
    def _labels(self) -> dict[int, Event]:
        return {0: {}}

    def arguments(self, number: int) -> Event:
        """What a label says."""
        number = int(number)
        if number not in self._labels:
            text = self[number]
            self._labels[number] = json.loads(text) if text else {}
        return self._labels[number]


def _events(spans: Any, texts: _Texts) -> Iterator[Event]:
    """The events of recorded spans, with the names of what they lie on, and an arrow from each launch to its task."""
    process = os.getpid()
    graphs = dict(
        zip(*(spans[spans["kind"] == _KIND_NODE][name].tolist() for name in ("launch", "graph")), strict=True)
    )
    launched = set(spans[spans["kind"] == _KIND_TASK]["launch"].tolist())
    seen: set[tuple[int, int]] = set()
    columns = [spans[name].tolist() for name in spans.dtype.names]
    for row in zip(*columns, strict=True):
        span = dict(zip(spans.dtype.names, row, strict=True))
        kind, launch, start = span["kind"], span["launch"], span["start"] / 1e3
        name, arguments = texts[span["name"]], {"launch": launch} if launch else {}
        if kind == _KIND_CALL:
            place, category = (process, span["thread"]), CALL
        else:
            place = (_device_process(process, span["device"]), span["stream"] * 100 + span["graph_stream"])
            category = REPLAY if kind == _KIND_TASK and name in _GRAPH_LAUNCHES else TASK
            arguments |= texts.arguments(span["label"])
        if kind == _KIND_NODE:
            arguments |= {"replay_of": span["graph"], "task": span["node"]}
        elif kind == _KIND_TASK and span["submitted"]:
            arguments["queued_us"] = (span["start"] - span["submitted"]) / 1e3
        if category == REPLAY and launch in graphs:
            arguments["replay_of"] = graphs[launch]
        if place not in seen:
            seen.add(place)
            yield from _names(place, span)
        common = {"pid": place[0], "tid": place[1]}
        yield {
            "ph": "X",
            "name": name,
            "cat": category,
            "ts": start,
            "dur": (span["end"] - span["start"]) / 1e3,
            **common,
            "args": arguments,
        }
        if kind == _KIND_CALL and launch in launched:
            yield {"ph": "s", "id": launch, "name": "launch", "cat": "launch", "ts": start, **common}
        elif kind == _KIND_TASK and launch:
            yield {"ph": "f", "bp": "e", "id": launch, "name": "launch", "cat": "launch", "ts": start, **common}


def _device_process(process: int, device: int) -> int:
    return process * 100 + 1 + device


def _names(place: tuple[int, int], span: dict[str, int]) -> Iterator[Event]:
    """What viewers show as the names of a line of the timeline and of the group that it is in."""
    pid, tid = place
    if span["device"] < 0:
        group, line = HOST, f"thread {tid}"
    else:
        beside = f", graph stream {span['graph_stream']}" if span["graph_stream"] else ""
        group, line = f"{DEVICE} npu:{span['device']}", f"stream {span['stream']}{beside}"
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": group}}
    yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": line}}
    yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
