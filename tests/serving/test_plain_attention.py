"""Attention by plain operators against float64, and a model with a window against transformers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from npu_compiler.serving import plain_attention
from npu_compiler.serving.plain_attention import Extras, attend
from tests.models import checkpoints
from tests.runtime import reference
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs, report

HEADS, KV_HEADS, SIZE, BLOCK = 4, 2, 16, 8
QUERIES, LENGTHS = [1, 5, 3], [13, 5, 20]
CASES = {
    "nothing": Extras(),
    "window": Extras(window=4),
    "soft cap": Extras(soft_cap=2.0),
    "slopes": Extras(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
    "sinks": Extras(sinks=torch.tensor([1.0, -2.0, 0.5, 3.0])),
}


def expected(query: Tensor, key: Tensor, value: Tensor, scale: float, extras: Extras) -> Tensor:
    """One request in float64: query [q, heads, size]; key, value [k, kv heads, size]; the last query sees all keys."""
    key, value = (one.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for one in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * scale
    if extras.soft_cap is not None:
        scores = (scores / extras.soft_cap).tanh() * extras.soft_cap
    back = torch.arange(len(query))[:, None] + len(key) - len(query) - torch.arange(len(key))
    if extras.slopes is not None:
        scores = scores - extras.slopes.double().view(-1, 1, 1) * back
    scores = scores.masked_fill((back < 0) | (back >= (extras.window or len(key))), -math.inf)
    total = scores.exp().sum(-1, keepdim=True)
    if extras.sinks is not None:
        total = total + extras.sinks.double().exp().view(-1, 1, 1)
    return torch.einsum("hqk,khd->qhd", scores.exp() / total, value)


def run(extras: Extras, dtype: torch.dtype, padding: int = 0) -> tuple[Tensor, Tensor]:
    """What `attend` gives for three requests over a paged cache, and what it should."""
    torch.manual_seed(5)
    blocks = 1 + sum(-(-length // BLOCK) for length in LENGTHS)
    key_cache, value_cache = (torch.randn(blocks, BLOCK, KV_HEADS, SIZE).to(dtype) for _ in range(2))
    order, table = iter((torch.randperm(blocks - 1) + 1).tolist()), torch.zeros(3, 3, dtype=torch.int32)
    query = torch.randn(sum(QUERIES) + padding, HEADS, SIZE).to(dtype)
    parts, start = [], 0
    for row, (queries, length) in enumerate(zip(QUERIES, LENGTHS, strict=True)):
        used = [next(order) for _ in range(-(-length // BLOCK))]
        table[row, : len(used)] = torch.tensor(used)
        key, value = (cache[used].flatten(0, 1)[:length] for cache in (key_cache, value_cache))
        parts.append(expected(query[start : start + queries], key, value, 0.3, extras))
        start += queries
    starts = torch.tensor([0, 1, 6, 9], dtype=torch.int32).npu()
    moved = {
        field.name: value.npu() if isinstance(value := getattr(extras, field.name), Tensor) else value
        for field in dataclasses.fields(extras)
    }
    tensors = (query.npu(), key_cache.npu(), value_cache.npu(), table.npu(), starts)
    found = attend(*tensors, torch.tensor(LENGTHS, dtype=torch.int32).npu(), 0.3, Extras(**moved))
    return found, torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    found, wanted = run(CASES[name], dtype)
    assert found.dtype == dtype
    reference.assert_close(found, wanted, dtype)


def test_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_attention, "_ELEMENTS", 2 * 3 * BLOCK * KV_HEADS * SIZE)  # room for two tokens
    reference.assert_close(*run(CASES["window"], torch.float32), torch.float32)


def test_rows_of_padding_stay_finite() -> None:
    found, wanted = run(CASES["window"], torch.float32, padding=40)
    assert found.isfinite().all()
    reference.assert_close(found[:9], wanted, torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose window is shorter than most of its texts."""
    shape = checkpoints.configuration(checkpoints.Shape()).to_dict()
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim", "num_key_value_heads")
    names = (*names, "intermediate_size", "vocab_size", "eos_token_id", "pad_token_id")
    made = {name: shape[name] for name in names}
    config = MistralConfig(**made, max_position_embeddings=1024, dtype="float32", bos_token_id=None, sliding_window=24)
    model = MistralForCausalLM(config).float()
    checkpoints.initialise(model, seed=1)
    return checkpoints.save(model.eval(), tmp_path_factory.mktemp("window"))


def test_tokens_of_a_model_with_a_window(folder: Path) -> None:
    prompts = oracle.prompts()[:5]
    wanted = [oracle.greedy(folder, prompt, 12) for prompt in prompts]
    assert len({token for tokens in wanted for token in tokens}) > 20
    with engine(folder, **graphs("FULL_DECODE_ONLY")) as llm:
        assert generate(llm, prompts[:4], 12) == wanted[:4]
        assert generate(llm, prompts[4:], 12) == wanted[4:]
        assert report(llm)["decode_steps"]["replayed"] > 0
