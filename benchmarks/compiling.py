"""What a compilation costs, measured in a process of its own: seconds by stage, captures by size, vLLM's start.

`benchmarks/compiler.py` starts these processes and compares them.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import devices, models
from benchmarks.cpu import Clock, spent

BACKENDS = ("ascend", "aot_eager", "npugraph_ex", "npugraphs", "inductor")
SIZES = 35


def seconds(backend: str, name: str, layers: int) -> dict[str, Any]:
    """CPU seconds from torch.compile to the end of the first call, of a fresh process and its children.

    `cpu` is all of it, `wall` the same by the clock. Parts of `wall`: `dynamo`; `compiler`, the backend with
    AOTAutograd. For `ascend` also CPU seconds of its own stages, `stages`, and of those behind AOTAutograd together,
    `after`. Inductor runs on the plain CPU, the others on the device.
    """
    from torch._dynamo.utils import compilation_time_metrics

    device = torch.device("cpu") if backend == "inductor" else devices.npu()
    with torch.inference_mode():
        arguments, step = models.inputs(name, device), models.step(name, layers, device)
        step(*arguments)  # operators and libraries are loaded before the clock starts
        start, start_cpu = time.perf_counter(), spent()
        options = {"cache": True} if backend == "ascend" else None  # others keep what they keep by themselves
        torch.compile(step, backend=backend, fullgraph=True, dynamic=False, options=options)(*arguments)
        if device.type == "npu":
            torch.npu.synchronize()
        wall, cpu = time.perf_counter() - start, spent() - start_cpu
    inside = sum(compilation_time_metrics["OutputGraph.call_user_compiler"])
    frame = sum(compilation_time_metrics["_compile.compile_inner"])
    found = {"cpu": cpu, "wall": wall, "dynamo": frame - inside, "compiler": inside, "after": None, "stages": None}
    if backend == "ascend":
        from npu_compiler.backend import ascend

        stages = ascend.compiled()[-1].stages
        found["after"] = stages.after_lowering.cpu
        found["stages"] = {stage: cost.cpu for stage, cost in stages.costs.items()}
    return found


def sizes(name: str, layers: int) -> dict[str, Any]:
    """Captures one text length after another, largest first, with `ascend`: milliseconds and MiB of each."""
    from npu_compiler.backend import ascend

    device = devices.npu()
    model = models.step(name, layers, device).model
    compiled = torch.compile(model, backend="ascend")
    # Long enough that the largest needs many of the allocator's 2 MiB segments: in one, growth could not show.
    lengths = [32 * (SIZES - index) for index in range(SIZES)]
    with torch.inference_mode():
        for length in lengths:
            tokens = torch.randint(1, models.VOCABULARY, (1, length), device=device)
            torch._dynamo.mark_dynamic(tokens, 1)
            extra = {} if models.FAMILIES[name].encoder else {"use_cache": False}
            compiled(tokens, **extra)
    captures = [capture for graph in ascend.compiled() if graph.ledger for capture in graph.ledger.captures]
    return {
        "lengths": lengths,
        "milliseconds": [capture.milliseconds for capture in captures],
        "mebibytes": [capture.mebibytes for capture in captures],
    }


def vllm_start(name: str, layers: int) -> dict[str, Any]:
    """CPU seconds of an engine's start in FULL_DECODE_ONLY, `cpu`, and of the compilation in it as vLLM counts it,
    `compile`; the same by the clock, `wall` and `compile_wall`. vLLM's import is not counted."""
    from vllm import LLM  # noqa: F401  # before the clock starts
    from vllm.compilation import monitor

    # The path of a model is part of vLLM's cache key: in a folder of another name each start would be a cold one.
    folder = str(Path(os.environ["VLLM_CACHE_ROOT"]) / f"{name}_{layers}")
    models.configuration(name, layers).save_pretrained(folder)
    with Clock() as clock:
        start, start_cpu = time.perf_counter(), spent()
        llm = models.engine(folder, [1, 2, 4])
        wall, cpu = time.perf_counter() - start, spent() - start_cpu
    report = llm.collective_rpc("report")[0]
    began = monitor.torch_compile_start_time  # of the one model that there is
    compile_wall = llm.llm_engine.vllm_config.compilation_config.compilation_time
    return {
        "cpu": cpu,
        "wall": wall,
        "compile": clock.between(began, began + compile_wall),
        "compile_wall": compile_wall,
        "capture": report["capture_milliseconds"] / 1e3,
    }


def vllm_pool(name: str, hidden: int, largest: int) -> dict[str, Any]:
    """Captures SIZES batch sizes up to `largest` requests in vLLM, largest first: MiB by which each grew the pool.

    Args:
        hidden: the width of the one layer, as wide elsewhere as published models of this width are.
        largest: a multiple of SIZES.
    """
    heads = hidden // 128
    wide = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": heads}
    folder = str(Path(os.environ["VLLM_CACHE_ROOT"]) / f"{name}_{hidden}")
    models.configuration(name, 1, num_key_value_heads=heads // 2, head_dim=128, **wide).save_pretrained(folder)
    sizes = [largest // SIZES * (index + 1) for index in range(SIZES)]
    llm = models.engine(folder, sizes, max_num_seqs=largest, max_num_batched_tokens=largest)
    graphs = sorted(llm.collective_rpc("report")[0]["graphs"], key=lambda graph: graph["tokens"], reverse=True)
    return {
        "tokens": [graph["tokens"] for graph in graphs],
        "milliseconds": [graph["milliseconds"] for graph in graphs],
        "mebibytes": [graph["mebibytes"] for graph in graphs],
    }
