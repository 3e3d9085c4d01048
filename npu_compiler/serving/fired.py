"""What passes did to the model of an engine, for its run report."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import TYPE_CHECKING, ClassVar

from npu_compiler.backend import CompiledGraph

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Fired:
    """How often each pass rewrote something in the programs of one engine, in the order of the passes.

    Attributes:
        config: of the engine.
        rewrites: by the pass's name; in equal layers that are compiled once, in all of them.
    """

    every: ClassVar[weakref.WeakSet[Fired]] = weakref.WeakSet()
    """Those that are alive; vLLM makes compilers and runners apart from each other, both from the engine's config."""

    def __init__(self, config: VllmConfig) -> None:
        self.config = config
        self.rewrites: Counter[str] = Counter()

    @classmethod
    def of(cls, config: VllmConfig) -> Fired:
        """That of an engine, which lives as long as somebody has it."""
        found = next((one for one in cls.every if one.config is config), None)
        if found is None:
            found = cls(config)
            cls.every.add(found)
        return found

    def add(self, compiled: CompiledGraph) -> None:
        """Takes a compiled or loaded program."""
        for record in compiled.records:
            if record.fired:
                self.rewrites[record.name] += sum(entry.layers for entry in record.fired)
