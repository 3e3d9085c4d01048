"""Why a step or a call was not a replay, why a graph was captured, and what to change: one table for logs, metrics,
reports and commands.

Whoever gives a reason takes it from here, so each has its advice. This module imports nothing but the standard library:
every layer uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

Why = NewType("Why", str)
"""A reason's text with its details. Only `Reason.said` makes one."""


@dataclass(frozen=True)
class Reason:
    """A reason.

    Attributes:
        name: its name in metrics and in JSON.
        text: what happened, as said in reports.
        change: what to change, or that there is nothing to change.
    """

    name: str
    text: str
    change: str

    def said(self, detail: str = "") -> Why:
        """The text with what is particular to one case."""
        return Why(f"{self.text}: {detail}" if detail else self.text)


# Steps of a serving engine.
GRAPHS_OFF = Reason(
    "graphs_off",
    "cudagraph_mode is NONE",
    "leave --enforce-eager and cudagraph_mode NONE out: FULL_DECODE_ONLY is the default",
)
PREFILL = Reason(
    "prefill",
    "the batch holds prefill, which the mode has no graphs for",
    "nothing, as long as prompts are few; cudagraph_mode FULL_AND_PIECEWISE has graphs for such batches too",
)
DECODE_TOO_LARGE = Reason(
    "decode_too_large",
    "more tokens than the largest graph",
    "raise max_cudagraph_capture_size or the last of cudagraph_capture_sizes to --max-num-seqs, or lower that",
)
PREFILL_TOO_LARGE = Reason(
    "prefill_too_large",
    "prefill larger than any graph",
    "lower --max-num-batched-tokens, which cuts prompts into smaller chunks, or raise max_cudagraph_capture_size",
)
NOT_CAPTURED = Reason(
    "not_captured",
    "not captured",
    "raise the option that is named (capture_budget_seconds, capture_budget_mib), or list fewer "
    "cudagraph_capture_sizes",
)
OTHER_RANK = Reason(
    "other_rank",
    "the data-parallel ranks go the same way, and another one has no graph for its batch",
    "look at the reports of the other ranks",
)
NO_GRAPH = Reason(
    "no_graph",
    "no graph for this batch",
    "add its size to cudagraph_capture_sizes; where it is there, that is a defect to report",
)
PIECES = Reason(
    "pieces",
    "replayed in pieces, with attention between them",
    "nothing for prompts; FULL_AND_PIECEWISE, or FULL_DECODE_ONLY, replays decode steps whole",
)
STEPS = (
    GRAPHS_OFF,
    PREFILL,
    DECODE_TOO_LARGE,
    PREFILL_TOO_LARGE,
    NOT_CAPTURED,
    OTHER_RANK,
    NO_GRAPH,
    PIECES,
)

# Calls of a function that torch.compile compiled.
CAPTURE_OFF = Reason("capture_off", "capture is off", 'leave options={"capture": False} out')
NO_DEVICE_TENSOR = Reason("no_device_tensor", "no tensor on an npu device", "move model and inputs to npu")
NOTHING_ON_DEVICE = Reason(
    "nothing_on_device", "nothing to compute on the device", "nothing: there is nothing to capture"
)
HOST_SCALAR = Reason(
    "host_scalar",
    "scalar in host memory",
    "pass a Python number, or make the tensor with device='npu'",
)
HOST_RANDOM = Reason(
    "host_random",
    "draws random numbers in a way that a captured graph can't repeat",
    "draw outside the compiled function, or with an operator that takes its numbers from the device's generator",
)
HOST_EFFECT = Reason(
    "host_effect",
    "has an effect on the host that no replay repeats",
    "call it outside the compiled function; torch.linalg's *_ex functions leave the check to the caller",
)
SIZE_NOT_LISTED = Reason(
    "size_not_listed",
    "a size is not in capture_sizes",
    "add the size to capture_sizes, or pad the input to a listed one",
)
FIRST_CALL = Reason(
    "first_call",
    "first call of a shape, before its capture",
    "nothing: one call a shape; fewer shapes (capture_sizes, padding) make fewer of them",
)
OVER_BUDGET = Reason(
    "over_budget",
    "does not fit",
    "raise the option that is named, or list fewer capture_sizes, the largest of which share their memory",
)
CALLS = (
    CAPTURE_OFF,
    NO_DEVICE_TENSOR,
    NOTHING_ON_DEVICE,
    HOST_SCALAR,
    HOST_RANDOM,
    HOST_EFFECT,
    SIZE_NOT_LISTED,
    FIRST_CALL,
    OVER_BUDGET,
)

# Captures. The first two are of a shape that had no graph yet.
FIRST_SHAPE = Reason("first_shape", "first shape", "nothing")
NEW_SHAPE = Reason(
    "new_shape", "new shape", "nothing; where sizes are many, pad to a few and list them as capture_sizes"
)
MOVED = Reason(
    "moved",
    "moved in memory",
    "keep the tensor where it is: write into it (copy_, index_copy_) instead of making a new one",
)
DRIVEN_OUT = Reason(
    "driven_out",
    "called again after its graph was driven out",
    "raise capture_limit above the number of shapes in use, or pad to fewer shapes",
)
CLEARED = Reason(
    "cleared",
    "captured again after vLLM dropped its graphs",
    "nothing: vLLM does so where memory, weights or the number of ranks change",
)
RECOMPILED = Reason(
    "recompiled",
    "compiled again",
    "keep what the guard names from changing, or mark the size dynamic (dynamic=True, torch._dynamo.mark_dynamic)",
)
NEW_CAPTURES = (FIRST_SHAPE, NEW_SHAPE)
RECAPTURES = (MOVED, DRIVEN_OUT, CLEARED, RECOMPILED)

ALL = (*STEPS, *CALLS, *NEW_CAPTURES, *RECAPTURES)


def named(name: str) -> Reason:
    """The reason of a name. One that is unknown, from a report of another version, has no advice."""
    return next((entry for entry in ALL if entry.name == name), Reason(name, name, "unknown to this version"))


def of(text: str) -> Reason:
    """The reason that a text with details was made from (`Reason.said`)."""
    return next(
        (entry for entry in ALL if text == entry.text or text.startswith(f"{entry.text}: ")), Reason("", text, "")
    )
