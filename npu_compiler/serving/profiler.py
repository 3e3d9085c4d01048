"""Timelines of a serving run: vLLM's profiler interface on npu_compiler.trace.

vllm serve MODEL --profiler-config '{"profiler": "torch", "torch_profiler_dir": "/DIR"}'    # POST /start_profile
vllm serve MODEL --additional-config '{"trace_dir": "DIR", "trace_steps": [100, 110]}'
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

from vllm.config.profiler import ProfilerConfig
from vllm.logger import init_logger
from vllm.profiler.wrapper import WorkerProfiler

from npu_compiler.inspect.trace import Recorder
from npu_compiler.serving.options import ServingOptions

logger = init_logger(f"vllm.{__name__}")


class TimelineProfiler(WorkerProfiler):
    """Writes a timeline of the steps between start and stop to FOLDER/NAME.trace.json.gz."""

    def __init__(self, config: ProfilerConfig, folder: str, name: str) -> None:
        super().__init__(config)
        self._folder, self._name = Path(folder), name
        self._recorder: Recorder | None = None

    @property
    def busy(self) -> bool:
        """Whether it records, or waits for the step at which it shall."""
        return self._active

    def set_output_name(self, worker_name: str) -> None:
        """See WorkerProfiler."""
        if not self._active:
            self._name = worker_name

    def _start(self) -> None:
        recorder = Recorder()
        recorder.start()
        self._recorder = recorder

    def _stop(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            file = self._folder / f"{self._name}.trace.json.gz"
            recorder.stop(file)
            logger.info("Timeline written to %s", file)

    def annotate_context_manager(self, name: str) -> AbstractContextManager[None]:
        """Names a step on the timeline."""
        return contextlib.nullcontext() if self._recorder is None else self._recorder.run.span(name)


def of_options(options: ServingOptions, name: str) -> TimelineProfiler | None:
    """The profiler that additional_config asks for, started: it waits for its first step by itself."""
    if options.trace_dir is None:
        return None
    first, last = options.trace_steps
    profiler = TimelineProfiler(ProfilerConfig(), options.trace_dir, name)
    profiler.start(delay_iterations=first, max_iterations=last - first + 1)
    return profiler
