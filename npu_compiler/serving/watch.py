"""Printing and saving what the option `watch` names, step by step."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from npu_compiler.backend import CompiledGraph, Notes, new_batch, watch_output
from npu_compiler.config import Options

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Watch:
    """What the pieces of one compiled model note.

    Attributes:
        config: of the engine. `batch`: what the runner writes before each step (compile_fx).
        notes: of each piece, in order.
    """

    every: ClassVar[weakref.WeakSet[Watch]] = weakref.WeakSet()
    """Those that are alive; vLLM makes compilers and runners apart from each other, both from the engine's config."""

    def __init__(self, config: VllmConfig) -> None:
        self.config, self.batch = config, new_batch()
        self.notes: list[Notes] = []
        self.every.add(self)

    def add(self, compiled: CompiledGraph) -> None:
        """Takes a compiled piece."""
        if compiled.notes is not None:
            self.notes.append(compiled.notes)

    def write(self, rows: int, step: int) -> None:
        """Tells the device of which step, and of how many tokens, it notes. It does so in the stream's order."""
        self.batch[:1].fill_(rows)
        self.batch[1:].fill_(step)


class Steps:
    """The steps of a runner, each told behind it.

    Args:
        config: the engine's. `options`: of its compiler.
    """

    def __init__(self, config: VllmConfig, options: Options) -> None:
        self._config = config
        self._output = watch_output(options, "vllm")

    @contextlib.contextmanager
    def step(self, number: int, tokens: int) -> Iterator[None]:
        """The forward pass of a step runs in it. What runs outside, as captures do, is not told."""
        watches = [watch for watch in Watch.every if watch.config is self._config]
        for watch in watches:
            watch.write(tokens, number)
        yield
        for watch in watches:
            watch.write(0, number)
        if self._output is not None:
            self._output.write([notes for watch in watches for notes in watch.notes])
