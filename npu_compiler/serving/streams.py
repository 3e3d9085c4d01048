"""The current stream, at a price that every step can pay.

torch_npu's `current_stream()` and `stream(...)` ask each kind of accelerator that torch knows whether it is there, and
make an object, at every call; a step asks about ten times.
"""

from __future__ import annotations

import functools
from types import TracebackType

import torch
from torch_npu import npu


def current() -> npu.Stream:
    """The current stream of the current device."""
    found = torch.accelerator.current_stream()
    return _stream(found.stream_id, found.device_index, found.device_type)


@functools.cache
def _stream(stream_id: int, device_index: int, device_type: int) -> npu.Stream:
    return npu.Stream(stream_id=stream_id, device_index=device_index, device_type=device_type)


class On:
    """While it is entered, `stream` is the current one of its device, which is the current device."""

    __slots__ = ("_before", "_stream")

    def __init__(self, stream: npu.Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = torch.accelerator.current_stream()
        npu.set_stream(self._stream)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        npu.set_stream(self._before)
