"""A decode step of vLLM's engine, a small Qwen3 with made-up weights: one graph a step, graphs of pieces, no graphs.

A step is all that `LLMEngine.step` does: scheduling, the model, sampling, and the tokens on the host. The engines live
in one process and take turns; before each round the requests begin anew, so that all decode behind the same prompts.
"""

from __future__ import annotations

import itertools
import tempfile
from typing import Any

import torch

from benchmarks import devices, models
from benchmarks.harness import Contestant, Factory, Goal, Row

LAYERS, POSITIONS, PROMPT, CHECKED = 8, 1024, 16, 8
"""Of the model; the longest text; tokens of each prompt; decoded tokens that have to agree."""
MODES = ("FULL_DECODE_ONLY", "PIECEWISE", "NONE")


class Decoding:
    """An engine with `batch` requests that decode.

    Attributes:
        found: the tokens of each request of the last round, in the order they were asked in.
    """

    def __init__(self, engine: Any, batch: int) -> None:
        self._engine, self._batch = engine, batch
        self._names = itertools.count()
        self.found: dict[str, list[int]] = {}

    def begin(self) -> None:
        """Gives up the requests there are, and brings new ones to their first token."""
        from vllm import SamplingParams

        self._engine.abort_request(list(self.found))
        self.found = {}
        for row in range(self._batch):
            name = str(next(self._names))
            self.found[name] = []
            wanted = SamplingParams(temperature=0.0, max_tokens=POSITIONS - PROMPT, ignore_eos=True, detokenize=False)
            tokens = [(7 * row + 3 * place) % models.VOCABULARY for place in range(PROMPT)]
            self._engine.add_request(name, {"prompt_token_ids": tokens}, wanted)
        while not all(self.found.values()):
            self.step()

    def step(self) -> None:
        """One step; begins anew where no request is left."""
        if not self._engine.has_unfinished_requests():
            self.begin()
        for output in self._engine.step():
            if output.request_id in self.found:
                self.found[output.request_id] = list(output.outputs[0].token_ids)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def checked(self) -> torch.Tensor:
        """The first tokens of new requests [batch, CHECKED]."""
        self.begin()
        self.steps(CHECKED)
        return torch.tensor([tokens[:CHECKED] for tokens in self.found.values()])


def served(mode: str, batch: int) -> Factory:
    def factory() -> Contestant:
        devices.npu()
        with devices.needed(mode), tempfile.TemporaryDirectory() as folder:
            models.configuration("qwen3", LAYERS).save_pretrained(folder)
            llm = models.engine(
                folder,
                [],
                max_model_len=POSITIONS,
                max_num_seqs=batch,
                max_num_batched_tokens=POSITIONS,
                enable_prefix_caching=False,
                compilation_config={"cudagraph_mode": mode, "cudagraph_capture_sizes": [batch]},
            )
        decoding = Decoding(llm.llm_engine, batch)
        return Contestant(mode, decoding.steps, decoding.checked, kept=(llm,), prepare=decoding.begin)

    return factory


def rows() -> list[Row]:
    return [
        Row(
            name=f"vllm_decode_b{batch}",
            title=f"decode step of vLLM, Qwen3 of {LAYERS} layers, hidden 256, batch {batch}, bfloat16",
            unit="us",
            contestants={mode: served(mode, batch) for mode in MODES},
            reference="NONE",
            goals=(Goal(peer="NONE", faster_than=1.5), Goal(peer="PIECEWISE", faster_than=1.2)),
            long=True,
        )
        for batch in (1, 8, 32)
    ]
