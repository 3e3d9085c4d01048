"""Two ranks over HCCL give the tokens that transformers gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from npu_compiler.inspect import bundle
from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs
from tests.serving.pairs import start, texts
from tests.serving.pairs.features import LAYERS
from tests.serving.test_tokens import MODES, TOKENS
from tests.serving.two_ranks import check_served

IN_DEFAULT_RUN = {("qwen3", "FULL_DECODE_ONLY"), ("llama", "PIECEWISE")}


def cases() -> list[object]:
    return [
        pytest.param(family, mode, marks=() if (family, mode) in IN_DEFAULT_RUN else pytest.mark.full)
        for mode in MODES
        for family in ("qwen3", "llama")
    ]


@pytest.mark.parametrize(("family", "mode"), cases())
def test_tokens(family: checkpoints.Family, mode: str) -> None:
    check_served(checkpoints.cached(checkpoints.Shape(family=family)), mode)


@pytest.mark.full
def test_products_summed_by_one_operator_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of more rows than asked for go through aclnnMatmulAllReduce, decode steps through two operators."""
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")  # a program that is loaded is not dumped
    folder = checkpoints.cached(checkpoints.Shape())
    prompts = oracle.prompts()
    tokens = []
    for rows in (0, 8):
        compile_options = {"dump": str(tmp_path / str(rows)), "matmul_all_reduce": rows}
        settings = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "dtype": "bfloat16"}
        with engine(
            folder, additional_config={"compile": compile_options}, **settings, **graphs("FULL_DECODE_ONLY")
        ) as llm:
            tokens.append(generate(llm, prompts, TOKENS))
    assert tokens[0] == tokens[1]
    ranks = bundle.all_of(tmp_path / "8")
    assert [item.header.environment.rank for item in ranks] == [0, 1]
    for item in ranks:
        assert item.run is not None and item.run.decode_steps.replayed > 0
        assert [(entry.mode, entry.tokens) for entry in item.captures] == [("FULL", size) for size in (4, 2, 1)]
        calls = [call for graph in item.graphs for call in graph.program(graph.stage("final")).calls]
        found = [call for call in calls if call.target == "npu_fused.matmul_all_reduce.default"]
        assert len(found) == 2 * checkpoints.Shape().layers, "the attention's output and the MLP's, in each layer"
        assert all(call.args[-1] == 8 for call in found)
    without = [entry for item in bundle.all_of(tmp_path / "0") for graph in item.graphs for entry in graph.about.passes]
    assert without
    assert "matmul_all_reduce" not in [entry.name for entry in without]


@pytest.mark.parametrize(
    "mode", ["FULL_DECODE_ONLY", *(pytest.param(mode, marks=pytest.mark.full) for mode in ("FULL", "PIECEWISE"))]
)
def test_rows_in_parts_give_the_same_tokens(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and decode steps, also those whose rows two ranks don't divide. Of the pieces
    between attentions only the last is rewritten: at the end of the others the residual would have to be gathered."""
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")  # a program that is loaded is not dumped
    folder = checkpoints.cached(checkpoints.Shape(family="llama"))
    check_served(folder, mode, dump=str(tmp_path), sequence_parallel=1)
    expected_sums = 2 if mode == "PIECEWISE" else 2 * checkpoints.Shape().layers + 1  # the first is the embedding's
    names = [f"npu_fused.{name}_rows.default" for name in ("reduce_scatter", "all_gather")]
    for item in bundle.all_of(tmp_path):
        programs = [graph.program(graph.stage("final")) for graph in item.graphs]
        targets = [call.target for program in programs for call in program.calls]
        assert [targets.count(name) for name in names] == [expected_sums] * 2
        assert ("vllm.all_reduce.default" in targets) == (mode == "PIECEWISE")


@pytest.mark.full
def test_stages_in_front_of_another_work_on_parts_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight layers are enough for the first stage to gather the residual at its end."""
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")  # a program that is loaded is not dumped
    shape = checkpoints.Shape(family="llama", layers=16)
    folder, prompts = checkpoints.cached(shape), oracle.prompts()
    settings = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    options = {"dump": str(tmp_path), "sequence_parallel": 1}
    with engine(folder, additional_config={"compile": options}, **settings, **graphs("FULL_DECODE_ONLY")) as llm:
        assert generate(llm, prompts, TOKENS) == [oracle.greedy(folder, prompt, TOKENS) for prompt in prompts]
    found = []
    for item in bundle.all_of(tmp_path):
        (graph,) = item.graphs
        targets = [call.target for call in graph.program(graph.stage("final")).calls]
        names = (
            "vllm.all_reduce.default",
            *(f"npu_fused.{name}_rows.default" for name in ("reduce_scatter", "all_gather")),
        )
        found.append([targets.count(name) for name in names])
    first = [1, 16, 17]  # the last sum is what the stage sends on; the first is the embedding's
    last = [0, 16, 16]
    assert found == [first, first, last, last]


@pytest.mark.full
def test_experts_whose_tokens_are_divided_work_on_parts_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines of two ranks: vLLM gives each rank its part of an engine's tokens for the experts, and gathers what
    comes back. Neither is left."""
    for name, value in start.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    folder = texts.folder("moe")
    prompts, answers = texts.of("moe", "float32")
    options = {"dump": str(tmp_path), "sequence_parallel": 1}
    settings = {
        **{"tensor_parallel_size": 2, "data_parallel_size": 2, "enable_expert_parallel": True, "dtype": "float32"},
        "additional_config": {"compile": options},
    }
    facts = tmp_path / "facts"
    facts.mkdir()
    counts = [len(answer) for answer in answers]
    assert start.replicated(folder, settings, prompts, counts, str(facts)) == answers
    ranks = bundle.all_of(tmp_path)
    assert len(ranks) == 4
    for item in ranks:
        (graph,) = item.graphs
        lowered, final = (
            [call.target for call in graph.program(graph.stage(name)).calls] for name in ("lowered", "final")
        )
        gathers = ("vllm.all_gather.default", "vllm.sequence_parallel_chunk_impl.default")
        assert [lowered.count(name) for name in gathers] == [4 * LAYERS, LAYERS]
        assert [final.count(name) for name in gathers] == [3 * LAYERS, 0], "rows, weights and numbers of experts"
        assert final.count("npu_fused.all_gather_rows.default") == LAYERS + 1
        assert "vllm.all_reduce.default" not in final
