"""AOTAutograd in its inference form.

What comes out is functional except for its tail: a mutated input is written by one `copy_` at the end, and a custom
operator that mutates is wrapped in `auto_functionalized_v2`. AOTAutograd itself keeps the calling convention: repeated
and aliased inputs, outputs that are views of inputs, and sizes as inputs never reach the passes.

No decomposition is asked for. Composite operators still fall apart (F.linear, nn.RMSNorm); the rest (silu, mm, every
operator of a vendor's or vLLM's namespace) keeps its name, which is what the rules match.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import fx
from torch._dynamo.utils import detect_fake_mode
from torch._functorch._aot_autograd.schemas import OutputType, PlainTensorMeta
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from npu_compiler.errors import TrainingWarning
from npu_compiler.graph.rolled import Rolled
from npu_compiler.graph.running import caller
from npu_compiler.graph.source import beginning

NEEDS_GRADIENTS = (
    "a function compiled by backend='ascend' needs gradients: it runs operator by operator, neither rewritten nor "
    "captured. For inference call it under torch.inference_mode() or torch.no_grad(), or freeze the parameters "
    "(requires_grad_(False)). npu_compiler.report() lists the graphs that this concerns."
)
EFFECTS = "effects are handled around the graph"


@dataclass(frozen=True)
class Functional:
    """A lowered graph.

    Attributes:
        graph: the functional program; placeholders are tensors and sizes (SymInt). Rolled up only behind the passes.
        inputs: the fake inputs, in placeholder order.
        stable: indices of inputs whose address does not change between calls: parameters, buffers, tensors marked with
            torch._dynamo.mark_static_address, and values computed once.
        convention: what AOTAutograd does around the graph at each call, as text; empty where it only calls it.
    """

    graph: fx.GraphModule | Rolled
    inputs: list[Any]
    stable: tuple[int, ...]
    convention: str = ""


def lower(
    dynamo: fx.GraphModule, example_inputs: Sequence[Any], finish: Callable[[Functional], Callable[..., Any]]
) -> Callable[..., Any]:
    """Lowers `dynamo`, hands the functional graph to `finish` and returns the callable with dynamo's convention.

    Where gradients are needed, AOTAutograd splits the graph into forward and backward. Both run operator by operator as
    they are, `finish` is not called, and a TrainingWarning says so.

    Args:
        example_inputs: what `dynamo` would be called with: fake or real tensors, and sizes.
        finish: makes the executable of the functional graph; it is called with a flat list of inputs.
    """

    marked = _marked_static(dynamo.graph)

    def inference(graph: fx.GraphModule, inputs: list[Any]) -> Callable[[list[Any]], Any]:
        convention = _convention(inputs, example_inputs)
        stable = {*_stable_inputs(len(inputs)), *(marked if len(inputs) == len(example_inputs) else ())}
        return _boxed(finish(Functional(graph, inputs, tuple(sorted(stable)), convention)))

    def forward(graph: fx.GraphModule, inputs: list[Any]) -> Callable[[list[Any]], Any]:
        warnings.warn(f"{NEEDS_GRADIENTS} ({beginning(graph.graph)})", TrainingWarning, stacklevel=2)
        return _boxed(caller(graph))

    def backward(graph: fx.GraphModule, inputs: list[Any]) -> Callable[[list[Any]], Any]:
        return _boxed(caller(graph))

    # The autograd cache stores Inductor's artifact types only.
    uncached = {"enable_autograd_cache": False, "bundled_autograd_cache": False, "strict_autograd_cache": False}
    # Code is generated for the program that is called, not for each one on the way, as Inductor does it.
    with _tracing_context(example_inputs), functorch_config.patch(uncached), _use_lazy_graph_module(True):
        return aot_module_simplified(
            dynamo,
            example_inputs,
            fw_compiler=forward,
            bw_compiler=backward,
            inference_compiler=inference,
            decompositions={},
            keep_inference_input_mutations=True,
        )


def _boxed(run: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """`run` in AOTAutograd's convention: all arguments in one list."""

    def boxed(args: list[Any]) -> Any:
        return run(*args)

    boxed._boxed_call = True  # type: ignore[attr-defined]  # how AOTAutograd is told that args is one list
    return boxed


def _stable_inputs(count: int) -> tuple[int, ...]:
    context = TracingContext.try_get()
    if context is None or context.fw_metadata is None:
        return ()
    return tuple(index for index in context.fw_metadata.static_input_indices if index < count)


def _marked_static(dynamo: fx.Graph) -> list[int]:
    """Indices of a Dynamo graph's inputs that Dynamo marked as parameters, buffers or static. AOTAutograd asks the
    nodes' sources for them, which are lost where somebody copied the graph, as vLLM does."""
    inputs = enumerate(dynamo.find_nodes(op="placeholder"))
    return [index for index, node in inputs if "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})]


def _convention(inputs: Sequence[Any], example_inputs: Sequence[Any]) -> str:
    """What AOTAutograd's wrapper does beyond calling the graph it made; empty if nothing."""
    context = TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    if metadata is None:
        return "nothing is known about AOTAutograd's calling convention"
    if metadata.tokens:
        return EFFECTS
    if len(inputs) != len(example_inputs):
        return "inputs that share memory are merged"
    if metadata.mutated_inp_runtime_indices:
        return "inputs are written behind the graph"
    if any(entry.output_type is not OutputType.non_alias for entry in metadata.output_info):
        return "outputs are views of inputs or of each other"
    if metadata.grad_enabled_mutation is not None or metadata.num_intermediate_bases:
        return EFFECTS
    plain = all(isinstance(entry, (int, PlainTensorMeta)) for entry in metadata.subclass_inp_meta)
    return "" if plain else "inputs are tensor subclasses"


def _tracing_context(example_inputs: Sequence[Any]) -> contextlib.AbstractContextManager[object]:
    """Dynamo's own context where there is one; otherwise one round the fake mode of the example inputs."""
    if TracingContext.try_get() is not None:
        return contextlib.nullcontext()
    mode = detect_fake_mode([item for item in example_inputs if isinstance(item, torch.Tensor)])
    return tracing(TracingContext(mode or FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)))
