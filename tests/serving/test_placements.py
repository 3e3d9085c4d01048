"""Placements of parallel layers, served on two ranks: transformers' tokens, and what was placed where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from npu_compiler.inspect import bundle
from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs
from tests.serving.test_moe import saved
from tests.serving.test_tokens import TOKENS
from tests.serving.two_ranks import check_served

LAYERS = checkpoints.Shape().layers
EXCHANGE, SCATTER, GATHER, COLUMNS = (
    f"npu_fused.{name}.default"
    for name in ("all_to_all_rows", "reduce_scatter_rows", "all_gather_rows", "all_gather_columns")
)


@pytest.mark.full
@pytest.mark.parametrize("mode", ["FULL_DECODE_ONLY", "FULL", "PIECEWISE"])
@pytest.mark.parametrize("rows", [0, 1], ids=["summed", "scattered"])
def test_attention_exchange(mode: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sums scattered and without. A piece between two attentions has no attention."""
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")  # a program that is loaded is not dumped
    folder = checkpoints.cached(checkpoints.Shape(family="llama"))

    def refuses_other_weights(llm: LLM) -> None:
        with pytest.raises(Exception, match="attention_exchange"):
            llm.collective_rpc("reload_weights")

    options = {"attention_exchange": 1, "sequence_parallel": rows}
    check_served(folder, mode, behind=refuses_other_weights, dump=str(tmp_path), **options)
    exchanged = 0 if mode == "PIECEWISE" else LAYERS
    for item in bundle.all_of(tmp_path):
        calls = [call for graph in item.graphs for call in graph.program(graph.stage("final")).calls]
        found = [call.target for call in calls]
        assert found.count(EXCHANGE) == exchanged
        if mode != "PIECEWISE":
            sums = 2 * LAYERS + 1  # the first is the embedding's
            assert found.count(SCATTER) == (sums - LAYERS if rows else 0)
            assert found.count("vllm.all_reduce.default") == (0 if rows else sums - LAYERS)
            assert found.count(GATHER) == (sums if rows else LAYERS)
        assert COLUMNS not in found, "weights are gathered once"


@pytest.mark.full
def test_shared_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside routed experts whose tokens are exchanged: with whole weights, no sum is left in their layers."""
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    folder, prompts = saved("deepseek_v2", tmp_path / "model"), oracle.prompts()[:4]
    expected = [oracle.greedy(folder, prompt, 16) for prompt in prompts]
    options = {"dump": str(tmp_path), "shared_expert_rows": 1, "sequence_parallel": 1}
    options |= {"expert_communication": "alltoall"}
    settings: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    settings |= {"enable_expert_parallel": True, **graphs("FULL_DECODE_ONLY")}
    with engine(folder, additional_config={"compile": options}, **settings) as llm:
        assert generate(llm, prompts, 16) == expected
        reports = llm.collective_rpc("report")
    assert all(data["decode_steps"]["eager"] == 0 for data in reports)
    for item in bundle.all_of(tmp_path):
        calls = [call for graph in item.graphs for call in graph.program(graph.stage("final")).calls]
        found = [call.target for call in calls]
        sparse = LAYERS - 1
        assert found.count("npu_fused.all_to_all_combine.default") == sparse
        assert found.count("npu_fused.unshard_rows.default") == 0
        assert found.count(SCATTER) == 2 * LAYERS + 1 - sparse, "of embedding, attentions and dense layers"


@pytest.mark.full
@pytest.mark.parametrize("mode", ["FULL_DECODE_ONLY", "FULL"])
def test_layer_sharding(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's whole output projection is kept on one of two ranks; decode steps with broadcasts are replays."""
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    layers = 6
    folder = checkpoints.cached(checkpoints.Shape(family="llama", layers=layers))
    options = {"attention_exchange": 1, "sequence_parallel": 1, "layer_sharding": True}
    check_served(folder, mode, dump=str(tmp_path), **options)
    for item in bundle.all_of(tmp_path):
        for graph in item.graphs:
            found = [call.target for call in graph.program(graph.stage("final")).calls]
            assert found.count("_c10d_functional.broadcast.default") == found.count(EXCHANGE) == layers
            assert graph.plan is not None and len(graph.plan.once) == layers // 2


@pytest.mark.full
@pytest.mark.parametrize("mode", ["FULL_DECODE_ONLY", "PIECEWISE"])
def test_dual_batch_overlap(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is between attentions in two halves, from three tokens on, since vLLM has no range of one token alone. A
    piece between two attentions has it too."""
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    folder = checkpoints.cached(checkpoints.Shape(family="llama"))
    check_served(folder, mode, dump=str(tmp_path), dual_batch_overlap=2)
    for item in bundle.all_of(tmp_path):
        found = [call.target for graph in item.graphs for call in graph.program(graph.stage("final")).calls]
        halves = sum("_c10d_functional.all_reduce" in target for target in found)
        assert halves == 2 * (2 * LAYERS + 1) == 2 * found.count("vllm.all_reduce.default")


@pytest.mark.full
def test_prompts_alone_are_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs share the weights; that of prompts alone reads some of them whole."""
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    folder = checkpoints.cached(checkpoints.Shape())
    prompts = oracle.prompts()
    expected = [oracle.greedy(folder, prompt, TOKENS) for prompt in prompts]
    options = {"dump": str(tmp_path), "attention_exchange": 16, "sequence_parallel": 8}
    settings = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", **graphs("FULL_DECODE_ONLY")}
    with engine(folder, additional_config={"compile": options}, **settings) as llm:
        assert generate(llm, prompts, TOKENS) == expected
    for item in bundle.all_of(tmp_path):
        found = [
            [call.target for call in graph.program(graph.stage("final")).calls].count(EXCHANGE) for graph in item.graphs
        ]
        assert sorted(found) == [0, 0, LAYERS]
