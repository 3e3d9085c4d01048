"""Two ranks over HCCL give the tokens that transformers gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs
from tests.serving.test_tokens import ENDING_ONE_BY_ONE, MODES, TOKENS, check_steps

IN_DEFAULT_RUN = {("qwen3", "FULL_DECODE_ONLY"), ("llama", "PIECEWISE")}


def cases() -> list[object]:
    return [
        pytest.param(family, mode, marks=() if (family, mode) in IN_DEFAULT_RUN else pytest.mark.full)
        for mode in MODES
        for family in ("qwen3", "llama")
    ]


@pytest.mark.parametrize(("family", "mode"), cases())
def test_tokens(family: checkpoints.Family, mode: str) -> None:
    folder: Path = checkpoints.cached(checkpoints.Shape(family=family))
    prompts = oracle.prompts()
    expected = [oracle.greedy(folder, prompt, TOKENS) for prompt in prompts]
    with engine(folder, tensor_parallel_size=2, distributed_executor_backend="mp", **graphs(mode)) as llm:
        assert generate(llm, prompts, TOKENS) == expected
        shortened = [tokens[:count] for tokens, count in zip(expected, ENDING_ONE_BY_ONE, strict=True)]
        assert generate(llm, prompts, ENDING_ONE_BY_ONE) == shortened
        reports = llm.collective_rpc("report")
    assert len(reports) == 2
    for data in reports:
        check_steps(mode, data)
