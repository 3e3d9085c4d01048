"""Side streams in vLLM's own captures, by tokens of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import CohereConfig, CohereForCausalLM

from tests.models import checkpoints, tokenizer
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs, report
from tests.serving.pairs import texts

OPTIONS = {"compile": {"multistream": "auto"}}


def cohere(folder: Path) -> Path:
    """Blocks that add attention and MLP of one norm: neither waits for the other."""
    shape = checkpoints.configuration(checkpoints.Shape()).to_dict()
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    config = CohereConfig(
        **{name: shape[name] for name in names},
        intermediate_size=256,
        max_position_embeddings=1024,
        dtype="float32",
        bos_token_id=None,
        eos_token_id=tokenizer.TURN_END_ID,
        pad_token_id=tokenizer.END_OF_TEXT_ID,
    )
    model = CohereForCausalLM(config).float()
    checkpoints.initialise(model, seed=0)
    return checkpoints.save(model.eval(), folder)


def shared_expert(folder: Path) -> Path:
    """A shared expert beside the routed ones; kept between runs, not in `folder`."""
    return texts.folder("shared")


@pytest.mark.parametrize("build", [pytest.param(cohere, marks=pytest.mark.full), shared_expert])
def test_tokens_and_streams(build: Callable[[Path], Path], tmp_path: Path) -> None:
    folder, prompts = build(tmp_path), oracle.prompts()[:3]
    with engine(folder, **graphs("FULL_DECODE_ONLY"), additional_config=OPTIONS) as llm:
        assert generate(llm, prompts, 12) == [oracle.greedy(folder, prompt, 12) for prompt in prompts]
        said = report(llm)
    assert [graph["streams"] for graph in said["graphs"]] == [2, 2, 2]
    assert said["decode_steps"]["replayed"] > 0
    assert said["decode_steps"]["eager"] == 0
