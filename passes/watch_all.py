"""Notes at every value of the program that is run whether it holds a NaN, or an infinite number, with the option
`watch`.

Before, with watch=["*:nan"]::

    a = aten.log.default(x)
    b = aten.mul_.Tensor(a, y)

After::

    a = aten.log.default(x)
    npu_fused.watched.default(a, '{"place": "model.py:3: ...", "what": "nan", ...}')
    b = aten.mul_.Tensor(a, y)
    npu_fused.watched.default(b, '{"place": "model.py:3: ...", "what": "nan", ...}')

This pass runs behind all others, on what they made of the program: nothing is fused differently because of it. Each
value is noted right behind its call, before it may be written over. Views are not noted, nor is memory that nobody has
written yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from npu_compiler.config import watched
from npu_compiler.graph.effects import value
from npu_compiler.graph.traffic import launches
from npu_compiler.passes.record import Pass, PassRecord
from npu_compiler.passes.watch import EVERY, is_watchable, watch

NAME = "watch_all"


def pass_of(entries: Sequence[str]) -> Pass | None:
    """The pass that watches every value; None where the option does not ask for that."""
    wanted = [what for place, what in map(watched, entries) if place == EVERY]
    if not wanted:
        return None

    def run(module: fx.GraphModule, record: PassRecord) -> None:
        for node in list(module.graph.nodes):
            if is_watchable(node) and value(node).is_floating_point() and _is_computed(node):  # type: ignore[attr-defined]
                for what in wanted:
                    watch(node, what, record)  # type: ignore[arg-type]  # one of config.WATCHES

    return Pass(NAME, "behind all others: what is watched is what runs", run)


def _is_computed(node: fx.Node) -> bool:
    """Whether a call computes its value: directly, or as one of several results of a call that does."""
    source = node.args[0] if node.args and not launches(node) else node
    if isinstance(source, fx.Node) and isinstance(value(source), (list, tuple)):
        return launches(source)
    return launches(node) and "empty" not in str(node.target)
