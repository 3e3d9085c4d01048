"""Side streams in vLLM's own captures, by tokens of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from tests.models import checkpoints, tokenizer
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs, report

OPTIONS = {"compile": {"multistream": "auto"}}


def cohere(shared: dict[str, Any]) -> PreTrainedModel:
    """Blocks that add attention and MLP of one norm: neither waits for the other."""
    return CohereForCausalLM(CohereConfig(**shared, intermediate_size=256))


def qwen2_moe(shared: dict[str, Any]) -> PreTrainedModel:
    """A shared expert beside the routed ones."""
    sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 256, "intermediate_size": 256}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**shared, **sizes, num_experts=4, num_experts_per_tok=2))


@pytest.mark.parametrize("build", [pytest.param(cohere, marks=pytest.mark.full), qwen2_moe])
def test_tokens_and_streams(build: Callable[[dict[str, Any]], PreTrainedModel], tmp_path: Path) -> None:
    shape = checkpoints.configuration(checkpoints.Shape()).to_dict()
    shared = {name: shape[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")}
    shared |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "dtype": "float32"}
    shared |= {"bos_token_id": None, "eos_token_id": tokenizer.TURN_END_ID, "pad_token_id": tokenizer.END_OF_TEXT_ID}
    model = build(shared).float()
    checkpoints.initialise(model, seed=0)
    folder = checkpoints.save(model.eval(), tmp_path)
    prompts = oracle.prompts()[:3]
    with engine(folder, **graphs("FULL_DECODE_ONLY"), additional_config=OPTIONS) as llm:
        assert generate(llm, prompts, 12) == [oracle.greedy(folder, prompt, 12) for prompt in prompts]
        said = report(llm)
    assert [graph["streams"] for graph in said["graphs"]] == [2, 2, 2]
    assert said["decode_steps"]["replayed"] > 0
    assert said["decode_steps"]["eager"] == 0
