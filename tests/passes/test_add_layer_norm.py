"""add_layer_norm: encoders of transformers, and both lowerings of F.layer_norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import npu_compiler.backend
from npu_compiler.passes import add_layer_norm, common
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(add_layer_norm.NAME, "", rules=add_layer_norm.RULES)
LAYERS = 2


@pytest.mark.parametrize("inference", [False, True])
def test_both_lowerings(inference: bool) -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total = x + residual
        return torch.nn.functional.layer_norm(total, (8,), weight, bias) + total

    args = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), torch.randn(8)
    program = lowered(block, *args, inference=inference)
    apply(PASS, program.graph)
    assert calls(program.graph) == ["npu_fused.add_layer_norm.default", "aten.add.Tensor"]
    torch.testing.assert_close(program.graph(*args)[0], block(*args))


@pytest.mark.parametrize("inference", [False, True])
def test_sum_that_is_reshaped_for_the_norm_and_goes_on(inference: bool) -> None:
    """OPT: the residual stream goes on from the reshaped sum."""

    def block(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total = (x + residual).reshape(-1, 8)
        return torch.nn.functional.layer_norm(total, (8,), weight, bias) + total

    args = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)
    program = lowered(block, *args, inference=inference)
    apply(PASS, program.graph)
    found = [name for name in calls(program.graph) if "view" not in name and "reshape" not in name]
    assert found == ["npu_fused.add_layer_norm.default", "aten.add.Tensor"]
    torch.testing.assert_close(program.graph(*args)[0], block(*args))


@pytest.mark.parametrize("inference", [False, True])
def test_norms_without_a_bias_share_their_zeros(inference: bool) -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        for _ in range(3):
            residual = x + residual
            x = torch.nn.functional.layer_norm(residual, (8,), weight)
        return x

    args = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    program = lowered(block, *args, inference=inference)
    apply(PASS, program.graph)
    apply(Pass(common.NAME, "", common.run), program.graph)
    assert sorted(calls(program.graph)) == ["aten.full.default", *["npu_fused.add_layer_norm.default"] * 3]
    torch.testing.assert_close(program.graph(*args)[0], block(*args))


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=128
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:  # ones and zeros would hide a weight or a bias that is dropped
            parameter.data = torch.rand_like(parameter) + 0.5
    return model


def test_bert_encoder() -> None:
    """Each layer normalises twice behind a residual; the embeddings' own norm follows an addition that broadcasts."""
    model = bert()
    tokens = torch.randint(0, 96, (2, 7))
    program = lowered(lambda ids: model(input_ids=ids).last_hidden_state, tokens)
    before = calls(program.graph)
    assert before.count("aten.native_layer_norm.default") == 2 * LAYERS + 1
    record = apply(PASS, program.graph)
    after = calls(program.graph)
    assert [fired.rule for fired in record.fired] == ["add_layer_norm"] * 2 * LAYERS
    assert any("the addition broadcasts" in refused.reason for refused in record.refused)
    assert after.count("aten.native_layer_norm.default") == 1
    assert before.count("aten.add.Tensor") - after.count("aten.add.Tensor") == 2 * LAYERS


def test_bert_captured_on_the_device() -> None:
    model, tokens = bert(), torch.randint(0, 96, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=tokens).last_hidden_state
        model, tokens = model.to("npu"), tokens.npu()
        backend = npu_compiler.backend.AscendBackend()
        run = torch.compile(model, backend=backend, dynamic=False)
        for _ in range(2):
            got = run(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-4)
    (graph,) = backend.compiled()
    assert graph.ledger is not None
    assert graph.ledger.replays == 1
    assert f"add_layer_norm x{2 * LAYERS}: aclnnAddLayerNorm" in str(graph)


def test_gpt2_keeps_the_residual_stream() -> None:
    """All norms but the first follow the addition of a residual, whose sum goes on."""
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=LAYERS, n_head=4, n_positions=32)
    model = GPT2Model(config).eval()
    tokens = torch.randint(0, 96, (2, 7))
    program = lowered(lambda ids: model(input_ids=ids, use_cache=False).last_hidden_state, tokens)
    apply(PASS, program.graph)
    after = calls(program.graph)
    assert after.count("npu_fused.add_layer_norm.default") == 2 * LAYERS
    assert after.count("aten.native_layer_norm.default") == 1
