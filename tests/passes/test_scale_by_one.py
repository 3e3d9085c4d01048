"""scale_by_one is exact, and finds the scale of Llama's rotary tables (its rule is tested in test_rules.py)."""

from __future__ import annotations

import pytest
import torch
import transformers

from npu_compiler.config import Options
from npu_compiler.passes import pipeline, scale_by_one
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(scale_by_one.NAME, "", rules=scale_by_one.RULES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_bits_stay(dtype: torch.dtype) -> None:
    """Before: view, mul, view. After: views."""
    x = torch.randint(-32768, 32767, (4096,), dtype=torch.int16)
    x = x.view(dtype) if dtype.itemsize == 2 else x.to(dtype)
    x[:3] = torch.tensor([-0.0, 0.0, 1.0]).to(dtype)
    x = torch.where(x.isnan(), 1, x)  # which NaN a product gives is nobody's promise
    program = lowered(lambda x: (x.view(64, 64) * 1).flip(0), x).graph
    assert len(apply(PASS, program).fired) == 1
    (got,) = program(x)
    assert torch.equal(got.view(torch.uint8), (x.view(64, 64) * 1).flip(0).view(torch.uint8))


def test_llama_scales_its_rotary_tables_by_one() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64, vocab_size=64
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)

    def tables(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = rotary(x, positions)
        return x * cos + x.flip(-1) * sin

    program = lowered(tables, torch.randn(1, 4, 16), torch.arange(4)[None]).graph
    before = calls(program).count("aten.mul.Tensor")
    records = {record.name: record for record in pipeline.run(program, Options())}
    assert len(records[scale_by_one.NAME].fired) == 2
    assert before - calls(program).count("aten.mul.Tensor") >= 2
