"""Serving calls of a compiled program by replays of captured graphs.

The first call of a shape runs operator by operator; its results are the call's results, and the operators are warm for
the capture that follows. A capture executes nothing, so writes happen once. Every later call of that shape copies its
inputs in, launches the graph and copies the outputs out.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_npu
from torch import fx

from npu_compiler import reasons
from npu_compiler.aclgraph import modes
from npu_compiler.aclgraph.budget import Budget
from npu_compiler.aclgraph.capture import EXCLUSIVE, capture, refuse_uncapturable
from npu_compiler.aclgraph.forecast import Forecast
from npu_compiler.aclgraph.graph_inputs import GraphInputs
from npu_compiler.aclgraph.inputs import Buffers, InputPlan, writable
from npu_compiler.aclgraph.labels import Labels
from npu_compiler.aclgraph.ledger import Capture, Ledger
from npu_compiler.aclgraph.outputs import OutputPlan
from npu_compiler.aclgraph.program_call import ProgramCall
from npu_compiler.aclgraph.sizes import NumberOutputs
from npu_compiler.aclgraph.streams import Streams, summary
from npu_compiler.config import Options
from npu_compiler.errors import CaptureBudgetWarning
from npu_compiler.graph.effects import draws_on_host, is_effect, tensors
from npu_compiler.graph.rolled import Rolled
from npu_compiler.graph.source import beginning, first_use, where
from npu_compiler.plan.schedule import StreamPlan
from npu_compiler.reasons import Why
from npu_compiler.stages import CAPTURE, FIRST_CALL, Stages

Key = tuple[Any, ...]
_stream_handle = torch_npu._C._npu_getCurrentRawStreamNoWait  # an int; torch.npu.current_stream() takes microseconds
MOVES_BEFORE_COPY = 2
"""After this many recaptures that did not pay because a written input moved, it is copied in and back instead."""
PAYING_REPLAYS = 4
"""A capture replayed this often has paid: a KV cache that moves once a generation is better captured again than copied
at every token."""


@dataclass
class Replayable:
    """A captured graph and what a replay of it needs.

    Attributes:
        replay: launches the graph; NPUGraph's own method writes a line for logs first, at a microsecond a call.
        inputs: which arguments have to be where they were, and which are copied in.
        addresses: by the position of an argument, where its address is part of the graph.
        buffers: by the position of an argument that is copied in, what the graph reads.
        returns: (argument position, the buffer to copy back from).
        streams: how many it uses.
        replays: how often it was replayed.
    """

    graph: Any
    replay: Callable[[], None]
    inputs: GraphInputs
    addresses: dict[int, int]
    buffers: dict[int, torch.Tensor]
    returns: list[tuple[int, torch.Tensor]]
    outputs: OutputPlan
    streams: int
    replays: int = 0


class Replayer:
    """A program, called with its flat arguments.

    Args:
        program: the fused program. `stable`: positions of inputs with lasting addresses.
        names: the inputs' names in the user's model, for messages.
        stages: what first calls and captures cost is counted here.
        streams: plans the streams of its captures; None: as the options say.

    Attributes:
        ledger: its captures and calls. `why_uncaptured`: why no call is captured; None where calls are.

    Raises:
        CaptureError, DeviceError: the program can't be captured (see there), unless capture is off.
    """

    def __init__(
        self,
        program: fx.GraphModule | Rolled,
        stable: Sequence[int],
        options: Options,
        name: str,
        names: Sequence[str],
        *,
        stages: Stages | None = None,
        streams: Streams | None = None,
    ) -> None:
        place = beginning(program.graph)
        self.ledger = Ledger(f"{name} ({place})" if place else name)
        self._program = program
        self._stages = stages or Stages()
        self._labels = Labels(name)
        self._call = ProgramCall(program, self._labels, called_once=True)
        self._options = options
        self._name = name
        self._plan = InputPlan.of(program, stable, names)
        self.why_uncaptured = _why_not(program.graph, self._plan, options)
        if self.why_uncaptured is None:
            refuse_uncapturable(program.graph)
            self._device = _device(program.graph)
        self._numbers = NumberOutputs(program.graph, set(self._plan.sizes))
        self._returned_inputs = _returned_inputs(program.graph)
        self._calls = _calls(program)
        self._allowed = frozenset(options.capture_sizes)
        self._graphs: OrderedDict[Key, Replayable] = OrderedDict()
        self._moves: Counter[int] = Counter()
        self._buffers = Buffers()
        self._budget = Budget(options, Forecast(program, self._plan.sizes), self._calls)
        self._refused: dict[Key, Why] = {}  # shapes that don't fit into the budget, and what is said of each
        self._evicted: set[Key] = set()
        self._captured: Key | None = None  # the shape captured last
        self._pool: Any = None
        self._handed_out: OutputPlan | None = None  # the outputs of the last replay
        self._streams = streams or Streams.chosen(program, options)
        self._last_stream: Any = None  # of the last replay, and CANN's handle of it
        self._last_handle: int | None = None
        # Copies in, launch and copies out of one call must not mix with another thread's: they share the buffers.
        self._lock = threading.RLock()

    def __call__(self, *args: Any) -> Any:
        if self.why_uncaptured is not None:
            return self._uncaptured(args, self.why_uncaptured)
        if torch.accelerator.current_device_index() != self._device:
            with torch.npu.device(self._device):
                return self(*args)
        with self._lock:
            key = tuple([args[position] for position in self._plan.sizes])
            found = self._graphs.get(key)
            if found is None:
                return self._unknown(key, args)
            if moved := found.inputs.moved(args):
                reason = self._what_moved(found, moved, args)
                del found  # its memory is for the graph that takes its place
                self._drop(key)
                return self._first(key, args, reason)
            self._graphs.move_to_end(key)
            return self._replay(found, args)

    def _unknown(self, key: Key, args: Sequence[Any]) -> Any:
        """Serves a call of a shape that has no graph."""
        if self._allowed and not self._allowed.issuperset(key):
            return self._uncaptured(args, reasons.SIZE_NOT_LISTED.said())
        if key in self._refused:
            return self._uncaptured(args, self._refused[key])
        return self._first(key, args, self._what_is_new(key))

    def _replay(self, found: Replayable, args: tuple[Any, ...]) -> list[Any]:
        if self._handed_out is not None:
            self._handed_out.refuse_stale()
        self._handed_out = found.outputs
        self._follow_last_stream()
        for position in found.inputs.copy(args):
            writable(found.buffers[position]).copy_(writable(args[position]), non_blocking=True)
        found.replay()
        for position, buffer in found.returns:
            args[position].copy_(buffer, non_blocking=True)
        found.replays += 1
        self.ledger.replays += 1
        return self._numbers.fill(found.outputs.hand_out(args), args)

    def _uncaptured(self, args: Sequence[Any], reason: Why) -> Any:
        self.ledger.uncaptured[reason] += 1
        return self._call(*args)

    def _first(self, key: Key, args: Sequence[Any], reason: Why) -> Any:
        """Runs the call, then captures its shape."""
        with self._stages.stage(FIRST_CALL), modes.at_first_call(self._program.graph):
            results = self._uncaptured(args, reasons.FIRST_CALL.said())
        with self._stages.stage(CAPTURE), modes.in_capture():
            self._capture_shape(key, args, reason)
        return results

    def _capture_shape(self, key: Key, args: Sequence[Any], reason: Why) -> None:
        """Captures a shape, unless that would not fit into the budget."""
        plan = self._streams.plan(args)
        needs = self._new_buffers(args), plan.streams if plan is not None else 1
        if not self.ledger.captures:
            self.ledger.outlook = self._budget.outlook(self._options.capture_sizes, *needs)
        refusal = self._budget.refusal(key, *needs)
        if refusal:
            self._refuse(key, refusal)
            return
        while len(self._graphs) >= self._options.capture_limit:
            evicted = next(iter(self._graphs))
            self._drop(evicted)
            self._evicted.add(evicted)
            self.ledger.evicted.append(self._key_text(evicted))
        try:
            self._graphs[key] = self._capture(key, args, reason, plan)
        except torch.OutOfMemoryError as error:
            self._refuse(key, f"the device has no memory left for it: {str(error).splitlines()[0]}")

    def _refuse(self, key: Key, why: str) -> None:
        """Lets a shape run uncaptured from now on, and says so once."""
        size = self._key_text(key)
        self._refused[key] = reasons.OVER_BUDGET.said(f"{size}, {why}")
        warnings.warn(
            f"{self._name} runs {size} uncaptured: {why}; other sizes are captured as before"
            f" ({beginning(self._program.graph)}). {reasons.OVER_BUDGET.change.capitalize()}",
            CaptureBudgetWarning,
            stacklevel=2,
        )

    def _drop(self, key: Key) -> None:
        gone = self._graphs.pop(key)
        self._budget.spent.streams -= gone.streams
        with EXCLUSIVE:
            torch.npu.synchronize()  # it may still be running
            gone.graph.reset()

    def _capture(self, key: Key, args: Sequence[Any], reason: Why, plan: StreamPlan | None) -> Replayable:
        copied_back = self._copied_back()
        bound = [*self._plan.stable, *(position for position in self._plan.written if position not in copied_back)]
        new_buffers = self._new_buffers(args)
        feeds = [(i, self._buffers.like(i, args[i])) for i in (*self._plan.copied, *copied_back)]
        arguments = list(args)
        for position, buffer in feeds:
            arguments[position] = buffer
        room = self._new_pool() if not self._graphs else 0
        made = capture(
            self._program,
            arguments,
            name=f"{self._name} ({self._key_text(key)})",
            pool=self._pool,
            streams=self._streams.of(plan),
            error_mode=self._options.capture_error_mode,
            plan=plan,
            labels=self._labels,
            room=room,
        )
        streams = plan.streams if plan is not None else 1
        self._budget.add(made.milliseconds / 1e3, made.mebibytes, new_buffers, streams)
        self._captured = key
        self.ledger.add(
            Capture(
                self._key_text(key),
                reason,
                made.milliseconds,
                made.mebibytes,
                self._calls,
                summary(plan),
                made.graph_id,
            ),
            plan,
        )
        addresses = {position: args[position].data_ptr() for position in bound}
        return Replayable(
            graph=made.graph,
            replay=super(torch.npu.NPUGraph, made.graph).replay,  # type: ignore[misc]  # of C++, without types
            inputs=GraphInputs(list(addresses.items()), feeds),
            addresses=addresses,
            buffers=dict(feeds),
            returns=[(position, buffer) for position, buffer in feeds if position in copied_back],
            outputs=OutputPlan(
                made.outputs,
                self._returned_inputs,
                [args[position] for position in bound],
                self._options.clone_outputs,
                self._place_of_output,
            ),
            streams=streams,
        )

    def _new_pool(self) -> int:
        """Takes a pool for the captures to come, and returns how many bytes the largest of them needs, if it is known.

        All shapes share it: they never run at the same time. A pool whose graphs are all gone takes no new ones.
        """
        self._pool = torch.npu.graph_pool_handle()
        self._budget.spent.pool = 0.0
        return self._budget.room(self._options.capture_sizes)

    def _copied_back(self) -> list[int]:
        return [position for position in self._plan.written if self._moves[position] >= MOVES_BEFORE_COPY]

    def _new_buffers(self, args: Sequence[Any]) -> int:
        """Bytes that a capture for these arguments takes for its inputs."""
        return sum(self._buffers.growth(i, args[i]) for i in (*self._plan.copied, *self._copied_back()))

    def _follow_last_stream(self) -> None:
        """Replays share buffers and pool, so one on another stream has to wait for the last."""
        handle = _stream_handle(self._device)
        if handle == self._last_handle:
            return
        stream = torch.npu.current_stream(self._device)
        if self._last_stream is not None:
            stream.wait_stream(self._last_stream)
        self._last_stream, self._last_handle = stream, handle

    def _what_moved(self, found: Replayable, moved: Sequence[int], args: Sequence[Any]) -> Why:
        for position in moved:
            if position in self._plan.written and found.replays < PAYING_REPLAYS:
                self._moves[position] += 1
        copied = [i for i in moved if self._moves[i] >= MOVES_BEFORE_COPY]
        note = "; it is copied in and back from now on" if copied else ""
        texts = [f"{self._plan.names[i]} {found.addresses[i]:#x} -> {args[i].data_ptr():#x}" for i in moved]
        return reasons.MOVED.said(f"{', '.join(texts)}{note}")

    def _what_is_new(self, key: Key) -> Why:
        if key in self._evicted:
            return reasons.DRIVEN_OUT.said(f"capture_limit={self._options.capture_limit}")
        if self._captured is None:
            return reasons.FIRST_SHAPE.said()
        pairs = zip(self._plan.sizes, self._captured, key, strict=True)
        new = (f"{self._plan.names[i]} {old} -> {size}" for i, old, size in pairs if old != size)
        return reasons.NEW_SHAPE.said(", ".join(new))

    def _place_of_output(self, position: int) -> str:
        (outputs,) = self._program.graph.output_node().args
        assert isinstance(outputs, (list, tuple))
        return where(outputs[position]) if isinstance(outputs[position], fx.Node) else ""

    def _key_text(self, key: Key) -> str:
        pairs = zip((self._plan.names[i] for i in self._plan.sizes), key, strict=True)
        return ", ".join(f"{name}={size}" for name, size in pairs) or "static"


def _why_not(graph: fx.Graph, plan: InputPlan, options: Options) -> Why | None:
    """Why a program is called uncaptured; None if it is captured."""
    if not options.capture:
        return reasons.CAPTURE_OFF.said()
    calls = [node for node in graph.nodes if node.op == "call_function"]
    devices = {tensor.device.type for node in (*calls, *graph.find_nodes(op="placeholder")) for tensor in tensors(node)}
    if "npu" not in devices:
        return reasons.NO_DEVICE_TENSOR.said()
    if not any("npu" in {tensor.device.type for tensor in tensors(node)} for node in calls):
        return reasons.NOTHING_ON_DEVICE.said()
    if plan.host:
        listed = ", ".join(plan.names[position] for position in plan.host)
        placeholders = graph.find_nodes(op="placeholder")
        return reasons.HOST_SCALAR.said(f"{listed} ({first_use(graph, (placeholders[i] for i in plan.host))})")
    draw = next((node for node in calls if draws_on_host(node)), None)
    if draw is not None:
        return reasons.HOST_RANDOM.said(f"{draw.target} ({where(draw)})")
    effect = next(filter(is_effect, calls), None)
    if effect is not None:
        return reasons.HOST_EFFECT.said(f"{effect.args[1]} ({where(effect)})")
    return None


def _calls(program: fx.GraphModule | Rolled) -> int:
    """How many calls a program makes."""
    if isinstance(program, Rolled):
        return program.calls
    return sum(node.op == "call_function" for node in program.graph.nodes)


def _device(graph: fx.Graph) -> int:
    """Index of the device the program runs on. A tensor without an index is on the current one."""
    found = [tensor.device for node in graph.nodes for tensor in tensors(node) if tensor.device.type == "npu"]
    index = next((device.index for device in found if device.index is not None), None)
    return torch.npu.current_device() if index is None else index


def _returned_inputs(graph: fx.Graph) -> dict[int, int]:
    """Outputs that are inputs of the program: output position -> argument position."""
    positions = {node: position for position, node in enumerate(graph.find_nodes(op="placeholder"))}
    returned = graph.output_node().args[0]
    assert isinstance(returned, (list, tuple))
    return {index: positions[node] for index, node in enumerate(returned) if node in positions}
