"""Side streams in vLLM's own captures: a block whose two halves read the same norm, by tokens of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CohereConfig, CohereForCausalLM

from tests.models import checkpoints, tokenizer
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs, report

OPTIONS = {"compile": {"multistream": "auto"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cohere's blocks add attention and MLP of one norm: neither waits for the other."""
    shape = checkpoints.configuration(checkpoints.Shape()).to_dict()
    shared = {name: shape[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")}
    config = CohereConfig(
        **shared, num_key_value_heads=2, intermediate_size=256, max_position_embeddings=1024, dtype="float32",
        bos_token_id=None, eos_token_id=tokenizer.TURN_END_ID, pad_token_id=tokenizer.END_OF_TEXT_ID,
    )  # fmt: skip
    model = CohereForCausalLM(config).float()
    checkpoints.initialise(model, seed=0)
    return checkpoints.save(model.eval(), tmp_path_factory.mktemp("cohere"))


def test_tokens_and_streams(folder: Path) -> None:
    prompts = oracle.prompts()[:3]
    with engine(folder, **graphs("FULL_DECODE_ONLY"), additional_config=OPTIONS) as llm:
        assert generate(llm, prompts, 12) == [oracle.greedy(folder, prompt, 12) for prompt in prompts]
        said = report(llm)
    assert [graph["streams"] for graph in said["graphs"]] == [2, 2, 2]
    assert said["decode_steps"]["replayed"] > 0
    assert said["decode_steps"]["eager"] == 0
