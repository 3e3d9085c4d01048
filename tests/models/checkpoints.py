"""Writes small Qwen3, Llama and Qwen2.5 checkpoints in Hugging Face format, by transformers itself.

    folder = checkpoints.cached(checkpoints.Shape(family="qwen3", layers=2))
    transformers.AutoModelForCausalLM.from_pretrained(folder)       # the oracle
    vllm.LLM(model=str(folder))                                     # the subject

Weights are random but far from degenerate: with transformers' own initialisation (std 0.02) greedy decoding repeats one
token, so a broken attention or cache would go unseen. Here every layer moves the argmax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.models import tokenizer

Family = Literal["qwen3", "llama", "qwen2"]
FAMILIES: dict[Family, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What decides a checkpoint, entirely: two equal shapes give byte-equal weights.

    Sizes are in elements; `dtype` is the dtype of the stored weights and of `config.json`. The defaults split over two
    ranks (heads, KV heads, intermediate size and vocabulary are even).
    """

    family: Family = "qwen3"
    layers: int = 2
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 256
    vocab: int = 320
    max_positions: int = 2048
    tied: bool = False
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r}: known families are {', '.join(FAMILIES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: known dtypes are {', '.join(DTYPES)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.family == "qwen2" and self.head_dim * self.heads != self.hidden:
            raise ValueError(
                f"Qwen2.5 has no head_dim of its own: hidden={self.hidden} must be heads x head_dim = "
                f"{self.heads} x {self.head_dim}"
            )


def configuration(shape: Shape) -> PreTrainedConfig:
    """The transformers configuration of `shape`."""
    settings: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.TURN_END_ID,
        "pad_token_id": tokenizer.END_OF_TEXT_ID,
        "dtype": shape.dtype,
    }
    if shape.family != "qwen2":
        settings["head_dim"] = shape.head_dim
    return FAMILIES[shape.family][0](**settings)


@torch.no_grad()
def initialise(model: PreTrainedModel, seed: int) -> None:
    """Gives every parameter a seeded random value that keeps greedy decoding lively.

    Matrices: N(0, (2.4 / sqrt(hidden))²), which is 0.3 at hidden 64, so that a projection of a normalised activation
    has a spread of 2.4 whatever the size. Norm weights: U(0.5, 1.5), so that a norm left out or applied twice shows.
    Biases: N(0, 0.5²).
    """
    generator = torch.Generator().manual_seed(seed)
    spread = 2.4 / model.config.hidden_size**0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, spread, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.5, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)


def random_model(shape: Shape) -> PreTrainedModel:
    """The model of `shape` in memory, in float32 rounded to the shape's dtype, ready for inference."""
    model = FAMILIES[shape.family][1](configuration(shape)).float()
    initialise(model, shape.seed)
    return model.to(DTYPES[shape.dtype]).eval()


def save(model: PreTrainedModel, folder: Path, stop: Sequence[int] = (tokenizer.TURN_END_ID,)) -> Path:
    """Writes config, generation config, safetensors and the byte tokenizer of `model` into `folder`.

    `stop` are the token ids that end a text, as the generation config names them.
    """
    config = model.config
    ends = list(stop) if len(stop) > 1 else stop[0]
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.END_OF_TEXT_ID, do_sample=False
    )
    model.save_pretrained(folder)
    tokenizer.byte_tokenizer(config.vocab_size, config.max_position_embeddings).save_pretrained(folder)
    return folder


def write(shape: Shape, folder: Path) -> Path:
    """Writes the checkpoint of `shape` into `folder` (made when missing) and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return save(random_model(shape), folder)


def cache_folder() -> Path:
    """Where checkpoints are kept between runs: `$XDG_CACHE_HOME/npu_compiler/models`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "npu_compiler" / "models"


def content_key(shape: Shape) -> str:
    """A name for the checkpoint made of everything that decides its bytes: the shape, this code, the libraries."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(shape), sort_keys=True).encode())
    for source in (Path(__file__), Path(tokenizer.__file__)):
        digest.update(source.read_bytes())
    digest.update(f"{torch.__version__} {transformers.__version__}".encode())
    return f"{shape.family}-l{shape.layers}-h{shape.hidden}-{shape.dtype}-{digest.hexdigest()[:16]}"


def cached(shape: Shape, cache: Path | None = None) -> Path:
    """The folder of the checkpoint of `shape`, written on first use; safe when several processes ask at once."""
    return _written_once((cache or cache_folder()) / content_key(shape), lambda scratch: write(shape, scratch))


def cached_as(name: str, sources: Sequence[Path], make: Callable[[], PreTrainedModel]) -> Path:
    """The same for the model that `make` returns, made anew when one of the `sources` that decide it changes."""
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    for source in (Path(__file__), Path(tokenizer.__file__), *sources):
        digest.update(source.read_bytes())
    return _written_once(cache_folder() / f"{name}-{digest.hexdigest()[:16]}", lambda scratch: save(make(), scratch))


def _written_once(folder: Path, fill: Callable[[Path], object]) -> Path:
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        fill(scratch)
        scratch.rename(folder)
    except OSError:
        # Another process may have finished the same checkpoint meanwhile; a rename onto a filled folder fails.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
