"""gemma_rms_norm on transformers' own Gemma."""

from __future__ import annotations

import torch
from transformers import GemmaConfig, GemmaModel

import npu_compiler.backend
from npu_compiler.passes import add_rms_norm, gemma_rms_norm, noop
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered

LAYERS = 2


def gemma() -> GemmaModel:
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=128,
    )  # fmt: skip
    model = GemmaModel(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # zeros would hide a weight that is dropped
            parameter.data = torch.rand_like(parameter) - 0.5
    return model


def test_gemma_of_transformers() -> None:
    """The first norm is alone, the others follow an addition; none is left for add_rms_norm."""
    model = gemma()
    tokens = torch.randint(0, 96, (2, 7))
    program = lowered(lambda ids: model(input_ids=ids, use_cache=False).last_hidden_state, tokens)
    apply(Pass(noop.NAME, "", noop.run), program.graph)
    apply(Pass(gemma_rms_norm.NAME, "", rules=gemma_rms_norm.RULES), program.graph)
    after = calls(program.graph)
    assert after.count("npu_fused.gemma_rms_norm.default") == 1
    assert after.count("npu_fused.gemma_add_rms_norm.default") == 2 * LAYERS
    assert "aten.rsqrt.default" not in after
    assert not apply(Pass(add_rms_norm.NAME, "", rules=add_rms_norm.RULES), program.graph).fired


def test_captured_on_the_device() -> None:
    model, tokens = gemma(), torch.randint(0, 96, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).last_hidden_state
        model, tokens = model.to("npu"), tokens.npu()
        backend = npu_compiler.backend.AscendBackend()
        run = torch.compile(model, backend=backend, dynamic=False)
        for _ in range(2):
            got = run(input_ids=tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-4)
    (graph,) = backend.compiled()
    assert graph.ledger is not None
    assert graph.ledger.replays == 1
    assert f"gemma_add_rms_norm x{2 * LAYERS}: add and aclnnGemmaRmsNorm" in str(graph)
    assert "gemma_rms_norm x1: aclnnGemmaRmsNorm" in str(graph)
