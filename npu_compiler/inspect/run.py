"""What a run left behind besides compiled graphs, as data that is checked when it is read: serving's run report and
vLLM's own captures (npu_compiler/serving/report.py), and the calls of a compiled function."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from npu_compiler.inspect.program import Data
from npu_compiler.units import in_bytes

RUN, CALLS = "run.json", "calls.json"


class ModelCapture(Data):
    """A line of a bundle's `captures.jsonl`, and a row of a run report: a graph of the model, or of a piece of it, that
    vLLM captured.

    Attributes:
        mode: FULL, or PIECEWISE for a piece.
        tokens, requests: its size.
        updated_operators: how many get the lengths of a batch at each replay.
        streams: how many its tasks are on; 0 where CANN doesn't tell.
        reason: why it was captured (npu_compiler/reasons.py).
    """

    mode: str
    tokens: int
    requests: int | None
    milliseconds: float
    mebibytes: float
    updated_operators: int
    streams: int = 0
    replays: int
    reason: str

    @property
    def size(self) -> str:
        """Its size as text."""
        return f"{self.mode} {self.tokens} tokens"


class StepGroup(Data):
    """Steps that were no replay of one graph, for one reason.

    Attributes:
        reason: its name (npu_compiler/reasons.py). `detail`: what is particular to this run.
        mode: what they ran as: NONE (eager) or PIECEWISE.
        smallest, largest: of their sizes in tokens. `sizes`: the most frequent ones, with how many steps had them.
        first, last: numbers of the first and the last such step, of all steps since the start.
    """

    reason: str
    detail: str
    kind: Literal["decode", "other"]
    mode: str
    steps: int
    smallest: int
    largest: int
    sizes: tuple[tuple[int, int], ...]
    first: int
    last: int


class Modes(Data):
    """Steps by what they ran as: the replay of one graph, replays of pieces, eagerly."""

    total: int
    replayed: int
    piecewise: int
    eager: int


class DroppedRows(Data):
    """What a layer of experts dropped, of all ranks' rows, where the option `token_drop` lets it.

    Attributes:
        needed: the capacity factor at which nothing would have been dropped.
    """

    layer: str
    routed: int
    dropped: int
    needed: float


class ExpertRows(Data):
    """What the ranks of a layer of experts got since the start, the last clear or the last change of the map.

    Attributes:
        layer: module path. `rows`: a token has one for each of its experts; padding is not counted.
        imbalance: rows of the fullest rank, as a multiple of the mean; 1 is even, 0: there were no rows.
        linear: the same rows', had they gone where vLLM's linear placement has the experts.
        moved: how many experts were moved so far. `before`: the imbalance that made the last ones move; 0: none did.
    """

    layer: str
    rows: int
    imbalance: float
    linear: float
    moved: int = 0
    before: float = 0.0

    def __str__(self) -> str:
        moves = f"; {self.moved} experts moved, at last for {self.before:.2f} times" if self.moved else ""
        return (
            f"{self.layer}: the fullest rank got {self.imbalance:.2f} times the mean of {self.rows} rows; "
            f"{self.linear:.2f} times in linear placement{moves}"
        )


class SplitWeights(Data):
    """Weights of one kind, split over engines (npu_compiler/serving/fine_grained_tp.py): how many, and bytes of what an
    engine has and of the whole ones."""

    kind: str
    engines: int
    weights: int
    here: int
    whole: int

    def __str__(self) -> str:
        return (
            f"fine_grained_tp: {self.kind}: {self.weights} weights split over {self.engines} engines, "
            f"{in_bytes(self.here)} on each instead of {in_bytes(self.whole)}"
        )


class Run(Data):
    """A run report. docs/serving.md describes the fields."""

    model: str
    device: str
    graphs: tuple[ModelCapture, ...]
    not_captured: dict[str, str]
    passes: dict[str, int] = Field(default_factory=dict)
    capture_milliseconds: float
    capture_mebibytes: float
    decode_steps: Modes
    other_steps: Modes
    not_replayed: tuple[StepGroup, ...]
    padding_waste: float
    generated_tokens: int
    serving_seconds: float
    tokens_per_second: float
    input_waits: int
    dropped: tuple[DroppedRows, ...] = ()
    experts: tuple[ExpertRows, ...] = ()
    split_weights: tuple[SplitWeights, ...] = ()


class Calls(Data):
    """The calls of a compiled function: replays, and the others by reason; and the graphs that were driven out.

    Attributes:
        recompiled: the guard that failed, where Dynamo had compiled the function before.
    """

    replays: int = 0
    uncaptured: dict[str, int] = Field(default_factory=dict)
    evicted: tuple[str, ...] = ()
    recompiled: str = ""
