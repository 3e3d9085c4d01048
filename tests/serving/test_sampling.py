"""Sampling on the device: log-probabilities and penalties against transformers, seeds, top-k and top-p."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams, TokensPrompt

from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs

PROMPT = oracle.prompts()[2]


@pytest.fixture(scope="module")
def folder() -> Path:
    return checkpoints.cached(checkpoints.Shape(family="qwen3"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with engine(folder, **graphs("FULL_DECODE_ONLY")) as made:
        yield made


def test_log_probabilities(llm: LLM, folder: Path) -> None:
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=1)
    out = llm.generate(TokensPrompt(prompt_token_ids=PROMPT), sampling, use_tqdm=False)[0]
    answer = list(out.outputs[0].token_ids)
    reference = oracle.log_probabilities(folder, PROMPT + answer)
    for position, given in enumerate(out.outputs[0].logprobs):
        best = reference[len(PROMPT) - 1 + position].topk(3)
        assert [given[token].logprob for token in best.indices.tolist()] == pytest.approx(
            best.values.tolist(), abs=1e-3
        )
    for position in range(1, len(PROMPT)):
        token = PROMPT[position]
        assert out.prompt_logprobs[position][token].logprob == pytest.approx(
            float(reference[position - 1, token]), abs=1e-3
        )


def test_repetition_penalty(llm: LLM, folder: Path) -> None:
    expected = oracle.greedy(folder, PROMPT, 24, repetition_penalty=1.3)
    assert expected != oracle.greedy(folder, PROMPT, 24)
    assert generate(llm, [PROMPT], 24, repetition_penalty=1.3) == [expected]


def test_a_seed_decides_the_tokens(llm: LLM) -> None:
    sampled = [generate(llm, [PROMPT], 24, temperature=1.0, seed=seed)[0] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_top_k_of_one_is_greedy(llm: LLM, folder: Path) -> None:
    expected = oracle.greedy(folder, PROMPT, 16)
    assert generate(llm, [PROMPT], 16, temperature=1.0, top_k=1, seed=3) == [expected]


@pytest.mark.parametrize("limits", [{"top_k": 4}, {"top_p": 0.3}, {"top_k": 8, "top_p": 0.5}, {"min_p": 0.4}])
def test_sampled_tokens_lie_within_the_limits(llm: LLM, folder: Path, limits: dict[str, Any]) -> None:
    count = 40
    tokens = generate(llm, [PROMPT], count, temperature=1.0, seed=5, **limits)[0]
    probabilities = oracle.log_probabilities(folder, PROMPT + tokens).exp()
    for position, token in enumerate(tokens):
        row = probabilities[len(PROMPT) - 1 + position]
        assert allowed(row, token, **limits), f"token {token} at {position} lies outside {limits}"
    greedy = [int(probabilities[len(PROMPT) - 1 + position].argmax()) for position in range(count)]
    assert tokens != greedy, "sampling always took the likeliest token"


def allowed(row: torch.Tensor, token: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> bool:
    """Whether `token` may be drawn from `row` [vocabulary], with room for rounding at the edge of each limit."""
    mine, slack = float(row[token]), 1e-4
    likelier = row[row > mine + slack]
    if top_k and len(likelier) >= top_k:
        return False
    if min_p and mine < min_p * float(row.max()) - slack:
        return False
    kept = row if not top_k else row.topk(top_k).values
    return float(likelier.sum() / kept.sum()) < top_p + slack


def test_penalties_on_presence_change_later_steps(llm: LLM) -> None:
    plain = generate(llm, [PROMPT], 48)[0]
    penalised = generate(llm, [PROMPT], 48, presence_penalty=2.0, frequency_penalty=2.0)[0]
    assert len(set(penalised)) > len(set(plain))
