"""What a task of the device says of itself in a timeline: the call of the program that it belongs to."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import torch
from torch import fx

from npu_compiler.graph.running import CallByCall
from npu_compiler.graph.source import operator_name, place
from npu_compiler.runtime import trace


class Labels:
    """The labels of a program's calls, made when they are first asked for.

    Attributes:
        name: of the compiled graph.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._texts: dict[fx.Node, bytes] = {}

    def set(self, node: fx.Node, stream: Any) -> int:
        """The tasks of `stream`, and of its capture, belong to `node` from now on. Returns the captured graph's id
        (runtime.trace.label)."""
        if node not in self._texts:
            self._texts[node] = self._text(node)
        return trace.label(stream, self._texts[node])

    def end(self, stream: Any) -> None:
        """The tasks of `stream`, and of its capture, belong to no call any more."""
        trace.label(stream, b"")

    def _text(self, node: fx.Node) -> bytes:
        found = place(node)
        origin = node.meta.get("npu_origin") or {}
        said = {
            "graph": self.name,
            "node": node.name,
            "call": operator_name(node.target),
            "module": found.module,
            "source": found.code,
            "pass": origin.get("pass", ""),
        }
        return json.dumps({name: text for name, text in said.items() if text}).encode()


class Labeller(CallByCall):
    """Runs a program call by call, so that each task's label names its call.

    Attributes:
        graph_id: of the captured graph, where that is known; else 0.

    Args:
        stream: the one that is captured; None: the current one.
    """

    def __init__(self, program: fx.GraphModule, labels: Labels, stream: Any = None) -> None:
        super().__init__(program)
        self.graph_id = 0
        self._labels = labels
        self._stream = torch.npu.current_stream() if stream is None else stream

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as failed:
            failed.callback(self._end_quietly)
            result = super().run(*args, **kwargs)
            failed.pop_all()
        self._labels.end(self._stream)
        return result

    def _end_quietly(self) -> None:
        """Behind an error, which is the one to see: what torch_npu had left to hand over may fail as well."""
        with contextlib.suppress(RuntimeError):
            self._labels.end(self._stream)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function":
            # This hands over what the call before left to torch_npu's queue: if that fails, `current` is still it.
            self.graph_id = self._labels.set(n, self._stream) or self.graph_id
        return super().run_node(n)
