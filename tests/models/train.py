"""Trains the tiny byte-level Qwen3 of the demo on `tests/models/text`, and writes it to `tests/models/trained`.

    python -m tests.models.train [--output FOLDER] [--steps N]

The checkpoint that ships with the repository was written by this program (150 steps, about 1 s each on two cores of
an x86 server). The text is short and the model learns it nearly by heart: the aim is a server whose answers can be
read, not a model that generalises.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from tests.models import checkpoints
from tests.models.checkpoints import Shape
from tests.models.tokenizer import END_OF_TEXT_ID, TURN_END_ID, TURN_START_ID

HERE = Path(__file__).parent
TEXT = HERE / "text"
OUTPUT = HERE / "trained"
SHAPE = Shape(
    family="qwen3", layers=4, hidden=192, heads=4, kv_heads=2, head_dim=64, intermediate=512, vocab=320, tied=True,
    max_positions=2048, dtype="bfloat16", seed=7,
)  # fmt: skip
ROWS, LENGTH = 16, 384
TYPOS = 0.04
STEPS = 150


def paragraphs() -> list[str]:
    """The paragraphs of the guide, each one line of plain prose."""
    return [line for line in (TEXT / "guide.txt").read_text().split("\n") if line]


def questions() -> list[tuple[str, str]]:
    """All (question, answer) pairs: several `Q:` lines may share the `A:` line that closes their block."""
    pairs, asked = [], []
    for number, line in enumerate((TEXT / "questions.txt").read_text().split("\n"), 1):
        if line.startswith("Q: "):
            asked.append(line[3:])
        elif line.startswith("A: "):
            pairs += [(question, line[3:]) for question in asked]
            asked = []
        elif line:
            raise ValueError(f"questions.txt:{number}: a line must start with 'Q: ' or 'A: ', not {line!r}")
    return pairs


def chat_ids(question: str, answer: str) -> list[int]:
    """One exchange as the chat template renders it."""
    ask = [TURN_START_ID, *f"user\n{question}".encode(), TURN_END_ID, *b"\n"]
    return [*ask, TURN_START_ID, *f"assistant\n{answer}".encode(), TURN_END_ID, *b"\n"]


def varied(question: str, chance: random.Random) -> str:
    """The question as people also type it: without its mark, or in lower case."""
    if chance.random() < 0.25:
        question = question.rstrip("?.!")
    return question.lower() if chance.random() < 0.15 else question


def documents(chance: random.Random) -> Iterator[list[int]]:
    """Endless epochs of the corpus in random order; a paragraph may start at any of its sentences."""
    prose, pairs = paragraphs(), questions()
    while True:
        epoch = [chat_ids(varied(question, chance), answer) for question, answer in pairs]
        for paragraph in prose:
            sentences = paragraph.split(". ")
            start = chance.randrange(len(sentences)) if chance.random() < 0.5 else 0
            epoch.append([*". ".join(sentences[start:]).encode(), END_OF_TEXT_ID])
        chance.shuffle(epoch)
        yield from epoch


def batches(seed: int) -> Iterator[torch.Tensor]:
    """Batches of (ROWS, LENGTH + 1) token ids; every row begins with the beginning of a document."""
    source = documents(random.Random(seed))
    while True:
        rows = []
        for _ in range(ROWS):
            row: list[int] = []
            while len(row) <= LENGTH:
                row += next(source)
            rows.append(row[: LENGTH + 1])
        yield torch.tensor(rows)


def with_typos(ids: torch.Tensor) -> torch.Tensor:
    """The inputs with a share of TYPOS of their bytes replaced by random letters; chat markers stay.

    The targets stay right, so the model learns to return to English after a byte that it did not expect.
    """
    hit = (torch.rand(ids.shape) < TYPOS) & (ids < END_OF_TEXT_ID) & (ids != ord("\n"))
    return torch.where(hit, torch.randint(ord("a"), ord("z") + 1, ids.shape), ids)


def optimisers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int) -> float:
    """The factor on the peak rate: a short warm-up, then a cosine to one fiftieth."""
    warm = 10
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(steps: int = STEPS) -> PreTrainedModel:
    """Trains from SHAPE's seed for `steps` steps in float32 and returns the model, rounded to SHAPE's dtype."""
    torch.manual_seed(SHAPE.seed)
    model = checkpoints.FAMILIES[SHAPE.family][1](checkpoints.configuration(SHAPE)).float().train()
    both = optimisers(model)
    peaks = [group["lr"] for optimiser in both for group in optimiser.param_groups]
    began = time.perf_counter()
    for step, batch in zip(range(steps), batches(SHAPE.seed), strict=False):
        groups = [group for optimiser in both for group in optimiser.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * learning_rate(step, steps)
        logits = model(with_typos(batch[:, :-1]), use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in both:
            optimiser.step()
            optimiser.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  {time.perf_counter() - began:5.1f} s", flush=True)
    return model.to(checkpoints.DTYPES[SHAPE.dtype]).eval()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.models.train", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the checkpoint (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    options = parser.parse_args()
    model = train(options.steps)
    checkpoints.save(model, options.output, stop=(TURN_END_ID, END_OF_TEXT_ID))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {size / 1e6:.2f} M parameters to {options.output}")


if __name__ == "__main__":
    main()
