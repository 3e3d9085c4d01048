"""Looking at a value inside of a program: `torch.ops.npu_fused.watched(x, point)` notes what x holds.

It changes nothing. All of it is done by operators on the device, so it is captured like any other call, and a replay
notes what it computes:

    slot  = counter % keep
    rows[slot]   = statistics of x
    values[slot] = x                  # only where values are asked for
    counter     += 1

The host takes part when it reads (`Notes.since`), which waits for the device; until then the last `keep` calls are
kept.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import weakref
from collections.abc import Iterator, Sequence
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
UNKNOWN = -1
"""How many rows of a value are real, or the number of a step, where nobody says."""


@dataclass(frozen=True)
class Statistics:
    """Of a tensor: smallest, largest and mean of its finite elements, computed in float32 (inf, -inf and NaN without
    any); how many are NaN and infinite, of how many."""

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
        graph: the compiled graph. `call`: counted from 0 since it was compiled; warm-up runs count, too.
        place: module path and source line in the user's model. `node`, `operator`: the call of the program, and what
            it calls.
        shape, dtype: of the value. `rows`: how many of its first rows are the batch, the others being padding; None
            where nobody said, and everything counts.
        statistics: of the real rows; None where only `nan` or `inf` was asked for. `nans`, `infinite`: how many
            elements are.
        value: the real rows, in host memory; None unless `values` was asked for.
        step: of the engine; None outside of vLLM.
    """

    graph: str
    call: int
    place: str
    node: str
    operator: str
    what: What
    shape: tuple[int, ...]
    dtype: torch.dtype
    nans: int
    infinite: int
    count: int
    statistics: Statistics | None = None
    value: Tensor | None = field(default=None, compare=False)
    rows: int | None = None
    step: int | None = None

    @property
    def when(self) -> str:
        """The step, or the graph and its call."""
        return f"{self.graph} call {self.call}" if self.step is None else f"step {self.step}"

    @property
    def kind(self) -> str:
        """Operator, type and shape; of the first dimension as many as are real."""
        shape: list[object] = list(self.shape)
        if self.rows is not None and self.rows != shape[0]:
            shape[0] = f"{self.rows} of {shape[0]}"
        return f"{self.operator}, {str(self.dtype).removeprefix('torch.')} [{', '.join(map(str, shape))}]"

    def __str__(self) -> str:
        held = str(self.statistics) if self.statistics else f"{self.nans} NaN, {self.infinite} infinite of {self.count}"
        lines = [f"{self.when}: {self.place or self.node}: {self.kind} {held}"]
        return "\n".join(lines if self.value is None else [*lines, str(self.value)])


class Point:
    """A place in one compiled program that is watched.

    Args:
        key: what the pass wrote into the program (see `key`). `position`: among the points of the program.
        counter: [1]. `rows`: [keep, COLUMNS]. `forms`: [keep, 3]: the number of the value's shape, how many rows of it
            are real, and the step.
        batch: int64 [2], real rows and step; None where nobody says. `real`: the first of the two, where the value has
            a row for each of the batch, so that padding can be left out; else None.
    """

    def __init__(
        self,
        key: str,
        position: int,
        counter: Tensor,
        rows: Tensor,
        forms: Tensor,
        batch: Tensor | None,
        real: Tensor | None,
    ) -> None:
        said = json.loads(key)
        self.what: What = said["what"]
        self.place, self.node, self.operator = said["place"], said["node"], said["operator"]
        self.position = position
        self._counter, self._rows, self._forms, self._keep = counter, rows, forms, len(rows)
        self._batch, self._real = batch, real
        self._kinds: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._values: list[Tensor | None] = []

    def note(self, x: Tensor) -> None:
        """Notes what x holds; called while the program runs or is captured."""
        form = self._form(x)
        slot = self._counter.remainder(self._keep)
        self._rows.index_copy_(0, slot, _row(x, self.what, self._real))
        batch = slot.new_full((2,), UNKNOWN) if self._batch is None else self._batch
        self._forms.index_copy_(0, slot, torch.cat([slot.new_full((1,), form), batch]).unsqueeze(0))
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
                    torch.empty(self._keep, *x.shape, dtype=x.dtype, device=x.device) if values else None
                )
        return self._kinds.index(kind)

    def seen(self, graph: str, call: int, row: Sequence[float], form: Sequence[int]) -> Seen | None:
        """What was noted in a call; None where there is nothing to tell of it."""
        low, high, mean, *counts = row
        nans, infinite, count = int(counts[0]), int(counts[1]), int(sum(counts))
        number, real, step = form
        shape, dtype = self._kinds[number]
        values, rows = self._values[number], None if self._real is None else min(real, shape[0])
        quiet = self.what in ("nan", "inf")
        if (quiet and not (nans or (infinite and self.what == "inf"))) or real == 0:
            return None
        return Seen(
            graph,
            call,
            self.place,
            self.node,
            self.operator,
            self.what,
            shape,
            dtype,
            nans,
            infinite,
            count,
            statistics=None if quiet else Statistics(low, high, mean, nans, infinite, count),
            value=None if values is None else _first(values[call % self._keep], rows).cpu(),
            rows=rows,
            step=None if step == UNKNOWN else step,
        )


class Notes:
    """What is noted in one compiled program. Whoever keeps the program keeps this: what has no memory (any more) is not
    noted.

    Args:
        graph: the program, in which each watched value is bound to memory of its own.
        name: of the compiled graph. `keep`: how many calls are kept until they are read.
        batch: int64 [2] on the device, written before each call by who knows: how many rows of the batch are real, the
            others being padding, and the number of the step. 0 rows: nothing of the call is told.

    Attributes:
        number: counted through the process, in the order of compilation.
    """

    def __init__(self, graph: fx.Graph, name: str, keep: int, batch: Tensor | None = None) -> None:
        self.name, self.number, self._keep = name, next(_numbers), keep
        nodes = graph.find_nodes(op="call_function", target=operator()) if _is_registered() else []
        self.points: list[Point] = []
        self._read = 0
        if not nodes:
            return
        device, size = nodes[0].args[0].meta["val"].device, _size_of_batch(graph)
        with _lasting():
            self._counters = torch.zeros(len(nodes), dtype=torch.int64, device=device)
            self._rows = torch.zeros(len(nodes), keep, COLUMNS, device=device)
            self._forms = torch.zeros(len(nodes), keep, 3, dtype=torch.int64, device=device)
            real = None if batch is None else batch[:1]
            memory = list(zip(self._counters.split(1), self._rows.unbind(), self._forms.unbind(), strict=True))
        for position, node in enumerate(nodes):
            source, said = node.args
            by_row = size is not None and _first_size(source) == size
            point = Point(said, position, *memory[position], batch, real if by_row else None)
            own = f"watched_{self.number}_{position}"
            _points[own] = point
            node.args = (source, own)
            self.points.append(point)
        _notes.add(self)

    def since(self, call: int) -> tuple[int, list[Seen]]:
        """What was noted from this call on, as far as it is still there, by call and place in the program; and the
        number of the next call. Waits for the device."""
        if not self.points:
            return call, []
        counted = self._counters.tolist()
        if max(counted) == call:
            return call, []
        rows, forms = self._rows.tolist(), self._forms.tolist()
        found = []
        for point, calls in zip(self.points, counted, strict=True):
            for number in range(max(call, calls - self._keep), calls):
                slot = number % self._keep
                row, form = rows[point.position][slot], forms[point.position][slot]
                found.append((number, point.position, point.seen(self.name, number, row, form)))
        ordered = sorted(found, key=lambda entry: entry[:2])
        return max(counted), [seen for _, _, seen in ordered if seen is not None]

    def unread(self) -> list[Seen]:
        """What was noted since this was asked last."""
        self._read, found = self.since(self._read)
        return found


_points: weakref.WeakValueDictionary[str, Point] = weakref.WeakValueDictionary()
"""The points of the programs that are alive, by what each program calls its own."""
_notes: weakref.WeakSet[Notes] = weakref.WeakSet()
_numbers = itertools.count()


def key(place: str, node: str, operator: str, what: What) -> str:
    """What the pass that watches a value writes into the program: it says all that is told of the point later."""
    return json.dumps({"place": place, "node": node, "operator": operator, "what": what})


def new_batch() -> Tensor:
    """Memory for what Notes calls `batch`; nothing is told until it is written."""
    with _lasting():
        return torch.zeros(2, dtype=torch.int64, device="npu")


def read() -> list[Seen]:
    """What the watched values of all compiled programs of this process held since the last time, by program in the
    order of compilation, call and place in the program: of the entries of `nan`, the first of a call is where the NaN
    came from. Waits for the device."""
    return [seen for notes in sorted(_notes, key=lambda notes: notes.number) for seen in notes.unread()]


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


def _first(value: Tensor, rows: int | None) -> Tensor:
    return value if rows is None else value[:rows]


def _first_size(node: fx.Node) -> Any:
    """The first size of a value, as an expression where it is symbolic; None without a dimension."""
    shape = node.meta["val"].shape
    return getattr(getattr(shape[0], "node", None), "expr", shape[0]) if len(shape) else None


def _size_of_batch(graph: fx.Graph) -> Any:
    """The symbol that is the size of the program's batch: the only one that its inputs' sizes are made of."""
    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    sizes = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    symbols = set().union(*(size.node.expr.free_symbols for size in sizes if isinstance(size, torch.SymInt)))
    return next(iter(symbols)) if len(symbols) == 1 else None


def _row(x: Tensor, what: What, real: Tensor | None) -> Tensor:
    """[1, COLUMNS], in float32, of the first `real` ([1]) rows of x."""
    wide = x.detach().float()
    finite, nan = torch.isfinite(wide), wide != wide
    infinite = torch.logical_or(finite, nan).logical_not()
    kinds = [nan, infinite, finite]
    if real is not None:
        counted = (torch.arange(x.shape[0], device=x.device) < real).view(-1, *[1] * (x.dim() - 1))
        kinds = [kind.logical_and(counted) for kind in kinds]
    counts = [kind.sum().float() for kind in kinds]
    finite = kinds[-1]
    if what in ("nan", "inf") or not x.numel():
        low = high = mean = torch.full_like(counts[0], torch.nan)
    else:
        low = torch.where(finite, wide, torch.inf).amin()
        high = torch.where(finite, wide, -torch.inf).amax()
        mean = torch.where(finite, wide, 0.0).sum() / counts[2]
    return torch.stack([low, high, mean, *counts]).unsqueeze(0)
