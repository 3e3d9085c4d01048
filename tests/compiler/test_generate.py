"""Hugging Face models: generate() with a static cache, and an encoder, compiled, against transformers on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from npu_compiler.backend import AscendBackend

TOKENS = 12
SPECIAL = {"vocab_size": 96, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 95}
DECODER = SPECIAL | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "qwen3": Qwen3Config(**DECODER),
    "llama": LlamaConfig(**DECODER),
    "gemma": GemmaConfig(**DECODER),
    "gemma2": Gemma2Config(**DECODER, sliding_window=16),
    "gpt2": GPT2Config(**SPECIAL, n_embd=64, n_layer=2, n_head=4, n_positions=64),
}


def build(family: str) -> PreTrainedModel:
    """A random model whose logits are far enough apart for greedy tokens to be stable."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name or ".ln_" in name
        parameter.data = torch.rand_like(parameter) + 0.5 if is_norm else torch.randn_like(parameter) * 0.2
    return model


def prompts() -> tuple[Tensor, Tensor]:
    """Two prompts, the second padded on the left: ids and mask."""
    ids, mask = torch.randint(2, 90, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor, **how: Any) -> Tensor:
    return model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
        no_repeat_ngram_size=1,  # a random model repeats itself, which would hide a wrong step
        cache_implementation="static",
        disable_compile=True,  # transformers' own torch.compile call, which knows only some devices
        **({"do_sample": False} | how),
    ).cpu()


def compiled_forward(model: PreTrainedModel) -> AscendBackend:
    backend = AscendBackend()
    model.forward = torch.compile(model.forward, backend=backend)
    return backend


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_the_cpu(family: str) -> None:
    model, (ids, mask) = build(family), prompts()
    expected = generate(model, ids, mask)
    assert len(set(expected[0, 7:].tolist())) == TOKENS
    model = model.to("npu")
    backend = compiled_forward(model)
    for _ in range(3):
        assert torch.equal(generate(model, ids, mask), expected)
    ledgers = [graph.ledger for graph in backend.compiled() if graph.ledger]
    captures = [entry for ledger in ledgers for entry in ledger.captures]
    replays = sum(ledger.replays for ledger in ledgers)
    assert replays + len(captures) >= 3 * (TOKENS - 1), "every token after the first"
    assert len(captures) <= 8, "a few a generation at most: its KV cache may lie elsewhere"
    assert not any("copied" in entry.reason for entry in captures)


def test_sampled_tokens_are_those_of_eager() -> None:
    model, (ids, mask) = build("llama").to("npu"), prompts()
    sampled = {"do_sample": True, "temperature": 1.5, "top_k": 20}
    torch.npu.manual_seed(3)
    expected = [generate(model, ids, mask, **sampled) for _ in range(2)]
    assert not torch.equal(*expected)
    compiled_forward(model)
    torch.npu.manual_seed(3)
    for want in expected:
        assert torch.equal(generate(model, ids, mask, **sampled), want)


def test_longer_prompts_use_what_is_compiled() -> None:
    model, (ids, mask) = build("qwen3"), prompts()
    batches = [(ids[:, :5], mask[:, :5]), (ids, mask), (torch.cat([ids, ids[:1].flip(1).repeat(2, 1)], 1), None)]
    batches = [(ids, torch.ones_like(ids) if mask is None else mask) for ids, mask in batches]
    expected = [generate(model, *batch) for batch in batches]
    model = model.to("npu")
    compiled_forward(model)
    for batch, want in zip(batches, expected, strict=True):
        assert torch.equal(generate(model, *batch), want)


def test_encoder_with_padding_and_a_changing_length() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    expected = BertModel(config).eval()
    model = copy.deepcopy(expected).to("npu")
    backend = AscendBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for length in (6, 9, 6, 9, 12, 9):
        ids, mask = torch.randint(0, 96, (2, length)), torch.ones(2, length, dtype=torch.long)
        mask[1, length - 2 :] = 0
        want = expected(ids, attention_mask=mask)
        got = compiled(ids.npu(), attention_mask=mask.npu())
        torch.testing.assert_close(got.last_hidden_state.cpu(), want.last_hidden_state, rtol=0, atol=2e-4)
        torch.testing.assert_close(got.pooler_output.cpu(), want.pooler_output, rtol=0, atol=2e-4)
    assert sum(graph.ledger.replays for graph in backend.compiled() if graph.ledger) >= 2
