"""The order of calls that needs the least memory.

Several orders are tried: the program's own, last use first (of the calls that can run, the one that lets go of most),
depth first and breadth first from the results. The one with the lowest peak wins, and only if it is proven to need no
more than the program's own order for any size.

Every order keeps what a call reads and writes: calls that touch the same memory, where one of them writes, stay in
order, and so do all calls with effects among one another: writes in place, random draws, collectives, whatever an
operator does outside of its schema.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from npu_compiler.graph.effects import is_pure, written_storages
from npu_compiler.graph.rolled import Rolled
from npu_compiler.graph.traffic import is_view, launches
from npu_compiler.plan import amounts
from npu_compiler.plan.accesses import HIDDEN, Accesses, accesses
from npu_compiler.plan.amounts import Amount, Amounts
from npu_compiler.plan.engines import Engine, engine_of
from npu_compiler.plan.liveness import Storages
from npu_compiler.plan.memory import DEVICE, amounts_of, live_sums
from npu_compiler.units import in_bytes

PROGRAM = "the program's order"


@dataclass(frozen=True)
class Arrangement:
    """What `arrange` did.

    Attributes:
        winner: the order that was taken.
        peaks: bytes alive at once for each order that was tried, at sizes taken for typical where they are symbolic.
        sizes: what symbolic sizes were taken for, as text; empty without any.
        seconds: what that took.
    """

    winner: str
    peaks: dict[str, int]
    sizes: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def moved(self) -> bool:
        """Whether the program has changed."""
        return self.winner != PROGRAM

    def __str__(self) -> str:
        alive = f"{in_bytes(self.peaks[self.winner])} alive at once" + (f" at {self.sizes}" if self.sizes else "")
        if not self.moved:
            return f"{PROGRAM} of calls, {alive}; no other needs less"
        return f"calls {self.winner}, {alive} instead of {in_bytes(self.peaks[PROGRAM])}"


def arrange(graph: fx.Graph, device: str = DEVICE) -> Arrangement:
    """Puts the calls of `graph` into the order that needs the least memory, in place.

    Args:
        device: the device type whose memory counts.
    """
    start = time.perf_counter()
    memory = _Memory(graph, device)
    winner, peaks = memory.choose()
    if winner != PROGRAM:
        _put(graph, memory.orders[winner])
    return Arrangement(winner, peaks, memory.amounts.typical_sizes, time.perf_counter() - start)


def arrange_rolled(rolled: Rolled, device: str = DEVICE) -> tuple[Arrangement, Rolled] | None:
    """`arrange` for a rolled program, whose calls that are held are put into the order that is best for all.

    That is told from the calls that are held where no layer leaves memory behind, in either order: then all repetitions
    need what the last period but one needs, and the peak of these calls is the program's.

    Returns:
        What was done, and the program behind it; None where it can't be told: nothing was done.
    """
    start = time.perf_counter()
    memory = _Memory(rolled.graph, device, rolled)
    winner, peaks = memory.choose()
    if not memory.is_steady(memory.orders[PROGRAM], rolled):
        return None
    done = Arrangement(winner, peaks, memory.amounts.typical_sizes, time.perf_counter() - start)
    if winner == PROGRAM:
        return done, rolled
    _put(rolled.graph, memory.orders[winner])
    again = rolled.proven_again()
    if isinstance(again, str) or not memory.is_steady(memory.orders[winner], again):
        _put(rolled.graph, memory.orders[PROGRAM])
        return None
    return done, again


class _Memory:
    """What orders of a program need.

    Attributes:
        orders: those that are tried. `amounts`: of its memory.
    """

    def __init__(self, graph: fx.Graph, device: str, rolled: Rolled | None = None) -> None:
        nodes = list(graph.nodes)
        self.amounts = amounts_of(graph)
        self._storages = Storages(nodes, device)
        needs = _needs(nodes)
        part_of = _parts(rolled) if rolled is not None else {}
        last_use_first = _last_use_first(nodes, needs, self.amounts, self._storages, part_of)
        self.orders = {PROGRAM: nodes, "last use first": last_use_first}
        if rolled is None:  # these two carry calls from layer to layer
            self.orders["depth first"] = _depth_first(nodes, needs)
            self.orders["breadth first"] = _breadth_first(nodes, needs)

    def choose(self) -> tuple[str, dict[str, int]]:
        """The best order that is proven to need no more than the program's own, and the bytes that each needs."""
        sums = {name: _live(order, self.amounts, self._storages) for name, order in self.orders.items()}
        peaks = {name: max(map(self.amounts.typical, sums[name]), default=0) for name in self.orders}
        safe = [name for name in self.orders if name == PROGRAM or amounts.never_more(sums[name], sums[PROGRAM])]
        return min(safe, key=peaks.__getitem__), peaks  # the first of equals

    def is_steady(self, order: Sequence[fx.Node], rolled: Rolled) -> bool:
        """Whether as much is alive behind the last period but one as behind the period before it. (Behind the last one
        that is gone which all layers read.)"""
        last = order.index(rolled.periods[-1 - rolled.length])
        before = order.index(rolled.periods[-1 - 2 * rolled.length])
        found = self._storages.lifetimes(order)
        alive = [
            [self.amounts.room(lifetime.bytes) for lifetime in found if lifetime.first <= place < lifetime.last]
            for place in (before, last)
        ]
        return sorted(alive[0]) == sorted(alive[1])


def _parts(rolled: Rolled) -> dict[fx.Node, int]:
    """Which part of a rolled program each call is in: 0 in front of the periods, then each period, then the rest."""
    found = {node: index // rolled.length + 1 for index, node in enumerate(rolled.periods)}
    behind = len(rolled.periods) // rolled.length + 1
    seen = False
    for node in rolled.graph.nodes:
        seen = seen or node is rolled.periods[-1]
        if seen and node not in found:
            found[node] = behind
    return found


def _put(graph: fx.Graph, order: Sequence[fx.Node]) -> None:
    last = None
    for node in order:
        if last is not None and last.next is not node:
            last.append(node)
        last = node
    graph.lint()


def _live(order: Sequence[fx.Node], of: Amounts, storages: Storages) -> list[Amount]:
    found = storages.lifetimes(order)
    return live_sums(found, [of.room(lifetime.bytes) for lifetime in found])


def _needs(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node those that have to run before it, in program order."""
    position = {node: index for index, node in enumerate(nodes)}
    writer: dict[int, fx.Node] = {}
    readers: dict[int, list[fx.Node]] = {}
    effect: fx.Node | None = None
    inputs = [node for node in nodes if node.op == "placeholder"]
    needs: dict[fx.Node, list[fx.Node]] = {}
    beside = _beside_collectives(nodes)
    for node in nodes:
        before = set(node.all_input_nodes)
        if node.op == "placeholder":
            before.update(inputs[position[node] - 1 : position[node]])
        elif node.op == "output":
            before.update(nodes[:-1])
        else:
            before.update(inputs[-1:])
            touched = accesses(node)
            for key in touched.reads | touched.writes:
                before.update([writer[key]] if key in writer else [])
            for key in touched.reads:
                readers.setdefault(key, []).append(node)
            for key in touched.writes:
                before.update(readers.pop(key, ()))
                writer[key] = node
            if _has_effect(node, touched):
                before.update([effect] if effect is not None else [])
                effect = node
        before.update(beside.get(node, ()))
        before.discard(node)
        needs[node] = sorted(before, key=position.__getitem__)
    return needs


def _beside_collectives(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For what stands between the beginning of a functional collective and the wait for it: the beginning; for the wait
    what stands there. It stands there to run meanwhile, so it stays."""
    found: dict[fx.Node, list[fx.Node]] = {}
    position = {node: index for index, node in enumerate(nodes)}
    for wait in nodes:
        if str(wait.target) != "_c10d_functional.wait_tensor.default" or not isinstance(wait.args[0], fx.Node):
            continue
        between = [node for node in nodes[position[wait.args[0]] + 1 : position[wait]] if launches(node)]
        for node in between:
            found.setdefault(node, []).append(wait.args[0])
        found.setdefault(wait, []).extend(between)
    return found


def _has_effect(node: fx.Node, touched: Accesses) -> bool:
    """Whether a call does more than to compute its result, and so stays in order with all that do."""
    if not launches(node):
        return node.op == "call_function" and not (is_view(node) or is_pure(node))
    return bool(touched.writes & HIDDEN or written_storages(node)) or engine_of(node) is Engine.LINK


def _followers(needs: dict[fx.Node, list[fx.Node]]) -> dict[fx.Node, list[fx.Node]]:
    found: dict[fx.Node, list[fx.Node]] = {node: [] for node in needs}
    for node, before in needs.items():
        for other in before:
            found[other].append(node)
    return found


def _breadth_first(nodes: Sequence[fx.Node], needs: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    followers = _followers(needs)
    missing = {node: len(before) for node, before in needs.items()}
    ready = deque(node for node in nodes if not missing[node])
    order = []
    while ready:
        node = ready.popleft()
        order.append(node)
        for follower in followers[node]:
            missing[follower] -= 1
            if not missing[follower]:
                ready.append(follower)
    return order


def _depth_first(nodes: Sequence[fx.Node], needs: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    """Each result, in the order in which they are returned, right behind what it needs."""
    done: dict[fx.Node, None] = {}
    wanted = [node for node in nodes if node.op == "placeholder"]
    wanted += [*nodes[-1].all_input_nodes, *nodes]
    for result in wanted:
        stack = [(result, iter(needs[result]))]
        while stack:
            node, before = stack[-1]
            following = next((other for other in before if other not in done), None) if node not in done else None
            if following is None:
                done[node] = None
                stack.pop()
            else:
                stack.append((following, iter(needs[following])))
    return list(done)


def _last_use_first(
    nodes: Sequence[fx.Node],
    needs: dict[fx.Node, list[fx.Node]],
    of: Amounts,
    storages: Storages,
    part_of: Mapping[fx.Node, int],
) -> list[fx.Node]:
    """A list schedule: of the calls that can run, the one that adds the least memory; the earliest of equals.

    Args:
        part_of: numbers of the program's parts, in order, of which no call leaves its own; 0 where there is none.
    """
    position = {node: index for index, node in enumerate(nodes)}
    weight = {key: of.typical(of.room(size)) for made in storages.made.values() for key, size in made}
    takes = {node: sum(weight[key] for key, _ in made) for node, made in storages.made.items()}
    touches = storages.touched
    left = {key: set(storages.keepers(key)) for key in weight}
    followers = _followers(needs)
    missing = {node: len(before) for node, before in needs.items()}

    def cost(node: fx.Node) -> tuple[int, int, int]:
        frees = sum(weight[key] for key in touches[node] if len(left[key]) == 1)
        return part_of.get(node, 0), takes.get(node, 0) - frees, position[node]

    ready = [cost(node) for node in nodes if not missing[node]]
    heapq.heapify(ready)
    done: dict[fx.Node, None] = {}
    while ready:
        *_, index = heapq.heappop(ready)
        node = nodes[index]
        if node in done:  # it was put in again when it had become cheaper
            continue
        done[node] = None
        for key in touches[node]:
            left[key].discard(node)
            for last in left[key] if len(left[key]) == 1 else ():
                if not missing[last] and last not in done:
                    heapq.heappush(ready, cost(last))
        for follower in followers[node]:
            missing[follower] -= 1
            if not missing[follower]:
                heapq.heappush(ready, cost(follower))
    return list(done)
