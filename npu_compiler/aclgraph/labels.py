"""What a task of the device says of itself in a timeline: the call of the program that it belongs to."""

from __future__ import annotations

import contextlib
import functools
import json
from typing import Any

import torch
from torch import fx

from npu_compiler.graph.rolled import Rolled, Stamped
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
        self._texts: dict[str, bytes] = {}

    def set(self, call: fx.Node | Stamped, stream: Any) -> int:
        """The tasks of `stream`, and of its capture, belong to `call` from now on. Returns the captured graph's id
        (runtime.trace.label)."""
        if call.name not in self._texts:
            self._texts[call.name] = self._text(call)
        return trace.label(stream, self._texts[call.name])

    def repeat(self, graph_id: int, rolled: Rolled) -> None:
        """Labels the tasks of a captured graph that repeat those of a rolled program's last period, call by call. Where
        a repetition has other tasks, they all keep the label of its first call."""
        tasks: dict[str, list[int]] = {}
        for index, text in enumerate(trace.labels(graph_id)):
            tasks.setdefault(text, []).append(index)
        calls = [call for call in rolled.template for _ in tasks.get(self._texts[call.name].decode(), ())]
        for times in rolled.repetitions:
            first = rolled.stamped(rolled.template[0], times)
            found = tasks.get(self._texts[first.name].decode(), [])
            if len(found) == len(calls) and found[-1] - found[0] == len(found) - 1:
                texts = [self._text(rolled.stamped(call, times)) for call in calls]
                trace.label_nodes(graph_id, found[0], texts)

    def end(self, stream: Any) -> None:
        """The tasks of `stream`, and of its capture, belong to no call any more."""
        trace.label(stream, b"")

    def _text(self, call: fx.Node | Stamped) -> bytes:
        found = place(call)
        origin = call.meta.get("npu_origin") or {}
        module = f'"module": {json.dumps(found.module)}, ' if found.module else ""
        parts = (self.name, operator_name(call.target), found.code, origin.get("pass", ""))
        return f'{{"node": "{call.name}", {module}{_of_equal_calls(*parts)}}}'.encode()


@functools.lru_cache(maxsize=1024)
def _of_equal_calls(graph: str, call: str, source: str, made_by: str) -> str:
    """What a label says of a call that equal layers have in common: it need not be written anew for each."""
    said = {"graph": graph, "call": call, "source": source, "pass": made_by}
    return json.dumps({name: text for name, text in said.items() if text})[1:-1]


class Labeller(CallByCall):
    """Runs a program call by call, so that each task's label names its call.

    Attributes:
        graph_id: of the captured graph, where that is known; else 0.

    Args:
        stream: the one that is captured; None: the current one.
        repeats: of a layer that is repeated, label the first call only: `label_repetitions` labels the others. Each
            label waits until torch_npu has handed over what came before.
    """

    def __init__(
        self, program: fx.GraphModule | Rolled, labels: Labels, stream: Any = None, repeats: bool = False
    ) -> None:
        super().__init__(program)
        self.graph_id = 0
        self._labels = labels
        self._stream = torch.npu.current_stream() if stream is None else stream
        self._starts = (self._rolled.template[0], *self._rolled.rest) if repeats and self._rolled is not None else None

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

    def label_repetitions(self) -> None:
        """Labels what `run` recorded of a rolled program's repeated layers, when the capture has ended."""
        if self._rolled is not None and self.graph_id:
            self._labels.repeat(self.graph_id, self._rolled)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and (not self._times or self._starts is None or n in self._starts):
            # This hands over what the call before left to torch_npu's queue: if that fails, `current` is still it.
            self.graph_id = self._labels.set(self.standing_for(n), self._stream) or self.graph_id
        return super().run_node(n)
