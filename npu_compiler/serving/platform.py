"""vLLM's view of the device `npu`: names, defaults, checks, and which of our classes vLLM is to use."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch_npu import npu
from vllm.logger import init_logger
from vllm.platforms.interface import Platform, PlatformEnum

from npu_compiler.config import BY_ROWS
from npu_compiler.errors import UnservedError
from npu_compiler.serving.places import here

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

logger = init_logger(f"vllm.{__name__}")
_HERE = "npu_compiler.serving"

# vLLM's fusion passes that emit CUDA operators. The `ascend` backend has its own passes.
_VLLM_FUSIONS = (
    "fuse_norm_quant",
    "fuse_act_quant",
    "fuse_attn_quant",
    "fuse_act_padding",
    "fuse_allreduce_rms",
    "fuse_mla_dual_rms_norm",
    "fuse_rope_kvcache",
    "fuse_qk_norm_rope_kvcache",
    "enable_qk_norm_rope_fusion",
    "fuse_rope_kvcache_cat_mla",
)
_PLACEMENTS = ("tensor", "pipeline", "data")
_GATHERED = "allgather_reducescatter"
"""vLLM's name for what layers of experts do with the tokens of data-parallel ranks (moe_runner.py)."""


class NPUPlatform(Platform):
    """Ascend NPUs through torch_npu. Methods are vLLM's hooks; see vllm/platforms/interface.py for their contracts."""

    _enum = PlatformEnum.OOT
    device_name = "npu"
    device_type = "npu"
    dispatch_key = "PrivateUse1"
    dist_backend = "hccl"
    ray_device_key = "NPU"
    device_control_env_var = "ASCEND_RT_VISIBLE_DEVICES"
    simple_compile_backend = "eager"  # vLLM's small sampling helpers; the model goes through get_compile_backend

    # -- the device ---------------------------------------------------------------------------------------------------

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return npu.get_device_name(device_id)

    @classmethod
    def get_device_uuid(cls, device_id: int = 0) -> str:
        return f"{cls.get_device_name(device_id)}-{cls.visible_device_id_to_physical_device_id(device_id)}"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return npu.get_device_properties(device_id).total_memory

    @classmethod
    def get_current_memory_usage(cls, device: torch.types.Device | None = None) -> float:
        npu.reset_peak_memory_stats(device)
        return float(npu.max_memory_allocated(device))

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return npu.get_device_properties(device_id).cube_core_num

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        npu.set_device(device)

    @classmethod
    def forget_graph_pool(cls) -> None:
        """The next engine of this process captures into a pool of its own: one whose graphs are all gone takes no new
        ones (torch's host allocator asserts that somebody still uses it)."""
        cls._global_graph_pool = None

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        npu.manual_seed_all(seed)

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype {dtype} is not served on npu; use --dtype bfloat16, float16 or float32")

    # -- which classes vLLM uses --------------------------------------------------------------------------------------

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: AttentionBackendEnum | None,
        attn_selector_config: AttentionSelectorConfig,
        num_heads: int | None = None,
    ) -> str:
        from npu_compiler.serving.attention import NPUAttentionBackend

        if selected_backend is not None and selected_backend.name != NPUAttentionBackend.get_name():
            raise UnservedError(
                f"attention backend {selected_backend.name} does not run on npu",
                where=here(),
                rule="npu has one backend, CUSTOM",
                fix="leave --attention-backend out, or, where vLLM chose it for this model (Gemma 4), give "
                "--attention-backend CUSTOM",
            )
        reasons = NPUAttentionBackend.validate_configuration(
            device_capability=None,  # type: ignore[arg-type]  # a CUDA notion, which this backend does not ask for
            **attn_selector_config._asdict(),
        )
        if reasons:
            raise UnservedError(
                f"attention on npu can't serve this model: {'; '.join(reasons)}",
                where=here(),
                rule=f"what npu_compiler/serving/attention.py supports; asked for: {attn_selector_config}",
                fix="change the option that asks for it (a dtype, --kv-cache-dtype, --block-size), or serve a model "
                "without such layers",
            )
        return f"{_HERE}.attention.NPUAttentionBackend"

    @classmethod
    def opaque_attention_op(cls) -> bool:
        return True

    @classmethod
    def support_static_graph_mode(cls) -> bool:
        return True

    @classmethod
    def get_static_graph_wrapper_cls(cls) -> str:
        return f"{_HERE}.graph_wrapper.ACLGraphWrapper"

    @classmethod
    def get_compile_backend(cls) -> str:
        return f"{_HERE}.compiler.AscendCompiler"

    @classmethod
    def get_pass_manager_cls(cls) -> str:
        return f"{_HERE}.compiler.PassManager"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return f"{_HERE}.communicator.NPUCommunicator"

    @classmethod
    def use_custom_op_collectives(cls) -> bool:
        return True

    @classmethod
    def import_kernels(cls) -> None:
        """Nothing to import: vLLM's own C++ kernels are for other devices."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        from npu_compiler.serving import ir_kernels  # noqa: F401  # registers its implementations

    @classmethod
    def get_default_ir_op_priority(cls, vllm_config: VllmConfig) -> IrOpPriorityConfig:
        from vllm.config.kernel import IrOpPriorityConfig

        ours = ["npu", "native"]
        return IrOpPriorityConfig.with_default(["native"], rms_norm=list(ours), fused_add_rms_norm=list(ours))

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        from vllm.triton_utils.dispatcher import register_kernels

        from npu_compiler.serving.triton_overrides import OVERRIDES

        register_kernels(OVERRIDES)

    # -- configuration ------------------------------------------------------------------------------------------------

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: VllmConfig) -> None:
        """Fills what the user left open, before vLLM resolves its optimization level."""
        compilation = vllm_config.compilation_config
        for fusion in _VLLM_FUSIONS:
            setattr(compilation.pass_config, fusion, False)
        # Keeps vllm_ir operators whole in the traced graph, which is what the compiler's patterns match.
        if compilation.ir_enable_torch_wrap is None:
            compilation.ir_enable_torch_wrap = True
        # There is no Triton to compile or to autotune.
        vllm_config.kernel_config.enable_flashinfer_autotune = False
        vllm_config.kernel_config.enable_jit_warmup = False
        _choose_graphs(vllm_config)

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuses what cannot run, then names our worker.

        Raises:
            ValueError: an option of ours is unknown or contradicts another, or a feature is not served on npu.
        """
        from vllm.config import CUDAGraphMode

        from npu_compiler.serving import expert_maps, fine_grained_tp
        from npu_compiler.serving.options import ServingOptions

        options = ServingOptions.of(vllm_config).compile
        rows = {options.get(name, 0) for name in BY_ROWS}
        if options.get("dual_batch_overlap") == 2:
            rows.add(3)  # vLLM makes no range of one token alone (vllm/config/vllm.py, _set_compile_ranges)
        _split_compile_ranges(vllm_config, rows)
        _refuse_unserved(vllm_config)
        _refuse_placements(vllm_config)
        expert_maps.settle(vllm_config)
        fine_grained_tp.settle(vllm_config)
        _refuse_missing_devices(vllm_config)
        if vllm_config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE):
            _refuse_uncapturable(os.environ)
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = f"{_HERE}.worker.NPUWorker"


def _choose_graphs(vllm_config: VllmConfig) -> None:
    """FULL_DECODE_ONLY unless the user says otherwise, and a graph for every decode batch that can occur."""
    from vllm.config import CUDAGraphMode
    from vllm.config.vllm import OptimizationLevel

    from npu_compiler.serving.capture_sizes import check_capture_sizes, default_capture_sizes

    compilation = vllm_config.compilation_config
    model = vllm_config.model_config
    if model is None or model.enforce_eager:
        return
    if compilation.cudagraph_mode is None:
        if vllm_config.optimization_level == OptimizationLevel.O0:
            return
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    mode = compilation.cudagraph_mode
    if mode == CUDAGraphMode.NONE:
        return
    if mode in (CUDAGraphMode.FULL, CUDAGraphMode.FULL_DECODE_ONLY) and compilation.splitting_ops is None:
        compilation.splitting_ops = []  # nothing runs in pieces, so the compiler gets the model as one graph
    scheduler = vllm_config.scheduler_config
    query_length = 1 + vllm_config.num_speculative_tokens
    decode_only = mode == CUDAGraphMode.FULL_DECODE_ONLY
    if compilation.cudagraph_capture_sizes is not None:
        check_capture_sizes(
            compilation.cudagraph_capture_sizes,
            max_requests=scheduler.max_num_seqs,
            query_length=query_length,
            max_tokens=scheduler.max_num_batched_tokens,
            decode_only=decode_only,
        )
    elif compilation.max_cudagraph_capture_size is None:
        sizes = default_capture_sizes(scheduler.max_num_seqs, query_length, scheduler.max_num_batched_tokens)
        compilation.cudagraph_capture_sizes = sizes


def _split_compile_ranges(vllm_config: VllmConfig, rows: Collection[int]) -> None:
    """Lets vLLM compile for each range between these numbers of tokens (serving/compiler.py)."""
    ends = sorted(number - 1 for number in rows if number > 2)
    if ends:
        compilation = vllm_config.compilation_config
        compilation.compile_ranges_endpoints = [*(compilation.compile_ranges_endpoints or ()), *ends]


def _refuse_unserved(vllm_config: VllmConfig) -> None:
    """Raises ValueError for vLLM features that this plugin does not serve, with the option to drop."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    unserved: list[tuple[Any, str]] = [
        (vllm_config.speculative_config is not None, "speculative decoding (--speculative-config)"),
        (vllm_config.lora_config is not None, "LoRA (--enable-lora)"),
        (vllm_config.kv_transfer_config is not None, "KV connectors (--kv-transfer-config)"),
        (parallel.use_ubatching, "dual-batch overlap (--enable-dbo)"),
        (parallel.decode_context_parallel_size > 1, "context parallelism (--decode-context-parallel-size)"),
        (model is not None and model.enable_sleep_mode, "sleep mode (--enable-sleep-mode)"),
        (cache.cache_dtype not in ("auto", "float16", "bfloat16"), f"--kv-cache-dtype {cache.cache_dtype}"),
        (vllm_config.use_v2_model_runner, "the second model runner (VLLM_USE_V2_MODEL_RUNNER=1)"),
    ]
    for present, feature in unserved:
        if present:
            raise ValueError(f"{feature} is not served on npu yet; leave it out")
    if model is not None and (model.is_hybrid or model.is_attention_free):
        raise ValueError(
            f"{model.architecture} has layers that keep a state instead of keys and values (state-space, linear "
            "attention, short convolutions), which vLLM runs by Triton kernels only; they are not served on npu yet"
        )
    if model is not None and hasattr(model.hf_text_config, "index_topk"):  # how vLLM's models ask, too
        raise ValueError(
            f"{model.architecture} (model type {model.hf_text_config.model_type}) has sparse attention: an indexer "
            f"chooses {model.hf_text_config.index_topk} keys for each token (index_topk). There is neither an operator "
            "for the indexer nor for attention to chosen keys; it is not served on npu yet"
        )


def _refuse_placements(vllm_config: VllmConfig) -> None:
    """Raises ValueError for ways of dividing a model over ranks that don't go together."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1 and vllm_config.scheduler_config.async_scheduling:
        raise ValueError(
            "--async-scheduling and --pipeline-parallel-size exclude each other: vLLM's model runner of the first "
            "version does not support the two together; leave --async-scheduling out"
        )
    if parallel.data_parallel_size > 1 and parallel.all2all_backend != _GATHERED:
        raise ValueError(
            f"--all2all-backend {parallel.all2all_backend} is a library for CUDA; on npu the tokens of data-parallel "
            f"ranks are gathered: leave it out, or use {_GATHERED}"
        )


def _refuse_missing_devices(vllm_config: VllmConfig) -> None:
    """Raises ValueError when this machine has fewer devices than the ranks that will run on it."""
    parallel, devices = vllm_config.parallel_config, npu.device_count()
    ranks = parallel.world_size * parallel.data_parallel_size_local
    if parallel.nnodes == 1 and parallel.distributed_executor_backend != "ray" and ranks > devices:
        sizes = [f"--{kind}-parallel-size {getattr(parallel, f'{kind}_parallel_size')}" for kind in _PLACEMENTS]
        raise ValueError(
            f"{ranks} ranks ({', '.join(size for size in sizes if not size.endswith(' 1'))}) need as many devices, but "
            f"{devices} are visible; lower it, or extend {NPUPlatform.device_control_env_var}"
        )


def _refuse_uncapturable(environment: Any) -> None:
    """Raises ValueError for settings of torch_npu under which nothing can be captured."""
    for name, value in (("TASK_QUEUE_ENABLE", "2"), ("ASCEND_LAUNCH_BLOCKING", "1")):
        if environment.get(name) == value:
            raise ValueError(
                f"{name}={value} and ACL graphs exclude each other (torch_npu refuses the capture); unset {name}, or "
                "set cudagraph_mode to NONE"
            )
