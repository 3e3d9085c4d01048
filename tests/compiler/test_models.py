"""Decoder models of transformers, compiled, against the same models run eagerly on the CPU in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from tests.compiler.test_capture import Compiled

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
FAMILIES = [(Qwen3Config, Qwen3ForCausalLM, "qk_norm_rope"), (LlamaConfig, LlamaForCausalLM, "qk_rope")]
STEPS, CACHE = 12, 32


def build(config: type, family: type) -> PreTrainedModel:
    torch.manual_seed(0)
    model = family(config(**SHAPE, attn_implementation="eager")).eval()
    for name, parameter in model.named_parameters():
        # weights of one would hide a norm's weight being dropped; wide logits make greedy tokens robust
        parameter.data = torch.rand_like(parameter) + 0.5 if "norm" in name else torch.randn_like(parameter) * 0.2
    return model


class DecodeStep(nn.Module):
    """One token with a static KV cache: what a server runs at every step."""

    def __init__(self, model: PreTrainedModel, device: str) -> None:
        super().__init__()
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        head = torch.zeros(1, SHAPE["num_key_value_heads"], 1, SHAPE["head_dim"], device=device)
        for layer in self.cache.layers:
            layer.lazy_initialization(head, head)

    def forward(self, token: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """token [1, 1] and position [1, 1] int64, mask [1, 1, 1, CACHE] added to the scores; gives [1, vocabulary]."""
        return self.model(
            token, position_ids=position, attention_mask=mask, past_key_values=self.cache, use_cache=True
        ).logits[:, -1]


def mask_for(step: int) -> Tensor:
    return torch.where(torch.arange(CACHE) <= step, 0.0, -1e9).view(1, 1, 1, CACHE)


@pytest.mark.parametrize(("config", "family", "rotary"), FAMILIES, ids=["qwen3", "llama"])
def test_prefill_with_dynamic_length(config: type, family: type, rotary: str) -> None:
    model = build(config, family)
    lengths = [5, 9, 5, 12, 9]
    inputs = [torch.randint(0, SHAPE["vocab_size"], (1, length)) for length in lengths]
    expected = [model(ids, use_cache=False).logits for ids in inputs]
    model = model.to("npu")
    compiled = Compiled(model)
    for ids, want in zip(inputs, expected, strict=True):
        ids = ids.npu()
        torch._dynamo.mark_dynamic(ids, 1)
        got = compiled.run(ids, use_cache=False).logits
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=2e-4)
    (graph,) = compiled.backend.compiled()
    fired = [entry.rule for record in graph.records for entry in record.fired]
    assert fired.count(rotary) == 2
    assert fired.count("add_rms_norm") == 4  # all norms of hidden states but the first, which has nothing to add
    assert fired.count("rms_norm") == 1
    assert fired.count("silu_mul") == 2
    assert len(compiled.ledger.captures) == 3
    assert compiled.ledger.replays == 2


@pytest.mark.parametrize(("config", "family", "rotary"), FAMILIES, ids=["qwen3", "llama"])
def test_greedy_decode_is_replayed(config: type, family: type, rotary: str) -> None:
    def decode(step: Any, device: str) -> tuple[list[int], list[Tensor]]:
        token, tokens, logits = torch.tensor([[7]]), [], []
        for position in range(STEPS):
            args = (token, torch.tensor([[position]]), mask_for(position))
            logits.append(step(*(arg.to(device) for arg in args)).cpu())
            token = logits[-1].argmax(-1, keepdim=True)
            tokens.append(int(token))
        return tokens, logits

    expected = decode(DecodeStep(build(config, family), "cpu"), "cpu")
    compiled = Compiled(DecodeStep(build(config, family).to("npu"), "npu"), dynamic=False, fullgraph=True)
    tokens, logits = decode(compiled, "npu")
    assert tokens == expected[0]
    for got, want in zip(logits, expected[1], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4)
    assert len(compiled.ledger.captures) == 1
    assert compiled.ledger.replays == STEPS - 1
    (graph,) = compiled.backend.compiled()
    assert graph.graph is not None
    operators = [str(node.target) for node in graph.graph.graph.nodes]
    assert operators.count("aten.index_copy_.default") == 2 * SHAPE["num_hidden_layers"], "written in place"
    assert "aten.index_copy.default" not in operators
    copied = [
        node.meta["val"].numel()
        for node in graph.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    ]
    assert max(copied, default=1) == 1, "nothing larger than the cache's count of tokens is copied"
    assert operators.count(f"npu_fused.{rotary}.default") == SHAPE["num_hidden_layers"]
