"""The passes on the graphs of upstream vLLM's model code: operators of one decoder layer before and after."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.passes import vllm_graphs
from tests.passes.vllm_graphs import Shape, TracedGraph, fired, layer

DECODERS = ["qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3", "glm4", "phi3"]


@pytest.fixture(params=DECODERS)
def graph(request: pytest.FixtureRequest) -> TracedGraph:
    return vllm_graphs.graph(Shape(request.param))


def test_every_norm_becomes_one_operator(graph: TracedGraph) -> None:
    before, compiled = layer(graph.lowered().graph), graph.compiled()
    assert compiled.graph is not None
    after = layer(compiled.graph)
    residual = before.count("vllm_ir.fused_add_rms_norm.default")
    assert residual == 2, "a decoder layer adds twice to its residual stream"
    assert not [name for name in after if name.startswith("vllm_ir.")]
    assert after.count("npu_fused.add_rms_norm.default") == residual
    assert fired(compiled)["vllm_fused_add_rms_norm"] == 2 * residual
    assert len(after) < len(before)
