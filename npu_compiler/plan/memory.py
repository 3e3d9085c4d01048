"""Where each storage of a program would lie in one block of memory, and how large that block is, for every batch.

Offsets and sizes are expressions in the sizes of the program: one plan serves every shape. Storages are placed from the
largest to the smallest, each at the lowest place that is free for as long as it lives. Free means proven free for all
sizes: where the order of two amounts is unknown, the storage goes above both.

The plan is what the program needs, not what is done: torch_npu's allocator places the storages. `live` is what that
allocator can't go below when calls run in program order, `peak` what one block for all of them takes.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import sympy
import torch
from torch import fx

from npu_compiler.facts.sizes import facts_of
from npu_compiler.graph.effects import tensors
from npu_compiler.plan import amounts
from npu_compiler.plan.amounts import ZERO, Amount, Amounts, Sizes
from npu_compiler.plan.liveness import Lifetime, Storages
from npu_compiler.units import in_bytes

DEVICE = "npu"


@dataclass(frozen=True)
class Block:
    """A storage and where it lies.

    Attributes:
        allocated: what the allocator takes for it.
        size: the room that the plan gives it, at least that.
        offset: where its room begins.
    """

    lifetime: Lifetime
    allocated: Amount
    size: Amount
    offset: Amount

    @property
    def end(self) -> Amount:
        return amounts.add(self.offset, self.size)


class MemoryPlan:
    """The memory of one program, for every size.

    Attributes:
        blocks: the storages that it allocates, in the order of their making.
    """

    def __init__(self, blocks: Sequence[Block], of: Amounts) -> None:
        self.blocks = tuple(blocks)
        self._amounts = of
        self._ends = amounts.largest(block.end for block in blocks)
        self._live = live_sums([block.lifetime for block in blocks], [block.allocated for block in blocks])

    def peak(self, sizes: Sizes) -> int:
        """Bytes of one block that holds all storages, outputs included, inputs not."""
        return max(self._amounts.evaluate(self._ends, sizes), default=0)

    def live(self, sizes: Sizes) -> int:
        """The most bytes that are alive at once: less can't do in this order of calls."""
        return max(self._amounts.evaluate(self._live, sizes), default=0)

    def offsets(self, sizes: Sizes) -> list[int]:
        """Where each of `blocks` lies, in bytes."""
        return self._amounts.evaluate([block.offset for block in self.blocks], sizes)

    def extents(self, sizes: Sizes) -> list[int]:
        """How long each of `blocks` is, in bytes."""
        return self._amounts.evaluate([block.size for block in self.blocks], sizes)

    @property
    def peak_formula(self) -> sympy.Expr:
        """`peak` in the symbols of the program."""
        return self._largest(self._ends)

    @property
    def live_formula(self) -> sympy.Expr:
        """`live` in the symbols of the program."""
        return self._largest(self._live)

    def formulas(self) -> Iterator[tuple[Block, sympy.Expr, sympy.Expr]]:
        """Each block with its offset and its end, in the symbols of the program."""
        for block in self.blocks:
            yield block, self._amounts.expression(block.offset), self._amounts.expression(block.end)

    def _largest(self, of: Sequence[Amount]) -> sympy.Expr:
        return sympy.Max(0, *(self._amounts.expression(amount) for amount in of))

    @property
    def summary(self) -> str:
        """The plan in a line."""
        return f"{len(self.blocks)} storages, {in_bytes(self.peak_formula)} in one block"

    def __str__(self) -> str:
        lines = [f"{self.summary}, {in_bytes(self.live_formula)} alive at once"]
        for block, offset, end in self.formulas():
            life = block.lifetime
            until = "the end" if life.returned else str(life.last)
            lines.append(f"  {life.name}: [{offset}, {end}) from {life.first} to {until}")
        return "\n".join(lines)


def plan(graph: fx.Graph, device: str = DEVICE) -> MemoryPlan:
    """The memory plan of a program after the passes, for calls in its order.

    Args:
        device: the device type whose memory is planned.
    """
    nodes = list(graph.nodes)
    found = Storages(nodes, device).lifetimes(nodes)
    of = amounts_of(graph)
    return MemoryPlan(placed(found, of), of)


def amounts_of(graph: fx.Graph) -> Amounts:
    """Amounts under what is known of the program's symbols."""
    numbers = (
        number
        for node in graph.nodes
        for number in (node.meta.get("val"), *(size for tensor in tensors(node) for size in tensor.shape))
        if isinstance(number, torch.SymInt)
    )
    return Amounts(facts_of(*([first] if (first := next(numbers, None)) is not None else [])))


def live_sums(found: Sequence[Lifetime], sizes: Sequence[Amount]) -> list[Amount]:
    """What is alive at once, wherever that is most."""
    changes: dict[int, Amount] = {}
    for lifetime, size in zip(found, sizes, strict=True):
        changes[lifetime.first] = amounts.add(changes.get(lifetime.first, ZERO), size)
        changes[lifetime.last + 1] = amounts.subtract(changes.get(lifetime.last + 1, ZERO), size)
    total, sums = ZERO, []
    for _, change in sorted(changes.items(), key=operator.itemgetter(0)):
        total = amounts.add(total, change)
        sums.append(total)
    return amounts.largest(sums)


def overlaps(plan: MemoryPlan, sizes: Sizes) -> list[tuple[Block, Block]]:
    """Pairs of storages that share bytes while both live: none in a plan that is right."""
    spans = zip(plan.offsets(sizes), plan.extents(sizes), plan.blocks, strict=True)
    placed = sorted((entry for entry in spans if entry[1]), key=lambda entry: entry[0])
    found: list[tuple[Block, Block]] = []
    open_spans: list[tuple[int, Block]] = []
    for offset, size, block in placed:
        open_spans = [entry for entry in open_spans if entry[0] > offset]
        found += [(other, block) for _, other in open_spans if _live_together(other.lifetime, block.lifetime)]
        open_spans.append((offset + size, block))
    return found


def _live_together(one: Lifetime, other: Lifetime) -> bool:
    return one.first <= other.last and other.first <= one.last


def placed(found: Sequence[Lifetime], of: Amounts) -> list[Block]:
    """Every storage with its offset, in the given order."""
    sizes = [of.room(lifetime.bytes) for lifetime in found]
    weights = [of.typical(size) for size in sizes]
    conflicts = _Conflicts(found)
    blocks: dict[int, Block] = {}
    for index in sorted(range(len(found)), key=lambda i: (-weights[i], i)):
        taken = [blocks[other] for other in conflicts.of(index) if other in blocks]
        blocks[index] = Block(
            found[index], of.allocated(found[index].bytes), sizes[index], _lowest(sizes[index], taken, of)
        )
    return [blocks[index] for index in range(len(found))]


def _lowest(size: Amount, taken: Sequence[Block], of: Amounts) -> Amount:
    """The lowest place for `size` that is proven to be beside every block of `taken`."""
    ordered = sorted(taken, key=lambda block: (of.typical(block.offset), block.lifetime.first))
    ceilings: list[Amount | None] = [None] * (len(ordered) + 1)  # at most the offset of every block from here on
    for index in range(len(ordered) - 1, -1, -1):
        above = ceilings[index + 1]
        offset = ordered[index].offset
        ceilings[index] = offset if above is None else amounts.lower(offset, above)
    floor = ZERO  # at least the end of every block before here
    for block, ceiling in zip(ordered, ceilings, strict=False):
        if ceiling is not None and amounts.covers(ceiling, amounts.add(floor, size)):
            return floor
        floor = amounts.upper(floor, block.end)
    return floor


class _Conflicts:
    """Which storages live at the same time as a given one; `found` is in the order of `first`."""

    def __init__(self, found: Sequence[Lifetime]) -> None:
        assert all(one.first <= other.first for one, other in pairwise(found))
        self._found = found
        self._starts = [lifetime.first for lifetime in found]
        self._alive: list[list[int]] = []
        alive: list[int] = []
        for index, lifetime in enumerate(found):
            alive = [other for other in alive if found[other].last >= lifetime.first]
            self._alive.append(alive)
            alive = [*alive, index]

    def of(self, index: int) -> Iterator[int]:
        yield from self._alive[index]
        yield from range(index + 1, bisect_right(self._starts, self._found[index].last))
