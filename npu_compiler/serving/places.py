"""Where in a vLLM model a layer is made or called, for messages: read off the Python stack, when there is something to
say."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn

_MODELS = "vllm.model_executor.models."
"""vLLM's own models. A model of a user's own lies in any other package but these."""
_NO_MODEL = ("vllm", "npu_compiler", "torch", "torch_npu")


def here(layer: str = "") -> str:
    """The layer that is being made or called, and the model's line that does it: `layers.0.mlp at FILE:LINE: CODE`.

    Args:
        layer: its path, where it is known. vLLM hands it to what a model makes as `prefix`.
    """
    frames = list(_stack())
    if not layer:
        layer = next((name for frame in frames if isinstance(name := frame.f_locals.get("prefix"), str) and name), "")
    line = next((_line(frame) for frame in frames if _is_model(frame)), "")
    return " at ".join(part for part in (layer, line) if part)


def _stack() -> Iterator[FrameType]:
    """The frames, the innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_model(frame: FrameType) -> bool:
    """Whether a frame runs a method of a model: vLLM's, or one of a user's own."""
    module = str(frame.f_globals.get("__name__", ""))
    ours = module.startswith(_MODELS) or module.partition(".")[0] not in _NO_MODEL
    return ours and isinstance(frame.f_locals.get("self"), nn.Module)


def _line(frame: FrameType) -> str:
    file, number = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{number}: {linecache.getline(file, number).strip()}"
