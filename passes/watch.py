"""Notes what values hold that the option `watch` names by their module or source line.

Before, with watch=["mlp:stats"]::

    gate = aten.mm.default(x, weight)                # mlp.gate_up
    h = npu_fused.swiglu.default(gate)               # mlp
    y = aten.add.Tensor(h, x)                        # the model

After::

    gate = aten.mm.default(x, weight)
    h = npu_fused.swiglu.default(gate)
    npu_fused.watched.default(h, '{"place": "mlp at model.py:7: ...", ...}')
    y = aten.add.Tensor(h, x)

A place stands for the values that leave it: what is computed in the module, or on the line, and used elsewhere. This
pass runs before all others, so that what is watched is still there: a rule that would fuse it away finds that it is
used by `watched`, too, and says so. So a watched program is another program than the one without.

What `*` names is the business of the pass watch_all.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from operator import getitem
from pathlib import PurePath

from torch import Tensor, fx

from npu_compiler.config import watched
from npu_compiler.fusion_kernels import register
from npu_compiler.fusion_kernels.watched import What, key, operator
from npu_compiler.graph.effects import value
from npu_compiler.graph.source import lines, module_paths, operator_name, origin_of, where
from npu_compiler.passes.record import Pass, PassRecord

NAME = "watch"
EVERY = "*"
UNUSED = "no value that is computed there is used elsewhere, so nothing of it is noted"
NEAREST = 3
"""How many places are named instead of one that is not there."""


def pass_of(entries: Sequence[str]) -> Pass | None:
    """The pass that watches what the option `watch` names; None where that is nothing but `*`."""
    wanted = [(place, what) for place, what in map(watched, entries) if place != EVERY]
    if not wanted:
        return None

    def run(module: fx.GraphModule, record: PassRecord) -> None:
        for place, what in wanted:
            found = leaving(module.graph, place)
            for node in found:
                watch(node, what, record)  # type: ignore[arg-type]  # one of config.WATCHES
            if not found:
                near = nearest(place, _places(module.graph))
                why = UNUSED if _inside(module.graph, place) else _nothing(place, near)
                record.refuse_all(f"{NAME} {place}", why, near)

    return Pass(NAME, "before all others: what is watched is not fused away", run)


def concerns(graph: fx.Graph, entries: Sequence[str]) -> bool:
    """Whether an entry of the option names something in this program."""
    places = [place for place, _ in map(watched, entries)]
    return any(place == EVERY or _inside(graph, place) for place in places)


def absent(pieces: Iterable[Sequence[PassRecord]]) -> Iterator[str]:
    """What to say of each place of which no piece of a model has a value.

    Args:
        pieces: the records of each.
    """
    refused = [
        {entry.rule: entry for entry in record.refused}
        for records in pieces
        for record in records
        if record.name == NAME
    ]
    for rule in refused[0] if refused else ():
        if all(rule in entries for entries in refused):
            place = rule.removeprefix(f"{NAME} ")
            names = dict.fromkeys(name for entries in refused for name in entries[rule].near)
            unused = any(entries[rule].reason == UNUSED for entries in refused)
            yield f"{place!r}: {UNUSED if unused else _nothing(place, nearest(place, names))}"


def leaving(graph: fx.Graph, place: str) -> list[fx.Node]:
    """The tensors that are computed at a place and used outside of it, in order."""
    inside = _inside(graph, place)
    found = [node for node in graph.nodes if node in inside and any(user not in inside for user in node.users)]
    return [node for node in found if is_watchable(node)]


def is_watchable(node: fx.Node) -> bool:
    """Whether a call gives one tensor that statistics can be made of."""
    found = value(node)
    return node.op == "call_function" and isinstance(found, Tensor) and not found.is_complex()


def watch(node: fx.Node, what: What, record: PassRecord) -> fx.Node:
    """Puts the call that notes what `node` holds right behind it."""
    register()
    graph = node.graph
    with graph.inserting_after(node):
        made = graph.call_function(operator(), (node, key(where(node), node.name, _called(node), what)))
    made.meta.update(origin_of([node], NAME), val=None)
    record.fire(f"{NAME}: {what}", node, [], made=[made])
    return made


def _inside(graph: fx.Graph, place: str) -> set[fx.Node]:
    """The calls at a place: a line as FILE:LINE, or a module path with wildcards."""
    line = _line(place)
    calls = [node for node in graph.nodes if node.op.startswith("call_")]
    if line is not None:
        return {node for node in calls if _on_line(node, *line)}
    return {node for node in calls if any(fnmatch.fnmatchcase(path, place) for path in module_paths(node))}


def _line(place: str) -> tuple[str, int] | None:
    """File and number of a place that is a line."""
    file, _, number = place.rpartition(":")
    return (file, int(number)) if file and number.isdecimal() else None


def _on_line(node: fx.Node, file: str, number: int) -> bool:
    return any(line == number and (path == file or path.endswith(f"/{file}")) for path, line in lines(node))


def _called(node: fx.Node) -> str:
    """The operator that computes a value; of one of several results, with its number."""
    if node.target is getitem and isinstance(node.args[0], fx.Node):
        return f"{_called(node.args[0])}[{node.args[1]}]"
    return operator_name(node.target)


def _places(graph: fx.Graph) -> list[str]:
    """What the option could name: the paths of modules, and lines."""
    calls = [node for node in graph.nodes if node.op.startswith("call_")]
    paths = dict.fromkeys(path for node in calls for path in module_paths(node))
    named = dict.fromkeys(f"{PurePath(file).name}:{number}" for node in calls for file, number in lines(node))
    return [*paths, *named]


def nearest(place: str, known: Iterable[str]) -> list[str]:
    """Those of the known places that are most like one that is not there: lines of its file, if it is a line, else
    names like it; where none is like it, the first ones."""
    line, known = _line(place), list(known)
    alike = [name for name in known if (_line(name) is None) == (line is None)]
    if line is not None:
        file, number = PurePath(line[0]).name, line[1]
        same = [name for name in alike if name.rpartition(":")[0] == file]
        close = sorted(same, key=lambda name: abs(int(name.rpartition(":")[2]) - number))
    else:
        close = difflib.get_close_matches(place, alike, n=NEAREST, cutoff=0.5)
    return (close or alike or known)[:NEAREST]


def _nothing(place: str, near: Sequence[str]) -> str:
    """Why nothing is noted of a place at which no call is."""
    there = f"; there is {', '.join(map(repr, near))}" if near else ""
    if _line(place) is None and all(map(_line, near)):
        return (
            "no call of this program says which module it is in, as none does of a graph that vLLM has read from its "
            f"cache (VLLM_DISABLE_COMPILE_CACHE=1 has it traced anew), so nothing is noted{there}"
        )
    return f"nothing is computed there, so nothing is noted{there}"
