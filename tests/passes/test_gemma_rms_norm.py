"""gemma_rms_norm on transformers' own Gemma."""

from __future__ import annotations

import torch
from transformers import GemmaConfig, GemmaModel

from npu_compiler.passes import add_rms_norm, gemma_rms_norm, noop
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered

LAYERS = 2


def test_gemma_of_transformers() -> None:
    """The first norm is alone, the others follow an addition; none is left for add_rms_norm."""
    config = GemmaConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=128,
    )  # fmt: skip
    model = GemmaModel(config).eval()
    tokens = torch.randint(0, 96, (2, 7))
    program = lowered(lambda ids: model(input_ids=ids, use_cache=False).last_hidden_state, tokens)
    apply(Pass(noop.NAME, "", noop.run), program.graph)
    apply(Pass(gemma_rms_norm.NAME, "", rules=gemma_rms_norm.RULES), program.graph)
    after = calls(program.graph)
    assert after.count("npu_fused.gemma_rms_norm.default") == 1
    assert after.count("npu_fused.gemma_add_rms_norm.default") == 2 * LAYERS
    assert "aten.rsqrt.default" not in after
    assert not apply(Pass(add_rms_norm.NAME, "", rules=add_rms_norm.RULES), program.graph).fired
