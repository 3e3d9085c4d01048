"""Capturing a program into an ACL graph through torch_npu's NPUGraph."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from npu_compiler.aclgraph.labels import Labels
from npu_compiler.aclgraph.streams import StreamRunner
from npu_compiler.errors import CaptureError
from npu_compiler.graph.effects import host_dependence
from npu_compiler.graph.rolled import Rolled
from npu_compiler.graph.source import beginning, operator_name, where
from npu_compiler.plan.schedule import StreamPlan

UNCAPTURED = 'use options={"capture": False} to call the compiled graph without capture'
MIB = 1 << 20
EXCLUSIVE = threading.Lock()
"""Held while a thread captures: a capture starts with a wait for the whole device, which CANN refuses while another
thread captures."""


@dataclass(frozen=True)
class Captured:
    """A captured graph.

    Attributes:
        graph: the NPUGraph. `outputs`: what the program returned, in the graph's memory.
        milliseconds, mebibytes: what the capture cost.
        graph_id: by which runtime.trace.nodes knows it; 0 where CANN tells no such thing.
    """

    graph: Any
    outputs: list[Any]
    milliseconds: float
    mebibytes: float
    graph_id: int = 0


def refuse_uncapturable(graph: fx.Graph) -> None:
    """Raises CaptureError at the first call that brings tensor data to the host or takes it from there."""
    for node in graph.nodes:
        reason = host_dependence(node)
        if reason:
            raise CaptureError(
                f"{operator_name(node.target)} can't be captured: {reason}",
                where=where(node),
                rule="a captured graph runs without the host",
                fix=f"keep the value on the device, or {UNCAPTURED}",
            )


def capture(
    program: fx.GraphModule | Rolled,
    arguments: Sequence[Any],
    *,
    name: str,
    pool: Any,
    streams: Sequence[Any],
    error_mode: str,
    plan: StreamPlan | None = None,
    labels: Labels | None = None,
    room: int = 0,
) -> Captured:
    """Records one run of `program`. Nothing is executed.

    Args:
        arguments: tensors at the addresses every replay will use, and sizes.
        streams: the stream to capture, and those that `plan` uses beside it.
        plan: what runs on which stream (plan/schedule.py); None: everything on the first.
        labels: what the tasks say of themselves in a timeline, where that was made before.
        pool: memory pool of the compiled function (torch.npu.graph_pool_handle()).
        room: bytes to get for the pool in one piece before anything else takes from it, for larger shapes to come. A
            pool gives back nothing while it has graphs, and can't join pieces: without this, each larger shape than
            all before would leave the pieces of the smaller ones unused.

    Raises:
        CaptureError: a call was refused; it names the call and its source line.
        torch.OutOfMemoryError: the device has no memory left.
    """
    with EXCLUSIVE:
        runner = StreamRunner(program, labels or Labels(name), plan, streams, repeats=True)
        return _capture(runner, arguments, name, pool, streams[0], error_mode, room)


def _capture(
    runner: StreamRunner, arguments: Sequence[Any], name: str, pool: Any, stream: Any, error_mode: str, room: int
) -> Captured:
    npu = torch.npu
    # A capture must not meet work that is still running, and can't free cached memory to make room.
    npu.synchronize()
    npu.empty_cache()
    npu.host_empty_cache()  # else each capture would leave the host memory of the ones that are gone behind
    start, reserved = time.perf_counter(), npu.memory_reserved()
    graph = npu.NPUGraph()
    with npu.stream(stream):
        try:
            graph.capture_begin(pool=pool, capture_error_mode=error_mode)
        except RuntimeError as error:
            raise _failed(name, error, runner) from error
        try:
            _make_room(room)
            outputs = runner.run(*arguments, enable_io_processing=False)
        except torch.OutOfMemoryError as error:
            _abandon(graph, error)
            raise
        except Exception as error:
            _abandon(graph, error)
            raise _failed(name, error, runner) from error
        try:
            graph.capture_end()
        except RuntimeError as error:
            raise _failed(name, error, runner) from error
    runner.label_repetitions()
    milliseconds = (time.perf_counter() - start) * 1e3
    return Captured(graph, list(outputs), milliseconds, (npu.memory_reserved() - reserved) / MIB, runner.graph_id)


def _failed(name: str, error: BaseException, runner: StreamRunner) -> CaptureError:
    """What a capture that was refused ends with. Where the refusal came with no call, the first one stands for all."""
    call = runner.current
    return CaptureError(
        f"the capture of {name} failed: {_first_line(error)}",
        where=where(call) if call is not None and call.op != "output" else beginning(runner.graph),
        rule="what CANN refuses during a capture, it refuses here",
        fix=f"take that call out of the compiled function, or {UNCAPTURED}",
    )


def _make_room(size: int) -> None:
    """Gets memory for the pool that is being captured into, and lets go of it. Without that much, shapes that need less
    may still fit."""
    if size:
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(size, dtype=torch.uint8, device="npu")


def _abandon(graph: Any, error: BaseException) -> None:
    """Ends a capture whose body failed. Ending it may fail too, for the same reason; that goes to the first error."""
    try:
        graph.capture_end()
    except RuntimeError as second:
        error.add_note(f"ending the capture failed too: {_first_line(second)}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
