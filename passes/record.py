"""What a pass did: which rules fired where, and which did not, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from npu_compiler.graph.source import where


@dataclass(frozen=True)
class Fired:
    """A rewrite that was made: the rule, the place in the user's model, the nodes that went away."""

    rule: str
    place: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """A rewrite that was considered and left out: the rule, the place, the reason."""

    rule: str
    place: str
    reason: str


@dataclass
class PassRecord:
    """What one pass did to one graph. Node counts are calls (no inputs, no output)."""

    name: str
    fired: list[Fired] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0

    def fire(self, rule: str, anchor: fx.Node, nodes: list[fx.Node]) -> None:
        """Notes a rewrite at `anchor` that replaces or removes `nodes`; call it before they are erased."""
        self.fired.append(Fired(rule, where(anchor), tuple(node.name for node in nodes)))

    def refuse(self, rule: str, anchor: fx.Node, reason: str) -> None:
        """Notes that `rule` was left out at `anchor`, and why."""
        self.refused.append(Refused(rule, where(anchor), reason))

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.nodes_before} -> {self.nodes_after} calls, {self.seconds * 1e3:.1f} ms"]
        lines += [f"  fired {entry.rule} ({len(entry.nodes)} nodes) {entry.place}" for entry in self.fired]
        lines += [f"  left out {entry.rule}: {entry.reason} ({entry.place})" for entry in self.refused]
        return "\n".join(lines)


@dataclass(frozen=True)
class Pass:
    """A pass as a value.

    Attributes:
        name: a user switches it off by this name (`disabled_passes`).
        place: why it stands where it stands in the pipeline.
        run: rewrites the graph module in place and notes in the record what it did.
    """

    name: str
    place: str
    run: Callable[[fx.GraphModule, PassRecord], None]
