"""What a serving run adds to its bundle: vLLM's own captures, and the run report of every rank."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from npu_compiler.backend import bundle_of
from npu_compiler.config import Options
from npu_compiler.serving.options import ServingOptions, compile_options
from npu_compiler.serving.report import GraphRecord

logger = init_logger(f"vllm.{__name__}")

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXPERT_GROUP = "ep:0"
"""vLLM's name of the group of ranks that experts are spread over. Layers of experts are traced (serving/moe_runner.py),
and with one data-parallel rank nothing else communicates in it."""
RUN, CAPTURES = "run.json", "captures.jsonl"
"""Files of a bundle (npu_compiler/inspect/contents.py)."""


def options_of(vllm_config: VllmConfig) -> Options:
    """The options of the compiler: what `additional_config` says, vLLM's folder for dumps and its largest graph."""
    given: dict[str, Any] = ServingOptions.of(vllm_config).compile
    compilation = vllm_config.compilation_config
    folder = compilation.debug_dump_path
    if vllm_config.parallel_config.enable_expert_parallel:
        largest = compilation.max_cudagraph_capture_size or 0
        given = {"expert_graph_tokens": largest, "expert_group": EXPERT_GROUP, **given}
    return compile_options(given if folder is None else {"dump": str(folder), **given})


def report_paths(vllm_config: VllmConfig) -> list[str]:
    """Where a rank writes its run report: into its bundle, and, only rank 0, where `report_path` says."""
    given, rank = ServingOptions.of(vllm_config).report_path, vllm_config.parallel_config.rank
    bundle = bundle_of(options_of(vllm_config))
    return [*([given] if given is not None and rank == 0 else []), *([str(bundle / RUN)] if bundle else [])]


def note_capture(vllm_config: VllmConfig, record: GraphRecord) -> None:
    """Writes a capture into the bundle, if there is one. A full disk must not end a run."""
    bundle = bundle_of(options_of(vllm_config))
    if bundle is None:
        return
    try:
        with (bundle / CAPTURES).open("a") as out:
            out.write(json.dumps(dataclasses.asdict(record)) + "\n")
    except OSError as error:
        logger.warning("A capture is missing in %s: %s", bundle, error)
