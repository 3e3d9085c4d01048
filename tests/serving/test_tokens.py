"""Greedy tokens equal transformers' in every graph mode, with chunked prefill and prefix caching on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs, report

MODES = ["NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"]
TOKENS = 64
# Requests of one batch that end one after the other: 8 (above the largest graph, 4), 7 ... 1, so that batches hit the
# captured sizes 1, 2 and 4, miss them by one, and straddle the largest.
ENDING_ONE_BY_ONE = [64, 8, 16, 24, 32, 40, 48, 56]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    return {
        family: [oracle.greedy(folder(family), prompt, TOKENS) for prompt in oracle.prompts()]
        for family in ("qwen3", "llama")
    }


def folder(family: checkpoints.Family) -> Path:
    return checkpoints.cached(checkpoints.Shape(family=family))


def check(llm: Any, expected: list[list[int]]) -> None:
    prompts = oracle.prompts()
    assert generate(llm, prompts, TOKENS) == expected
    shortened = [tokens[:count] for tokens, count in zip(expected, ENDING_ONE_BY_ONE, strict=True)]
    assert generate(llm, prompts, ENDING_ONE_BY_ONE) == shortened
    assert generate(llm, prompts[:3], 12) == [tokens[:12] for tokens in expected[:3]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_tokens(family: checkpoints.Family, mode: str, expected: dict[str, list[list[int]]]) -> None:
    with engine(folder(family), **graphs(mode)) as llm:
        check(llm, expected[family])
        data = report(llm)
    check_steps(mode, data)


def check_steps(mode: str, data: dict[str, Any]) -> None:
    """Each mode runs the steps it promises to run as graphs, and says why the others were eager."""
    decode, other = data["decode_steps"], data["other_steps"]
    if mode == "NONE":
        assert (decode["replayed"], decode["piecewise"], data["graphs"]) == (0, 0, [])
        assert {group["reason"] for group in data["not_replayed"]} == {"graphs_off"}
        return
    full = mode in ("FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
    assert decode["replayed" if full else "piecewise"] > 40
    assert decode["piecewise" if full else "replayed"] == 0
    large = [group for group in data["not_replayed"] if group["reason"] == "decode_too_large"]
    assert [group["detail"] for group in large] == ["4"]
    assert large[0]["steps"] == decode["eager"] > 0 and large[0]["smallest"] > 4
    assert 0 < data["padding_waste"] < 0.5
    rows = [(row["mode"], row["tokens"]) for row in data["graphs"]]
    kinds = {"PIECEWISE": ["PIECEWISE"], "FULL_AND_PIECEWISE": ["FULL", "PIECEWISE"]}.get(mode, ["FULL"])
    assert rows == [(kind, size) for kind in kinds for size in (1, 2, 4)]
    assert all(row["milliseconds"] > 0 for row in data["graphs"])
    if mode == "FULL_DECODE_ONLY":
        assert (other["replayed"], other["piecewise"]) == (0, 0)


def test_prefix_is_found_again(expected: dict[str, list[list[int]]]) -> None:
    from vllm import SamplingParams, TokensPrompt

    prompt, tokens = oracle.prompts()[5], expected["qwen3"][5]
    with engine(folder("qwen3"), **graphs("FULL_DECODE_ONLY")) as llm:
        sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        runs = [llm.generate(TokensPrompt(prompt_token_ids=prompt), sampling, use_tqdm=False)[0] for _ in range(2)]
    assert [run.num_cached_tokens for run in runs] == [0, 2 * oracle.BLOCK]
    assert [list(run.outputs[0].token_ids) for run in runs] == [tokens[:8]] * 2
