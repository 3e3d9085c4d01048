"""The option `watch` round a compiled program: whether it names something there, what was noted, who is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from npu_compiler.config import Options
from npu_compiler.errors import WatchWarning
from npu_compiler.fusion_kernels import watched as noted
from npu_compiler.fusion_kernels.watched import Notes as Notes
from npu_compiler.fusion_kernels.watched import Seen as Seen
from npu_compiler.fusion_kernels.watched import new_batch as new_batch
from npu_compiler.passes import watch as places
from npu_compiler.passes.record import PassRecord

if TYPE_CHECKING:
    from npu_compiler.aclgraph.watch_output import Output


def is_watched(graph: fx.Graph, options: Options) -> bool:
    """Whether the option `watch` names something in a dynamo graph, so that one that looks like it is another."""
    return places.concerns(graph, options.watch)


def output_of(options: Options, name: str) -> Output | None:
    """What prints and saves what is watched; None where neither is asked for. `name`: of the folder."""
    if not options.watch or not (options.watch_print or options.watch_save):
        return None
    from npu_compiler.aclgraph.watch_output import Output

    return Output(options.watch_print, options.watch_save, name)


def told(call: Callable[..., Any], notes: Notes | None, options: Options, name: str) -> Callable[..., Any]:
    """`call`, with what it noted printed and saved behind it, if that is asked for."""
    output = output_of(options, name) if notes is not None else None
    return call if output is None or notes is None else output.behind(call, notes)


def warn_of_absent(name: str, pieces: Sequence[Sequence[PassRecord]]) -> None:
    """Warns of each place that the option `watch` names and that no piece of a model has.

    Args:
        name: of what was compiled. `pieces`: what the passes did to each.
    """
    for text in places.absent(pieces):
        warnings.warn(f"watch in {name}: {text}", WatchWarning, stacklevel=2)


def watched() -> list[Seen]:
    """What the values that the option `watch` names held in the calls since this was asked last, by graph, call and
    place in the program: of the entries of `nan`, the first of a call is where the NaN came from. Waits for the device,
    so it can't be called during a capture."""
    return noted.read()
