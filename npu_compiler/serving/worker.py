"""vLLM's worker process on npu."""

from __future__ import annotations

import atexit
import copy
import gc
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch_npu import npu
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.config.profiler import ProfilerConfig
from vllm.distributed import cleanup_dist_env_and_memory, get_pp_group
from vllm.distributed.utils import get_worker_rank_suffix
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.platforms.interface import set_assigned_physical_gpu_ids
from vllm.utils.gc_utils import freeze_gc_heap, maybe_attach_gc_debug_callback
from vllm.utils.mem_utils import MemorySnapshot
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment
from vllm.v1.worker.utils import request_memory
from vllm.v1.worker.worker_base import CompilationTimes

from npu_compiler.config import OF_WEIGHTS
from npu_compiler.errors import UnservedError
from npu_compiler.serving import fine_grained_tp, moe, moe_runner, split_layers  # noqa: F401  # give vLLM its layers
from npu_compiler.serving.compiler import put_into_key
from npu_compiler.serving.options import ServingOptions, compile_options
from npu_compiler.serving.platform import NPUPlatform
from npu_compiler.serving.runner import NPUModelRunner
from npu_compiler.watching import Seen, watched

logger = init_logger(f"vllm.{__name__}")


class NPUWorker(Worker):
    """One rank: one npu, its HCCL groups and its model runner."""

    model_runner: NPUModelRunner
    profiler: Any
    is_shut_down = False

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(_without_profiler(vllm_config), *args, **kwargs)
        self.vllm_config, self.profiler_config = vllm_config, vllm_config.profiler_config

    def init_device(self) -> None:
        """Takes the device of this rank, joins the groups and makes the model runner.

        Raises:
            ValueError: there are fewer devices than ranks, or less free memory than gpu_memory_utilization asks for.
        """
        assigned = self.parallel_config.assigned_physical_gpu_ids
        if assigned is not None:  # --device-ids, or this engine's share of the devices in data parallelism
            set_assigned_physical_gpu_ids(assigned)
        index = current_platform.logical_device_id_to_visible_device_id(self.local_rank)
        available = npu.device_count()
        if index >= available:
            raise ValueError(
                f"rank {self.rank} needs device npu:{index}, but {available} devices are visible; lower "
                f"--tensor-parallel-size or extend {current_platform.device_control_env_var}"
            )
        self.device = torch.device(f"npu:{index}")
        npu.set_device(self.device)
        atexit.register(_shut_down, weakref.ref(self))
        # The default stream can't be captured. Everything this worker runs goes to a stream of its own.
        npu.set_stream(npu.Stream())
        NPUPlatform.forget_graph_pool()
        if self.model_config is not None:
            current_platform.check_if_supports_dtype(self.model_config.dtype)  # type: ignore[arg-type]  # resolved
        # Out of tree vLLM's groups take the number they are given for that of their device (parallel_state.py, line
        # 540). With synchronous scheduling engines agree on a step's tokens there (dp_utils.py, _get_device_and_group).
        init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, index, current_platform.dist_backend
        )
        fine_grained_tp.make_groups(self.vllm_config)
        set_random_seed(self.model_config.seed)
        gc.collect()
        npu.empty_cache()
        self.init_snapshot = MemorySnapshot(device=self.device)
        self.requested_memory = request_memory(self.init_snapshot, self.cache_config)
        if self.compilation_config.mode == CompilationMode.VLLM_COMPILE:
            put_into_key(self.vllm_config)
        self._init_workspace_and_model_runner()

    def _make_model_runner(self) -> NPUModelRunner:
        assert self.device is not None
        return NPUModelRunner(self.vllm_config, self.device)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        return nullcontext()  # pools of their own serve sleep mode only, which the platform refuses

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache: what is asked for, or what is left after a profiling run.

        Raises:
            ValueError: more is asked for than the device has left.
        """
        asked, (free, total) = self.cache_config.kv_cache_memory_bytes, npu.mem_get_info(self.device)
        if asked is not None and asked > free:
            raise ValueError(
                f"--kv-cache-memory-bytes asks for {asked / 2**30:.2f} GiB, but {self.device} has {free / 2**30:.2f} "
                f"of its {total / 2**30:.2f} GiB left beside the model; lower it, or leave it out and let "
                "--gpu-memory-utilization decide"
            )
        return super().determine_available_memory()

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Runs each compiled range once, captures the graphs, and runs the sampler at its largest size.

        vLLM's own method also warms up CUDA kernels, and imports them to do so.
        """
        for size in self._sizes_to_warm_up():
            self.model_runner._dummy_run(size, skip_eplb=True, remove_lora=False)
        if not self.model_config.enforce_eager:
            self.model_runner.capture_model()
        self._warm_up_sampler()
        # Warm-up must not show in the random numbers of the first request.
        set_random_seed(self.model_config.seed, self.parallel_config.data_parallel_index)
        freeze_gc_heap()
        maybe_attach_gc_debug_callback()
        self._start_trace()
        compilation = self.compilation_config
        return CompilationTimes(
            language_model=compilation.compilation_time, encoder=compilation.encoder_compilation_time
        )

    def _sizes_to_warm_up(self) -> list[int]:
        """Sizes in tokens, largest first: those asked for and one of every compiled range that no graph covers."""
        compilation = self.compilation_config
        if compilation.mode != CompilationMode.VLLM_COMPILE:
            return []
        captured: set[int] = set()
        if compilation.cudagraph_mode != CUDAGraphMode.NONE:
            captured = set(compilation.cudagraph_capture_sizes or [])
        sizes = {int(size) for size in compilation.compile_sizes or []} - captured
        for compile_range in compilation.get_compile_ranges():
            if not any(size in compile_range for size in captured | sizes):
                sizes.add(compile_range.end)
        return sorted(sizes, reverse=True)

    def _warm_up_sampler(self) -> None:
        if not get_pp_group().is_last_rank:
            return
        runner, scheduler = self.model_runner, self.scheduler_config
        requests = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
        hidden, last_hidden = runner._dummy_run(
            num_tokens=requests, skip_eplb=True, cudagraph_runtime_mode=CUDAGraphMode.NONE
        )
        if runner.is_pooling_model:
            runner._dummy_pooler_run(hidden)
        else:
            runner._dummy_sampler_run(hidden_states=last_hidden)

    # -- weights that change ------------------------------------------------------------------------------------------

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """See vLLM's Worker.

        Raises:
            UnservedError: programs hold values that were computed from the weights.
        """
        self._refuse_other_weights()
        super().reload_weights(*args, **kwargs)

    def _start_weight_update(self, is_draft: bool = False) -> None:
        self._refuse_other_weights()
        super()._start_weight_update(is_draft)

    def _refuse_other_weights(self) -> None:
        options = compile_options(ServingOptions.of(self.vllm_config).compile)
        holds = [name for name in OF_WEIGHTS if getattr(options, name)]
        if holds:
            raise UnservedError(
                f"weights can't be replaced with the compile option {' and '.join(holds)}",
                where="the weights of the running model",
                rule="programs keep what they computed from the weights once; vLLM writes new ones without a trace",
                fix=f"leave {' and '.join(holds)} out, or start the engine again with the new weights",
            )

    # -- steps --------------------------------------------------------------------------------------------------------

    def execute_dummy_batch(self) -> None:
        """The step of a data-parallel engine that has no tokens for it, while others do."""
        self.model_runner.between_steps()
        super().execute_dummy_batch()
        self.model_runner.logits_for_others()

    # -- the run report -----------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What this rank did so far (docs/serving.md). `LLM.collective_rpc("report")` returns one a rank."""
        self.model_runner.read_counters()
        return self.model_runner.report.as_dict()

    def watched(self) -> list[Seen]:
        """What watched values held since the last time (docs/watch.md); of LLM.collective_rpc("watched") a list each
        rank."""
        return watched()

    def clear_report(self) -> None:
        """Starts the report's counters again."""
        for counts in self.model_runner.drop_counts:
            counts.clear()
        self.model_runner.expert_loads.clear()
        self.model_runner.report.clear()

    # -- timelines ----------------------------------------------------------------------------------------------------

    def profile(self, is_start: bool = True, *args: Any, **kwargs: Any) -> None:
        """Starts or ends a timeline (POST /start_profile, LLM.start_profile). See vLLM's Worker for the arguments."""
        if is_start and self.profiler_config.profiler is not None and not (self.profiler and self.profiler.busy):
            from npu_compiler.serving.profiler import TimelineProfiler

            self.profiler = TimelineProfiler(self.profiler_config, self.profiler_config.torch_profiler_dir, "")
        super().profile(is_start, *args, **kwargs)

    def _start_trace(self) -> None:
        options = ServingOptions.of(self.vllm_config)
        if options.trace_dir is not None:
            from npu_compiler.serving import profiler

            self.profiler = profiler.of_options(options, get_worker_rank_suffix(global_rank=self.rank))

    def shutdown(self) -> None:
        """Writes the run report and gives the device's memory back; once, however often it is called."""
        if self.is_shut_down:
            return
        self.is_shut_down = True
        runner = getattr(self, "model_runner", None)
        if runner is not None:
            runner.read_counters()
        if runner is not None and self.rank == 0:
            logger.info("Run report\n%s", runner.report.text())
        if runner is not None and runner.report_file is not None:
            runner.report_file.write(runner.report)
        fine_grained_tp.destroy_groups()
        super().shutdown()


def _shut_down(worker: weakref.ref[NPUWorker]) -> None:
    """Ends an engine that its program, in the same process, left alive.

    vLLM ends it when Python exits, as here (core.py, EngineCore.shutdown), but behind torch_npu's own hook, which gives
    the device and the groups back. Python calls the youngest hook first, and this one is younger than both.
    """
    if (living := worker()) is not None and not living.is_shut_down:
        living.shutdown()
        cleanup_dist_env_and_memory()


def _without_profiler(config: VllmConfig) -> VllmConfig:
    """`config` for vLLM's own worker, which knows the profilers of a few devices only and refuses to start on others.

    Raises:
        ValueError: another profiler than "torch" is asked for.
    """
    kind = config.profiler_config.profiler
    if kind not in (None, "torch"):
        raise ValueError(
            f"--profiler-config: profiler {kind!r} is of other devices; npu has 'torch', which writes a timeline to "
            "torch_profiler_dir"
        )
    quiet = copy.copy(config)
    quiet.profiler_config = ProfilerConfig()
    return quiet
