"""A Qwen3 decode layer as CANN's fused kernels give it: from the projection to the paged cache in one, nine in all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams, TokensPrompt

from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, graphs

SHAPE = checkpoints.Shape(family="qwen3", dtype="float16", head_dim=128)
ATTENTION = "aclnnFusedInferAttentionScoreV3"
LAYER = [
    "aclnnMatmul",
    "aclnnAddRmsNorm",
    "aclnnMatmul",
    "aclnnSwiGlu",
    "aclnnMatmul",
    "aclnnAddRmsNorm",
    "aclnnMatmul",
    "aclnnQkvRmsNormRopeCache",
    ATTENTION,
]
NEW_TOKENS = 6
# Largest and mean distance of log-probabilities, as in test_precision.py.
TOLERANCE = (0.08, 0.01)


def runner(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def kernels(llm: LLM, folder: Path) -> list[str]:
    """What the captured decode graph of one token runs, in order, by CANN's names."""
    (entry,) = [entry for key, entry in runner(llm).model._entries.items() if key.num_tokens == 1]
    file = folder / "graph.json"
    with pytest.warns(UserWarning, match="debug_dump"):
        entry.graph.debug_dump(str(file))
    return [event["name"] for event in json.loads(file.read_text()) if event["args"]["Task Type"] == "KERNEL"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    settings = {"dtype": SHAPE.dtype, "max_logprobs": SHAPE.vocab}
    with engine(checkpoints.cached(SHAPE), **settings, **graphs("FULL_DECODE_ONLY")) as llm:
        yield llm


def test_decode_layer_is_nine_kernels(llm: LLM, tmp_path: Path) -> None:
    names = kernels(llm, tmp_path)
    attentions = [index for index, name in enumerate(names) if name == ATTENTION]
    assert names[attentions[0] + 1 : attentions[1] + 1] == LAYER
    assert len(attentions) == SHAPE.layers


def test_log_probabilities(llm: LLM) -> None:
    """Prefill in chunks, then decode steps by replays, over caches in fractal order, in batches of unequal lengths."""
    prompts = [oracle.prompts()[index] for index in (1, 4, 5)]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=SHAPE.vocab)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], sampling, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, rows = output.outputs[0].token_ids, output.outputs[0].logprobs
        served = torch.tensor([[row[token].logprob for token in range(SHAPE.vocab)] for row in rows])
        exact = oracle.log_probabilities(checkpoints.cached(SHAPE), prompt + list(tokens))[len(prompt) - 1 : -1]
        distance = (served.double() - exact).abs()
        assert float(distance.max()) < TOLERANCE[0]
        assert float(distance.mean()) < TOLERANCE[1]


def test_layers_keep_one_order(llm: LLM) -> None:
    layers = runner(llm).compilation_config.static_forward_context.values()
    assert [layer.impl.fractal for layer in layers] == [True] * SHAPE.layers


def test_a_cache_in_plain_order_is_served_too(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled model, on layers whose first call was not the packed one, gives the same tokens."""
    prompt = [TokensPrompt(prompt_token_ids=oracle.prompts()[3])]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    llm.reset_prefix_cache()
    (fused,) = llm.generate(prompt, sampling, use_tqdm=False)
    for layer in runner(llm).compilation_config.static_forward_context.values():
        monkeypatch.setattr(layer.impl, "fractal", False)
    llm.reset_prefix_cache()
    (plain,) = llm.generate(prompt, sampling, use_tqdm=False)
    assert plain.outputs[0].token_ids == fused.outputs[0].token_ids
    for got, want in zip(plain.prompt_logprobs[1:], fused.prompt_logprobs[1:], strict=True):
        token = next(iter(got))
        assert abs(got[token].logprob - want[token].logprob) < TOLERANCE[0]
