"""Captures a model, or a piece of one, into ACL graphs and replays them: one graph a batch size."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch_npu
from torch import Tensor
from torch_npu import npu
from vllm.compilation.counter import compilation_counter
from vllm.compilation.cuda_graph import CUDAGraphOptions, CUDAGraphWrapper
from vllm.compilation.monitor import validate_cudagraph_capturing_enabled
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor, ForwardContext, get_forward_context, is_forward_context_available
from vllm.platforms import current_platform

from npu_compiler import reasons
from npu_compiler.reasons import Why
from npu_compiler.runtime import trace
from npu_compiler.serving import dump
from npu_compiler.serving.attention import UPDATES_KEY
from npu_compiler.serving.graph_updates import GraphUpdates, UpdateResources
from npu_compiler.serving.platform import NPUPlatform
from npu_compiler.serving.report import GraphRecord

# Other threads (the collectives' watchdog, the copy of the last step's tokens) go on while this one captures.
CAPTURE_MODE = "thread_local"


@dataclasses.dataclass
class _Entry:
    graph: npu.NPUGraph
    output: Any
    updates: GraphUpdates
    record: GraphRecord
    addresses: list[int]


class ACLGraphWrapper(CUDAGraphWrapper):
    """vLLM's graph wrapper on torch_npu's NPUGraph.

    It derives from vLLM's wrapper for what vLLM finds by that type (`unwrap`, `clear_all_graphs`). The runtime mode and
    the batch descriptor in the forward context decide: another mode than this wrapper's calls through; an unknown
    descriptor captures; a known one replays. Inputs must lie where they lay at capture, which vLLM's persistent
    buffers give.
    """

    def __init__(
        self,
        runnable: Callable[..., Any],
        vllm_config: VllmConfig,
        runtime_mode: CUDAGraphMode,
        cudagraph_options: CUDAGraphOptions | None = None,
        update_resources: UpdateResources | None = None,
    ) -> None:
        super().__init__(runnable, vllm_config, runtime_mode, cudagraph_options)
        self._entries: dict[BatchDescriptor, _Entry] = {}
        self._captured: set[BatchDescriptor] = set()  # cleared ones too
        self._update_resources = update_resources

    def clear_graphs(self) -> None:
        """Forgets every graph; the next call of a size captures again."""
        super().clear_graphs()
        self._entries.clear()
        # A pool whose graphs are all gone takes no new ones.
        self.graph_pool = None
        NPUPlatform.forget_graph_pool()

    @property
    def records(self) -> list[GraphRecord]:
        """What was captured, in capture order."""
        return [entry.record for entry in self._entries.values()]

    def repeat(self, descriptor: BatchDescriptor) -> Any:
        """Replays the graph of `descriptor` by itself, over the inputs and lengths of its last replay: the part of a
        step that is the device's, to be measured. Returns what the graph writes, which its next replay overwrites."""
        entry = self._entries[descriptor]
        entry.updates.keep()
        entry.graph.replay()
        return entry.output

    @property
    def descriptors(self) -> list[BatchDescriptor]:
        """What there are graphs of, in capture order."""
        return list(self._entries)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_forward_context_available():
            return self.runnable(*args, **kwargs)
        context = get_forward_context()
        if context.cudagraph_runtime_mode != self.runtime_mode:
            return self.runnable(*args, **kwargs)
        if context.batch_descriptor is None:
            raise RuntimeError(f"the forward context asks for a {self.runtime_mode.name} graph of no batch")
        entry = self._entries.get(context.batch_descriptor)
        if entry is None:
            return self._capture(context, args, kwargs)
        return self._replay(entry, context, args)

    def _capture(self, context: ForwardContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        validate_cudagraph_capturing_enabled()
        descriptor = context.batch_descriptor
        assert descriptor is not None
        if self.graph_pool is None:
            self.graph_pool = current_platform.get_global_graph_pool()
        updates = GraphUpdates(self._update_resources or UpdateResources())
        graph = npu.NPUGraph()
        before, start = pool_bytes(self.graph_pool), time.perf_counter()
        if self.runtime_mode == CUDAGraphMode.FULL:
            context.additional_kwargs[UPDATES_KEY] = updates
        try:
            graph.capture_begin(pool=self.graph_pool, capture_error_mode=CAPTURE_MODE)
            try:
                output = self.runnable(*args, **kwargs)
                if self.cudagraph_options.weak_ref_output:
                    output = _weak(output)
                graph_id = trace.label(npu.current_stream(), b"")
            finally:
                graph.capture_end()
        except Exception as error:
            error.add_note(
                f"while capturing the {self.runtime_mode.name} graph of {descriptor.num_tokens} tokens; "
                "cudagraph_mode NONE serves the model without graphs"
            )
            raise
        finally:
            context.additional_kwargs.pop(UPDATES_KEY, None)
        record = GraphRecord(
            mode=self.runtime_mode.name,
            tokens=descriptor.num_tokens,
            requests=descriptor.num_reqs,
            milliseconds=(time.perf_counter() - start) * 1e3,
            mebibytes=(pool_bytes(self.graph_pool) - before) / 2**20,
            updated_operators=len(updates),
            streams=len({task["stream"] for task in trace.nodes(graph_id)}),
            reason=self._why(descriptor),
        )
        self._captured.add(descriptor)
        dump.note_capture(self.vllm_config, record)
        self._entries[descriptor] = _Entry(graph, _weak(output), updates, record, _addresses(args))
        compilation_counter.num_cudagraph_captured += 1
        # The strong output: the pool must not hand its memory out again before the rest of this step has used it.
        return output

    def _why(self, descriptor: BatchDescriptor) -> Why:
        if descriptor in self._captured:
            return reasons.CLEARED.said()
        return reasons.NEW_SHAPE.said() if self._captured else reasons.FIRST_SHAPE.said()

    def _replay(self, entry: _Entry, context: ForwardContext, args: tuple[Any, ...]) -> Any:
        if self.is_debugging_mode and _addresses(args) != entry.addresses:
            raise RuntimeError(
                f"inputs of the {self.runtime_mode.name} graph of {entry.record.tokens} tokens have moved since its "
                "capture; the graph would read stale memory"
            )
        if len(entry.updates):
            entry.updates.before_replay()
        entry.graph.replay()
        if len(entry.updates):
            if not isinstance(context.attn_metadata, dict):
                raise RuntimeError("a full graph was replayed without attention metadata")
            entry.updates.after_replay(context.attn_metadata)  # type: ignore[arg-type]  # this backend's metadata
        entry.record.replays += 1
        return entry.output


def _addresses(args: tuple[Any, ...]) -> list[int]:
    return [arg.data_ptr() for arg in args if isinstance(arg, Tensor)]


def pool_bytes(pool: Any) -> int:
    """Bytes of the segments that a pool of graphs holds."""
    # Not memory_snapshot(pool): torch_npu 2.13 gives up references to the two numbers that it does not own, which
    # frees the second of them from 257 on, and whoever reads the pool next reads freed memory.
    return sum(segment["total_size"] for segment in npu.memory_snapshot() if segment["segment_pool_id"] == pool)


def _weak(value: Any) -> Any:
    """`value` with tensors that do not keep the graph pool's memory from being used again."""
    if isinstance(value, Tensor):
        return torch_npu._C._weak_ref_tensor(value) if value.numel() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_weak(one) for one in value)
    if hasattr(value, "tensors"):  # vLLM's IntermediateTensors
        return type(value)({name: _weak(tensor) for name, tensor in value.tensors.items()})
    return value
