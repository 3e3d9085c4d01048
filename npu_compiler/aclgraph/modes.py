"""Modes of torch around a program: what watches every operator costs more than most operators do.

At the first call AOTAutograd watches, in Python, whether a custom operator returns memory of its arguments. That is of
use where the model has custom operators of its own, and only while they run: not in a capture, which records them.
"""

from __future__ import annotations

import contextlib

import torch
import torch._dynamo  # before the module below, which it imports
from torch import fx
from torch._functorch._aot_autograd.runtime_wrappers import _AnalyzeCustomOpInputOutputMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

KNOWN = frozenset(("aten", "prim", "prims", "npu", "npu_fused", "_c10d_functional"))
"""Namespaces of operators whose results are known to be their own."""


def in_capture() -> contextlib.AbstractContextManager[object]:
    """Within it no mode watches the operators."""
    return _disable_current_modes()  # type: ignore[no-any-return]


def at_first_call(graph: fx.Graph) -> contextlib.AbstractContextManager[object]:
    """Within it AOTAutograd's watch is off, if there is nothing to find and no other mode watches."""
    modes = _get_current_dispatch_mode_stack()
    if not modes or not all(isinstance(mode, _AnalyzeCustomOpInputOutputMode) for mode in modes):
        return contextlib.nullcontext()
    return contextlib.nullcontext() if _has_own_operators(graph) else in_capture()


def _has_own_operators(graph: fx.Graph) -> bool:
    targets = {node.target for node in graph.nodes if node.op == "call_function"}
    return any(isinstance(target, torch._ops.OpOverload) and target.namespace not in KNOWN for target in targets)
