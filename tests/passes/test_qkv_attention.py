"""qkv_attention on the graphs of upstream vLLM's models: where it fires, and why not elsewhere."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from npu_compiler.passes import qkv_attention
from tests.passes import vllm_graphs
from tests.passes.vllm_graphs import ATTENTION, PACKED_ATTENTION, Shape, fired, layer

LEFT_OUT = [
    (Shape("qwen3", dtype="float32"), "the kernel takes float16 or bfloat16, not torch.float32"),
    (Shape("qwen3", changes=(("head_dim", 64),)), "head size of the kernel: 64 is not 128"),
    (Shape("llama"), "query and key are not normalised and rotated by one operator"),
]


def name(value: object) -> str:
    return f"{value.family}-{value.dtype}" if isinstance(value, Shape) else ""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_qwen3_layer(dtype: str) -> None:
    compiled = vllm_graphs.graph(Shape("qwen3", dtype=dtype)).compiled({"check": True})
    assert compiled.graph is not None
    assert fired(compiled)[qkv_attention.NAME] == vllm_graphs.SMALL["num_hidden_layers"]
    operators = layer(compiled.graph)
    operators.remove("aten.empty.memory_format")  # the attention's output: memory, no kernel
    # the last stands for two kernels: from the projection to the cache, and the attention
    assert len(operators) == 8
    assert operators[-2:] == ["aten.matmul.default", PACKED_ATTENTION]
    assert ATTENTION not in operators


def test_source_line_and_saving() -> None:
    compiled = vllm_graphs.graph(Shape("qwen3")).compiled()
    (record,) = [record for record in compiled.records if record.name == qkv_attention.NAME]
    for entry in record.fired:
        assert "unified_attention_with_output" in entry.place
        assert entry.saves is not None
        assert entry.saves.kernels == 1
    assert compiled.graph is not None
    for node in compiled.graph.graph.nodes:
        if str(node.target) == PACKED_ATTENTION:
            assert "attention.py" in node.meta["stack_trace"]


@pytest.mark.parametrize(("shape", "reason"), LEFT_OUT, ids=name)
def test_left_out_with_the_reason(shape: Shape, reason: str) -> None:
    compiled = vllm_graphs.graph(shape).compiled()
    (record,) = [record for record in compiled.records if record.name == qkv_attention.NAME]
    assert not record.fired
    assert [entry.reason for entry in record.refused] == [reason] * vllm_graphs.SMALL["num_hidden_layers"]
    assert compiled.graph is not None
    assert layer(compiled.graph)[-1] == ATTENTION


def test_can_be_switched_off() -> None:
    compiled = vllm_graphs.graph(Shape("qwen3")).compiled({"disabled_passes": [qkv_attention.NAME]})
    assert compiled.graph is not None
    assert layer(compiled.graph)[-2:] == ["aten.empty.memory_format", ATTENTION]
