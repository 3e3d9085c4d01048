"""What transformers says about the same checkpoint, in float32 on the CPU, independent of anything on the device."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

BLOCK = 128  # tokens a KV-cache block; a prefix is found again in whole blocks


def prompts() -> list[list[int]]:
    """Eight prompts of 3 to 300 tokens. The last two share 150 tokens, which is more than a block."""
    generator = torch.Generator().manual_seed(7)

    def text(length: int) -> list[int]:
        return torch.randint(32, 127, (length,), generator=generator).tolist()

    shared = text(150)
    return [text(3), text(17), text(40), text(64), text(129), text(300), shared + text(5), shared + text(30)]


@functools.lru_cache(maxsize=4)
def model(folder: Path) -> PreTrainedModel:
    """The checkpoint as transformers loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def greedy(folder: Path, prompt: list[int], count: int, **penalties: float) -> list[int]:
    """The `count` tokens that greedy decoding gives, whether or not an end-of-text is among them."""
    ids = torch.tensor([prompt])
    out = model(folder).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        **penalties,
    )
    return out[0, len(prompt) :].tolist()


@torch.inference_mode()
def log_probabilities(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [len(tokens), vocabulary] of what follows each token, float64."""
    return model(folder)(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
