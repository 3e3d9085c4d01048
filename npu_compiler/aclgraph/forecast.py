"""What captures of a program will take, before they are made: from the memory plan, for any sizes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from npu_compiler.graph.rolled import Rolled, whole
from npu_compiler.plan import memory
from npu_compiler.plan.memory import MemoryPlan


class Forecast:
    """The memory of a program's captures.

    Args:
        program: the program.
        key: positions of the inputs that are sizes of the key, as in InputPlan.sizes.
    """

    def __init__(self, program: fx.GraphModule | Rolled, key: Sequence[int]) -> None:
        self._program = program
        inputs = program.graph.find_nodes(op="placeholder")
        self._symbols = [_symbol(inputs[position].meta.get("val")) for position in key]

    @functools.cached_property
    def _plan(self) -> MemoryPlan:
        return memory.plan(whole(self._program).graph)

    def pool_bytes(self, key: Sequence[Any]) -> int:
        """What the pool needs for a graph of these sizes: results and outputs, without inputs. 0 where the plan can't
        say, as for sizes below the program's smallest."""
        values = zip(self._symbols, key, strict=True)
        try:
            return self._plan.peak({symbol: int(size) for symbol, size in values if symbol is not None})
        except (KeyError, ValueError):
            return 0

    def keys(self, sizes: Sequence[int]) -> list[tuple[int, ...]]:
        """The keys that a list of sizes stands for, largest first; none unless the program has one size.

        With several sizes every combination could come, and few do.
        """
        if len(self._symbols) != 1 or self._symbols[0] is None:
            return []
        return [(size,) for size in sorted(sizes, reverse=True)]


def _symbol(value: object) -> sympy.Symbol | None:
    if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
        return value.node.expr
    return None
