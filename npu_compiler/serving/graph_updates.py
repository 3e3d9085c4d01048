"""Host-side lengths of attention inside full graphs, replaced in device order.

`npu_fused_infer_attention_score` takes its lengths as host integers, so a capture freezes them. Each such operator is
captured as a task group behind an external event, and a replay goes

    compute stream:  ... | replay: ... wait(event) reset(event) attention(lengths) ...
    update stream:   wait for the compute stream's work so far | update the group | record(event) | next group ...

The update stream waits for everything the compute stream was given before the replay, so an update never overtakes the
previous replay of the same graph; the events hold the replay back until its lengths are there. The host only enqueues.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
import torch_npu
from torch import Tensor
from torch_npu import npu

from npu_compiler.serving import streams

if TYPE_CHECKING:
    from collections.abc import Mapping


Integers: TypeAlias = "list[int] | torch._C.ScriptList[int]"
"""A ScriptList is taken as it is; of a Python list an operator asks each element, at each call, what it is."""


class Lengths(Protocol):
    """The host integers that change from step to step."""

    query_ends: list[int]
    kv_lengths: list[int]


@dataclass(frozen=True)
class AttentionCall:
    """One call of the operator, all but its lengths.

    query, output [tokens, heads, head size]; key, value [blocks, block size, kv heads * head size], or in fractal order
    [blocks, kv heads, head size / 16, block size, 16];
    block_table [rows, blocks a request] int32; mask [2048, 2048] bool.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    block_table: Tensor
    mask: Tensor
    output: Tensor
    num_heads: int
    num_kv_heads: int
    scale: float
    block_size: int
    workspace: Tensor | None = None
    softmax_lse: Tensor | None = None

    def _arguments(self, query_ends: Integers, kv_lengths: Integers) -> dict[str, object]:
        return {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "atten_mask": self.mask,
            "actual_seq_lengths": query_ends,
            "actual_seq_lengths_kv": kv_lengths,
            "block_table": self.block_table,
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "scale": self.scale,
            "input_layout": "TND",
            "sparse_mode": 3,
            "block_size": self.block_size,
        }

    def run(self, query_ends: Integers, kv_lengths: Integers) -> None:
        """Attends and writes `output`. Lengths as in NPUAttentionMetadata."""
        lse = self.softmax_lse if self.softmax_lse is not None else self.unused_lse()
        torch_npu.npu_fused_infer_attention_score.out(
            **self._arguments(query_ends, kv_lengths), workspace=self.workspace, out=[self.output, lse]
        )

    def unused_lse(self) -> Tensor:
        """What the operator wants as its second output when it is not to compute one."""
        return torch.empty(1, dtype=torch.float32, device=self.query.device)

    def max_workspace(self, query_ends: list[int], kv_lengths: list[int]) -> Tensor:
        """Memory that suffices for every length the operator may later be updated to."""
        return torch_npu._npu_fused_infer_attention_score_get_max_workspace(**self._arguments(query_ends, kv_lengths))

    def weak(self) -> AttentionCall:
        """The same call with tensors that do not keep the graph pool's memory from being used again."""
        return replace(
            self,
            query=torch_npu._C._weak_ref_tensor(self.query),
            output=torch_npu._C._weak_ref_tensor(self.output),
        )


@dataclass
class _Group:
    layer_name: str
    handle: object
    event: npu.ExternalEvent
    call: AttentionCall


@dataclass
class UpdateResources:
    """What the full graphs of one model share. They never run at the same time, so one of each is enough."""

    stream: npu.Stream = field(default_factory=npu.Stream)
    ready: npu.Event = field(default_factory=npu.Event)
    workspace: Tensor | None = None
    unused_lse: Tensor | None = None


class GraphUpdates:
    """The updatable attention operators of one full graph, in the order in which they run."""

    def __init__(self, resources: UpdateResources) -> None:
        self._resources = resources
        self._groups: list[_Group] = []
        self._operands: list[tuple[torch._C.ScriptList[int], torch._C.ScriptList[int]]] = []

    def __len__(self) -> int:
        return len(self._groups)

    def capture(self, layer_name: str, call: AttentionCall, lengths: Lengths) -> None:
        """Captures `call` on the current stream as a group that `enqueue` can give other lengths."""
        shared = self._resources
        # Asking makes tensors as large as the output. On a stream that is not captured they, and what stays, are not of
        # the graphs' pool: it would keep room for them, and what stays would lie between the tensors of later graphs.
        with npu.stream(shared.stream):
            needed = call.max_workspace(lengths.query_ends, lengths.kv_lengths)
            if shared.unused_lse is None:
                shared.unused_lse = call.unused_lse()
        if shared.workspace is None or shared.workspace.numel() < needed.numel():
            shared.workspace = needed
        call = replace(call, workspace=shared.workspace, softmax_lse=shared.unused_lse)
        stream = npu.current_stream()
        event = npu.ExternalEvent()  # one a group: torch_npu pairs each captured wait with one record
        event.wait(stream)
        event.reset(stream)
        npu.graph_task_group_begin(stream)
        call.run(lengths.query_ends, lengths.kv_lengths)
        handle = npu.graph_task_group_end(stream)
        self._groups.append(_Group(layer_name, handle, event, call.weak()))

    def before_replay(self) -> None:
        """Holds the update stream until all work given to the current stream so far is done."""
        self._resources.ready.record(streams.current())
        self._resources.stream.wait_event(self._resources.ready)

    def keep(self) -> None:
        """Lets the next replay run with the lengths it has."""
        for group in self._groups:
            group.event.record(self._resources.stream)

    def after_replay(self, metadata: Mapping[str, Lengths]) -> None:
        """Enqueues the update of every group with its layer's lengths. Never waits on the host."""
        stream = self._resources.stream
        operands: dict[int, tuple[Integers, Integers]] = {}  # of metadata, which the layers of a KV cache group share
        with streams.On(stream):
            for group in self._groups:
                lengths = metadata[group.layer_name]
                if id(lengths) not in operands:
                    operands[id(lengths)] = self._operand(len(operands), lengths)
                npu.graph_task_update_begin(stream, group.handle)
                group.call.run(*operands[id(lengths)])
                npu.graph_task_update_end(stream)
                group.event.record(stream)

    def _operand(self, place: int, lengths: Lengths) -> tuple[Integers, Integers]:
        """`lengths` as the operator takes them, in lists that are used again: filling one is quicker than making it."""
        if place == len(self._operands):
            self._operands.append((torch._C.ScriptList([0]), torch._C.ScriptList([0])))
        found = self._operands[place]
        for operand, integers in zip(found, (lengths.query_ends, lengths.kv_lengths), strict=True):
            operand.clear()
            operand.extend(integers)
        return found
