"""Prompts and the answers that transformers gives to them, in float32 on the CPU."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.models import checkpoints, tokenizer
from tests.serving import oracle
from tests.serving.pairs.features import EXPERTS, HIDDEN, LAYERS

TOKENS = 16
MARGIN = 0.25
"""How far the chosen token's logit has to lie above all others where half precision is compared with float32: half
precision moves log-probabilities by up to 0.08 (tests/serving/test_precision.py), so two of them by up to 0.16."""
ROUTER_MARGIN = 0.05
"""How far the router's score of the last expert that a token gets has to lie above the next one's there: a rounding
that changes which experts a token has changes its logits by any amount."""
LENGTHS = (3, 17, 64, 129)
CANDIDATES, PER_LENGTH = 64, 2
Texts = tuple[list[list[int]], list[list[int]]]


def folder(kind: str, layers: int = LAYERS, hidden: int = HIDDEN) -> Path:
    """A checkpoint of this kind, written on first use."""
    shape = checkpoints.Shape(family="qwen3", layers=layers, hidden=hidden)
    if kind == "dense":
        return checkpoints.cached(shape)
    make = functools.partial(_mixture, shape, shared=kind == "shared")
    return checkpoints.cached_as(f"{kind}-{layers}-{hidden}", (Path(__file__),), make)


def _mixture(shape: checkpoints.Shape, shared: bool) -> PreTrainedModel:
    """Qwen3-MoE, or Qwen2-MoE, whose routed experts have a shared one beside them."""
    dense = checkpoints.configuration(shape).to_dict()
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    settings = {name: dense[name] for name in names} | {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 1024,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": tokenizer.TURN_END_ID,
        "pad_token_id": tokenizer.END_OF_TEXT_ID,
    }
    model: PreTrainedModel
    if shared:
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings, shared_expert_intermediate_size=256))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, head_dim=dense["head_dim"]))
    checkpoints.initialise(model.float(), seed=0)
    return model.eval()


@functools.cache
def of(kind: str, dtype: str, layers: int = LAYERS, hidden: int = HIDDEN) -> Texts:
    """Prompts, and what follows them greedily. For float16: prompts whose answer half precision can't change, because
    every token of it is chosen by a margin, and transformers in float16 gives the same one."""
    if dtype == "float32":
        prompts = oracle.prompts()
        return prompts, [oracle.greedy(folder(kind, layers, hidden), prompt, TOKENS) for prompt in prompts]
    model = oracle.model(folder(kind, layers, hidden))
    found = [text for length in LENGTHS for text in _decided(model, length)]
    assert len(found) >= len(LENGTHS), f"{kind}: only {len(found)} answers are decided by {MARGIN}"
    return [prompt for prompt, _ in found], [answer for _, answer in found]


def _decided(model: PreTrainedModel, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts of this length whose answers don't depend on the precision: at most PER_LENGTH, the first that are
    found among random ones; the answer ends where a token is no longer decided."""
    generator = torch.Generator().manual_seed(length)
    prompts = torch.randint(32, 127, (CANDIDATES, length), generator=generator)
    sure, answers = _greedy(model, prompts)
    half = _greedy(copy.deepcopy(model).half(), prompts)[1]
    agreed = (sure & (half == answers)).long().cumprod(1).sum(1)
    for index in agreed.argsort(descending=True, stable=True)[:PER_LENGTH].tolist():
        if agreed[index] >= TOKENS // 2:
            yield prompts[index].tolist(), answers[index, : agreed[index]].tolist()


@torch.inference_mode()
def _greedy(model: PreTrainedModel, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each step of greedy decoding: whether the token is chosen by MARGIN, and its experts by ROUTER_MARGIN, and the
    token; both [prompts, TOKENS]."""
    found = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(found.logits, dim=1).float().topk(2).values
    sure = best[..., 0] - best[..., 1] >= MARGIN
    if hasattr(model.config, "num_experts_per_tok"):
        scores = model(found.sequences, output_router_logits=True).router_logits
        last = torch.stack(scores).float().topk(model.config.num_experts_per_tok + 1).values[..., -2:]
        gaps = (last[..., 0] - last[..., 1]).amin(0).view_as(found.sequences)
        sure &= gaps[:, prompts.shape[1] - 1 : -1] >= ROUTER_MARGIN
    return sure, found.sequences[:, prompts.shape[1] :]
