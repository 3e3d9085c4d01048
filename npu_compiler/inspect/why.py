"""Why a rule did not fire: where it was tried, how far it got, what stopped it, and what would let it go on.

for graph, answer in answers(bundle.graphs, "rms_norm", "model.layers.3"):
    print(f"{graph.name}: {answer}")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from npu_compiler.errors import BundleError
from npu_compiler.inspect import untried
from npu_compiler.inspect.bundle import StoredGraph
from npu_compiler.inspect.contents import Attempt, Fire, RuleInfo
from npu_compiler.inspect.program import Data

WANTS = ", the rule wants "
"""What stands in a reason between what is there and what the pattern has (passes/matching.py)."""
NEAREST = 3
"""How many misses an answer shows as text."""


class Miss(Data):
    """A call at which the rule was tried in vain.

    Attributes:
        stage: the pass that tried it.
        node, place: the call at which the pattern would have ended.
        matched, calls: how many calls of the pattern were found, and how many it has; none of a pass without patterns.
        whole: whether the pattern was found, so that the reason is why the rewrite was not allowed.
        reason, stopper, stopper_place: what stopped it, and the call that did, where one did.
        advice: what would let it go on, where more can be said than the reason says.
    """

    stage: str
    node: str
    place: str
    matched: int
    calls: int
    reason: str
    whole: bool = False
    stopper: str = ""
    stopper_place: str = ""
    advice: str = ""

    def __str__(self) -> str:
        if not self.calls:  # of a pass without patterns
            return f"left out at {self.place}\n  then: {self.reason}"
        if self.whole:
            lines = [f"the pattern is there at {self.node}: {self.place}", f"  not allowed: {self.reason}"]
        else:
            lines = [f"matched {self.matched} of {self.calls} calls at {self.node}: {self.place}"]
            lines.append(f"  then: {self.reason or 'nothing fits its first argument'}")
        if self.stopper:
            known = self.stopper_place not in (self.place, f"node {self.stopper}")
            elsewhere = f": {self.stopper_place}" if known else ""
            lines.append(f"  at:   {self.stopper}{elsewhere}")
        return "\n".join([*lines, f"  next: {self.advice}"] if self.advice else lines)


class Why(Data):
    """The answer for one rule, or for one pass without rules.

    Attributes:
        fired: where it did fire.
        misses: where it did not, the nearest first.
        passes: those that have it; none where they were left out of the compilation.
        note: why it was not tried at all; empty where it was.
    """

    rule: str
    passes: tuple[str, ...]
    fired: tuple[Fire, ...] = ()
    misses: tuple[Miss, ...] = ()
    note: str = ""

    def text(self, most: int | None = None) -> str:
        """The answer in lines, with the `most` nearest misses (None: all) and the number of the others."""
        if not self.passes:
            return f"{self.rule}: {self.note}"
        counts = f"fired {_times(len(self.fired))}, missed {_times(len(self.misses))}"
        lines = [f"{self.rule} ({', '.join(self.passes)}): {counts}"]
        lines += [f"fired at {fire.place}" for fire in self.fired]
        lines += map(str, self.misses[:most])
        rest = self.misses[len(self.misses[:most]) :]
        if rest:
            lines.append(f"and {len(rest)} more, {_matched(rest[0])}; --all shows them")
        return "\n".join([*lines, self.note] if self.note else lines)

    def __str__(self) -> str:
        return self.text(NEAREST)


def why(graph: StoredGraph, rule: str, node: str = "") -> Why:
    """Where `rule` fired in a compilation, where it did not, and why.

    Args:
        rule: a rule, or a pass that has none, such as `reinplace`.
        node: only at the call of this name, or, where none has it, at places that contain this text
            (`model.layers.3`, `model.py:88`).

    Raises:
        BundleError: the compilation had no such rule, or no such call or place.
    """
    passes = [entry for entry in graph.about.passes if any(known.name == rule for known in entry.rules)]
    if not passes:
        return _why_pass(graph, rule, node)
    about = next(known for known in passes[0].rules if known.name == rule)
    names = tuple(entry.name for entry in passes)
    stages = [stage for stage in graph.stages if stage.name in names]
    asked = _asked(graph, names, node)
    fired = [fire for stage in stages for fire in stage.fired if fire.rule == rule and asked(fire.nodes, fire.place)]
    tried = [(stage, attempt) for stage in stages for attempt in stage.attempts if attempt.rule == rule]
    tried = [(stage, found) for stage, found in tried if asked((found.anchor,), found.place)]
    misses = sorted((_miss(stage.name, attempt, about) for stage, attempt in tried), key=lambda miss: -miss.matched)
    note = "" if fired or misses else untried.reason(graph, names, about, node)
    return Why(rule=rule, passes=names, fired=tuple(fired), misses=tuple(misses), note=note)


def answers(graphs: Sequence[StoredGraph], rule: str, node: str = "") -> list[tuple[StoredGraph, Why]]:
    """The answers of several graphs, for a rule, or for each rule of a pass that has some; graphs without such a rule
    or place are left out.

    Raises:
        BundleError: no graph has it.
    """
    found: list[tuple[StoredGraph, Why]] = []
    missing: BundleError | None = None
    for graph in graphs:
        try:
            found += [(graph, why(graph, name, node)) for name in _rules(graph, rule)]
        except untried.NotThere as error:
            missing = missing or error
    if missing is not None and not found:
        raise missing
    return found


def _rules(graph: StoredGraph, name: str) -> list[str]:
    """The rules of the pass of this name; the name itself where it is a rule's."""
    known = {entry.name: [rule.name for rule in entry.rules] for entry in graph.about.passes}
    return [name] if any(name in rules for rules in known.values()) else known.get(name) or [name]


def _why_pass(graph: StoredGraph, name: str, node: str) -> Why:
    """The answer for a pass without rules, or for what is neither a rule nor a pass of this compilation."""
    stages = [stage for stage in graph.stages if stage.name == name and stage.ran]
    about = next((entry for entry in graph.about.passes if entry.name == name), None)
    if about is not None and about.rules:
        rules = ", ".join(rule.name for rule in about.rules)
        raise BundleError(f"{name} is a pass of rules", rule=f"they are {rules}", fix="name one of them")
    if about is None and not stages:
        return Why(rule=name, passes=(), note=untried.left_out(graph, name))
    asked = _asked(graph, (name,), node)
    fired = [fire for stage in stages for fire in stage.fired if asked(fire.nodes, fire.place)]
    refused = [entry for stage in stages for entry in stage.refused if asked((), entry.place)]
    misses = [Miss(stage=name, node="", place=e.place, matched=0, calls=0, reason=e.reason) for e in refused]
    note = "" if fired or misses else untried.reason(graph, (name,), None, node)
    return Why(rule=name, passes=(name,), fired=tuple(fired), misses=tuple(misses), note=note)


def _asked(graph: StoredGraph, passes: Sequence[str], node: str) -> Callable[[Sequence[str], str], bool]:
    """Whether `node` is one of these calls, or means this place; what has no calls is at the call's place."""
    place = untried.place_of(graph, passes, node)
    if place is None:
        return lambda names, where: node in names or node in where
    return lambda names, where: node in names or (not names and where == place)


def _miss(stage: str, found: Attempt, rule: RuleInfo) -> Miss:
    return Miss(
        stage=stage,
        node=found.anchor,
        place=found.place,
        matched=found.matched,
        calls=max(rule.calls, found.matched),
        reason=found.reason,
        whole=found.whole,
        stopper=found.stopper,
        stopper_place=found.stopper_place,
        advice=_advice(found),
    )


def _advice(found: Attempt) -> str:
    if found.whole:
        sizes = "can't be proven" in found.reason
        return "a torch._check in the model that says this of its sizes lets it fire" if sizes else ""
    _, wants, wanted = found.reason.partition(WANTS)
    return f"it goes on if {found.stopper} is a call of {wanted}" if wants and found.stopper else ""


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _matched(miss: Miss) -> str:
    return f"the nearest of which matched {miss.matched} of {miss.calls} calls" if miss.calls else "left out too"
