"""A decode step of vLLM's engine, a small Qwen3 with made-up weights: one graph a step, graphs of pieces, no graphs.

A step is all that `LLMEngine.step` does: scheduling, the model, sampling, and the tokens on the host. The engines live
in one process and take turns; before each round the requests begin anew, so that all decode behind the same prompts.
Beside them the graph of FULL_DECODE_ONLY is replayed by itself, launch and wait: what a step takes beside that is the
host's time.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from typing import Any

import torch

from benchmarks import devices, models
from benchmarks.harness import Contestant, Goal, Row

LAYERS, POSITIONS, PROMPT, CHECKED = 8, 1024, 16, 8
"""Of the model; the longest text; tokens of each prompt; decoded tokens that have to agree."""
FULL, PIECEWISE, NONE = MODES = ("FULL_DECODE_ONLY", "PIECEWISE", "NONE")
REPLAY = "its replay"
HOST_US = 1500.0
"""What a step in FULL_DECODE_ONLY may take beside the replay of its graph."""


class Decoding:
    """An engine with `batch` requests that decode.

    Attributes:
        found: the tokens of each request of the last round, in the order they were asked in.
    """

    def __init__(self, llm: Any, batch: int) -> None:
        self._llm, self._engine, self._batch = llm, llm.llm_engine, batch
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

    def replays(self, count: int) -> None:
        """Replays the graph of the last step alone, and waits for each replay."""
        (model,) = self._llm.collective_rpc(full_graphs)
        (descriptor,) = model.descriptors
        wait = devices.wait()
        for _ in range(count):
            model.repeat(descriptor)
            wait()

    def checked(self) -> torch.Tensor:
        """The first tokens of new requests [batch, CHECKED]."""
        self.begin()
        self.steps(CHECKED)
        return torch.tensor([tokens[:CHECKED] for tokens in self.found.values()])


def full_graphs(worker: Any) -> Any:
    """What replays a worker's full graphs (serving.graph_wrapper.ACLGraphWrapper)."""
    return worker.worker.model_runner.model


class Served:
    """The engine of one mode: made for the first contestant that asks for it, there as long as one has it."""

    def __init__(self, mode: str, batch: int) -> None:
        self._mode, self._batch = mode, batch
        self._made: weakref.ref[Decoding] | None = None

    def _decoding(self) -> Decoding:
        found = self._made() if self._made is not None else None
        if found is None:
            found = self._make()
            self._made = weakref.ref(found)
        return found

    def _make(self) -> Decoding:
        devices.npu()
        with devices.needed(self._mode), tempfile.TemporaryDirectory() as folder:
            models.configuration("qwen3", LAYERS).save_pretrained(folder)
            llm = models.engine(
                folder,
                [],
                max_model_len=POSITIONS,
                max_num_seqs=self._batch,
                max_num_batched_tokens=POSITIONS,
                enable_prefix_caching=False,
                compilation_config={"cudagraph_mode": self._mode, "cudagraph_capture_sizes": [self._batch]},
            )
        return Decoding(llm, self._batch)

    def steps(self) -> Contestant:
        """Whole steps."""
        decoding = self._decoding()
        return Contestant(self._mode, decoding.steps, decoding.checked, prepare=decoding.begin)

    def replays(self) -> Contestant:
        """What the device does of them."""
        decoding = self._decoding()

        def prepare() -> None:
            decoding.begin()
            devices.wait()()

        return Contestant(REPLAY, decoding.replays, prepare=prepare)


def row(batch: int) -> Row:
    """The row of steps with `batch` requests."""
    served = {mode: Served(mode, batch) for mode in MODES}
    return Row(
        name=f"vllm_decode_b{batch}",
        title=f"decode step of vLLM, Qwen3 of {LAYERS} layers, hidden 256, batch {batch}, bfloat16",
        unit="us",
        contestants={**{mode: one.steps for mode, one in served.items()}, REPLAY: served[FULL].replays},
        reference=NONE,
        goals=(
            Goal(peer=FULL, rest=HOST_US),
            Goal(peer=NONE, faster_than=1.5),
            Goal(peer=PIECEWISE, faster_than=1.2),
        ),
        part=REPLAY,
        long=True,
    )


def rows() -> list[Row]:
    return [row(batch) for batch in (1, 8, 32)]
