"""The graphs that upstream vLLM's model code gives, of shrunken models with random weights, without an engine.

    graph = vllm_graphs.graph(vllm_graphs.Shape("qwen3"))
    graph.lowered()                  # the functional program that the passes receive
    graph.compiled()                 # what compile_fx makes of it: .records, .graph
    layer(graph.compiled().graph)    # the operators of one decoder layer, by name

A graph is traced once a process (vLLM itself takes 15 seconds to import, a model 2 to 5 to trace) and handed out in
copies. It is what `AscendCompiler.compile` receives where nothing runs in pieces (FULL_DECODE_ONLY): the whole model,
tokens dynamic.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import transformers
from torch import fx
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.compilation.passes.ir.inplace_functionalization import VllmIRInplaceFunctionalizationPass
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.config.utils import Range
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

from npu_compiler.backend import CompiledGraph, compile_fx
from npu_compiler.graph.traffic import launches
from npu_compiler.lowering.functional import Functional, lower
from npu_compiler.serving import qkv_attention
from npu_compiler.serving.compiler import PassManager
from npu_compiler.serving.options import compile_options

TOKENS = 4
ATTENTION = "vllm.unified_attention_with_output.default"
PACKED_ATTENTION = "npu_serving.qkv_attention.default"
ATTENTIONS = (ATTENTION, PACKED_ATTENTION)
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GLOBAL = ["full_attention"] * SMALL["num_hidden_layers"]
# What each family's configuration adds: head sizes are those of the published models.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "llama": ("Llama", {"head_dim": 128}),
    "mistral": ("Mistral", {"head_dim": 128, "sliding_window": None}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 256, "query_pre_attn_scalar": 256, "attn_logit_softcapping": None, "layer_types": GLOBAL},
    ),
    "gemma3": ("Gemma3", {"head_dim": 256, "query_pre_attn_scalar": 256, "layer_types": GLOBAL}),
    "glm4": ("Glm4", {"head_dim": 128, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {}),
    "bert": ("Bert", {}),
}
CLASSES = {"gemma3": "Gemma3TextConfig"}
ARCHITECTURES = {"bert": "BertModel"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What decides a graph. `changes` are settings of the transformers configuration, as a tuple of pairs; lists as
    tuples."""

    family: str
    dtype: str = "bfloat16"
    changes: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class TracedGraph:
    """A dynamo graph with its fake inputs, as vLLM hands it to a compiler."""

    dynamo: fx.GraphModule
    inputs: tuple[Any, ...]
    config: VllmConfig

    def lowered(self) -> Functional:
        """The functional program, no passes run; a new one at every call."""
        programs: list[Functional] = []

        def finish(functional: Functional) -> Callable[..., Any]:
            programs.append(functional)
            return functional.graph.forward

        with torch.inference_mode():
            lower(copy.deepcopy(self.dynamo), self.inputs, finish)
        (program,) = programs
        return program

    def compiled(self, options: Mapping[str, Any] | None = None) -> CompiledGraph:
        """The result of compile_fx, with the options and passes that the plugin gives it; a new one at every call."""
        qkv_attention.register()
        with torch.inference_mode():
            return compile_fx(copy.deepcopy(self.dynamo), self.inputs, compile_options(options or {}))

    def compiled_by_vllm(self, options: Mapping[str, Any] | None = None) -> CompiledGraph:
        """As `compiled`, with vLLM's pass manager behind the rules, as in an engine."""
        qkv_attention.register()
        manager = PassManager()
        manager.configure(self.config)
        with torch.inference_mode(), self.config.kernel_config.ir_op_priority.set_priority():
            dynamo, chosen = copy.deepcopy(self.dynamo), compile_options(options or {})
            return compile_fx(dynamo, self.inputs, chosen, after_passes=manager)


@functools.cache
def graph(shape: Shape) -> TracedGraph:
    """The graph of a model of `shape`. Parameters are among its inputs, as vLLM's compiler sees them."""
    _collected.clear()
    with tempfile.TemporaryDirectory() as folder:
        config = _configuration(shape, Path(folder))
        # Ahead of time vLLM compiles only by backends whose result it can store.
        with _process_groups(config), mock.patch.dict(os.environ, {"VLLM_USE_AOT_COMPILE": "0"}):
            _run(config)
            ((dynamo, inputs),) = _collected
            _functionalize(dynamo, config)
    return TracedGraph(dynamo, inputs, config)


_collected: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []


def collect(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A torch.compile backend, named to vLLM by its path, that keeps what it is given and runs it as it is."""
    fakes = tuple(node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder"))
    _collected.append((copy.deepcopy(gm), fakes))
    return gm.forward


def _configuration(shape: Shape, folder: Path) -> VllmConfig:
    """vLLM's configuration of a model whose weights exist nowhere: load_format "dummy" makes them up."""
    name, settings = FAMILIES[shape.family]
    family = getattr(transformers, CLASSES.get(shape.family, f"{name}Config"))
    changes = {name: list(value) if isinstance(value, tuple) else value for name, value in shape.changes}
    config = family(**(SMALL | settings | changes), dtype=shape.dtype)
    config.architectures = [ARCHITECTURES.get(shape.family, f"{name}ForCausalLM")]
    config.save_pretrained(folder)
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=shape.dtype,
        max_model_len=SMALL["max_position_embeddings"],
        max_num_seqs=TOKENS,
        kv_cache_memory_bytes=64 << 20,
        compilation_config={"mode": CompilationMode.DYNAMO_TRACE_ONCE, "backend": f"{__name__}.{collect.__name__}"},
    ).create_engine_config()


@contextlib.contextmanager
def _process_groups(config: VllmConfig) -> Iterator[None]:
    """The groups of one rank, which vLLM's layers ask for when they are made; gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        try:
            init_worker_distributed_environment(config, 0, f"file://{folder}/store", 0, current_platform.dist_backend)
            yield
        finally:
            cleanup_dist_env_and_memory()


def _run(config: VllmConfig) -> None:
    """Loads the model and calls it once, as vLLM's own profiling run does: without attention metadata."""
    torch._dynamo.reset()
    device = torch.device("npu:0")
    with config.kernel_config.ir_op_priority.set_priority():  # for this run: other tests call the operators on the CPU
        model = get_model(vllm_config=config)
        with torch.inference_mode(), set_forward_context(None, config, num_tokens=TOKENS):
            model(*(torch.arange(TOKENS, device=device) for _ in range(2)))


def _functionalize(dynamo: fx.GraphModule, config: VllmConfig) -> None:
    """What vLLM does to a graph before a compiler lowers it: operators that may reuse an input no longer do."""
    with pass_context(Range(1, TOKENS)):
        VllmIRInplaceFunctionalizationPass(config)(dynamo.graph)
    dynamo.recompile()


def fired(compiled: CompiledGraph) -> dict[str, int]:
    """How often each rule fired, over all passes."""
    counts: dict[str, int] = {}
    for record in compiled.records:
        for entry in record.fired:
            counts[entry.rule] = counts.get(entry.rule, 0) + 1
    return counts


def layer(module: fx.GraphModule) -> list[str]:
    """The operators of one decoder layer, in order: from behind the first attention up to and with the second.

    Views, getitem and arithmetic on sizes are left out: they are no work for the device.
    """
    names = [name for name in map(_operator, module.graph.nodes) if name]
    marks = [index for index, name in enumerate(names) if name in ATTENTIONS]
    return names[marks[0] + 1 : marks[1] + 1]


def _operator(node: fx.Node) -> str:
    """The operator that a call runs on the device; empty for everything else."""
    if not launches(node):
        return ""
    # the target of a functionalised operator is its first argument
    return str(node.args[0] if isinstance(node.target, torch._ops.HigherOrderOperator) else node.target)
