"""Calls of a program that nobody here captures: run as they are, inside of somebody else's capture, or recorded."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from npu_compiler.aclgraph.labels import Labels
from npu_compiler.aclgraph.streams import StreamRunner, Streams, summary
from npu_compiler.graph.rolled import Rolled, whole
from npu_compiler.graph.running import CallByCall, run
from npu_compiler.runtime import trace

logger = logging.getLogger(__name__)


class ProgramCall:
    """A program's own `forward`; while it is captured or recorded, run call by call with labels.

    A capture that somebody else has begun, such as vLLM's, gets the streams that are planned for its sizes: they fork
    from the stream that is captured, and are joined before the call returns.

    Args:
        program: what to call.
        streams: plans the streams inside of a capture; None: all calls stay on the captured one.
        called_once: most likely, so that its code is generated at the second call; else it is now.

    Attributes:
        planned: what several streams are estimated to save, by the sizes that were captured; nothing for a size that
            one stream serves as well.
    """

    def __init__(
        self,
        program: fx.GraphModule | Rolled,
        labels: Labels,
        streams: Streams | None = None,
        called_once: bool = False,
    ) -> None:
        self.planned: dict[str, str] = {}
        self._program, self._labels, self._streams = program, labels, streams
        self._waits = called_once
        if not called_once:
            _LazyGraphModule.force_recompile(whole(program))

    def __call__(self, *args: Any) -> Any:
        capturing = torch.npu.is_current_stream_capturing()
        if capturing or trace.recording():
            return self._runner(args, capturing).results(args)
        if self._waits:
            self._waits = False
            return CallByCall(self._program).results(args)
        return run(whole(self._program), args)

    def _runner(self, args: tuple[Any, ...], capturing: bool) -> StreamRunner:
        main = torch.npu.current_stream()
        plan = self._streams.plan(args) if self._streams is not None and capturing else None
        if self._streams is None or plan is None:
            return StreamRunner(self._program, self._labels, None, [main])
        sizes = self._streams.text(args)
        self.planned[sizes] = summary(plan)
        logger.info("%s captured %s on %s", self._labels.name, sizes, self.planned[sizes])
        return StreamRunner(self._program, self._labels, plan, self._streams.beside(main, plan))
