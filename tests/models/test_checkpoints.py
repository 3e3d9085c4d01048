"""The checkpoints are complete, reproducible, and hard enough that a wrong cache or norm changes the tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import checkpoints, tokenizer
from tests.models.checkpoints import Shape

PROMPTS = ["The compiler", "graph 17 replays", "Ä naïve €uro", "x = torch.ones(3)"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def greedy(folder: Path, prompt: str, count: int) -> tuple[list[int], float]:
    """The greedy continuation, and the smallest distance between the best and the second logit on the way."""
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    ids = torch.tensor([list(prompt.encode())])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best, second = torch.stack(out.logits).squeeze(1).topk(2, dim=-1).values.unbind(-1)
    return out.sequences[0, ids.shape[1] :].tolist(), float((best - second).min())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2"])
def test_greedy_output_is_lively(cache: Path, family: checkpoints.Family, tied: bool) -> None:
    folder = checkpoints.cached(Shape(family=family, tied=tied), cache)
    answers = [greedy(folder, prompt, 64) for prompt in PROMPTS]
    for tokens, margin in answers:
        assert len(set(tokens)) >= 24, f"{family}: greedy output repeats itself: {tokens}"
        assert margin > 1e-5, f"{family}: a tie in float32 makes the greedy token a matter of rounding ({margin})"
    assert len({tuple(tokens) for tokens, _ in answers}) == len(PROMPTS)


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2"])
def test_folder_is_a_complete_checkpoint(cache: Path, family: checkpoints.Family) -> None:
    shape = Shape(family=family, dtype="bfloat16", layers=3)
    folder = checkpoints.cached(shape, cache)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["dtype"]) == (3, shape.hidden, "bfloat16")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == tokenizer.TURN_END_ID
    weights = load_file(folder / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert sum(name.startswith("model.layers.2.") for name in weights) >= 9
    norms = torch.cat([w.float().flatten() for name, w in weights.items() if "norm" in name])
    assert 0.5 <= norms.min() < 0.7 and 1.3 < norms.max() <= 1.5
    if family == "qwen2":
        assert weights["model.layers.0.self_attn.q_proj.bias"].float().std() > 0.3


def test_tied_weights_are_stored_once(cache: Path) -> None:
    assert "lm_head.weight" in load_file(checkpoints.cached(Shape(tied=False), cache) / "model.safetensors")
    assert "lm_head.weight" not in load_file(checkpoints.cached(Shape(tied=True), cache) / "model.safetensors")


def test_same_shape_same_bytes(tmp_path: Path) -> None:
    first, again, other = (
        checkpoints.write(Shape(seed=seed), tmp_path / name) / "model.safetensors"
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_cache_writes_once_and_leaves_no_scratch(tmp_path: Path) -> None:
    folder = checkpoints.cached(Shape(), tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert checkpoints.cached(Shape(), tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert checkpoints.cached(Shape(seed=9), tmp_path) != folder
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "gpt2"}, "known families are qwen3, llama, qwen2"),
        ({"dtype": "int8"}, "known dtypes"),
        ({"heads": 4, "kv_heads": 3}, "not a multiple of kv_heads=3"),
        ({"family": "qwen2", "head_dim": 64}, "must be heads x head_dim = 4 x 64"),
    ],
)
def test_impossible_shapes_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape(**settings)  # type: ignore[arg-type]


def test_tokenizer_is_bytes_with_chat_markers(cache: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(checkpoints.cached(Shape(), cache))
    text = "Grüße, 図 🙂\n\tend"
    assert loaded.encode(text) == list(text.encode())
    assert loaded.decode(loaded.encode(text)) == text
    assert len(loaded) == Shape().vocab
    assert loaded.convert_tokens_to_ids("<|reserved_0|>") == tokenizer.SMALLEST_VOCAB
    chat = loaded.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    start, end = tokenizer.TURN_START_ID, tokenizer.TURN_END_ID
    assert chat == [start, *b"user\nhi", end, *b"\n", start, *b"assistant\n"]


def test_tokenizer_needs_room_for_its_markers() -> None:
    with pytest.raises(ValueError, match="at least 259"):
        tokenizer.byte_tokenizer(256, 128)
