"""Kernels of one layer of encoders and decoders with layer norms, of transformers, before and after the passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from npu_compiler.config import Options
from npu_compiler.graph.traffic import launches
from npu_compiler.passes import pipeline
from tests.passes.lowered import lowered

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Settings by family, kernels of a layer before and after, and what is left apart from the attention.
FAMILIES: dict[str, tuple[dict[str, Any], int, int, set[str]]] = {
    "bert": ({}, 14, 10, {"aten.addmm.default", "npu_fused.add_layer_norm.default", "aten.gelu.default"}),
    "albert": (
        {"embedding_size": 64},
        20,
        10,
        {"aten.addmm.default", "npu_fused.add_layer_norm.default", "aten.gelu.default"},
    ),
    "gpt2": (
        {"bos_token_id": 1, "eos_token_id": 2},
        22,
        8,
        {"aten.addmm.default", "npu_fused.add_layer_norm.default", "aten.gelu.default"},
    ),
    "phi": (
        {"bos_token_id": 1, "eos_token_id": 2},
        36,
        14,
        {"npu_fused.qk_rope.default", "aten.cat.default", "npu_fused.add_layer_norm.default", "aten.gelu.default"}
        | {"aten.addmm.default", "aten.add.Tensor", "aten.clone.default"},
    ),
    "gpt_neox": (
        {"bos_token_id": 1, "eos_token_id": 2},
        28,
        13,
        {"npu_fused.qk_rope.default", "aten.cat.default", "npu_fused.add_layer_norm.default", "aten.gelu.default"}
        | {"aten.addmm.default", "aten.add.Tensor", "aten.clone.default", "aten.native_layer_norm.default"},
    ),
    "modernbert": (
        {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 1},
        28,
        9,
        {"npu_fused.qk_rope.default", "aten.mm.default", "npu_fused.add_layer_norm.default", "npu_fused.geglu.default"},
    ),
    "opt": (
        {"ffn_dim": 128, "word_embed_proj_dim": 64, "bos_token_id": 1, "eos_token_id": 2},
        15,
        11,
        {"aten.addmm.default", "npu_fused.add_layer_norm.default", "aten.relu.default", "aten.mul.Tensor"},
    ),
}
DECODERS = {"gpt2", "opt", "phi", "gpt_neox"}


# Where attention is written out: kernels of a layer before and after.
WRITTEN_OUT = {"bert": (22, 10), "gpt2": (28, 8), "phi": (41, 14), "modernbert": (38, 9)}


def kernels(family: str, layers: int, attention: str = "sdpa") -> tuple[list[str], list[str]]:
    """The kernels of a model before and after the passes, sorted."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | FAMILIES[family][0])
    config.num_hidden_layers = layers
    config._attn_implementation = attention
    model = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    more = {"use_cache": False} if family in DECODERS else {}
    tokens = torch.randint(3, 96, (2, 7))
    program = lowered(lambda ids: model(input_ids=ids, **more).last_hidden_state, tokens)

    def found() -> list[str]:
        return sorted(str(node.target) for node in program.graph.graph.nodes if launches(node))

    before = found()
    pipeline.run(program.graph, Options())
    return before, found()


def difference(more: list[str], fewer: list[str]) -> list[str]:
    left = list(more)
    for name in fewer:
        if name in left:
            left.remove(name)
    return left


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in ("bert", "gpt2") else pytest.mark.full) for name in FAMILIES]
)
def test_kernels_of_a_layer(family: str) -> None:
    """A layer is what two layers have more than one."""
    _, before, after, left = FAMILIES[family]
    one, two = kernels(family, 1), kernels(family, 2)
    assert len(difference(two[0], one[0])) == before
    layer = difference(two[1], one[1])
    assert len(layer) == after, layer
    assert {name for name in layer if "attention" not in name} == left


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "bert" else pytest.mark.full) for name in WRITTEN_OUT]
)
def test_kernels_of_a_layer_with_attention_written_out(family: str) -> None:
    one, two = kernels(family, 1, "eager"), kernels(family, 2, "eager")
    before, after = (difference(more, fewer) for more, fewer in zip(two, one, strict=True))
    assert (len(before), len(after)) == WRITTEN_OUT[family], (before, after)
    assert "npu_fused.attention.default" in after
