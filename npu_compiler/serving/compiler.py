"""vLLM's compiler interface on the `ascend` backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx as fx
from vllm.compilation.compiler_interface import CompilerInterface
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.compilation.passes.ir.lowering_pass import VllmIRLoweringPass
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.utils import Range


class PassManager(InductorPass):
    """The passes vLLM hands to a compiler: the user's own, then the choice of each vLLM IR operator's provider.

    Fusion is the backend's own pipeline (npu_compiler.passes), which wants vLLM's IR operators whole; this manager
    therefore runs behind it.
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
    """Compiles one piece of a model for a range of token counts."""

    name = "ascend"

    def compute_hash(self, vllm_config: VllmConfig) -> str:
        return ""

    def compile(
        self,
        graph: fx.GraphModule,
        example_inputs: list[Any],
        compiler_config: dict[str, Any],
        compile_range: Range,
        key: str | None = None,
    ) -> tuple[Callable[..., Any] | None, Any | None]:
        compiler_config["pre_grad_custom_pass"](graph.graph)
        graph.recompile()
        return graph, None
