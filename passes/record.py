"""What a pass did: which rules fired where, and which did not, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import sympy
from torch import fx

from npu_compiler.graph.source import TIMES, where
from npu_compiler.graph.traffic import launches, moved_bytes

if TYPE_CHECKING:
    from npu_compiler.passes.matching import Miss
    from npu_compiler.passes.rewrite import Rule


@dataclass(frozen=True)
class Saving:
    """What a rewrite saves at every run: kernel launches, and bytes moved as an expression of the program's symbolic
    sizes. A negative number is a loss."""

    kernels: int
    bytes: sympy.Expr

    @classmethod
    def between(cls, before: Iterable[fx.Node], after: Iterable[fx.Node]) -> Saving:
        """The difference of two lists of calls; views and arithmetic on sizes cost nothing."""
        old, new = list(before), list(after)
        kernels = sum(map(launches, old)) - sum(map(launches, new))
        return cls(kernels, sympy.expand(sum(map(moved_bytes, old)) - sum(map(moved_bytes, new))))

    def __str__(self) -> str:
        return f"saves {self.kernels} kernels and {self.bytes} bytes"


@dataclass(frozen=True)
class Fired:
    """A rewrite that was made: the rule, the place in the user's model, the nodes that went away, what that saves
    (None where it was not worked out), in how many equal layers it was made, and the nodes that came."""

    rule: str
    place: str
    nodes: tuple[str, ...]
    saves: Saving | None = None
    layers: int = 1
    made: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """A rewrite that was considered and left out: the rule, the place, the reason, in how many equal layers; what there
    is, where the user named something that is not there."""

    rule: str
    place: str
    reason: str
    layers: int = 1
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """A call at which a rule was tried in vain.

    Attributes:
        anchor, place: the call where the pattern was to end, and its place in the user's model.
        matched: how many calls of the pattern were found, on the way that got furthest.
        reason: what stopped it.
        stopper, stopper_place: the call that stopped it, where one did.
        whole: whether the pattern was found, so that the reason is the rule's legality.
    """

    rule: str
    anchor: str
    place: str
    matched: int
    reason: str
    stopper: str = ""
    stopper_place: str = ""
    whole: bool = False


class EnoughRewrites(Exception):
    """Ends a pass that has made as many rewrites as it may (PassRecord.most)."""


@dataclass
class PassRecord:
    """What one pass did to one graph. Node counts are calls (no inputs, no output).

    `disabled` holds the names of rules the user switched off; `rewrite.apply` leaves them out. `attempts`: where rules
    were tried in vain; None unless somebody wants to know (a dump). `most`: how many rewrites the pass may make; None
    is any number. Rules stop firing then, and a function is ended by EnoughRewrites where it notes the next.
    """

    name: str
    disabled: frozenset[str] = frozenset()
    fired: list[Fired] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    attempts: list[Attempt] | None = None
    most: int | None = None

    @property
    def is_spent(self) -> bool:
        """Whether the pass may make no more rewrites."""
        return self.most is not None and len(self.fired) >= self.most

    def fire(
        self,
        rule: str,
        anchor: fx.Node,
        nodes: Sequence[fx.Node],
        saves: Saving | None = None,
        made: Sequence[fx.Node] = (),
    ) -> None:
        """Notes a rewrite at `anchor` that replaces or removes `nodes`, by those `made`; call it before the program
        changes.

        Raises:
            EnoughRewrites: the pass may make no more.
        """
        if self.is_spent:
            raise EnoughRewrites
        before, after = (tuple(node.name for node in some) for some in (nodes, made))
        self.fired.append(Fired(rule, where(anchor), before, saves, anchor.meta.get(TIMES, 1), after))

    def refuse(self, rule: str, anchor: fx.Node, reason: str) -> None:
        """Notes that `rule` was left out at `anchor`, and why."""
        self.refused.append(Refused(rule, where(anchor), reason, anchor.meta.get(TIMES, 1)))

    def attempt(self, rule: str, anchor: fx.Node, miss: Miss) -> None:
        """Notes that `rule` was tried at `anchor` in vain, if somebody wants to know."""
        if self.attempts is not None:
            miss = miss.furthest()
            name, place = (miss.node.name, where(miss.node)) if miss.node is not None else ("", "")
            self.attempts.append(
                Attempt(rule, anchor.name, where(anchor), miss.depth, miss.reason, name, place, miss.whole)
            )

    def refuse_all(self, rule: str, reason: str, near: Sequence[str] = ()) -> None:
        """Notes that `rule` had nothing to look at in the whole program, and what there is instead of what it names."""
        self.refused.append(Refused(rule, "the whole program", reason, near=tuple(near)))

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.nodes_before} -> {self.nodes_after} calls, {self.seconds * 1e3:.1f} ms"]
        for entry in self.fired:
            saves = f", {entry.saves}" if entry.saves is not None else ""
            lines.append(f"  fired {entry.rule} ({len(entry.nodes)} nodes{saves}) {entry.place}{_more(entry)}")
        lines += [f"  left out {entry.rule}: {entry.reason} ({entry.place}){_more(entry)}" for entry in self.refused]
        return "\n".join(lines)


def report_lines(records: Sequence[PassRecord]) -> list[str]:
    """What passes did, as lines of a report; those that found nothing to do share one."""
    busy = [record for record in records if record.fired or record.refused]
    idle = [record for record in records if not record.fired and not record.refused]
    lines = [line for record in busy for line in str(record).splitlines()]
    if idle:
        names = ", ".join(dict.fromkeys(record.name for record in idle))
        lines.append(f"nothing to do for {names}: {sum(record.seconds for record in idle) * 1e3:.1f} ms")
    return lines


def _more(entry: Fired | Refused) -> str:
    return f", and in {entry.layers - 1} more layers" if entry.layers > 1 else ""


@dataclass(frozen=True)
class Pass:
    """A pass as a value: an ordered set of rules, or a function that does as it likes.

    Attributes:
        name: a user switches it off by this name (`disabled_passes`).
        place: why it stands where it stands in the pipeline.
        run: rewrites the graph module in place and notes in the record what it did; None for a pass of rules alone.
        rules: tried in this order at every call of the program, by `rewrite.apply`. A pass that has `run` too applies
            them itself; they are listed so that they are tested and can be switched off by name (`disabled_rules`).
        local: of a pass that a user adds: what it does to a call depends on the calls around it alone, not on which
            layer of the model that is or on how many there are, so that equal layers need it once.
        before, after: of a pass that a user adds (options={"passes": [...]}): the pass it stands in front of or behind.
    """

    name: str
    place: str
    run: Callable[[fx.GraphModule, PassRecord], None] | None = None
    rules: tuple[Rule, ...] = ()
    before: str = ""
    after: str = ""
    local: bool = False

    def __post_init__(self) -> None:
        if self.run is None and not isinstance(self.rules, tuple):
            raise TypeError(f"pass {self.name}: rules is a tuple of rules")
