"""How far a dumped program is compiled and run, and what came of it."""

from __future__ import annotations

from typing import Final, Literal

from npu_compiler.inspect.contents import Fire
from npu_compiler.inspect.judge import Compared, Difference
from npu_compiler.inspect.program import Data


class Point(Data):
    """How far a program is compiled, and by which of the later layers it is run. None: as the bundle's options say.

    Attributes:
        stage: index of a stored stage, whose program is run as it is; none of the rest then counts but `disabled`.
        first, passes, rewrites: the passes that run, and how many rewrites the last of them may make
            (passes.pipeline.Until).
        equal_layers: whether equal layers may be compiled once (option layers_once).
        order: how many nodes are put into the chosen order.
        captured: how many calls are captured.
        streams: how many launches are on the streams of the plan.
        disabled: rules that are left out.
        called: whether it is called, or only compiled, to see what that does.
    """

    stage: int | None = None
    first: int = 0
    passes: int | None = None
    rewrites: int | None = None
    equal_layers: bool = True
    order: int | None = None
    captured: int | None = None
    streams: int | None = None
    disabled: tuple[str, ...] = ()
    called: bool = True


class Part(Data):
    """A call of a compiled program: its operator, its place in the user's model, and the rule or pass that made it."""

    name: str
    operator: str
    place: str
    rule: str = ""

    def __str__(self) -> str:
        made_by = f", made by {self.rule}" if self.rule else ""
        return f"{self.name} ({self.operator}{made_by}) at {self.place}"


RACE: Final = "race"
"""The kind of a difference that is memory touched in no order."""


class Outcome(Data):
    """What came of a point.

    Attributes:
        state: `right`; `wrong`, with the differences; `error`: it raised; `crash`, `hang`: the process did not answer.
        text: of an error or crash.
        kind: what makes two errors one.
        rewrites: what the last pass did.
        ordered, calls, steps: what was ordered, captured, planned, in that order.
        on_device: calls of the reference that the CPU can't do in float64.
        compared: the errors of the float results.
        said: what the host runtime's checking mode found, in its words.
    """

    state: Literal["right", "wrong", "error", "crash", "hang"]
    differences: tuple[Difference, ...] = ()
    text: str = ""
    kind: str = ""
    rewrites: tuple[Fire, ...] = ()
    ordered: tuple[Part, ...] = ()
    calls: tuple[Part, ...] = ()
    steps: tuple[Part, ...] = ()
    on_device: tuple[str, ...] = ()
    compared: tuple[Compared, ...] = ()
    said: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """Whether nothing is wrong."""
        return self.state == "right"

    def same(self, other: Outcome) -> bool:
        """Whether the other shows this failure too: memory that is touched in no order, else the first of its
        differences in kind, or the same error. What such memory makes wrong beside it is chance."""
        kinds = [entry.kind for entry in self.differences]
        decisive = RACE if RACE in kinds else next(iter(kinds), None)
        alike = decisive is None or decisive in {entry.kind for entry in other.differences}
        return self.state == other.state and self.kind == other.kind and alike

    def __str__(self) -> str:
        lines = [self.state + (f": {self.text}" if self.text else ""), *(f"  {entry}" for entry in self.differences)]
        return "\n".join([*lines, *(f"  {line}" for line in self.said)])
