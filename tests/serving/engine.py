"""vLLM engines for tests: one place that says how small they are and how they are taken down again."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before vLLM is imported: the engine runs in this process, so that a test can see its worker.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

KV_CACHE_BYTES = 64 << 20
CAPTURE_SIZES = [1, 2, 4]
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,  # a prompt of 300 tokens takes five chunks
    "kv_cache_memory_bytes": KV_CACHE_BYTES,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "disable_log_stats": True,
    "seed": 0,
}


@contextlib.contextmanager
def engine(folder: Path, **changes: Any) -> Iterator[LLM]:
    """An engine on `folder` with SETTINGS and `changes`; its device memory and groups are gone afterwards."""
    cleanup_dist_env_and_memory()  # of an engine that failed to start: its groups may lack those this model needs
    try:
        llm = LLM(model=str(folder), **(SETTINGS | changes))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
    finally:
        cleanup_dist_env_and_memory()  # other tests make groups of their own


def graphs(mode: str, sizes: list[int] | None = None) -> dict[str, Any]:
    """Engine settings for `cudagraph_mode` `mode`, capturing `sizes` (CAPTURE_SIZES by default)."""
    config: dict[str, Any] = {"cudagraph_mode": mode}
    if mode != "NONE":
        config["cudagraph_capture_sizes"] = sizes or CAPTURE_SIZES
    return {"compilation_config": config}


def generate(llm: LLM, prompts: list[list[int]], counts: list[int] | int, **sampling: Any) -> list[list[int]]:
    """Greedy tokens (or as `sampling` says) of exactly the asked-for length for each prompt."""
    wanted = [counts] * len(prompts) if isinstance(counts, int) else counts
    parameters = [
        SamplingParams(max_tokens=count, ignore_eos=True, **({"temperature": 0.0} | sampling)) for count in wanted
    ]
    outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def report(llm: LLM) -> dict[str, Any]:
    """The run report of rank 0."""
    return llm.collective_rpc("report")[0]
