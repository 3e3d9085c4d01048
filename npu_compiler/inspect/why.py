"""Why a rule did not fire: where it was tried, how far it got, what stopped it, and what would let it go on."""

from __future__ import annotations

import difflib

from npu_compiler.errors import BundleError
from npu_compiler.inspect.bundle import StoredGraph
from npu_compiler.inspect.contents import Attempt, Fire, PassInfo, RuleInfo, Stage
from npu_compiler.inspect.program import Data

WANTS = ", the rule wants "
"""What stands in a reason between what is there and what the pattern has (passes/matching.py)."""


class Miss(Data):
    """A call at which the rule was tried in vain.

    Attributes:
        stage: the pass that tried it.
        node, place: the call at which the pattern would have ended.
        matched, calls: how many calls of the pattern were found, and how many it has.
        reason, stopper, stopper_place: what stopped it, and the call that did, where one did.
        advice: what would let it go on.
    """

    stage: str
    node: str
    place: str
    matched: int
    calls: int
    reason: str
    stopper: str = ""
    stopper_place: str = ""
    advice: str = ""

    def __str__(self) -> str:
        if not self.calls:  # of a pass without patterns
            return f"left out at {self.place}\n  then: {self.reason}"
        lines = [f"matched {self.matched} of {self.calls} calls at {self.node}: {self.place}"]
        lines.append(f"  then: {self.reason or 'nothing fits its first argument'}")
        if self.stopper:
            lines.append(
                f"  at:   {self.stopper}" + (f": {self.stopper_place}" if self.stopper_place != self.place else "")
            )
        return "\n".join([*lines, f"  next: {self.advice}"] if self.advice else lines)


class Why(Data):
    """The answer for one rule.

    Attributes:
        fired: where it did fire.
        misses: where it did not, the nearest first.
        note: why it was not tried at all; empty where it was.
    """

    rule: str
    passes: tuple[str, ...]
    fired: tuple[Fire, ...] = ()
    misses: tuple[Miss, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.rule} ({', '.join(self.passes)}): fired {len(self.fired)} times, missed {len(self.misses)} times"
        ]
        lines += [f"fired at {fire.place}" for fire in self.fired]
        lines += map(str, self.misses)
        return "\n".join([*lines, self.note] if self.note else lines)


def why(graph: StoredGraph, rule: str, node: str = "") -> Why:
    """Where `rule` fired in a compilation, where it did not, and why.

    Args:
        rule: a rule, or a pass that has none, such as `reinplace`.
        node: only at calls of this name, or at places that contain this text (`model.layers.3`, `model.py:88`).

    Raises:
        BundleError: the compilation had no such rule.
    """
    if any(entry.name == rule and not entry.rules for entry in graph.about.passes):
        return _why_pass(graph, rule, node)
    passes = [entry for entry in graph.about.passes if any(known.name == rule for known in entry.rules)]
    if not passes:
        raise _unknown(graph, rule)
    about = next(known for known in passes[0].rules if known.name == rule)
    stages = [stage for stage in graph.stages if stage.name in {entry.name for entry in passes}]
    fired = [fire for stage in stages for fire in stage.fired if fire.rule == rule]
    tried = [(stage, attempt) for stage in stages for attempt in stage.attempts if attempt.rule == rule]
    fired = [fire for fire in fired if not node or node in fire.nodes or node in fire.place]
    tried = [(stage, found) for stage, found in tried if not node or node == found.anchor or node in found.place]
    misses = [_miss(stage.name, attempt, about) for stage, attempt in tried]
    return Why(
        rule=rule,
        passes=tuple(entry.name for entry in passes),
        fired=tuple(fired),
        misses=tuple(sorted(misses, key=lambda miss: -miss.matched)),
        note="" if fired or misses else _not_tried(graph, passes, about, stages, node),
    )


def _why_pass(graph: StoredGraph, name: str, node: str) -> Why:
    stages = [stage for stage in graph.stages if stage.name == name]
    fired = [fire for stage in stages for fire in stage.fired if not node or node in fire.nodes or node in fire.place]
    refused = [entry for stage in stages for entry in stage.refused if not node or node in entry.place]
    misses = [Miss(stage=name, node="", place=e.place, matched=0, calls=0, reason=e.reason) for e in refused]
    note = "" if fired or misses else "it found nothing to do" if stages else "it was not run: the compilation ended"
    return Why(rule=name, passes=(name,), fired=tuple(fired), misses=tuple(misses), note=note)


def _miss(stage: str, found: Attempt, rule: RuleInfo) -> Miss:
    return Miss(
        stage=stage,
        node=found.anchor,
        place=found.place,
        matched=found.matched,
        calls=max(rule.calls, found.matched),
        reason=found.reason,
        stopper=found.stopper,
        stopper_place=found.stopper_place,
        advice=_advice(found),
    )


def _advice(found: Attempt) -> str:
    if found.whole:
        return "the pattern is there; it becomes legal when that is proven: " + found.reason
    _, wants, wanted = found.reason.partition(WANTS)
    if wants and found.stopper:
        return f"it goes on if {found.stopper} is a call of {wanted}"
    return "it goes on if that is what the rule has there" if found.reason else ""


def _not_tried(graph: StoredGraph, passes: list[PassInfo], rule: RuleInfo, stages: list[Stage], node: str) -> str:
    if rule.disabled:
        return "it was not tried: it is in disabled_rules"
    if not stages:
        return f"it was not tried: the compilation ended before {passes[0].name}"
    roots = ", ".join(rule.roots)
    position = graph.stages.index(stages[0])
    before = graph.program(graph.stages[position - 1])
    targets = {call.target for call in before.calls}
    if not targets.intersection(rule.roots):
        return (
            f"it was not tried: its pattern ends in a call of {roots}, and the program has none before {passes[0].name}"
        )
    return f"it was not tried{f' at {node}' if node else ''}: another rule of the pass took the calls of {roots} first"


def _unknown(graph: StoredGraph, rule: str) -> BundleError:
    known = [name for info in graph.about.passes for name in [entry.name for entry in info.rules] or [info.name]]
    close = difflib.get_close_matches(rule, known, n=1)
    return BundleError(
        f"no pass of {graph.name} has a rule {rule!r}",
        rule=f"its rules are {', '.join(known)}",
        fix=f"did you mean {close[0]!r}?" if close else "a pass that was left out (disabled_passes) has no rules here",
    )
