"""What vLLM's captures may take: the largest size comes first, and what does not fit runs without a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from npu_compiler.serving.capture_budget import CaptureBudget
from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs, report


@pytest.fixture(scope="module")
def folder() -> Path:
    return checkpoints.cached(checkpoints.Shape(family="qwen3"))


def records(llm: Any) -> list[int]:
    """Sizes in the order of their captures."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return [record.tokens for record in runner.model.records]


def check_tokens(llm: Any, folder: Path, requests: int) -> None:
    prompts = oracle.prompts()[:requests]
    for prompt, tokens in zip(prompts, generate(llm, prompts, 5), strict=True):
        assert tokens == oracle.greedy(folder, prompt, 5)


def test_time(folder: Path) -> None:
    """The first capture has no other to be estimated from; it takes longer than the budget, so the rest is eager."""
    with engine(folder, additional_config={"capture_budget_seconds": 1e-4}, **graphs("FULL_DECODE_ONLY")) as llm:
        assert records(llm) == [4]
        check_tokens(llm, folder, 1)
        check_tokens(llm, folder, 4)
        data = report(llm)
    assert list(data["not_captured"]) == ["FULL 2 tokens", "FULL 1 tokens"]
    assert all("capture_budget_seconds is 0.0001" in reason for reason in data["not_captured"].values())
    steps = {group["detail"]: group["steps"] for group in data["not_replayed"] if group["reason"] == "not_captured"}
    assert steps[f"FULL 1 tokens, {data['not_captured']['FULL 1 tokens']}"] >= 4
    assert data["decode_steps"]["replayed"] > 0


def test_memory(folder: Path) -> None:
    """Nothing is captured: the run before the first capture already takes more."""
    with engine(folder, additional_config={"capture_budget_mib": 0.001}, **graphs("FULL_DECODE_ONLY")) as llm:
        assert records(llm) == []
        check_tokens(llm, folder, 2)
        data = report(llm)
    assert list(data["not_captured"]) == [f"FULL {size} tokens" for size in (4, 2, 1)]
    assert data["decode_steps"]["replayed"] == 0


@pytest.mark.full
def test_two_ranks_leave_out_the_same_sizes(folder: Path) -> None:
    settings: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    budget = {"capture_budget_seconds": 1e-4}
    with engine(folder, additional_config=budget, **settings, **graphs("FULL_DECODE_ONLY")) as llm:
        check_tokens(llm, folder, 4)
        left_out = [list(data["not_captured"]) for data in llm.collective_rpc("report")]
    assert left_out == [["FULL 2 tokens", "FULL 1 tokens"]] * 2


def test_estimates() -> None:
    budget = CaptureBudget(seconds=1.0, mebibytes=10.0)
    assert budget.refusal(lambda: 11.0) == "about 11 MiB are needed, capture_budget_mib is 10"
    assert not budget.refusal(lambda: 9.0)
    budget.add(0.4, 8.0)
    assert not budget.refusal(lambda: 9.0), "smaller sizes lie where the first does"
    budget.add(0.4, 0.0)
    assert "0.8 s are taken, about 0.4 more" in budget.refusal(lambda: 0.0)
    late = CaptureBudget(seconds=0.0, mebibytes=10.0)
    late.add(99.0, 12.0)
    assert late.refusal(lambda: 0.0) == "12 MiB are taken, capture_budget_mib is 10"
