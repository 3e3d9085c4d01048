"""Looking at a value inside of a program: `torch.ops.npu_fused.watched(x, point)` notes what x holds.

It changes nothing. All of it is done by operators on the device, so it is captured like any other call, and a replay
notes what it computes:

    slot  = counter % keep
    rows[slot]   = statistics of x
    values[slot] = x                  # only where values are asked for
    counter     += 1

The host takes part when it reads (`read`), which waits for the device; until then the last `keep` calls are kept.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

NAME = "watched"
SCHEMA = f"{NAME}(Tensor x, str point) -> ()"
What = Literal["stats", "values", "nan", "inf"]
COLUMNS = 6
"""Of a row: smallest, largest and mean of what is finite; how many are NaN, infinite, finite."""


@dataclass(frozen=True)
class Statistics:
    """Of a tensor: smallest, largest and mean of its finite elements, computed in float32 (inf, -inf and NaN without
    any); how many are NaN and infinite, of how many. The padding behind a batch of vLLM's counts."""

    smallest: float
    largest: float
    mean: float
    nans: int
    infinite: int
    count: int

    def __str__(self) -> str:
        bad = f", {self.nans} NaN, {self.infinite} infinite" if self.nans or self.infinite else ""
        return f"{self.smallest:.6g} to {self.largest:.6g}, mean {self.mean:.6g}{bad} of {self.count}"


@dataclass(frozen=True)
class Seen:
    """What a watched value held in one call.

    Attributes:
        graph: the compiled graph. `call`: counted from 0 since it was compiled, warm-up runs among them.
        place: module path and source line in the user's model. `node`: the call of the program.
        shape, dtype: of the value.
        statistics: None where only `nan` or `inf` was asked for. `nans`, `infinite`: how many elements are.
        value: in host memory; None unless `values` was asked for.
    """

    graph: str
    call: int
    place: str
    node: str
    what: What
    shape: tuple[int, ...]
    dtype: torch.dtype
    nans: int
    infinite: int
    statistics: Statistics | None = None
    value: Tensor | None = field(default=None, compare=False)

    def __str__(self) -> str:
        kind = f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"
        held = str(self.statistics) if self.statistics else f"{self.nans} NaN, {self.infinite} infinite"
        lines = [f"{self.graph} call {self.call}: {self.place or self.node}: {kind} {held}"]
        return "\n".join(lines if self.value is None else [*lines, str(self.value)])


class Point:
    """A place in one compiled program that is watched: the memory of what was noted there.

    Args:
        key: what the pass wrote into the program (see `key`). `graph`: the compiled graph's name.
        position: among the points of the program. `keep`: how many calls are kept.
    """

    def __init__(self, key: str, graph: str, position: int, keep: int, device: torch.device) -> None:
        said = json.loads(key)
        self.what: What = said["what"]
        self.place, self.node = said["place"], said["node"]
        self.graph, self.position, self.keep = graph, position, keep
        with _lasting():
            self._counter = torch.zeros(1, dtype=torch.int64, device=device)
            self._rows = torch.zeros(keep, COLUMNS, device=device)
            self._forms = torch.zeros(keep, dtype=torch.int64, device=device)
        self._kinds: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._values: list[Tensor | None] = []
        self._read = 0

    def note(self, x: Tensor) -> None:
        """Notes what x holds; called while the program runs or is captured."""
        form = self._form(x)
        slot = self._counter.remainder(self.keep)
        self._rows.index_copy_(0, slot, _row(x, self.what))
        self._forms.index_copy_(0, slot, torch.full_like(slot, form))
        values = self._values[form]
        if values is not None:
            values.index_copy_(0, slot, x.detach().unsqueeze(0))
        self._counter.add_(1)

    def _form(self, x: Tensor) -> int:
        """The number of x's shape; room for values is taken when a shape is met first."""
        kind = (tuple(x.shape), x.dtype)
        if kind not in self._kinds:
            self._kinds.append(kind)
            with _lasting():
                values = self.what == "values"
                self._values.append(
                    torch.empty(self.keep, *x.shape, dtype=x.dtype, device=x.device) if values else None
                )
        return self._kinds.index(kind)

    def unread(self) -> Iterator[Seen]:
        """What was noted since the last time, oldest first. Waits for the device."""
        calls = int(self._counter.item())
        first, self._read = max(self._read, calls - self.keep), calls
        if first == calls:
            return
        rows, forms = self._rows.cpu(), self._forms.cpu()
        for call in range(first, calls):
            low, high, mean, *counts = rows[call % self.keep].tolist()
            nans, infinite, count = int(counts[0]), int(counts[1]), int(sum(counts))
            form = int(forms[call % self.keep])
            shape, dtype = self._kinds[form]
            values = self._values[form]
            if self.what in ("nan", "inf") and not (nans or (infinite and self.what == "inf")):
                continue
            statistics = Statistics(low, high, mean, nans, infinite, count)
            yield Seen(
                self.graph,
                call,
                self.place,
                self.node,
                self.what,
                shape,
                dtype,
                nans,
                infinite,
                None if self.what in ("nan", "inf") else statistics,
                None if values is None else values[call % self.keep].cpu(),
            )


_points: weakref.WeakValueDictionary[str, Point] = weakref.WeakValueDictionary()
"""The points of the programs that are alive, by what each program calls its own."""
_numbers = itertools.count()


def key(place: str, node: str, what: What) -> str:
    """What the pass that watches a value writes into the program: it says all that is told of the point later."""
    return json.dumps({"place": place, "node": node, "what": what})


def bind(graph: fx.Graph, name: str, keep: int) -> list[Point]:
    """Gives every watched value of a program memory of its own. Whoever keeps the program keeps the result: what has no
    memory (any more) is not noted."""
    points = []
    nodes = graph.find_nodes(op="call_function", target=operator()) if _is_registered() else []
    for position, node in enumerate(nodes):
        source, said = node.args
        point = Point(said, name, position, keep, source.meta["val"].device)
        own = f"watched_{next(_numbers)}"
        _points[own] = point
        node.args = (source, own)
        points.append(point)
    return points


def read() -> list[Seen]:
    """What the watched values of all compiled programs of this process held since the last time, by graph, call and
    place in the program: of the entries of `nan`, the first of a call is where the NaN came from. Waits for the device.
    """
    found = [
        (seen.graph, seen.call, point.position, seen) for point in list(_points.values()) for seen in point.unread()
    ]
    return [entry[-1] for entry in sorted(found, key=lambda entry: entry[:3])]


def operator() -> Any:
    """The operator, once it is registered."""
    return torch.ops.npu_fused.watched.default


def register(library: torch.library.Library) -> None:
    """Defines the operator in the library of the fused ones."""
    library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(NAME, _watched, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{library.ns}::{NAME}", lambda x, point: None, lib=library)
    fx.node.has_side_effect(operator())


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    """Tensors made in it are real ones that may be written in any mode, whoever compiles or calls just now."""
    with unset_fake_temporarily(), torch.inference_mode(False):
        yield


def _is_registered() -> bool:
    return hasattr(torch.ops.npu_fused, NAME)


def _watched(x: Tensor, point: str) -> None:
    found = _points.get(point)
    if found is not None:
        with torch.no_grad():
            found.note(x)


def _row(x: Tensor, what: What) -> Tensor:
    """[1, COLUMNS], in float32."""
    wide = x.detach().float()
    finite, nan = torch.isfinite(wide), wide != wide
    infinite = torch.logical_or(finite, nan).logical_not()
    counts = [kind.sum().float() for kind in (nan, infinite, finite)]
    if what in ("nan", "inf") or not x.numel():
        low = high = mean = torch.full_like(counts[0], torch.nan)
    else:
        low = torch.where(finite, wide, torch.inf).amin()
        high = torch.where(finite, wide, -torch.inf).amax()
        mean = torch.where(finite, wide, 0.0).sum() / counts[2]
    return torch.stack([low, high, mean, *counts]).unsqueeze(0)
