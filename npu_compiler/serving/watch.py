"""What compiled pieces note on the device, step by step: values that the option `watch` names, tokens that
`token_drop` drops."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from npu_compiler.backend import CompiledGraph, DropCounts
from npu_compiler.config import Options
from npu_compiler.watching import Notes, new_batch, output_of, warn_of_absent

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Watch:
    """What the pieces of one compiled model note.

    Attributes:
        config: of the engine. `batch`: what the runner writes before each step (compile_fx).
        pieces: what was compiled, in order.
    """

    every: ClassVar[weakref.WeakSet[Watch]] = weakref.WeakSet()
    """Those that are alive; vLLM makes compilers and runners apart from each other, both from the engine's config."""

    def __init__(self, config: VllmConfig) -> None:
        self.config, self.batch = config, new_batch()
        self.pieces: list[CompiledGraph] = []
        self.every.add(self)

    def add(self, compiled: CompiledGraph) -> None:
        """Takes a compiled piece."""
        self.pieces.append(compiled)

    @property
    def notes(self) -> list[Notes]:
        """What each piece notes."""
        return [piece.notes for piece in self.pieces if piece.notes is not None]

    @property
    def drops(self) -> list[DropCounts]:
        """What counts each piece's drops."""
        return [piece.drops for piece in self.pieces if piece.drops is not None]

    def write(self, rows: int, step: int) -> None:
        """Tells the device of which step, and of how many tokens, it notes. It does so in the stream's order."""
        self.batch[:1].fill_(rows)
        self.batch[1:].fill_(step)


def is_noted(options: Options) -> bool:
    """Whether the options ask for anything that pieces note."""
    return bool(options.watch or options.token_drop)


class Steps:
    """The steps of a runner, each told behind it.

    Args:
        config: the engine's. `options`: of its compiler.
    """

    def __init__(self, config: VllmConfig, options: Options) -> None:
        self._config = config
        self._output = output_of(options, "vllm")
        self._warned = not options.watch

    @property
    def _watches(self) -> list[Watch]:
        return [watch for watch in Watch.every if watch.config is self._config]

    @property
    def drops(self) -> list[DropCounts]:
        """What counts the model's drops."""
        return [entry for watch in self._watches for entry in watch.drops]

    @contextlib.contextmanager
    def step(self, number: int, tokens: int) -> Iterator[None]:
        """The forward pass of a step runs in it. What runs outside, as captures do, is not told."""
        watches = self._watches
        if not self._warned:
            self._warned = True
            for watch in watches:
                warn_of_absent("the model", [piece.records for piece in watch.pieces])
        for watch in watches:
            watch.write(tokens, number)
        yield
        for watch in watches:
            watch.write(0, number)
        if self._output is not None:
            self._output.write([notes for watch in watches for notes in watch.notes])
