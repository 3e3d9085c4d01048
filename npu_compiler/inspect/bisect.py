"""Which pass, rule and match, or which later layer and call, makes a dumped program wrong.

What is done to a program is a list of points, each one step further than the one before: the passes one by one, equal
layers at once, the order of calls, the capture, its streams. The first point is the lowered program, which is right by
definition; the last is what was compiled. Between a right and a wrong one there is a step that makes the difference,
and halving finds one. The same is done inside of it: over the rewrites that a pass makes, the calls that change places,
the calls that are captured, the launches that leave the main stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from npu_compiler.config import Options
from npu_compiler.inspect.contents import Fire
from npu_compiler.inspect.outcome import Outcome, Part, Point
from npu_compiler.inspect.program import Data
from npu_compiler.passes import pipeline

Run = Callable[[Point], Outcome]
Say = Callable[[str], None]
Layer = Literal["nothing", "lowered", "pass", "equal layers", "order", "capture", "streams", "another version"]
UNCAPTURED = Point(passes=0, equal_layers=False, order=0, captured=0)
MOST_DOUBLINGS = 20


class Cause(Data):
    """What `bisect` found.

    Attributes:
        layer: where it goes wrong. `nothing`: it doesn't, with these inputs. `lowered`: the program fails before
            anything is done to it. `another version`: a stored stage is wrong, which the passes of today don't make.
        stage: the pass, for the layer `pass`; the stored stage, for `another version`.
        rule, match: the rewrite: what went and what came, and where.
        confirmed: whether everything is right without that rule; None where a rule can't be left out alone.
        call: for the layers behind the passes, the call without which the layer is right.
        outcome: what goes wrong.
        right, wrong: neighbours; all that is between them is the cause.
        stored: the first stage of the bundle whose stored program is wrong; empty where none is.
        probes: how many programs were run.
    """

    layer: Layer
    stage: str = ""
    rule: str = ""
    match: Fire | None = None
    confirmed: bool | None = None
    call: Part | None = None
    outcome: Outcome
    right: Point | None = None
    wrong: Point | None = None
    stored: str = ""
    probes: int = 0

    def __str__(self) -> str:
        lines = [_HEADINGS[self.layer].format(self.stage)]
        if self.rule:
            lines.append(f"rule: {self.rule}" + ("; without it everything is right" if self.confirmed else ""))
        if self.match is not None:
            lines.append(f"match: {', '.join(self.match.nodes)} became {', '.join(self.match.made) or 'another value'}")
            lines.append(f"at: {self.match.place}")
        if self.call is not None:
            lines.append(f"call: {self.call}")
        if self.stored:
            lines.append(f"the first stored stage that is wrong: {self.stored}")
        return "\n".join([*lines, *str(self.outcome).splitlines(), f"{self.probes} programs were run"])


_HEADINGS = {
    "nothing": "nothing is wrong with these inputs",
    "lowered": "the lowered program fails by itself, before anything was done to it",
    "pass": "pass: {}",
    "equal layers": "equal layers, compiled once, are not equal (option layers_once)",
    "order": "the order of calls (option reorder)",
    "capture": "the capture: calls one by one are right",
    "streams": "several streams: one is right (option multistream)",
    "another version": "stage {}, made by another version: the passes of this one are right",
}


@dataclass(frozen=True)
class _Step:
    """A point, and what it adds to the one before."""

    point: Point
    layer: Layer
    name: str = ""


def bisect(run: Run, options: Options, stages: Sequence[str] = (), say: Say = lambda text: None) -> Cause:
    """Finds what makes a program wrong.

    Args:
        run: what comes of a point (replay.Subject.run, or a worker's).
        options: those of the compilation.
        stages: names of the stored stages, in order; those without a program of the whole are "".
        say: told of each program that is run.
    """
    probe = _Probe(run, say)
    start = probe(UNCAPTURED, "the lowered program")
    if not start.right:
        return Cause(layer="lowered", outcome=start, wrong=UNCAPTURED, probes=probe.count)
    stored = _stored(probe, stages)
    steps = _steps(options)
    whole = probe(steps[-1].point, "all that was done")
    if whole.right and stored is not None:  # what is wrong call by call may be right in a capture
        steps = [step for step in steps if step.layer in ("lowered", "pass")]
        whole = probe(steps[-1].point, "all passes")
    if whole.right:
        return _only_stored(probe, stored, stages, whole)
    last, outcome = _between(probe, [step.point for step in steps], whole, [_described(step) for step in steps])
    before, step = steps[last - 1], steps[last]
    cause = Cause(
        layer=step.layer,
        stage=step.name,
        outcome=outcome,
        right=before.point,
        wrong=step.point,
        stored="" if stored is None else stages[stored],
    )
    rules = {rule.name for entry in pipeline.selected(options) for rule in entry.rules}
    cause = (_in_pass if step.layer == "pass" else _in_layer)(probe, cause, rules)
    return cause.model_copy(update={"probes": probe.count})


class _Probe:
    """Runs points, each once."""

    def __init__(self, run: Run, say: Say) -> None:
        self._run, self._say = run, say
        self._known: dict[str, Outcome] = {}

    @property
    def count(self) -> int:
        return len(self._known)

    def __call__(self, point: Point, what: str) -> Outcome:
        key = point.model_dump_json()
        if key not in self._known:
            self._known[key] = self._run(point)
            self._say(f"{what}: {self._known[key].state}")
        return self._known[key]


def _steps(options: Options) -> list[_Step]:
    names = pipeline.names(pipeline.selected(options))
    steps = [_Step(UNCAPTURED, "lowered")]
    steps += [
        _Step(UNCAPTURED.model_copy(update={"passes": index + 1}), "pass", name) for index, name in enumerate(names)
    ]
    if options.layers_once:
        steps.append(_Step(Point(order=0, captured=0), "equal layers"))
    if options.reorder:
        steps.append(_Step(Point(captured=0), "order"))
    if options.capture:
        steps.append(_Step(Point(streams=0), "capture"))
        if options.multistream == "auto":
            steps.append(_Step(Point(), "streams"))
    return steps


def _described(step: _Step) -> str:
    return f"up to pass {step.name}" if step.layer == "pass" else f"with {step.layer}"


def _between(probe: _Probe, points: Sequence[Point], wrong: Outcome, what: Sequence[str]) -> tuple[int, Outcome]:
    """Index of a wrong point behind a right one, and what comes of it. The first is right, the last is wrong."""
    low, high = 0, len(points) - 1
    while high - low > 1:
        middle = (low + high) // 2
        outcome = probe(points[middle], what[middle])
        if outcome.right:
            low = middle
        else:
            high, wrong = middle, outcome
    return high, wrong


def _stored(probe: _Probe, stages: Sequence[str]) -> int | None:
    """The first stored stage that is wrong, by halving; None if the last one is right."""
    whole = [index for index, name in enumerate(stages) if name]
    if len(whole) < 2:
        return None
    points = [Point(stage=index) for index in whole]
    what = [f"stored stage {stages[index]}" for index in whole]
    last = probe(points[-1], what[-1])
    return None if last.right else whole[_between(probe, points, last, what)[0]]


def _only_stored(probe: _Probe, stored: int | None, stages: Sequence[str], whole: Outcome) -> Cause:
    if stored is None:
        return Cause(layer="nothing", outcome=whole, probes=probe.count)
    wrong = Point(stage=stored)
    name = stages[stored]
    outcome = probe(wrong, name)
    return Cause(layer="another version", stage=name, stored=name, outcome=outcome, wrong=wrong, probes=probe.count)


def _in_pass(probe: _Probe, cause: Cause, rules: Collection[str]) -> Cause:
    """The rewrite of a pass that makes it wrong."""
    wrong = cause.wrong
    assert wrong is not None

    def limited(count: int) -> Point:
        return wrong.model_copy(update={"rewrites": count})

    if not probe(limited(0), f"pass {cause.stage}, no rewrite").right:
        return cause  # it is not in what the pass notes
    made = cause.outcome.rewrites
    if cause.outcome.state in ("crash", "hang"):
        made = probe(wrong.model_copy(update={"called": False}), f"what pass {cause.stage} does").rewrites
    count = len(made) or _first_wrong(probe, limited, cause.stage)
    if not count:
        return cause
    what = [f"pass {cause.stage}, {index} rewrites" for index in range(count + 1)]
    found, outcome = _between(probe, [limited(index) for index in range(count)] + [limited(count)], cause.outcome, what)
    made = made or outcome.rewrites
    match = made[found - 1] if len(made) >= found else None
    rule = match.rule if match is not None else ""
    found_cause = cause.model_copy(
        update={"rule": rule, "match": match, "outcome": outcome, "right": limited(found - 1), "wrong": limited(found)}
    )
    return _confirmed(probe, found_cause, rules)


def _first_wrong(probe: _Probe, limited: Callable[[int], Point], stage: str) -> int:
    """A number of rewrites that is wrong, where the pass ended in an error and did not say how many it makes."""
    for power in range(MOST_DOUBLINGS):
        if not probe(limited(1 << power), f"pass {stage}, {1 << power} rewrites").right:
            return 1 << power
    return 0


def _confirmed(probe: _Probe, cause: Cause, rules: Collection[str]) -> Cause:
    """Whether everything is right without the rule, where it is one that can be left out by its name."""
    if cause.rule not in rules:
        return cause
    outcome = probe(Point(disabled=(cause.rule,)), f"without rule {cause.rule}")
    return cause.model_copy(update={"confirmed": outcome.right})


def _in_layer(probe: _Probe, cause: Cause, rules: Collection[str]) -> Cause:
    """The call without which a layer behind the passes is right."""
    field = {"order": "order", "capture": "captured", "streams": "streams"}.get(cause.layer)
    wrong = cause.wrong
    assert wrong is not None
    if field is None:
        return cause
    parts = {"order": cause.outcome.ordered, "capture": cause.outcome.calls, "streams": cause.outcome.steps}[
        cause.layer
    ]
    if not parts:
        return cause
    points = [wrong.model_copy(update={field: index}) for index in range(len(parts))] + [wrong]
    what = [f"{cause.layer}, the first {index} of {len(parts)}" for index in range(len(points))]
    if not probe(points[0], what[0]).right:
        return cause
    found, outcome = _between(probe, points, cause.outcome, what)
    part = parts[found - 1]
    update = {"call": part, "rule": part.rule, "outcome": outcome, "right": points[found - 1], "wrong": points[found]}
    return _confirmed(probe, cause.model_copy(update=update), rules)
