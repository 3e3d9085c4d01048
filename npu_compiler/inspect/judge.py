"""Whether what a program gave is right: the rule by which `replay` and `bisect` decide.

Three runs are compared: the float64 reference, the lowered program on the device, and the program in question.

* A float may be off by ERRORS times the largest error of the lowered program in that tensor, or by ROUNDINGS roundings
  of its dtype at its largest value, whichever is more. Infinities and NaNs stand where the lowered program has them.
* Anything else is as the lowered program has it, but where that is not as the reference either (an argmax of equals).
* Two results, or a result and an input, share memory only if they do in the lowered program; an input is written only
  if the lowered program writes it; a result that was handed out does not change at later calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from npu_compiler.inspect.program import Data

ERRORS = 8
ROUNDINGS = 4


Kind = Literal["value", "form", "alias", "write", "overwritten", "collectives", "race"]


class Difference(Data):
    """Something that is not as it should be.

    Attributes:
        call: of the calls that were made one after the other, with other values each, the first at which it shows.
        what: `output 0`, `input cache`, or what else is compared.
        text: what is wrong with it, and of which kind that is.
        error, allowed: for floats: the largest error, and what was allowed.
    """

    call: int
    what: str
    text: str
    kind: Kind = "value"
    error: float | None = None
    allowed: float | None = None

    def __str__(self) -> str:
        return f"call {self.call}: {self.what} {self.text}"


class Compared(Data):
    """A float result in figures.

    Attributes:
        what: as in Difference. `scale`: its largest value in float64.
        error, lowered: the largest error against float64, of the program in question (None: it has infinities or NaNs
            where none should be) and of the lowered one.
        allowed: what the error may be.
    """

    call: int
    what: str
    scale: float
    error: float | None
    lowered: float
    allowed: float

    def __str__(self) -> str:
        off = "infinity" if self.error is None else f"{self.error:.3g}"
        return (
            f"call {self.call}: {self.what} is off by {off} at values up to {self.scale:.3g}; "
            f"the lowered program by {self.lowered:.3g}, allowed are {self.allowed:.3g}"
        )


@dataclass(frozen=True)
class Seen:
    """What one call left: everything on the host.

    Attributes:
        outputs: what it returned.
        written: the inputs' values behind the call, by name; only of those that changed.
        shared: pairs of names of results and inputs that share memory.
    """

    outputs: list[Any]
    written: dict[str, Tensor]
    shared: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Expected:
    """What a call should leave: the lowered program's, and in float64 (None where there is no reference)."""

    lowered: Seen
    wide: Seen | None


def compared(call: int, found: Seen, expected: Expected) -> Iterator[Compared]:
    """The errors of a call's float results against float64."""
    if expected.wide is None or len(found.outputs) != len(expected.lowered.outputs):
        return
    three = [
        (f"output {index}", *items)
        for index, items in enumerate(zip(found.outputs, expected.lowered.outputs, expected.wide.outputs, strict=True))
    ]
    names = expected.lowered.written.keys() & found.written.keys() & expected.wide.written.keys()
    three += [
        (f"input {name}", found.written[name], expected.lowered.written[name], expected.wide.written[name])
        for name in sorted(names)
    ]
    for what, got, base, wide in three:
        plain = isinstance(base, Tensor) and isinstance(got, Tensor) and base.dtype.is_floating_point
        if not plain or got.shape != base.shape or not base.numel():
            continue
        allowed, finite = allowance(base, wide)
        means = wide.double()[finite]
        errors = [float((one.double()[finite] - means).abs().max()) if means.numel() else 0.0 for one in (got, base)]
        scale = float(means.abs().max()) if means.numel() else 0.0
        error = errors[0] if math.isfinite(errors[0]) else None
        yield Compared(call=call, what=what, scale=scale, error=error, lowered=errors[1], allowed=allowed)


def judge(call: int, found: Seen, expected: Expected) -> Iterator[Difference]:
    """What is wrong with a call."""
    lowered, wide = expected.lowered, expected.wide
    for first, second in sorted(found.shared - lowered.shared):
        yield Difference(call=call, what=first, text=f"shares memory with {second}", kind="alias")
    if len(found.outputs) != len(lowered.outputs):
        yield Difference(
            call=call, what="outputs", text=f"are {len(found.outputs)}, not {len(lowered.outputs)}", kind="form"
        )
        return
    for index, (got, base) in enumerate(zip(found.outputs, lowered.outputs, strict=True)):
        yield from _value(call, f"output {index}", got, base, None if wide is None else wide.outputs[index])
    for name in sorted(found.written.keys() | lowered.written.keys()):
        if name not in lowered.written:
            yield Difference(
                call=call, what=f"input {name}", text="was written; the lowered program leaves it", kind="write"
            )
        elif name not in found.written:
            yield Difference(
                call=call, what=f"input {name}", text="was not written; the lowered program writes it", kind="write"
            )
        else:
            reference = None if wide is None else wide.written.get(name)
            yield from _value(call, f"input {name}", found.written[name], lowered.written[name], reference)


def _value(call: int, what: str, got: Any, base: Any, wide: Any) -> Iterator[Difference]:
    if not isinstance(base, Tensor) or not isinstance(got, Tensor):
        if type(got) is not type(base) or (not isinstance(got, Tensor) and got != base):
            yield Difference(call=call, what=what, text=f"is {got!r:.60}, not {base!r:.60}", kind="form")
    elif (got.dtype, got.shape) != (base.dtype, base.shape):
        yield Difference(call=call, what=what, text=f"is {_form(got)}, not {_form(base)}", kind="form")
    elif not base.dtype.is_floating_point:
        sure = torch.ones_like(base, dtype=torch.bool) if wide is None else base == wide
        wrong = int((sure & (got != base)).sum())
        if wrong:
            yield Difference(call=call, what=what, text=f"differs in {wrong} of {base.numel()} elements")
    else:
        yield from _float(call, what, got, base, base if wide is None else wide)


def _float(call: int, what: str, got: Tensor, base: Tensor, wide: Tensor) -> Iterator[Difference]:
    allowed, finite = allowance(base, wide)
    kept, expected, means = got.double()[finite], base.double()[~finite], wide.double()[finite]
    odd = int(((got.double()[~finite] != expected) & ~(got[~finite].isnan() & expected.isnan())).sum())
    bad = int((~kept.isfinite()).sum())
    if odd or bad:
        yield Difference(
            call=call, what=what, text=f"has {odd + bad} infinities or NaNs that should not be, or lacks them"
        )
        return
    errors = (kept - means).abs()
    worst = float(errors.max()) if errors.numel() else 0.0
    if worst > allowed:
        count = int((errors > allowed).sum())
        text = f"is off by up to {worst:.3g}, {allowed:.3g} is allowed; {count} of {got.numel()} elements are"
        yield Difference(call=call, what=what, text=text, error=worst, allowed=allowed)


def allowance(base: Tensor, wide: Tensor) -> tuple[float, Tensor]:
    """The largest error that is allowed, and which elements are finite in the lowered program and in float64."""
    left, right = base.double(), wide.double()
    finite = left.isfinite() & right.isfinite()
    if not bool(finite.any()):
        return 0.0, finite
    error = float((left - right)[finite].abs().max())
    scale = float(right[finite].abs().max())
    return max(ERRORS * error, ROUNDINGS * torch.finfo(base.dtype).eps * scale), finite


def shared_memory(named: Sequence[tuple[str, Any]], outputs: int) -> frozenset[tuple[str, str]]:
    """Pairs of the first `outputs` values with any other that share memory."""
    keys = [
        item.untyped_storage().data_ptr() if isinstance(item, Tensor) and item.numel() else None for _, item in named
    ]
    return frozenset(
        (named[one][0], named[two][0])
        for one in range(outputs)
        for two in range(one + 1, len(named))
        if keys[one] is not None and keys[one] == keys[two]
    )


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
