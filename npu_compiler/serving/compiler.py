"""vLLM's compiler interface on the `ascend` backend."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch._functorch._aot_autograd import autograd_cache
from torch._functorch._aot_autograd.schemas import AOTConfig
from vllm.compilation.backends import StopCompiling
from vllm.compilation.compiler_interface import CompilerInterface
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.compilation.passes.ir.lowering_pass import VllmIRLoweringPass
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.utils import Range
from vllm.logger import init_logger
from vllm.platforms import current_platform

from npu_compiler.backend import STORED, CompiledGraph, compile_fx, fingerprint, load_fx
from npu_compiler.config import BY_ROWS, OF_WEIGHTS, Options
from npu_compiler.errors import StoredProgramError
from npu_compiler.serving import dump, qkv_attention
from npu_compiler.serving.attention_notes import AttentionNotes
from npu_compiler.serving.fired import Fired
from npu_compiler.serving.options import compile_options
from npu_compiler.serving.watch import Watch, is_noted
from npu_compiler.watching import is_watched

logger = init_logger(f"vllm.{__name__}")
IN_KEY = "npu_compiler"
"""What `put_into_key` adds to vLLM's `inductor_compile_config`."""


class PassManager(InductorPass):
    """The passes vLLM hands to a compiler: the user's own, then the choice of each vLLM IR operator's provider.

    Fusion is the backend's own pipeline (npu_compiler.passes), which wants vLLM's IR operators whole; this manager
    therefore runs behind the rules, on the graph that is still functional.
    """

    def __init__(self) -> None:
        self.passes: list[InductorPass] = []

    def configure(self, config: VllmConfig) -> None:
        """Called by vLLM before the first graph."""
        with set_current_vllm_config(config, check_compile=False):
            self._lowering = VllmIRLoweringPass(config)

    @property
    def local(self) -> bool:
        """Whether a program of a few of a model's equal layers will do (compile_fx): a user's pass sees every layer."""
        return not self.passes

    def add(self, pass_: InductorPass) -> None:
        """Adds a pass of the user's, from inductor_compile_config."""
        self.passes.append(pass_)

    def __call__(self, graph: fx.Graph) -> None:
        for pass_ in self.passes:
            pass_(graph)
        self._lowering(graph)

    def uuid(self) -> str:
        """Changes when a pass, a provider or their order does."""
        return "|".join(str(pass_.uuid()) for pass_ in (*self.passes, self._lowering))


class AscendCompiler(CompilerInterface):
    """Compiles one piece of a model for a range of token counts.

    vLLM captures by itself (graph_wrapper.py), so this is the backend without its capture. What was compiled lies in
    vLLM's compile cache, one file a piece: the next start with the same settings loads it and skips lowering and
    passes. Pieces that are equal but for names, as those of a model's layers, are compiled once, if nothing in them is
    watched, counted or computed from weights once.
    """

    name = "ascend"

    def __init__(self) -> None:
        qkv_attention.register()
        self._options = compile_options({})
        self._folder: Path | None = None
        # Programs that could not be loaded. vLLM's CompilerManager.load notes them as loaded all the same, and would
        # stop their compilation to hand out nothing.
        self._unusable: set[str] = set()
        self._notes: AttentionNotes | None = None
        self._watch: Watch | None = None
        self._fired: Fired | None = None

    def initialize_cache(self, cache_dir: str, disable_cache: bool = False, prefix: str = "") -> None:
        """See CompilerInterface."""
        self._folder = None if disable_cache else Path(cache_dir)

    def compute_hash(self, vllm_config: VllmConfig) -> str:
        """Changes when the backend, its options or its passes do. vLLM calls it before the first `compile`."""
        self._options = dump.options_of(vllm_config)
        self._fired = Fired.of(vllm_config)
        self._notes = AttentionNotes(vllm_config.compilation_config.static_forward_context)
        if is_noted(self._options) and self._watch is None:
            self._watch = Watch(vllm_config)
        return fingerprint(self._options)

    def compile(
        self,
        graph: fx.GraphModule,
        example_inputs: list[Any],
        compiler_config: dict[str, Any],
        compile_range: Range,
        key: str | None = None,
    ) -> tuple[Callable[..., Any] | None, Any | None]:
        """See CompilerInterface. `graph` is left as it is: vLLM compiles it once a range."""
        name = key or f"vllm_{compile_range.start}_{compile_range.end}"
        options = for_range(self._options, compile_range)
        try:
            own = self._options.token_drop or any(getattr(self._options, name) for name in OF_WEIGHTS)
            if not (own or is_watched(graph.graph, self._options)):
                tell_vllm_the_key(graph, example_inputs, options)
        except StopCompiling:
            if name not in self._unusable:
                raise
        file = None if self._folder is None else self._folder / f"{name}.program"
        compiled = compile_fx(
            copy.deepcopy(graph),
            example_inputs,
            options,
            before_lowering=compiler_config["pre_grad_custom_pass"],
            after_passes=compiler_config[current_platform.pass_key],
            keep=None if file is None else functools.partial(_write, file),
            name=name,
            surroundings=self._notes,
            batch=self._batch,
        )
        self._add(compiled)
        logger.debug("%s", compiled)
        stored = file is not None and compiled.stored == STORED
        return compiled, (name, str(file)) if stored else None

    def load(
        self,
        handle: Any,
        graph: fx.GraphModule,
        example_inputs: list[Any],
        graph_index: int,
        compile_range: Range,
    ) -> Callable[..., Any] | None:
        """See CompilerInterface. None, which makes vLLM compile, where the stored program can't be used."""
        name, file = handle
        try:
            stored = Path(file).read_bytes()
            compiled = load_fx(stored, copy.deepcopy(graph), example_inputs, name, self._options, self._batch)
        except (OSError, StoredProgramError) as error:
            logger.warning("The stored program %s is compiled again: %s", file, error)
            self._unusable.add(name)
            return None
        self._add(compiled)
        return compiled

    @property
    def _batch(self) -> torch.Tensor | None:
        return None if self._watch is None else self._watch.batch

    def _add(self, compiled: CompiledGraph) -> None:
        if self._fired is not None:
            self._fired.add(compiled)
        if self._watch is not None:
            self._watch.add(compiled)


def for_range(options: Options, tokens: Range) -> Options:
    """The options for a range of token counts, which a program's sizes do not show: the passes that ask for a number of
    rows are on where there are always as many, and experts' communication is chosen for the most that there can be."""
    changed: dict[str, Any] = {name: int(0 < getattr(options, name) <= max(tokens.start, 2)) for name in BY_ROWS}
    changed["dual_batch_overlap"] = 2 * (0 < options.dual_batch_overlap <= tokens.start)
    return dataclasses.replace(options, **changed, expert_tokens=options.expert_tokens or tokens.end)


def put_into_key(config: VllmConfig) -> None:
    """Makes the compiler part of vLLM's key for the graph that Dynamo traced, which vLLM keeps between starts.

    That key is made before a backend is asked (vllm/compilation/caching.py, `aot_compile_hash_factors`); of what a
    plugin can set it holds this dictionary, which vLLM hands to the compiler and which ours does not read otherwise.
    Without it, a graph traced for another version of our operators could be loaded.
    """
    config.compilation_config.inductor_compile_config[IN_KEY] = fingerprint(dump.options_of(config))


def _write(file: Path, data: bytes) -> None:
    file.write_bytes(data)


def tell_vllm_the_key(graph: fx.GraphModule, example_inputs: list[Any], options: Options) -> None:
    """Asks for torch's cache key of the graph, which is where vLLM finds out that it has compiled an equal one. The
    options go into it as one more input: one graph becomes another program where a range of tokens has others.

    vLLM's CompilerManager.compile listens to `autograd_cache_key` and, at a key it knows, takes the earlier result.
    Graphs that torch has no key for are compiled one by one.
    """
    config = AOTConfig(None, None, None, {}, 0, 0, keep_inference_input_mutations=True)
    with contextlib.suppress(autograd_cache.BypassAOTAutogradCache):
        autograd_cache.autograd_cache_key(graph, [*example_inputs, repr(options)], config)
