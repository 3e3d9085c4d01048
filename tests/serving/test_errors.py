"""What cannot work is refused before a device is touched, with a sentence that says what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from benchmarks.sweep import shrink
from npu_compiler.serving import platform
from tests.models import checkpoints
from tests.serving.engine import engine
from tests.serving.pairs import texts


@pytest.fixture(scope="module")
def folder() -> Path:
    return checkpoints.cached(checkpoints.Shape(family="qwen3"))


SPARSE = shrink.Subject("DeepseekV32ForCausalLM", "deepseek_v32")
SPARSE_REFUSED = r"DeepseekV32ForCausalLM \(model type deepseek_v32\) has sparse attention"


def configure(folder: Path, **changes: Any) -> Any:
    return EngineArgs(model=str(folder), max_num_seqs=8, max_model_len=256, **changes).create_engine_config()


def graphs(mode: str, sizes: list[int]) -> dict[str, Any]:
    return {"compilation_config": {"cudagraph_mode": mode, "cudagraph_capture_sizes": sizes}}


def compiled(**options: Any) -> dict[str, Any]:
    return {"additional_config": {"compile": options}}


ROOM = {"capacity_factor": 1.25}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"additional_config": {"report_pth": "x"}}, "unknown option 'report_pth'; did you mean 'report_path'"),
        ({"additional_config": {"compile": {"dump": "x"}}, "enforce_eager": True}, "contradict --enforce-eager"),
        (compiled(sequence_parallel=1), "sequence_parallel are about sums of tensor parallelism, and with one rank"),
        (compiled(token_drop=ROOM), "Qwen3ForCausalLM has no experts; leave them out"),
        (compiled(expert_communication="alltoall"), "Qwen3ForCausalLM has no experts"),
        (graphs("FULL_DECODE_ONLY", [1, 16]), "graph of size 16 would never run; .*--max-num-seqs"),
        (graphs("PIECEWISE", [0, 4]), "0 can't be captured; remove it"),
        (graphs("FULL", [4, 2]), r"ascending .*; use \[2, 4\]"),
        (graphs("PIECEWISE", [1 << 20]), "no batch has 1048576 tokens.*--max-num-batched-tokens"),
        ({"enable_lora": True}, r"LoRA \(--enable-lora\) is not served on npu yet"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 is not served on npu yet"),
        ({"pipeline_parallel_size": 2, "async_scheduling": True}, "--async-scheduling and --pipeline-parallel-size ex"),
        (
            {"data_parallel_size": 2, "all2all_backend": "deepep_v2"},
            "--all2all-backend deepep_v2 is a library for CUDA",
        ),
    ],
)
def test_option_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(folder, **changes)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (
            {"token_drop": ROOM},
            {"enable_expert_parallel": False},
            "without --enable-expert-parallel each rank has",
        ),
        ({"token_drop": ROOM}, {"tensor_parallel_size": 1}, "with one rank all experts are on it"),
        ({"token_drop": ROOM}, {"data_parallel_size": 2}, "token_drop and --data-parallel-size exclude each other"),
        ({"shared_expert_rows": 1}, {"data_parallel_size": 2}, "shared_expert_rows and --data-parallel-size exclude"),
        ({"expert_communication": "fused_mc2"}, {}, r"'fused_mc2' can't be done: torch_npu has no operator"),
    ],
)
def test_ways_of_tokens_to_experts_that_do_nothing(
    options: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    settings = {"tensor_parallel_size": 2, "enable_expert_parallel": True, **settings}
    with pytest.raises(ValueError, match=message):
        configure(texts.folder("moe"), **settings, **compiled(**options))


@pytest.mark.parametrize(("name", "value"), [("TASK_QUEUE_ENABLE", "2"), ("ASCEND_LAUNCH_BLOCKING", "1")])
def test_settings_that_exclude_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value} and ACL graphs exclude each other.*unset {name}"):
        configure(folder)
    configure(folder, compilation_config={"cudagraph_mode": "NONE"})


def test_defaults(folder: Path) -> None:
    config = configure(folder)
    compilation = config.compilation_config
    assert compilation.cudagraph_mode.name == "FULL_DECODE_ONLY"
    assert compilation.cudagraph_capture_sizes == [1, 2, 3, 4, 5, 6, 7, 8]
    assert compilation.ir_enable_torch_wrap is True
    assert config.parallel_config.worker_cls == "npu_compiler.serving.worker.NPUWorker"
    assert config.scheduler_config.async_scheduling is True


def test_no_model_at_the_path(tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    # vLLM's ValueError where the hub is offline; otherwise the hub refuses the path as a repository name.
    with pytest.raises((ValueError, OSError), match=re.escape(str(missing))):
        configure(missing)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)config\.json"):
        configure(tmp_path)


def test_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen99", "architectures": ["Qwen99ForCausalLM"]}))
    with pytest.raises(ValueError, match=r"(?s)qwen99"):
        configure(tmp_path)


def test_more_memory_than_the_device_has(folder: Path) -> None:
    too_much = torch.npu.get_device_properties(0).total_memory + 1
    with (
        pytest.raises(ValueError, match=r"--kv-cache-memory-bytes asks for .* lower it"),
        engine(folder, kv_cache_memory_bytes=too_much, enforce_eager=True),
    ):
        pass


def test_more_ranks_than_devices() -> None:
    ranks = 2 * torch.npu.device_count()
    divisible = checkpoints.cached(checkpoints.Shape(family="qwen3", heads=ranks, kv_heads=ranks, head_dim=16))
    with pytest.raises(ValueError, match=f"{ranks} ranks .* but {ranks // 2} are visible; lower it"):
        configure(divisible, tensor_parallel_size=ranks)


@pytest.mark.full
def test_sparse_attention(tmp_path: Path) -> None:
    shrink.configuration(SPARSE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=SPARSE_REFUSED):
        configure(tmp_path, skip_tokenizer_init=True)


def test_a_configuration_with_an_indexer() -> None:
    """Sparse attention as above, without vLLM's look at the model's class, which takes a process of its own."""
    text = shrink.configuration(SPARSE)
    with pytest.raises(ValueError, match=SPARSE_REFUSED):
        refuse(is_hybrid=False, is_attention_free=False, architecture=SPARSE.architecture, hf_text_config=text)


def test_layers_that_keep_a_state() -> None:
    """vLLM's own settings of such a model ask for Triton before a platform is asked, so this one is made by hand."""
    with pytest.raises(ValueError, match="Mamba has layers that keep a state instead of keys and values"):
        refuse(is_hybrid=False, is_attention_free=True, architecture="Mamba")


def refuse(**model: Any) -> None:
    """The platform's look at a configuration with one rank and nothing special beside `model`."""
    off = SimpleNamespace(use_ubatching=False, pipeline_parallel_size=1, decode_context_parallel_size=1)
    unset = dict.fromkeys(("speculative_config", "lora_config", "kv_transfer_config", "use_v2_model_runner"))
    asked = SimpleNamespace(enable_sleep_mode=False, **model)
    cache = SimpleNamespace(cache_dtype="auto")
    made = SimpleNamespace(**unset, model_config=asked, cache_config=cache, parallel_config=off)
    platform._refuse_unserved(made)  # type: ignore[arg-type]  # what is read of it
