"""The decode model of the benchmarks computes what transformers' Qwen3 computes."""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicCache

from benchmarks import decode_model
from benchmarks.decode_model import Size

SMALL = Size(hidden=64, heads=4, kv_heads=2, head_dim=32, intermediate=96, vocab=50, layers=3, positions=16, batch=2)
# Our module names, and transformers' for the same weights.
NAMES = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def transformers_model(ours: decode_model.Decoder, size: Size) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        intermediate_size=size.intermediate,
        vocab_size=size.vocab,
        num_hidden_layers=size.layers,
        max_position_embeddings=size.positions,
        rms_norm_eps=1e-6,
    )
    weights = {
        "model.embed_tokens.weight": ours.embedding.weight,
        "model.norm.weight": ours.norm.weight,
        "lm_head.weight": ours.head.weight,
    }
    for index, layer in enumerate(ours.layers):
        for mine, theirs in NAMES.items():
            weights[f"model.layers.{index}.{theirs}.weight"] = layer.get_submodule(mine).weight
    model = Qwen3ForCausalLM(config).eval()
    model.load_state_dict(weights)
    return model


@torch.inference_mode()
def test_one_step_equals_transformers() -> None:
    ours = decode_model.decoder(SMALL)
    theirs = transformers_model(ours, SMALL)
    tokens, position = decode_model.inputs(SMALL)
    past = int(position)
    cache = DynamicCache()
    for index, layer in enumerate(ours.layers):
        cache.update(layer.attention.keys[:, :, :past].clone(), layer.attention.values[:, :, :past].clone(), index)
    right = theirs(tokens[:, None], past_key_values=cache, position_ids=position.expand(SMALL.batch, 1)).logits[:, 0]
    torch.testing.assert_close(ours(tokens, position), right, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_prefill_equals_transformers() -> None:
    ours = decode_model.decoder(SMALL)
    tokens = torch.arange(SMALL.positions)
    right = transformers_model(ours, SMALL)(tokens[None]).logits[0, -1:]
    for grouped in (True, False):
        found = decode_model.Prefill(ours, grouped)(ours.embedding(tokens))
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_step_is_repeatable_and_writes_its_cache_row() -> None:
    model = decode_model.decoder(SMALL)
    before = model.layers[0].attention.keys.clone()
    tokens, position = decode_model.inputs(SMALL)
    first, again = model(tokens, position), model(tokens, position)
    assert torch.equal(first, again)
    changed = (model.layers[0].attention.keys != before).any(dim=3).any(dim=1).any(dim=0)
    assert changed.nonzero().flatten().tolist() == position.tolist()
