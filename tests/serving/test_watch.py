"""What is watched on two ranks, in an engine that compiles and in one that takes the programs of the first."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs
from tests.serving.test_trace import mlp_of_transformers

TOKENS = 4
NOWHERE = "WatchWarning: watch in the model: 'layers.1.mpl': nothing is computed there, so nothing is noted; there is "


@pytest.mark.full
@pytest.mark.parametrize("starts", [1, 2], ids=["cold", "and warm"])
def test_both_ranks_note_the_same(
    starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The MLP's output is summed over the ranks, so each has all of it. (A warm start of one rank: test_warm_start.)"""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # vLLM sets it: put back afterwards
    folder = checkpoints.cached(checkpoints.Shape(family="qwen3"))
    prompt = oracle.prompts()[1]
    tokens = oracle.greedy(folder, prompt, TOKENS)
    expected = mlp_of_transformers(folder, [*prompt, *tokens])[: len(prompt) + TOKENS - 1]
    watch = {"watch": ["layers.1.mlp:values", "layers.1.mpl:stats", "*:nan"], "watch_save": str(tmp_path / "saved")}
    settings = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", **graphs("FULL_DECODE_ONLY", [1])}
    for start, name in enumerate(("vllm", "vllm.1")[:starts]):
        capfd.readouterr()
        with engine(folder, additional_config={"compile": watch}, **settings) as llm:
            assert generate(llm, [prompt], TOKENS) == [tokens]
        out, err = capfd.readouterr()
        said = out + err
        assert said.count(NOWHERE + "'layers.1.mlp'") == 2, "once a rank"
        assert ("Directly load" in said) == bool(start), said
        for rank in range(2):
            saved = tmp_path / "saved" / f"rank{rank}" / name
            lines = [json.loads(line) for line in (saved / "notes.jsonl").read_text().splitlines()]
            values = [load_file(saved / line["file"])[line["key"]] for line in lines]
            torch.testing.assert_close(torch.cat(values), expected, rtol=1e-3, atol=1e-4)
            assert [line["step"] for line in lines] == list(range(TOKENS))
            assert Counter(line["what"] for line in lines) == {"values": TOKENS}
            assert said.count(f"watch step {TOKENS - 1}: layers.1.mlp") == 2, "printed by each rank"
