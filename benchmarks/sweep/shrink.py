"""Shrunken configurations of any architecture, from its own configuration class: small, with legal head layouts."""

from __future__ import annotations

import dataclasses
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 32
_EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")
# Names that configuration classes use for the same thing, and the small value of it.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "n_embed"), HEADS * HEAD_DIM),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner"), 256),
    "ffn_hidden_size": 4 * HEADS * HEAD_DIM,  # Falcon's loader knows no other
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "num_query_groups"), KV_HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(_EXPERTS_A_TOKEN, 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), 256),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 0),
    "head_dim": HEAD_DIM,
    "kv_channels": HEAD_DIM,
    "rotary_dim": HEAD_DIM,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "num_kv_shared_layers": 0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "word_embed_proj_dim": HEADS * HEAD_DIM,
    "embedding_size": HEADS * HEAD_DIM,
    "shared_intermediate_size": 256,
    "prefix_attention_window": 256,
    "hidden_size_per_layer_input": 32,
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "eos_token_id": 1,
    "lru_width": HEADS * HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "float32",
}
SECTIONS = ("text_config", "attn_config", "ffn_config")
# What published checkpoints of a type say beside the fields of its configuration class.
PUBLISHED: dict[str, dict[str, Any]] = {
    "afmoe": {"n_group": 1, "topk_group": 1, "route_norm": True, "score_func": "sigmoid"},
    "axk1": {"first_k_dense_replace": 0},  # vLLM wants a norm of dense layers too, which transformers does not write
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe": {"head_dim": HEAD_DIM},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "hy_v3": {"first_k_dense_replace": 1, "qk_norm": True, "expert_hidden_dim": 64, "route_norm": True},
    "mimo_v2_flash": {  # transformers has constants where vLLM has fields
        **{"hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "layernorm_epsilon": 1e-5},
        **{"swa_head_dim": HEAD_DIM, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": 2 * KV_HEADS},
        **{"swa_v_head_dim": HEAD_DIM, "add_swa_attention_sink_bias": True, "sliding_window_size": 128},
        **{"rope_theta": 5e6, "swa_rope_theta": 1e4, "partial_rotary_factor": 0.334},
    },
    "minimax_m2": {"rotary_dim": HEAD_DIM, "scoring_func": "sigmoid", "use_routing_bias": True},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},  # vLLM's model has them whatever the configuration says
}
_COMMON_FIELDS = frozenset(transformers.PreTrainedConfig().to_dict())


@dataclasses.dataclass(frozen=True)
class Subject:
    """An architecture of vLLM and the model type whose configuration describes it."""

    architecture: str
    model_type: str


def subjects() -> tuple[list[Subject], list[str]]:
    """Every text-generation architecture of vLLM that transformers ships a configuration for, and the names of the
    others, in vLLM's order: first those vLLM has a model of, then those it runs by transformers' own model."""
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS, _TRANSFORMERS_SUPPORTED_MODELS

    types: dict[str, str] = {}
    for table in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        for model_type, names in table.items():
            for name in (names,) if isinstance(names, str) else names:
                if model_type in CONFIG_MAPPING_NAMES:
                    types.setdefault(name.lower(), model_type)  # PhiMoE here, Phimoe there
    text = [name for name, (_, kind) in _TRANSFORMERS_SUPPORTED_MODELS.items() if "MultiModal" not in kind]
    names = [*_TEXT_GENERATION_MODELS, *text]
    found = [Subject(name, types[name.lower()]) for name in names if name.lower() in types]
    return found, [name for name in names if name.lower() not in types]


def configuration(subject: Subject) -> transformers.PreTrainedConfig:
    """The small configuration of `subject`, with its architecture named for vLLM.

    Raises:
        Exception: whatever the configuration class says to values it can't take.
    """
    family = transformers.CONFIG_MAPPING[subject.model_type]
    config = family(**changes(family().to_dict()))
    config.architectures = [subject.architecture]
    config.dtype = "float32"
    _publish(config, PUBLISHED.get(subject.model_type, {}))
    return config


def _publish(config: transformers.PreTrainedConfig, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if name in SECTIONS:
            _publish(getattr(config, name), value)
        else:
            setattr(config, name, value)


def changes(defaults: dict[str, Any]) -> dict[str, Any]:
    """What to change of a configuration's default values."""
    made: dict[str, Any] = {}
    layers = next((defaults[name] for name in SMALL if SMALL[name] == LAYERS and name in defaults), None)
    for name, value in defaults.items():
        if name in SECTIONS and isinstance(value, dict):
            own = {field: given for field, given in value.items() if field not in _COMMON_FIELDS}
            made[name] = own | changes(own)
        elif name in ("layer_types", "layers_block_type", "mlp_layer_types") and isinstance(value, list):
            made[name] = _spread(value)
        elif isinstance(value, list) and layers is not None and len(value) == layers:
            made[name] = value[:LAYERS]
        elif name in SMALL and (value is not None or name in ("head_dim",)):
            made[name] = 1 if name in _EXPERTS_A_TOKEN and value == 1 else SMALL[name]
    kv = [name for name in ("num_key_value_heads", "num_kv_heads") if name in made]
    heads = next((defaults[n] for n in ("num_attention_heads", "n_head", "num_heads") if n in defaults), None)
    for name in kv:  # multi-head and multi-query attention stay what they are
        given = defaults[name]
        made[name] = HEADS if given == heads else 1 if given == 1 else KV_HEADS
    if "num_key_value_heads" in defaults and defaults["num_key_value_heads"] is None:
        made["num_key_value_heads"] = HEADS  # transformers means as many as there are heads, vLLM wants the number
    if defaults.get("head_dim") is None:
        made.pop("head_dim", None)
    return made


def _spread(types: list[str]) -> list[str]:
    """Kinds of layers for two layers: the first two different ones, so that a hybrid model stays one."""
    kinds = list(dict.fromkeys(types))
    return (kinds if len(kinds) > 1 else kinds * LAYERS)[:LAYERS]
