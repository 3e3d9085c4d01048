"""Generate text with a Hugging Face model whose decode steps are graph replays.

python examples/generate_with_transformers.py                  the small model in tests/models/trained
python examples/generate_with_transformers.py PATH_OR_NAME     any causal language model of transformers
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import npu_compiler

TRAINED = Path(__file__).parents[1] / "tests" / "models" / "trained"


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], tokens: int) -> tuple[torch.Tensor, float]:
    """Greedy tokens (prompt included) and the seconds they took.

    cache_implementation="static" gives the KV cache one shape for all steps; disable_compile keeps transformers from
    compiling the model a second time.
    """
    start = time.perf_counter()
    output = model.generate(
        **{name: value.to(model.device) for name, value in inputs.items()},
        max_new_tokens=tokens,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
    )
    return output.cpu(), time.perf_counter() - start


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, torch.Tensor]:
    """The prompt as ids and mask, as a chat where the model has a chat template."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        found = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:
        found = tokenizer(prompt, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(TRAINED))
    parser.add_argument("--prompt", default="What is an ACL graph?")
    parser.add_argument("--tokens", type=int, default=48)
    chosen = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval().to("npu")
    inputs = encode(tokenizer, chosen.prompt)

    eager, seconds = generate(model, inputs, chosen.tokens)
    print(tokenizer.decode(eager[0], skip_special_tokens=True))
    print(f"eager:    {seconds:.2f} s")
    model.forward = torch.compile(model.forward, backend="ascend")
    for run in ("cold", "warm"):
        compiled, seconds = generate(model, inputs, chosen.tokens)
        print(f"compiled: {seconds:.2f} s ({run}), {'the same' if torch.equal(compiled, eager) else 'OTHER'} tokens")
    for line in npu_compiler.report().splitlines():
        if line.startswith("graph") or line.endswith(" replays") or " captured " in line:
            print(line)


if __name__ == "__main__":
    main()
