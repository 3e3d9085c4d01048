"""The passes on the graphs of upstream vLLM's model code: operators of one decoder layer before and after."""

from __future__ import annotations

import dataclasses
import functools

import pytest

pytest.importorskip("vllm")

import torch

from npu_compiler.backend import CompiledGraph
from tests.passes import vllm_graphs
from tests.passes.vllm_graphs import Shape, fired, layer

# Operators of one decoder layer before and after the passes, without the memory of the attention's result.
OPERATORS = {
    "qwen2": (26, 9),
    "qwen3": (28, 8),
    "llama": (26, 9),
    "mistral": (26, 9),
    "gemma2": (36, 11),
    "gemma3": (42, 13),
    "glm4": (28, 11),
    "phi3": (26, 9),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """Operators of a decoder layer before and after the passes, and how often each rule fired in the model."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    fired: dict[str, int]


@functools.cache
def compiled_layer(family: str) -> Layer:
    """Of a family's model, which is compiled once for all tests of this file."""
    graph = vllm_graphs.graph(Shape(family))
    compiled = graph.compiled()
    assert compiled.graph is not None
    return Layer(tuple(layer(graph.lowered().graph)), tuple(layer(compiled.graph)), fired(compiled))


@pytest.mark.parametrize("family", OPERATORS)
def test_every_norm_becomes_one_operator(family: str) -> None:
    before, after = compiled_layer(family).before, compiled_layer(family).after
    residual = before.count("vllm_ir.fused_add_rms_norm.default")
    assert residual == 2, "a decoder layer adds twice to its residual stream"
    assert not [name for name in after if name.startswith("vllm_ir.")]
    assert sum(name.endswith("add_rms_norm.default") for name in after) == residual
    assert len(after) < len(before)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemma_weights_go_to_the_norm_as_they_are_stored(family: str) -> None:
    """No kernel widens a weight and adds its one: hidden states are normalised four times a layer, and in Gemma 3
    queries and keys too."""
    counts, after = compiled_layer(family).fired, compiled_layer(family).after
    heads = 2 if family == "gemma3" else 0
    assert counts["gemma_rms_norm"] == 5 + 2 * heads
    assert counts["vllm_gemma_add_rms_norm"] == 4
    assert after.count("npu_fused.gemma_rms_norm.default") == 2 + heads
    assert after.count("npu_fused.gemma_add_rms_norm.default") == 2
    assert "aten._to_copy.default" not in after


@pytest.mark.parametrize("family", OPERATORS)
def test_operators_of_a_layer(family: str) -> None:
    """Rotations (of halves; GLM-4's of neighbours, in half of the head) and gates are one operator each."""
    before, after = list(compiled_layer(family).before), list(compiled_layer(family).after)
    for operators in (before, after):
        operators.remove("aten.empty.memory_format")
    assert (len(before), len(after)) == OPERATORS[family]
    assert not {"aten.cat.default", "aten.stack.default", "aten.mul.Tensor", "aten.gelu.default"} & set(after)
    rotations = after.count("npu_fused.qk_rope_cached.default") + after.count(vllm_graphs.PACKED_ATTENTION)
    gates = after.count("npu_fused.swiglu.default") + after.count("npu_fused.geglu.default")
    assert (rotations, gates) == (1, 1)


def test_another_shape_in_one_process_gets_its_fusions_too() -> None:
    """Nothing is registered for the whole process, with one number of heads or one epsilon."""
    changes = (("num_attention_heads", 8), ("num_key_value_heads", 4), ("rms_norm_eps", 1e-5))
    other = vllm_graphs.graph(Shape("qwen3", changes=changes)).compiled()
    again = vllm_graphs.graph(Shape("qwen3")).compiled()
    assert fired(other) == fired(again) == compiled_layer("qwen3").fired
    assert (epsilons(other), epsilons(again)) == ({1e-5}, {1e-6})


def epsilons(compiled: CompiledGraph) -> set[object]:
    """Of the norms behind an addition."""
    assert compiled.graph is not None
    norms = compiled.graph.graph.find_nodes(op="call_function", target=torch.ops.npu_fused.add_rms_norm.default)
    return {node.args[3] for node in norms}
