"""The sweep's parts that need no engine: shrinking, resuming, and rows of processes that crash or hang."""

from __future__ import annotations

import sys

import pytest
import transformers

from benchmarks.sweep import __main__ as sweep
from benchmarks.sweep import shrink, table, worker

TYPES = [("llama", "LlamaForCausalLM"), ("qwen3_moe", "Qwen3MoeForCausalLM"), ("gpt2", "GPT2LMHeadModel")]


@pytest.mark.parametrize(("model_type", "architecture"), TYPES)
def test_a_shrunken_model_is_small_and_of_its_kind(model_type: str, architecture: str) -> None:
    config = shrink.configuration(shrink.Subject(architecture, model_type))
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == architecture
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6
    assert config.num_hidden_layers == shrink.LAYERS
    assert config.num_attention_heads % getattr(config, "num_key_value_heads", 1) == 0


def test_kinds_of_heads_stay_what_they_are() -> None:
    multi_head = shrink.changes({"num_attention_heads": 12, "num_key_value_heads": 12})
    grouped = shrink.changes({"num_attention_heads": 32, "num_key_value_heads": 8})
    multi_query = shrink.changes({"num_attention_heads": 32, "num_key_value_heads": 1})
    assert [made["num_key_value_heads"] for made in (multi_head, grouped, multi_query)] == [4, 2, 1]


def test_a_hybrid_model_keeps_two_kinds_of_layers() -> None:
    made = shrink.changes({"num_hidden_layers": 4, "layer_types": ["linear", "linear", "linear", "full"]})
    assert made == {"num_hidden_layers": 2, "layer_types": ["linear", "full"]}


def test_one_expert_a_token_stays_one() -> None:
    assert [shrink.changes({"num_experts_per_tok": k})["num_experts_per_tok"] for k in (1, 8)] == [1, 2]


def test_kernels_of_a_layer_lie_between_two_attentions() -> None:
    assert worker.layer_kernels(("A", "Attention", "B", "C", "Attention", "D")) == 3
    assert worker.layer_kernels(("A", "Attention", "B")) is None
    assert worker.layer_kernels(("ScatterPaKvCache", "A", "ScatterPaKvCache", "Attention")) == 2


@pytest.mark.parametrize(
    ("program", "reason"),
    [("raise SystemExit(7)", "ended with code 7"), ("import time; time.sleep(60)", "no result within")],
)
def test_a_crash_or_a_hang_costs_one_row(program: str, reason: str) -> None:
    serving = sweep.Worker(timeout=3.0, command=[sys.executable, "-S", "-c", f"input(); {program}"])
    row = serving.row("LlamaForCausalLM")
    assert row["outcome"] == "crashed"
    assert reason in row["reason"]
    assert serving._process is None, "the next row gets a new process"


def test_the_page_names_what_failed_and_why() -> None:
    good = {
        "architecture": "A",
        "outcome": "equal",
        "reason": "",
        "fired": {"swiglu": 2, "noop": 3},
        "dummy_because": "",
    }
    good |= {"layer_kernels": 9, "compile_seconds": 1.5, "compiler": "abcdef123"}
    bad = {"architecture": "B", "outcome": "eager fails", "reason": "RuntimeError: no operator | here"}
    page = table.page([good, bad], ["C"], ["D"], "abcdef123")
    assert "| A | equal | - | saved | 9 | swiglu x 2 | 1.5 | abcdef |" in page
    assert "1 rows are of the compiler as it is now (`abcdef`)" in page
    assert "| B | eager fails | RuntimeError: no operator \\| here |" in page
    assert "equal 1, eager fails 1" in table.summary([good, bad])
