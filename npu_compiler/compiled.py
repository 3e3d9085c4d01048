"""A compiled graph: what calls it, and what is known of how it was made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import TreeSpec

from npu_compiler.aclgraph.ledger import Ledger
from npu_compiler.config import Options
from npu_compiler.fusion_kernels.chosen import providers
from npu_compiler.fusion_kernels.drop_counts import DropCounts
from npu_compiler.graph import once
from npu_compiler.graph.rolled import Rolled, whole
from npu_compiler.passes.record import PassRecord, report_lines
from npu_compiler.plan import memory, weight_layout
from npu_compiler.plan.ahead import Ahead
from npu_compiler.plan.memory import MemoryPlan
from npu_compiler.plan.order import Arrangement
from npu_compiler.stages import Stages
from npu_compiler.units import in_bytes
from npu_compiler.watching import Notes, told, warn_of_absent


@dataclass(frozen=True)
class Interface:
    """How a dynamo graph is called.

    Attributes:
        names: its inputs, in the terms of the user's model.
        place: where the model makes the graph's first call.
        returned: the structure of what it returns; None where that is flat.
    """

    names: Sequence[str]
    place: str
    returned: TreeSpec | None


class CompiledGraph:
    """What a dynamo graph became. Calling it does what the graph did.

    Attributes:
        name: a label for reports and dumps.
        options: the options it was compiled with.
        records: what each pass did, in order.
        program: the program after the passes, with equal layers rolled up where it is captured like that; None where
            gradients are needed: it is neither rewritten nor captured. `graph`: the same, written out.
        arrangement: the order of calls that was chosen; None where the option `reorder` is off or the program was
            found in a cache, in order.
        ledger: captures and replays; None where nothing is captured (compile_fx), or by npugraph_ex.
        streams: what the streams that were planned inside of captures made by others are estimated to save, by sizes.
        weights: which of them are laid out in FRACTAL_NZ; None where the option `weight_nz` is off.
        constants: the values that are computed once, which the program has as its last inputs; None without any.
        ahead: the broadcasts that were begun early; None where the program has none of what it keeps.
        stored: what the cache did for it, as text; empty without a cache.
        key: what decides about the result, part by part: the key of the cache. Empty without a cache.
        missed: what differed from the nearest program that was stored before, where this one had to be stored.
        stages: what compiling, first calls and captures cost.
        dumped: where its part of a bundle is, and how large; empty without a dump.
        batch: how many rows of each call are no padding, and its step, where somebody writes that (watched.Notes).
        notes: the memory of what the option `watch` names; None without it.
        drops: counts what the option `token_drop` drops; None where nothing can be dropped.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.options = options
        self.records: list[PassRecord] = []
        self.program: fx.GraphModule | Rolled | None = None
        self.arrangement: Arrangement | None = None
        self.ledger: Ledger | None = None
        self.streams: Mapping[str, str] = {}
        self.constants: once.Split | None = None
        self.ahead: Ahead | None = None
        self.weights: weight_layout.Layout | None = None
        self.stored = ""
        self.key: dict[str, str] = {}
        self.missed: list[str] = []
        self.stages = Stages()
        self.dumped = ""
        self.batch: torch.Tensor | None = None
        self.notes: Notes | None = None
        self.drops: DropCounts | None = None
        self._call: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        assert self._call is not None, "only a finished CompiledGraph leaves this module"
        return self._call(*args)

    @property
    def graph(self) -> fx.GraphModule | None:
        return None if self.program is None else whole(self.program)

    def watch(self) -> None:
        """Prints and saves what is watched behind each call, and warns of what is not there."""
        assert self._call is not None, "only a finished CompiledGraph leaves this module"
        warn_of_absent(self.name, [self.records])
        self._call = told(self._call, self.notes, self.options, self.name)

    @property
    def __code__(self) -> CodeType:
        """What debuggers of torch.compile, such as depyf, look for in a compiled function."""
        return type(self).__call__.__code__

    def __str__(self) -> str:
        operators = providers(self.graph.graph) if self.graph else []
        parts: list[object] = [
            *report_lines(self.records),
            *operators,
            *self._planned(),
            *([self.stages] if self.stages.costs else []),
            *(self.drops.read() if self.drops else []),
            *([self.ledger] if self.ledger else []),
        ]
        if self.graph is None:
            parts.append("gradients are needed: no passes, no captures")
        elif self.options.capture_with != "ascend" and self.ledger is None:
            parts.append(f"captured by {self.options.capture_with}, which keeps no ledger")
        if self.stored:
            parts.append(f"program {self.stored}")
        if self.dumped:
            parts.append(f"dumped to {self.dumped}")
        return "\n".join([self.name, *(f"  {line}" for part in parts for line in str(part).splitlines())])

    @functools.cached_property
    def memory(self) -> MemoryPlan | None:
        """What the program's own storages take, for every size; made when it is first asked for."""
        return memory.plan(self.graph.graph) if self.graph else None

    def _planned(self) -> list[str]:
        order = [f"order: {self.arrangement}"] if self.arrangement else []
        if self.constants:
            order.append(f"constants: {len(self.constants.values)} computed once, {in_bytes(self.constants.size)}")
        order += [str(self.ahead)] if self.ahead else []
        weights = [str(self.weights)] if self.weights else []
        peak = [f"memory: {self.memory.summary}"] if self.memory else []
        return [*order, *weights, *peak, *(f"captured {sizes}: {saved}" for sizes, saved in self.streams.items())]
