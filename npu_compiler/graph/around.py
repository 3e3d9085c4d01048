"""What a call of an inference program needs besides the program.

AOTAutograd's runtime wrapper (torch/_functorch/_aot_autograd/runtime_wrappers.py) serves every convention there is, at
every call. Where its own metadata says that a program needs next to nothing of it, the call that is made here does that
little: `lowering.functional` decides which programs those are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch._aot_autograd.runtime_wrappers import mark_dynamo_propagated_dynamic_indices


@dataclass(frozen=True)
class Around:
    """What is done around a program at each call. It runs without gradients and without autocast, whose casts it holds.

    Attributes:
        written: positions of the inputs that the program writes. Their version counters say so to autograd, which
            refuses to differentiate through values that are gone.
        dynamic: (position of an output, its dimensions of no fixed size), which torch notes on the output: what Dynamo
            compiles next of the model takes them as dynamic from the start.
        autocast: whether it was compiled under autocast.
    """

    written: tuple[int, ...] = ()
    dynamic: tuple[tuple[int, tuple[int, ...]], ...] = ()
    autocast: bool = False

    def call(self, run: Callable[..., Any], first: Callable[..., Any] | None = None) -> Callable[..., list[Any]]:
        """A callable that calls `run`, which returns a sequence.

        Args:
            first: is called instead of `run`, with nothing around it, at the first call.
        """
        written, dynamic, autocast, pending = self.written, self.dynamic, self.autocast, first

        def call(*args: Any) -> list[Any]:
            nonlocal pending
            if (wrapped := pending) is not None:
                outputs = list(wrapped(*args))
                pending = None  # a call that failed was no first call
                return outputs
            if autocast or torch.is_grad_enabled():
                with torch.no_grad(), torch._C._DisableAutocast() if autocast else contextlib.nullcontext():
                    outputs = list(run(*args))
            else:
                outputs = list(run(*args))
            if written:
                torch.autograd.graph.increment_version([args[position] for position in written])
            for position, dimensions in dynamic:
                mark_dynamo_propagated_dynamic_indices(outputs[position], set(dimensions))
            return outputs

        return call
