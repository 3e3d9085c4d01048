"""The passes on the graphs of upstream vLLM's model code: operators of one decoder layer before and after."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.passes import vllm_graphs
from tests.passes.vllm_graphs import Shape, TracedGraph, fired, layer

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


@pytest.fixture(params=OPERATORS)
def graph(request: pytest.FixtureRequest) -> TracedGraph:
    return vllm_graphs.graph(Shape(request.param))


def test_every_norm_becomes_one_operator(graph: TracedGraph) -> None:
    before, compiled = layer(graph.lowered().graph), graph.compiled()
    assert compiled.graph is not None
    after = layer(compiled.graph)
    residual = before.count("vllm_ir.fused_add_rms_norm.default")
    assert residual == 2, "a decoder layer adds twice to its residual stream"
    assert not [name for name in after if name.startswith("vllm_ir.")]
    assert sum(name.endswith("add_rms_norm.default") for name in after) == residual
    assert len(after) < len(before)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemma_weights_go_to_the_norm_as_they_are_stored(family: str) -> None:
    """No kernel widens a weight and adds its one: hidden states are normalised four times a layer, and in Gemma 3
    queries and keys too."""
    compiled = vllm_graphs.graph(Shape(family)).compiled()
    counts = fired(compiled)
    heads = 2 if family == "gemma3" else 0
    assert counts["gemma_rms_norm"] == 5 + 2 * heads
    assert counts["vllm_gemma_add_rms_norm"] == 4
    assert compiled.graph is not None
    after = layer(compiled.graph)
    assert after.count("npu_fused.gemma_rms_norm.default") == 2 + heads
    assert after.count("npu_fused.gemma_add_rms_norm.default") == 2
    assert "aten._to_copy.default" not in after


def test_operators_of_a_layer(graph: TracedGraph, request: pytest.FixtureRequest) -> None:
    """Rotations (of halves; GLM-4's of neighbours, in half of the head) and gates are one operator each."""
    compiled = graph.compiled()
    assert compiled.graph is not None
    before, after = layer(graph.lowered().graph), layer(compiled.graph)
    for operators in (before, after):
        operators.remove("aten.empty.memory_format")
    assert (len(before), len(after)) == OPERATORS[request.node.callspec.params["graph"]]
    assert not {"aten.cat.default", "aten.stack.default", "aten.mul.Tensor", "aten.gelu.default"} & set(after)
    rotations = after.count("npu_fused.qk_rope_cached.default") + after.count(vllm_graphs.PACKED_ATTENTION)
    gates = after.count("npu_fused.swiglu.default") + after.count("npu_fused.geglu.default")
    assert (rotations, gates) == (1, 1)
