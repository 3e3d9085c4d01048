"""Broadcasts of what was there before the call are begun early, beside calls that compute.

Before::

    y = aten.mm.default(x, w)
    z = npu_fused.all_gather_rows(y, "tp:0", 2, rows)
    sent = _c10d_functional.broadcast(kept, 0, "tp:0")
    came = _c10d_functional.wait_tensor(sent)
    a = aten.mm.default(z, came)

After::

    sent = _c10d_functional.broadcast(kept, 0, "tp:0")
    y = aten.mm.default(x, w)
    came = _c10d_functional.wait_tensor(sent)
    z = npu_fused.all_gather_rows(y, "tp:0", 2, rows)
    a = aten.mm.default(z, came)

From its call to the wait a functional collective runs on a stream that torch_npu has for the communicator. It stays
between two other collectives, for one communicator runs one at a time, and links are shared; of all these gaps it gets
the one with the most to compute, by the estimate, beside what else was put there. It begins behind the last reader of
the broadcast before it that brings a tensor of the same shape: of a model's layers one is on its way at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from npu_compiler.facts.sizes import expression
from npu_compiler.graph.device import Device
from npu_compiler.graph.effects import tensors, value
from npu_compiler.graph.groups import group_of
from npu_compiler.graph.traffic import is_view, launches
from npu_compiler.plan.amounts import TYPICAL
from npu_compiler.plan.engines import Engine, engine_of
from npu_compiler.plan.estimate import Sizes, estimate

BROADCAST, WAIT = "_c10d_functional.broadcast.default", "_c10d_functional.wait_tensor.default"


@dataclass(frozen=True)
class Ahead:
    """What `begin_early` did.

    Attributes:
        count: how many broadcasts. `link`: microseconds that they take by the estimate, all together.
        beside: for how much of that there is something to compute.
        sizes: what symbolic sizes were taken for, as text; empty without any.
    """

    count: int
    link: float
    beside: float
    sizes: str

    def __str__(self) -> str:
        at = f" at {self.sizes}" if self.sizes else ""
        return (
            f"ahead: {self.count} broadcasts, estimated {self.link:.0f} us, {self.beside:.0f} us of it beside "
            f"computation{at}"
        )


@dataclass(frozen=True)
class _Gap:
    """The launches between two collectives: `calls[first:last]` of the program's."""

    first: int
    last: int
    microseconds: float


def begin_early(graph: fx.Graph, kept: Collection[fx.Node]) -> Ahead | None:
    """Moves the broadcasts of `kept`, inputs of the program, and the waits for them, in place.

    Returns:
        What was done; None where nothing of `kept` is broadcast.
    """
    found = [sent for node in graph.nodes if (sent := _sent(node, kept)) is not None]
    if not found:
        return None
    sizes, device = _typical_sizes(graph), Device()
    moved = {node for sent in found for node in (sent.send, sent.wait)}
    calls = [node for node in graph.nodes if launches(node) and node not in moved]
    place = {node: index for index, node in enumerate(calls)}
    microseconds = [estimate(node, sizes, device).microseconds for node in calls]
    free_from: dict[object, int] = {}
    taken: dict[int, float] = {}
    link = beside = 0.0
    for sent in found:
        readers = [place[node] for node in sent.readers]
        begin = free_from.get(sent.kind, 0)
        free_from[sent.kind] = max(readers) + 1
        takes = estimate(sent.send, sizes, device).microseconds
        link += takes
        left = {
            gap: gap.microseconds - taken.get(gap.last, 0.0) for gap in _gaps(calls, microseconds, begin, min(readers))
        }
        gap = max(left, key=left.__getitem__, default=None)
        if gap is None or left[gap] <= 0:
            continue
        beside += min(takes, left[gap])
        taken[gap.last] = taken.get(gap.last, 0.0) + takes
        calls[gap.first].prepend(sent.send)
        for node in (sent.wait, *sent.views):
            calls[gap.last].prepend(node)
    graph.lint()
    return Ahead(len(found), link, beside, ", ".join(f"{symbol}={size}" for symbol, size in sizes.items()))


@dataclass(frozen=True)
class _Sent:
    """A broadcast, the wait for it, the views of what came, in order, and the launches that read one of these."""

    send: fx.Node
    wait: fx.Node
    views: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]

    @property
    def kind(self) -> object:
        """Equal for those of which one is on its way at a time."""
        tensor = value(self.send)
        assert isinstance(tensor, torch.Tensor)
        return group_of(self.send), *tensor.shape, tensor.dtype


def _sent(send: fx.Node, kept: Collection[fx.Node]) -> _Sent | None:
    """The broadcast of one of `kept` that a call is; None for other calls, and where it can't be said who reads it."""
    if str(send.target) != BROADCAST or send.args[0] not in kept or len(send.users) != 1:
        return None
    (wait,) = send.users
    views, readers, todo = [], [], list(wait.users)
    while todo:
        user = todo.pop(0)
        if launches(user):
            readers.append(user)
        elif is_view(user) and len(user.all_input_nodes) == 1:
            views.append(user)
            todo += user.users
        else:
            return None
    return _Sent(send, wait, tuple(views), tuple(readers)) if readers and str(wait.target) == WAIT else None


def _gaps(calls: list[fx.Node], microseconds: list[float], first: int, last: int) -> Iterator[_Gap]:
    """The gaps between collectives among calls[first:last]. None in front of a wait: its collective is on its way."""
    begin = first
    for index in range(first, last + 1):
        if index < last and engine_of(calls[index]) is not Engine.LINK:
            continue
        if index > begin and not (index < last and str(calls[index].target) == WAIT):
            yield _Gap(begin, index, sum(microseconds[begin:index]))
        begin = index + 1


def _typical_sizes(graph: fx.Graph) -> Sizes:
    """Dynamic sizes are not known yet."""
    found = {
        symbol
        for node in graph.find_nodes(op="placeholder")
        for size in (node.meta["val"], *(size for tensor in tensors(node) for size in tensor.shape))
        if isinstance(size, torch.SymInt)
        for symbol in expression(size).free_symbols
    }
    return dict.fromkeys(sorted(found, key=str), TYPICAL)
