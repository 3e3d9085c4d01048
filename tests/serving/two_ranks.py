"""A model served on two ranks, which give the tokens that transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm import LLM

from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs
from tests.serving.test_tokens import ENDING_ONE_BY_ONE, TOKENS, check_steps


def check_served(
    folder: Path, mode: str, *, behind: Callable[[LLM], object] = lambda llm: None, **options: Any
) -> None:
    """Two ranks in a graph mode, with options of the compile backend, answer the prompts by transformers' tokens, all
    at once and ending one by one; each rank's report has the steps of its mode. `behind`: what to do with them then."""
    prompts = oracle.prompts()
    expected = [oracle.greedy(folder, prompt, TOKENS) for prompt in prompts]
    settings: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", **graphs(mode)}
    with engine(folder, additional_config={"compile": options}, **settings) as llm:
        assert generate(llm, prompts, TOKENS) == expected
        shortened = [tokens[:count] for tokens, count in zip(expected, ENDING_ONE_BY_ONE, strict=True)]
        assert generate(llm, prompts, ENDING_ONE_BY_ONE) == shortened
        reports = llm.collective_rpc("report")
        behind(llm)
    assert len(reports) == 2
    for data in reports:
        check_steps(mode, data)
