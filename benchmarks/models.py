"""The models of the compiler's benchmarks: transformers' own code, random weights, one decode step (or one encoding).

Widths are small, so that what is measured is the compiler and not the arithmetic; the layout of heads is that of the
published models, because the fused operators depend on it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

if TYPE_CHECKING:
    from vllm import LLM

BATCH, POSITIONS, VOCABULARY = 4, 128, 512
DEPTHS = (4, 28)
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """How a model is made: transformers' configuration class, the architecture, and what differs from the defaults.

    Attributes:
        architecture: a class of transformers, and the name vLLM knows the model by.
        encoder: one pass over a whole text instead of one step with a cache.
    """

    configuration: str
    architecture: str
    settings: dict[str, Any]
    encoder: bool = False


FAMILIES = {
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 128}),
    "llama": Family("LlamaConfig", "LlamaForCausalLM", {**_DECODER, "head_dim": 128}),
    "gemma": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_DECODER, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": POSITIONS},
    ),
    "bert": Family(
        "BertConfig",
        "BertModel",
        {key: value for key, value in _DECODER.items() if key not in ("num_key_value_heads", "pad_token_id")}
        | {"pad_token_id": 0},
        encoder=True,
    ),
}


def configuration(
    name: str, layers: int, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> transformers.PreTrainedConfig:
    """The configuration of `name` with `layers` layers; all layers of Gemma attend to everything, as at short texts."""
    family = FAMILIES[name]
    settings = {**family.settings, "num_hidden_layers": layers, "dtype": dtype, **changes}
    if name == "gemma":
        settings["layer_types"] = ["full_attention"] * layers
    config = getattr(transformers, family.configuration)(**settings)
    config.architectures = [family.architecture]
    return config


class DecodeStep(nn.Module):
    """One token a request with a static KV cache: what a server runs at every step."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.cache = transformers.StaticCache(config=config, max_cache_len=POSITIONS)
        dtype = next(model.parameters()).dtype
        head = torch.zeros(BATCH, config.num_key_value_heads, 1, config.head_dim, device=device, dtype=dtype)
        for layer in self.cache.layers:
            layer.lazy_initialization(head, head)

    def forward(self, tokens: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """tokens, position [batch, 1]; mask [batch, 1, 1, positions], added to scores; logits [batch, vocabulary]."""
        found = self.model(
            tokens, position_ids=position, attention_mask=mask, past_key_values=self.cache, use_cache=True
        )
        return found.logits[:, -1]


class Encoding(nn.Module):
    """One pass of an encoder over a batch of short texts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """tokens, position [batch, length]; mask [batch, length] of ones; gives [batch, length, hidden]."""
        return self.model(tokens, position_ids=position, attention_mask=mask).last_hidden_state


def step(name: str, layers: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The module of one unit of work, on `device`, ready for inference; equal weights for equal arguments."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    config = configuration(name, layers, dtype)
    config._attn_implementation = "eager"
    model = getattr(transformers, family.architecture)(config).to(dtype).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 2.4 / config.hidden_size**0.5)
        elif "norm" in parameter_name.lower():
            parameter.data.uniform_(0.5, 1.5)
    model = model.to(device)
    made = Encoding(model) if family.encoder else DecodeStep(model, device)
    return made.eval()


def inputs(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """What `step` is called with."""
    generator = torch.Generator().manual_seed(1)
    if FAMILIES[name].encoder:
        length = 16
        tokens = torch.randint(1, VOCABULARY, (BATCH, length), generator=generator)
        position = torch.arange(length).expand(BATCH, length).contiguous()
        return tokens.to(device), position.to(device), torch.ones(BATCH, length, dtype=torch.int64).to(device)
    tokens = torch.randint(0, VOCABULARY, (BATCH, 1), generator=generator)
    position = torch.full((BATCH, 1), 7)
    seen = torch.where(torch.arange(POSITIONS) <= 7, 0.0, -1e9).to(dtype)
    return tokens.to(device), position.to(device), seen.expand(BATCH, 1, 1, POSITIONS).contiguous().to(device)


def engine(folder: str, capture_sizes: Sequence[int], **changes: Any) -> LLM:
    """vLLM's engine, in this process, in FULL_DECODE_ONLY, with made-up weights for the configuration in `folder`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    settings: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": POSITIONS,
        "max_num_seqs": BATCH,
        "max_num_batched_tokens": POSITIONS,
        "kv_cache_memory_bytes": 64 << 20,
        "disable_log_stats": True,
        "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": list(capture_sizes)},
    }
    return LLM(model=folder, **(settings | changes))
