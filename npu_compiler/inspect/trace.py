"""Recording a run as a timeline: calls of the host, tasks of the device with the call of the program they belong to."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch

from npu_compiler.errors import TraceError
from npu_compiler.runtime import loader
from npu_compiler.runtime import trace as recording

STEP = "step"
"""Category of the events that a user names."""


class Run:
    """A run being recorded."""

    def __init__(self) -> None:
        self._named: list[recording.Event] = []

    @contextlib.contextmanager
    def span(self, name: str, **arguments: object) -> Iterator[None]:
        """Names a part of the run on the host's line of the timeline; `arguments` are shown with it."""
        start = time.perf_counter_ns()
        with torch.profiler.record_function(name):
            yield
        end = time.perf_counter_ns()
        place = {"pid": os.getpid(), "tid": threading.get_native_id()}
        times = {"ts": start / 1e3, "dur": (end - start) / 1e3}
        self._named.append({"ph": "X", "name": name, "cat": STEP, **times, **place, "args": arguments})

    def events(self) -> Sequence[recording.Event]:
        """What was named."""
        return self._named


@contextlib.contextmanager
def trace(file: str | Path, *, limit: int = recording.LIMIT) -> Iterator[Run]:
    """Records what this process runs while it is open, and writes it to `file`.

        with npu_compiler.trace("run.json") as run:
            for number in range(3):
                with run.span(f"step {number}"):
                    model(x)

    The file has Chrome's trace event format, which ui.perfetto.dev and `npu-compiler trace` read; compressed where its
    name ends in .gz. The device is waited for before the recording begins and before it ends. What an error inside
    ends is written too.

    Args:
        limit: how many events are kept; what comes later is counted and dropped. Not on a card.

    Raises:
        TraceError: the process is recorded already, or the file can't be written.
    """
    place = Path(file)
    recorder = Recorder()
    recorder.start(limit)
    with contextlib.ExitStack() as failed:
        failed.callback(recorder.stop_quietly, place)
        yield recorder.run
        failed.pop_all()
    recorder.stop(place)


class Recorder:
    """As `trace`, for what begins and ends in different places."""

    def __init__(self) -> None:
        self.run = Run()
        self._recorder = recording.recorder()

    def start(self, limit: int = recording.LIMIT) -> None:
        """Begins to record."""
        torch.npu.synchronize()
        try:
            self._recorder.start(limit)
        except RuntimeError as error:
            raise TraceError(str(error), rule="a process is recorded once", fix="end the other recording") from error

    def stop(self, file: Path) -> None:
        """Ends the recording and writes it."""
        try:
            torch.npu.synchronize()
        finally:
            events = [*self._recorder.stop(), *self.run.events()]
            _write(file, events)

    def stop_quietly(self, file: Path) -> None:
        """As `stop`, behind an error, which is the one to see."""
        with contextlib.suppress(RuntimeError, TraceError):
            self.stop(file)


def _write(file: Path, events: Sequence[recording.Event]) -> None:
    choice = loader.choose()
    version = metadata.version("npu-compiler")
    about = {"made_by": f"npu-compiler {version}", "cann": f"{choice.runtime}, because {choice.reason}"}
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ns", "otherData": about}).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(text, 3) if file.suffix == ".gz" else text)
    except OSError as error:
        raise TraceError(
            f"no trace can be written to {str(file)!r}: {error}", rule="the file can be written", fix="name another one"
        ) from error
