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
from collections.abc import Iterable, Sequence

from torch import Tensor, fx

from npu_compiler.config import watched
from npu_compiler.fusion_kernels import register
from npu_compiler.fusion_kernels.watched import What, key, operator
from npu_compiler.graph.effects import value
from npu_compiler.graph.source import lines, module_paths, origin_of, where
from npu_compiler.passes.record import Pass, PassRecord

NAME = "watch"
EVERY = "*"


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
                record.refuse_all(NAME, f"no value leaves {place!r} here{_nearest(place, module.graph)}")

    return Pass(NAME, "before all others: what is watched is not fused away", run)


def concerns(graph: fx.Graph, entries: Sequence[str]) -> bool:
    """Whether an entry of the option names something in this program."""
    places = [place for place, _ in map(watched, entries)]
    return any(place == EVERY or _inside(graph, place) for place in places)


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
        made = graph.call_function(operator(), (node, key(where(node), node.name, what)))
    made.meta.update(origin_of([node], NAME), val=None)
    record.fire(f"{NAME}: {what}", node, [], made=[made])
    return made


def _inside(graph: fx.Graph, place: str) -> set[fx.Node]:
    """The calls at a place: a line as FILE:LINE, or a module path with wildcards."""
    file, _, number = place.rpartition(":")
    calls = [node for node in graph.nodes if node.op.startswith("call_")]
    if file and number.isdecimal():
        return {node for node in calls if _on_line(node, file, int(number))}
    return {node for node in calls if any(fnmatch.fnmatchcase(path, place) for path in module_paths(node))}


def _on_line(node: fx.Node, file: str, number: int) -> bool:
    return any(line == number and (path == file or path.endswith(f"/{file}")) for path, line in lines(node))


def _nearest(place: str, graph: fx.Graph) -> str:
    known: Iterable[str] = {path for node in graph.nodes for path in module_paths(node)}
    close = difflib.get_close_matches(place, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
