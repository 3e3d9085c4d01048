"""A graph through the stages of the compiler, compared with the graph as it was at every one of them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from npu_compiler.config import Options
from npu_compiler.graph import once
from npu_compiler.graph.spec import SpecCheck
from npu_compiler.passes import pipeline, reinplace
from npu_compiler.plan.order import arrange
from tests.properties.compare import Seen, Strides, copied, interpreted, promised_strides
from tests.properties.fragments import HALVES
from tests.properties.graphs import Built
from tests.properties.streams import interleavings

SEED = 1
PASSES = pipeline.selected(Options())


class Stages:
    """Runs a program's graph through the stages. Those that leave it as it was are not run again: what is compared is
    each different graph once. The graphs between are interpreted, the one that is planned runs as generated code.

    Attributes:
        fired: how often each rule, or pass, fired.
        compared: how many graphs were compared with the program's own.
        left_out: the passes without which the program was compared.
        changed: for each pass that changed the program, its place in the pipeline and the program before, which
            `without` uses up.
    """

    def __init__(self, built: Built) -> None:
        self.fired: Counter[str] = Counter()
        self.compared = 0
        self.left_out: list[str] = []
        self.changed: dict[str, tuple[int, fx.GraphModule]] = {}
        self._built = built
        longer = {size: size + 1 + 2 * (size % 2) for size in built.symbols.values()}
        self._lengths = [one for one in ({}, longer) if built.serves(one)][: 2 if longer else 1]
        assert self._lengths, "the guards don't hold for what the program was made for"
        self._exact: dict[int, list[Tensor]] = {}
        self._expected = [self._seen(_run(built.module), lengths) for lengths in self._lengths]

    def prefixes(self, check: bool) -> fx.GraphModule:
        """After every prefix of the pipeline; returns the program at the end.

        Args:
            check: whether the spec check runs after each pass that changed the program.
        """
        module = copied(self._built.module)
        spec = SpecCheck(module) if check else None
        before, text = copied(module), _text(module)
        for index, entry in enumerate(PASSES):
            guards = len(self._built.environment.guards)
            record = pipeline.run_pass(entry, module, Options())
            self.fired.update(one.rule.split(":")[0] for one in record.fired)
            if _text(module) == text:
                continue
            if spec is not None:
                spec.after(entry.name, module)
            assert entry.name == reinplace.NAME or len(self._built.environment.guards) == guards, f"{entry.name} guards"
            self.compare(_run(module), f"after the prefix up to {entry.name}")
            self.changed.setdefault(entry.name, (index, before))
            before, text = copied(module), _text(module)
        return module

    def without(self, name: str) -> None:
        """With one pass left out."""
        index, module = self.changed[name]
        assert name not in self.left_out, "its graph is used up"
        for entry in PASSES[index:]:
            if entry.name != name:
                pipeline.run_pass(entry, module, Options())
        self.left_out.append(name)
        self.compare(_run(module), f"without {name}")

    def planned(self, module: fx.GraphModule) -> None:
        """In the order that needs least memory, and on several streams in the orders that the plan allows."""
        arrange(module.graph)
        module.recompile()
        self.compare(module, "in the order that needs least memory")
        for text, interleaved in interleavings(module):
            self.compare(_run(interleaved), f"on several streams, {text}")
        part = once.split(module)
        if part is not None:
            values = once.Once(part)
            self.compare(lambda *given: module(*given, *values(given)), "with constants computed once")

    def compare(self, module: Callable[..., Any], stage: str) -> None:
        """Asserts that `module` does what the program does."""
        for place, lengths in enumerate(self._lengths):
            got = self._seen(module, lengths)
            exact = functools.partial(self._exactly, place)
            promised = functools.partial(self._promised, lengths) if self._built.program.dtype in HALVES else None
            got.assert_same(self._expected[place], f"{stage}, sizes {lengths or 'as drawn'}", exact, promised)
        self.compared += 1

    def _exactly(self, place: int) -> list[Tensor]:
        if place not in self._exact:
            torch.default_generator.manual_seed(SEED)
            self._exact[place] = self._built.exact(self._built.arguments(SEED, self._lengths[place]))
        return self._exact[place]

    def _promised(self, lengths: dict[int, int]) -> list[Strides]:
        return [promised_strides(_run(self._built.module), self._built.arguments(SEED, lengths))]

    def _seen(self, module: Callable[..., Any], lengths: dict[int, int]) -> Seen:
        given = self._built.arguments(SEED, lengths)
        torch.default_generator.manual_seed(SEED)
        tensors = [item for item in given if isinstance(item, Tensor)]
        return Seen(lambda *_: module(*given), tensors)


def check_all(built: Built, disabled: int, plan: bool = False, check: bool = True) -> Stages:
    """The program equals itself behind every prefix of the pipeline, and with one pass left out.

    Args:
        disabled: picks which one, among those that change the program.
        plan: whether to plan it too.
        check: whether to run the spec check.
    """
    stages = Stages(built)
    module = stages.prefixes(check)
    if stages.changed:
        stages.without(list(stages.changed)[disabled % len(stages.changed)])
    if plan:
        stages.planned(module)
    return stages


def _run(module: fx.GraphModule) -> Callable[..., Any]:
    return functools.partial(interpreted, module.graph)


def _text(module: fx.GraphModule) -> list[tuple[Any, ...]]:
    """What decides what a program does; equal lists are equal programs."""
    return [(node, node.target, node.args, node.kwargs) for node in module.graph.nodes]
