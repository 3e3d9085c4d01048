"""Why a rule was tried nowhere, or not at the place that was asked for; and what the place is, if it is none."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Sequence

from npu_compiler.config import BY_ROWS
from npu_compiler.errors import BundleError
from npu_compiler.inspect.bundle import StoredGraph
from npu_compiler.inspect.contents import FINAL, RuleInfo, Stage
from npu_compiler.inspect.program import Call

SEVERAL = 3
"""How many names a sentence lists."""
OPTIONS = {
    **{name: name for name in ("matmul_all_reduce", "layer_sharding", *BY_ROWS)},
    "user_rules": "rules",
}
"""The passes that run only with an option, and that option."""


_LAYER = re.compile(r".*?\.\d+")


class NotThere(BundleError):
    """A compilation has no such rule, call or place."""


def reason(graph: StoredGraph, passes: Sequence[str], rule: RuleInfo | None, node: str) -> str:
    """Why a rule, or a pass without rules (None), of these passes neither fired nor missed at `node`.

    Raises:
        NotThere: no call is called `node`, and none comes from such a place.
    """
    if rule is not None and rule.disabled:
        return "it was not tried: it is in disabled_rules"
    position = _position(graph, passes)
    if not position:
        return f"it was not tried: {_not_run(graph, passes[0])}"
    before = _calls_before(graph, position)
    there = [call for call in before if node == call.name]
    there = there or [call for call in before if node in str(call.place)]
    if not there:
        return _elsewhere(graph, graph.stages[:position], before, node, passes[0])
    if rule is None:
        return f"it found nothing to do{f' at {node}' if node else ''}"
    roots = tuple(_root(name) for name in rule.roots)
    ends = [call for call in there if call.target in roots]
    if ends:
        return _taken(ends, graph.stages[position])
    wanted = " or ".join(roots)
    if not node:
        return f"it was not tried: its pattern ends in a call of {wanted}, and the program has none before {passes[0]}"
    if [call.name for call in there] == [node]:
        return f"it was not tried: {node} is a call of {there[0].target}; the pattern ends in one of {wanted}"
    targets = _listed(call.target for call in there)
    return f"it was not tried: the pattern ends in a call of {wanted}; at {node} are calls of {targets}"


def place_of(graph: StoredGraph, passes: Sequence[str], name: str) -> str | None:
    """The place of the call of this name in the program before these passes; None where there is no such call."""
    position = _position(graph, passes)
    calls = _calls_before(graph, position) if name and position else []
    return next((str(call.place) for call in calls if call.name == name), None)


def left_out(graph: StoredGraph, name: str) -> str:
    """Why a pass, or the pass of a rule, was no part of a compilation.

    Raises:
        NotThere: there is no such pass or rule.
    """
    from npu_compiler.passes import pipeline, qkv_attention

    owner = name
    for entry in pipeline.PASSES:
        if name in [rule.name for rule in entry.rules]:
            owner = entry.name
    whose = "it was not tried" if owner == name else f"it was not tried: it is a rule of {owner}, which was not run"
    if owner in _value(graph, "disabled_passes"):
        return f"{whose}: {owner} is in disabled_passes"
    if owner in OPTIONS:
        option = OPTIONS[owner]
        return f"{whose}: it needs the option {option}, which is {graph.about.options.get(option, 'not given')} here"
    if owner == qkv_attention.NAME:
        return f"{whose}: it is a pass for models that vLLM serves (docs/serving.md)"
    raise _unknown(graph, name, pipeline.names())


def _position(graph: StoredGraph, passes: Sequence[str]) -> int:
    """Where the first stage of these passes stands; 0 where they did not run."""
    return next((index for index, stage in enumerate(graph.stages) if stage.name in passes), 0)


def _calls_before(graph: StoredGraph, position: int) -> list[Call]:
    return [call for call in graph.program(graph.stages[position - 1]).calls if call.op == "call_function"]


def _value(graph: StoredGraph, option: str) -> tuple[str, ...]:
    """An option that lists names."""
    try:
        found = ast.literal_eval(graph.about.options.get(option, "()"))
    except (ValueError, SyntaxError):  # of another version
        return ()
    return tuple(found) if isinstance(found, (tuple, list)) else ()


def _not_run(graph: StoredGraph, name: str) -> str:
    if graph.stages and graph.stages[-1].name == FINAL and graph.plan is not None and graph.plan.cache:
        return f"the passes did not run, the program came from the cache ({graph.plan.cache})"
    return f"the compilation ended before {name}"


def _elsewhere(graph: StoredGraph, stages: Sequence[Stage], before: Sequence[Call], node: str, name: str) -> str:
    """What became of a call or place of an earlier stage's program."""
    if not node:
        return "it was not tried: the program has no call"
    taken = next((fire for stage in stages for fire in stage.fired if node in fire.nodes), None)
    if taken is not None:
        return f"it was not tried: {taken.rule} had taken {node} before {name}, at {taken.place}"
    first = graph.program(stages[0]).calls
    known = next((call for call in first if node == call.name or node in str(call.place)), None)
    if known is None:
        raise _no_place(graph, [*first, *before], node)
    if known.op != "call_function":
        return f"it was not tried: {known.name} is no call, it is an input, a constant or the output"
    if any(stage.name == "shortened" for stage in stages):
        layers = (_LAYER.match(call.place.module) for call in before)
        places = _listed(found[0] for found in layers if found)
        return (
            f"it was not tried at {node}: the passes saw a few of the model's equal layers, which stand for all; "
            f"ask for a place of those ({places})"
        )
    return f"it was not tried: an earlier pass had removed {node} before {name}"


def _taken(ends: Sequence[Call], stage: Stage) -> str:
    names = {call.name for call in ends}
    for fire in stage.fired:
        if names & set(fire.nodes):
            taken = min(names & set(fire.nodes))
            return f"it was not tried: {fire.rule}, a rule of the same pass, took {taken} first, at {fire.place}"
    return f"it was not tried at {_listed(call.name for call in ends)}"


def _no_place(graph: StoredGraph, calls: Sequence[Call], node: str) -> NotThere:
    places = [call.place for call in calls]
    known = dict.fromkeys([call.name for call in calls] + [place.module for place in places if place.module])
    known |= dict.fromkeys(f"{place.file.rpartition('/')[2]}:{place.line}" for place in places if place.file)
    close = difflib.get_close_matches(node, list(known), n=1)
    return NotThere(
        f"{graph.name} has no call {node!r}, and no call from such a place",
        rule="NODE is the name of a call, or a part of a place, as `model.layers.3` or `model.py:88`",
        fix=f"did you mean {close[0]!r}?" if close else "`show BUNDLE --stage lowered` prints the calls",
    )


def _unknown(graph: StoredGraph, rule: str, passes: Sequence[str]) -> NotThere:
    known = [name for info in graph.about.passes for name in [entry.name for entry in info.rules] or [info.name]]
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(rule, [*known, *passes], n=1)
    return NotThere(
        f"no pass of {graph.name} has a rule {rule!r}",
        rule=f"its rules are {', '.join(known)}",
        fix=f"did you mean {close[0]!r}?" if close else "name one of them",
    )


def _root(target: str) -> str:
    """A root of a pattern as programs name it."""
    return "operator.getitem" if target == "<built-in function getitem>" else target


def _listed(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    return ", ".join(found[:SEVERAL]) + (", ..." if len(found) > SEVERAL else "")
