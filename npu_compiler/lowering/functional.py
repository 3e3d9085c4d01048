"""AOTAutograd in its inference form.

What comes out is functional except for its tail: a mutated input is written by one `copy_` at the end, and a custom
operator that mutates is wrapped in `auto_functionalized_v2`. AOTAutograd itself keeps the calling convention: repeated
and aliased inputs, outputs that are views of inputs, and sizes as inputs never reach the passes. Where its metadata
says that there is nothing of the kind, calls behind the first pass its wrapper by (graph/around.py).

No decomposition is asked for. Composite operators still fall apart (F.linear, nn.RMSNorm); the rest (silu, mm, every
operator of a vendor's or vLLM's namespace) keeps its name, which is what the rules match.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import fx
from torch._dynamo.utils import detect_fake_mode
from torch._functorch._aot_autograd.schemas import PlainTensorMeta, ViewAndMutationMeta
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from npu_compiler.errors import TrainingWarning
from npu_compiler.graph.around import Around
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
        around: what is done around the graph at each call where nothing of AOTAutograd's wrapper is needed.
        convention: what needs the wrapper, as text; empty if nothing.
    """

    graph: fx.GraphModule | Rolled
    inputs: list[Any]
    stable: tuple[int, ...]
    around: Around
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
    autocast = torch._C._is_any_autocast_enabled()  # AOTAutograd turns it off while it compiles
    held = any(True for _ in itertools.chain(dynamo.parameters(), dynamo.buffers()))
    plain: tuple[Around, Callable[..., Any]] | None = None

    def inference(graph: fx.GraphModule, inputs: list[Any]) -> Callable[[list[Any]], Any]:
        nonlocal plain
        context = TracingContext.try_get()
        metadata = None if context is None else context.fw_metadata
        convention = _convention(metadata, len(inputs) == len(example_inputs) and not held)
        around = _around(metadata, autocast)
        stable = {*_stable_inputs(metadata, len(inputs)), *(marked if len(inputs) == len(example_inputs) else ())}
        run = finish(Functional(graph, inputs, tuple(sorted(stable)), around, convention))
        if not convention:
            plain = around, run
        return _boxed(run)

    def forward(graph: fx.GraphModule, inputs: list[Any]) -> Callable[[list[Any]], Any]:
        warnings.warn(f"{NEEDS_GRADIENTS} ({beginning(graph.graph)})", TrainingWarning, stacklevel=2)
        return _boxed(caller(graph))

    def backward(graph: fx.GraphModule, inputs: list[Any]) -> Callable[[list[Any]], Any]:
        return _boxed(caller(graph))

    # The autograd cache stores Inductor's artifact types only.
    uncached = {"enable_autograd_cache": False, "bundled_autograd_cache": False, "strict_autograd_cache": False}
    # Code is generated for the program that is called, not for each one on the way, as Inductor does it.
    with _tracing_context(example_inputs), functorch_config.patch(uncached), _use_lazy_graph_module(True):
        wrapped = aot_module_simplified(
            dynamo,
            example_inputs,
            fw_compiler=forward,
            bw_compiler=backward,
            inference_compiler=inference,
            decompositions={},
            keep_inference_input_mutations=True,
        )
    if plain is None:
        return wrapped
    around, run = plain
    return around.call(run, first=wrapped)  # at a first call torch watches whether custom operators return aliases


def _boxed(run: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """`run` in AOTAutograd's convention: all arguments in one list."""

    def boxed(args: list[Any]) -> Any:
        return run(*args)

    boxed._boxed_call = True  # type: ignore[attr-defined]  # how AOTAutograd is told that args is one list
    return boxed


def _stable_inputs(metadata: ViewAndMutationMeta | None, count: int) -> tuple[int, ...]:
    if metadata is None:
        return ()
    return tuple(index for index in metadata.static_input_indices if index < count)


def _marked_static(dynamo: fx.Graph) -> list[int]:
    """Indices of a Dynamo graph's inputs that Dynamo marked as parameters, buffers or static. AOTAutograd asks the
    nodes' sources for them, which are lost where somebody copied the graph, as vLLM does."""
    inputs = enumerate(dynamo.find_nodes(op="placeholder"))
    return [index for index, node in inputs if "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})]


def _convention(metadata: ViewAndMutationMeta | None, same_inputs: bool) -> str:
    """What a call of the graph needs AOTAutograd's wrapper for; empty if nothing.

    Args:
        same_inputs: the graph has the inputs of Dynamo's graph, and no others.
    """
    if metadata is None:
        return "nothing is known about AOTAutograd's calling convention"
    if metadata.tokens:
        return EFFECTS
    if not same_inputs:
        return "inputs are merged or added"
    if metadata.is_rng_op_functionalized:
        return "the state of random numbers is an input"
    if metadata.mutated_inp_runtime_indices:
        return "inputs are written behind the graph"
    if metadata.num_outputs_aliased or metadata.num_intermediate_bases:
        return "outputs are views of inputs or of each other"
    if metadata.grad_enabled_mutation is not None:
        return EFFECTS
    layouts = (*metadata.subclass_inp_meta, *metadata.subclass_fw_graph_out_meta)
    if metadata.act_input_indices or not all(isinstance(entry, (int, PlainTensorMeta)) for entry in layouts):
        return "inputs or outputs are tensor subclasses"
    return "torch checks its own guards at each call (debug_assert)" if functorch_config.debug_assert else ""


def _around(metadata: ViewAndMutationMeta | None, autocast: bool) -> Around:
    if metadata is None:
        return Around()
    return Around(
        written=tuple(metadata.mutated_graph_handled_indices_seen_by_autograd),
        dynamic=tuple(
            (position, tuple(sorted(info.dynamic_dims)))
            for position, info in enumerate(metadata.output_info)
            if info.dynamic_dims
        ),
        autocast=autocast,
    )


def _tracing_context(example_inputs: Sequence[Any]) -> contextlib.AbstractContextManager[object]:
    """Dynamo's own context where there is one; otherwise one round the fake mode of the example inputs."""
    if TracingContext.try_get() is not None:
        return contextlib.nullcontext()
    mode = detect_fake_mode([item for item in example_inputs if isinstance(item, torch.Tensor)])
    return tracing(TracingContext(mode or FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)))
