"""vLLM's compiler interface on the `ascend` backend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch.fx as fx
from vllm.compilation.compiler_interface import CompilerInterface
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.compilation.passes.ir.lowering_pass import VllmIRLoweringPass
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.utils import Range
from vllm.logger import init_logger
from vllm.platforms import current_platform

from npu_compiler.backend import compile_fx, fingerprint
from npu_compiler.serving import qkv_attention
from npu_compiler.serving.options import ServingOptions, compile_options

logger = init_logger(__name__)


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

    vLLM captures by itself (graph_wrapper.py), so this is the backend without its capture. Nothing is cached on disk:
    `compile` returns no handle, and vLLM compiles again in every process.
    """

    name = "ascend"

    def __init__(self) -> None:
        qkv_attention.register()
        self._options = compile_options({})

    def compute_hash(self, vllm_config: VllmConfig) -> str:
        """Changes when the backend, its options or its passes do. vLLM calls it before the first `compile`."""
        self._options = compile_options(ServingOptions.of(vllm_config).compile)
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
        compiled = compile_fx(
            copy.deepcopy(graph),
            example_inputs,
            self._options,
            before_lowering=compiler_config["pre_grad_custom_pass"],
            after_passes=compiler_config[current_platform.pass_key],
            name=key or f"vllm_{compile_range.start}_{compile_range.end}",
        )
        logger.debug("%s", compiled)
        return compiled, None
