"""FULL_DECODE_ONLY: every uniform decode step is one replay, and the host waits for nothing while it prepares one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from npu_compiler.runtime import counters
from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs, report

STEPS = 500


@pytest.fixture(scope="module")
def folder() -> Path:
    return checkpoints.cached(checkpoints.Shape(family="qwen3"))


def model_runner(llm: LLM) -> Any:
    """The model runner of an engine that runs in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


class WaitsOfSteps:
    """Counts host synchronisations from the start of each step to the copy of its sampled tokens, or its end."""

    def __init__(self, runner: Any) -> None:
        self.total = 0
        self._since = 0
        self._execute, self._sample, self._to_list = runner.execute_model, runner.sample_tokens, runner._to_list
        runner.execute_model, runner.sample_tokens, runner._to_list = self.execute, self.sample, self.to_list

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        self._since = counters.read()["host_synchronizations"]
        output = self._execute(*args, **kwargs)
        if output is not None:  # the step that only clears what has finished: nothing is sampled in it
            self._stop()
        return output

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        output = self._sample(*args, **kwargs)
        self._stop()
        return output

    def to_list(self, tokens: Any) -> Any:  # where a synchronous engine copies the tokens, and waits for them
        self._stop()
        result = self._to_list(tokens)
        self._since = counters.read()["host_synchronizations"]
        return result

    def _stop(self) -> None:
        self.total += counters.read()["host_synchronizations"] - self._since


@torch.inference_mode()
def check_repeats(model: Any) -> None:
    """A graph replayed by itself computes again what its last replay did: inputs, cache and lengths are there."""
    descriptor = next(found for found in model.descriptors if found.num_tokens == 1)
    output = model._entries[descriptor].output
    torch.npu.synchronize()
    before = output.cpu()
    for _ in range(2):  # each replay takes its events back, and needs them anew
        output.zero_()
        model.repeat(descriptor)
        torch.npu.synchronize()
        assert before.any() and torch.equal(output.cpu(), before)


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_steps_are_replays_without_waiting(folder: Path, asynchronous: bool) -> None:
    settings: dict[str, Any] = {"max_model_len": 640, "async_scheduling": asynchronous}
    prompts = oracle.prompts()[:3]
    with engine(folder, **settings, **graphs("FULL_DECODE_ONLY", [1, 2, 4])) as llm:
        generate(llm, prompts, 4)  # so that lazy initialisation is behind us
        waits = WaitsOfSteps(model_runner(llm))
        llm.collective_rpc("clear_report")
        before = counters.read()["graph_launches"]
        tokens = generate(llm, prompts[:1], STEPS + 1)  # the first token is the prefill's
        data = report(llm)
        launches = counters.read()["graph_launches"] - before
        check_repeats(model_runner(llm).model)
    assert tokens[0][:64] == oracle.greedy(folder, prompts[0], 64)
    assert data["decode_steps"] == {"total": STEPS, "replayed": STEPS, "piecewise": 0, "eager": 0}
    assert launches == STEPS
    assert sum(graph["replays"] for graph in data["graphs"]) == STEPS
    # An asynchronous engine runs a step ahead and reuses its host buffers: where the device is that far behind, the
    # host waits before it fills them. Nothing else may wait, and a synchronous engine not at all.
    assert waits.total == data["input_waits"]
    assert asynchronous or waits.total == 0
