"""The one place where vLLM 0.32.0 leaves a plugin no extension point.

The seam: `torch.cuda.X` written out in vLLM's V1 model runner, where every other accelerator call of that file goes
through `torch.accelerator` or the platform:

* vllm/v1/worker/gpu_model_runner.py:745-753, 896-939: `torch.cuda.Stream()` and `torch.cuda.Event(blocking=True)` in
  `GPUModelRunner.__init__`;
* vllm/v1/worker/gpu_model_runner.py:286-299: `torch.cuda.Event`, `torch.cuda.current_stream` and `torch.cuda.stream` in
  `AsyncGPUModelRunnerOutput.__init__`, which `sample_tokens` constructs by its global name.

vLLM's own XPU runner replaces the same attributes for good (vllm/v1/worker/xpu_model_runner.py:52-75). Here they are
replaced only while one of those two functions runs, in the worker's own thread of control, and put back after it.

Upstream change that removes this file: `torch.Stream`, `torch.Event` and `torch.accelerator.current_stream` (or
`current_platform`'s) in those lines. `torch.accelerator` already serves the rest of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch_npu import npu

from npu_compiler.serving import streams


class _Event(npu.Event):
    """An npu event. `blocking` asks CUDA to sleep instead of spinning; waiting for an npu event sleeps anyway."""

    def __new__(cls, *args: Any, blocking: bool | None = None, **kwargs: Any) -> _Event:
        return super().__new__(cls, *args, **kwargs)

    def record(self, stream: npu.Stream | None = None) -> None:
        super().record(streams.current() if stream is None else stream)


@contextmanager
def cuda_names_mean_npu() -> Iterator[None]:
    """While it is entered, the stream and event names of `torch.cuda` that vLLM's V1 runner uses are `torch.npu`'s."""
    replacements = {
        "Stream": npu.Stream,
        "Event": _Event,
        "current_stream": streams.current,
        "stream": streams.On,
    }
    saved = {name: getattr(torch.cuda, name) for name in replacements}
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(torch.cuda, name, value)
