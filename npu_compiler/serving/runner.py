"""vLLM's V1 model runner on npu."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch_npu import npu
from vllm.compilation.counter import compilation_counter
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.compilation.monitor import set_cudagraph_capturing_enabled
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import get_ep_group, get_tp_group
from vllm.forward_context import BatchDescriptor, get_forward_context
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.workspace import lock_workspace

from npu_compiler import reasons
from npu_compiler.backend import DropCounts, Dropped
from npu_compiler.errors import UnservedError
from npu_compiler.inspect.run import ExpertRows
from npu_compiler.reasons import Reason
from npu_compiler.serving import dump, streams
from npu_compiler.serving.attention_notes import STEP_KEY
from npu_compiler.serving.capture_budget import CaptureBudget, agreed
from npu_compiler.serving.drops import DropReader
from npu_compiler.serving.expert_loads import ExpertLoads
from npu_compiler.serving.expert_rebalance import Rebalancer
from npu_compiler.serving.fine_grained_tp import NO_PROMPT_LOGPROBS
from npu_compiler.serving.fired import Fired
from npu_compiler.serving.graph_updates import UpdateResources
from npu_compiler.serving.graph_wrapper import ACLGraphWrapper
from npu_compiler.serving.metrics import stat_of
from npu_compiler.serving.options import ExpertRebalance, FineGrainedTP, ServingOptions
from npu_compiler.serving.report import ReportFile, RunReport
from npu_compiler.serving.seams import cuda_names_mean_npu
from npu_compiler.serving.split_layers import NPULogitsProcessor, split_weights
from npu_compiler.serving.steady_buffer import make_steady
from npu_compiler.serving.steps import Step
from npu_compiler.serving.watch import Steps, is_noted

logger = init_logger(f"vllm.{__name__}")


class NPUModelRunner(GPUModelRunner):
    """Adds to vLLM's runner: ACL graphs, npu streams, the run report. Steps themselves are vLLM's."""

    model: Any
    async_output_copy_stream: npu.Stream | None
    prepare_inputs_event: Any

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        with cuda_names_mean_npu():
            super().__init__(vllm_config, device)
        make_steady(self)
        if self.prepare_inputs_event is None and vllm_config.parallel_config.pipeline_parallel_size > 1:
            # A stage that is not the last one waits for no tokens: without this it would fill host buffers again that
            # the device still copies from.
            self.prepare_inputs_event = npu.Event()
        options = ServingOptions.of(vllm_config)
        self.report = RunReport(device=str(npu.get_device_name(device)), model=vllm_config.model_config.model)
        paths = dump.report_paths(vllm_config)
        self.report_file = ReportFile(paths, options.report_interval) if paths else None
        self._step: Step | None = None  # what was decided of the step that is prepared,
        self._requests = 0  # and how many requests it has
        self._options = options
        self._budget: CaptureBudget | None = None  # while capture_model runs
        compiler = dump.options_of(vllm_config)
        self._noted = Steps(vllm_config, compiler) if is_noted(compiler) else None
        self.expert_loads = ExpertLoads()
        self._rebalancer: Rebalancer | None = None
        layers = vllm_config.compilation_config.static_all_moe_layers  # vLLM fills it when the model is made
        self._drops = DropReader(layers) if compiler.token_drop else None
        self._fired = Fired.of(vllm_config)
        self.report.passes = self._fired.rewrites
        self._logits: list[NPULogitsProcessor] = []  # those whose head is split over engines
        if self.model_config.logits_processors == [NO_PROMPT_LOGPROBS]:
            self.input_batch.logitsprocs_need_output_token_ids = False  # a step need not wait for the last one's tokens

    # -- model and cache ----------------------------------------------------------------------------------------------

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model, and wraps it in our graph wrapper where vLLM wraps it in its own."""
        super().load_model(*args, **kwargs)
        if isinstance(self.model, CUDAGraphWrapper) and not isinstance(self.model, ACLGraphWrapper):
            self.model = ACLGraphWrapper(
                self.model.unwrap(), self.vllm_config, CUDAGraphMode.FULL, update_resources=UpdateResources()
            )
        self.expert_loads.find(self.vllm_config, self.get_model())
        kinds = FineGrainedTP.of(self._options.fine_grained_tp).sizes
        self.report.split_weights = split_weights(self.get_model(), kinds)
        if "lm_head" in kinds:
            self._logits = [item for item in self.get_model().modules() if isinstance(item, NPULogitsProcessor)]
        settings = ExpertRebalance.of(self._options.expert_rebalance)
        if settings is not None and self.expert_loads.layers:
            # Of one engine, ranks of the experts' group may exchange tokens without HCCL (dump.EXPERT_GROUP).
            group = get_ep_group() if self.parallel_config.data_parallel_size > 1 else get_tp_group()
            self._rebalancer = Rebalancer(settings, self.expert_loads, group)

    def initialize_kv_cache_tensors(
        self,
        kv_cache_config: KVCacheConfig,
        kernel_block_sizes: list[int],
        kv_cache_allocation_context: AbstractContextManager[Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Allocates as vLLM does. What copies whole blocks (`self.kv_caches`) sees keys and values apart.

        Raises:
            UnservedError: the model needs several KV cache groups, whose blocks would share memory.
        """
        groups = kv_cache_config.kv_cache_groups
        if len(groups) > 1:
            kinds = "; ".join(_group(group.layer_names, type(group.kv_cache_spec).__name__) for group in groups)
            raise UnservedError(
                f"the model has {len(groups)} KV cache groups (attention of several kinds)",
                where=kinds,
                rule="npu serves one kind of cache a model",
                fix="serve a model whose layers all keep keys and values of one kind; no option changes this",
            )
        caches = super().initialize_kv_cache_tensors(kv_cache_config, kernel_block_sizes, kv_cache_allocation_context)
        self.kv_caches[:] = [half for cache in self.kv_caches for half in _halves(cache)]
        return caches

    # -- graphs -------------------------------------------------------------------------------------------------------

    def capture_model(self) -> int:
        """Captures every graph of the configured mode, the largest first, and returns the bytes they took.

        vLLM's own method captures on a stream that `parallel_state.graph_capture` makes, which knows CUDA's and XPU's
        communicators only. The worker's stream is not the default stream, so captures need no other.
        """
        if self.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
            return 0
        compilation_counter.num_gpu_runner_capture_triggers += 1
        start = time.perf_counter()
        npu.synchronize()
        npu.empty_cache()
        free = npu.mem_get_info()[0]
        set_cudagraph_capturing_enabled(True)
        seconds, mebibytes = self._options.capture_budget_seconds, self._options.capture_budget_mib
        self._budget = CaptureBudget(seconds, mebibytes) if seconds or mebibytes else None
        try:
            with self._freeze_gc():
                for mode, descriptors in self.cudagraph_dispatcher.get_capture_descs():
                    self._capture_cudagraphs(batch_descriptors=descriptors, cudagraph_runtime_mode=mode)
                    npu.synchronize()
        finally:
            set_cudagraph_capturing_enabled(False)
            self._budget = None
        npu.empty_cache()
        used = free - npu.mem_get_info()[0]
        lock_workspace()
        wrappers = [w for w in CUDAGraphWrapper._all_instances if isinstance(w, ACLGraphWrapper)]
        own = [w for w in wrappers if w.vllm_config is self.vllm_config]
        records = [record for wrapper in own for record in wrapper.records]
        self.report.graphs = sorted(records, key=lambda record: (record.mode, record.tokens))
        logger.info(
            "Captured %d ACL graphs (%s) in %.1f s with warm-up runs and compilation, %.1f MiB of device memory",
            len(records),
            self.compilation_config.cudagraph_mode.name,
            time.perf_counter() - start,
            used / 2**20,
        )
        return used

    def _warmup_and_capture(
        self, desc: BatchDescriptor, cudagraph_runtime_mode: CUDAGraphMode, *args: Any, **kwargs: Any
    ) -> None:
        """Captures one size, unless it does not fit into the budget: then vLLM's dispatcher forgets it, and batches of
        that size run without this graph."""
        budget = self._budget
        if budget is None:
            return super()._warmup_and_capture(desc, cudagraph_runtime_mode, *args, **kwargs)
        refusal = agreed(budget.refusal(lambda: self._memory_of_a_run(desc, cudagraph_runtime_mode)))
        if refusal:
            self.cudagraph_dispatcher.cudagraph_keys[cudagraph_runtime_mode].discard(desc)
            size = f"{cudagraph_runtime_mode.name} {desc.num_tokens} tokens"
            self.report.not_captured[size] = refusal
            logger.warning("No graph for %s: %s; such batches run without it, other sizes keep theirs", size, refusal)
            return None
        npu.empty_cache()  # of the runs before: what is reserved from here on is the capture's
        start, reserved = time.perf_counter(), npu.memory_reserved()
        super()._warmup_and_capture(desc, cudagraph_runtime_mode, *args, **kwargs)
        npu.empty_cache()
        budget.add(time.perf_counter() - start, (npu.memory_reserved() - reserved) / 2**20)
        return None

    def _memory_of_a_run(self, desc: BatchDescriptor, mode: CUDAGraphMode) -> float:
        """MiB that a run of this size without a graph takes at its peak, beyond what there is."""
        npu.synchronize()
        npu.reset_peak_memory_stats()
        before = npu.memory_allocated()
        self._dummy_run(
            desc.num_tokens,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            force_attention=mode == CUDAGraphMode.FULL,
            uniform_decode=desc.uniform,
            skip_eplb=True,
            remove_lora=False,
            num_active_loras=desc.num_active_loras,
        )
        npu.synchronize()
        return (npu.max_memory_allocated() - before) / 2**20

    # -- steps --------------------------------------------------------------------------------------------------------

    @contextmanager
    def synchronize_input_prep(self) -> Iterator[None]:
        """Before host buffers are filled again, the copies out of them must be done; they nearly always are."""
        event = self.prepare_inputs_event
        if event is None:
            yield
            return
        if not event.query():
            self.report.input_waits += 1
            event.synchronize()
        try:
            yield
        finally:
            event.record(streams.current())

    def _get_or_create_async_output_copy_stream(self) -> npu.Stream:
        if self.async_output_copy_stream is None:
            self.async_output_copy_stream = npu.Stream()
        return self.async_output_copy_stream

    @torch.inference_mode()
    def between_steps(self) -> None:
        """What all ranks do in front of each step, also one that takes part in it without tokens of its own."""
        if self._rebalancer is not None:
            self._rebalancer.between_steps()

    @torch.inference_mode()
    def logits_for_others(self) -> None:
        """The LM head's part in a step of engines that split it, for one that has no tokens in the step."""
        if self._logits:
            size = self.model_config.get_hidden_size()
            self.model.compute_logits(torch.empty(0, size, dtype=self.dtype, device=self.device))

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens:
            self.between_steps()  # before ranks agree on the step's size: one without tokens can't be asked later
        output = super().execute_model(scheduler_output, *args, **kwargs)
        # The step that only clears what has finished: nothing is left to do, and Ctrl-C may kill this process next.
        if scheduler_output.total_num_scheduled_tokens == 0 and self.report_file is not None:
            self.report_file.write(self.report)
        return output

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        with cuda_names_mean_npu():
            return super().sample_tokens(grammar_output)

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        """Keeps what was decided, for the report of the step, and sends it along to vLLM's metrics."""
        mode, descriptor, *between, _ = super()._determine_batch_execution_and_padding(*args, **kwargs)
        ubatches, across = between
        if across is not None and self.parallel_config.is_moe_model:
            # Layers of experts gather as many tokens of each rank. vLLM itself pads like that where all replay.
            across = across.new_full(across.shape, int(across.max()))
            descriptor = dataclasses.replace(descriptor, num_tokens=int(across[0]))
        for logits in self._logits:  # as many on all engines: no more than tokens, of which a request has one sampled
            logits.rows = min(descriptor.num_tokens, self.max_num_reqs)
        tokens, requests = kwargs["num_tokens"], kwargs["num_reqs"]
        decode = kwargs["max_num_scheduled_tokens"] == 1 and tokens == requests
        reason, detail = self._why_no_replay(mode, tokens, decode)
        self._step = Step(decode, mode.name, tokens, descriptor.num_tokens, reason=reason, detail=detail)
        self._requests = requests
        return (mode, descriptor, ubatches, across, stat_of(self._step, self._newly_dropped(), self._new_loads()))

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        get_forward_context().additional_kwargs[STEP_KEY] = True
        assert self._step is not None, "vLLM decides about a step before it runs it"
        noted = self._noted.step(self.report.steps.total, self._step.tokens) if self._noted else nullcontext()
        with noted, self.expert_loads.step(self._step.tokens):
            output = super()._model_forward(*args, **kwargs)
        if self._drops is not None:
            self._drops.ask(self.drop_counts)
        self._count(self._step)
        return output

    @property
    def drop_counts(self) -> list[DropCounts]:
        """What counts the tokens that the model drops, on the device."""
        return [] if self._noted is None else self._noted.drops

    def read_counters(self) -> None:
        """Brings the report's figures on dropped tokens and on experts up to date. Waits for the device."""
        self.expert_loads.wait()
        self.report.experts = self.expert_loads.latest
        if self._drops is not None:
            self._drops.wait(self.drop_counts)
            self.report.dropped = self._drops.latest

    def _newly_dropped(self) -> list[Dropped]:
        if self._drops is None:
            return []
        found = self._drops.take()
        self.report.dropped = self._drops.latest
        return found

    def _new_loads(self) -> list[ExpertRows]:
        found = self.expert_loads.take()
        self.report.experts = self.expert_loads.latest
        return found

    def _count(self, step: Step) -> None:
        discarded = int(np.count_nonzero(self.discard_request_mask.np[: self._requests]))
        self.report.add(dataclasses.replace(step, generated=self._requests - discarded))
        if self.report_file is not None:
            self.report_file.update(self.report)

    def _why_no_replay(self, mode: CUDAGraphMode, tokens: int, decode: bool) -> tuple[Reason | None, str]:
        """Why a step is no replay of one graph, with details."""
        if mode == CUDAGraphMode.FULL:
            return None, ""
        if mode == CUDAGraphMode.PIECEWISE:
            return reasons.PIECES, ""
        configured = self.cudagraph_dispatcher.cudagraph_mode
        if configured == CUDAGraphMode.NONE:
            return reasons.GRAPHS_OFF, ""
        if not decode and configured.mixed_mode() == CUDAGraphMode.NONE:
            return reasons.PREFILL, configured.name
        largest = self.compilation_config.max_cudagraph_capture_size or 0
        if tokens > largest:
            return reasons.DECODE_TOO_LARGE if decode else reasons.PREFILL_TOO_LARGE, f"{largest}"
        sizes = self.compilation_config.cudagraph_capture_sizes or []
        size = f"FULL {next((size for size in sorted(sizes) if size >= tokens), largest)} tokens"
        if size in self.report.not_captured:
            return reasons.NOT_CAPTURED, f"{size}, {self.report.not_captured[size]}"
        if self.parallel_config.data_parallel_size > 1:
            return reasons.OTHER_RANK, ""
        return reasons.NO_GRAPH, ""


def _group(layers: Sequence[str], kind: str) -> str:
    """The layers of a KV cache group, in a few words."""
    rest = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return f"{layers[0]}{rest}: {kind}"


def _halves(cache: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values of one layer, each [blocks, elements a block]; `cache` as vLLM views it, blocks first."""
    flat = cache.permute(0, 2, 1, 3).view(-1)
    return list(flat.view(2, cache.shape[0], -1))
