"""A decode step of vLLM's engine with made-up weights: one graph a step, graphs of pieces, no graphs.

A small Qwen3 shows what the host costs, one of Qwen3-0.6B's shape what is left of that where the weights take their
time; beside the latter transformers decodes on the plain CPU. A step is all that `LLMEngine.step` does: scheduling, the
model, sampling, and the tokens on the host. The engines live in one process and take turns; before each round the
requests begin anew, so that all decode behind the same prompts. Beside them the graph of FULL_DECODE_ONLY is replayed
alone, launch and wait; of the larger model the logits behind it are computed too, a quarter of the bytes that it reads.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import devices, models
from benchmarks.harness import Contestant, Factory, Goal, Row

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LAYERS, POSITIONS, PROMPT, CHECKED = 8, 1024, 16, 8
"""Of the small model; the longest text; tokens of each prompt; decoded tokens that have to agree."""
QWEN3_06B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}
"""https://huggingface.co/Qwen/Qwen3-0.6B, config.json; the rest is as in models.FAMILIES."""
FULL, PIECEWISE, NONE = MODES = ("FULL_DECODE_ONLY", "PIECEWISE", "NONE")
REPLAY, BARE, TRANSFORMERS = "its replay", "replay and logits", "transformers"
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
            self._engine.add_request(name, {"prompt_token_ids": prompt(row)}, wanted)
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

    @torch.inference_mode()
    def replays(self, count: int, logits: bool) -> None:
        """Replays the graph of the last step alone, with or without the logits behind it, and waits each time."""
        (model,) = self._llm.collective_rpc(full_graphs)
        (descriptor,) = model.descriptors
        wait = devices.wait()
        for _ in range(count):
            hidden = model.repeat(descriptor)
            if logits:
                model.compute_logits(hidden[: self._batch])
            wait()

    def checked(self) -> torch.Tensor:
        """The first tokens of new requests [batch, CHECKED]."""
        self.begin()
        self.steps(CHECKED)
        return torch.tensor([tokens[:CHECKED] for tokens in self.found.values()])


def cache_bytes(configuration: PreTrainedConfig) -> int:
    """Bytes of the keys and values of one text, in bfloat16."""
    heads = configuration.num_hidden_layers * configuration.num_key_value_heads
    return 2 * 2 * heads * configuration.head_dim * POSITIONS


def prompt(row: int) -> list[int]:
    return [(7 * row + 3 * place) % models.VOCABULARY for place in range(PROMPT)]


def full_graphs(worker: Any) -> Any:
    """What replays a worker's full graphs (serving.graph_wrapper.ACLGraphWrapper)."""
    return worker.worker.model_runner.model


class Served:
    """The engine of one mode: made for the first contestant that asks for it, there as long as one has it."""

    def __init__(self, mode: str, batch: int, configuration: PreTrainedConfig) -> None:
        self._mode, self._batch, self._configuration = mode, batch, configuration
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
            self._configuration.save_pretrained(folder)
            llm = models.engine(
                folder,
                [],
                max_model_len=POSITIONS,
                max_num_seqs=self._batch,
                max_num_batched_tokens=POSITIONS,
                kv_cache_memory_bytes=self._batch * cache_bytes(self._configuration) + (32 << 20),
                enable_prefix_caching=False,
                compilation_config={"cudagraph_mode": self._mode, "cudagraph_capture_sizes": [self._batch]},
            )
        return Decoding(llm, self._batch)

    def steps(self) -> Contestant:
        """Whole steps."""
        decoding = self._decoding()
        return Contestant(self._mode, decoding.steps, decoding.checked, prepare=decoding.begin)

    def replays(self, logits: bool = False) -> Contestant:
        """What the device does of them but for the sampling, and without `logits` but for these."""
        decoding = self._decoding()

        def prepare() -> None:
            decoding.begin()
            devices.wait()()

        return Contestant(BARE if logits else REPLAY, lambda count: decoding.replays(count, logits), prepare=prepare)


def in_transformers(batch: int, configuration: PreTrainedConfig) -> Factory:
    """A step of transformers' greedy generation on the plain CPU: the model with its cache, and the argmax. Its weights
    are others than vLLM makes up, so its tokens are not compared."""

    def factory() -> Contestant:
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.manual_seed(0)
        with torch.inference_mode():
            model = AutoModelForCausalLM.from_config(configuration, dtype=torch.bfloat16).eval()
        last, cache = torch.empty(0), DynamicCache()

        @torch.inference_mode()
        def step(tokens: torch.Tensor) -> None:
            nonlocal last
            last = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

        def prepare() -> None:
            nonlocal cache
            cache = DynamicCache(config=configuration)
            step(torch.tensor([prompt(row) for row in range(batch)]))

        def steps(count: int) -> None:
            for _ in range(count):
                step(last)

        return Contestant(TRANSFORMERS, steps, prepare=prepare)

    return factory


def row(batch: int) -> Row:
    """The row of steps of the small model with `batch` requests."""
    configuration = models.configuration("qwen3", LAYERS)
    served = {mode: Served(mode, batch, configuration) for mode in MODES}
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


def row_of_qwen3_06b(batch: int, threads: int = 1) -> Row:
    """The row of steps with `batch` requests of a model that takes its time to read its weights."""
    configuration = models.configuration("qwen3", 28, **QWEN3_06B)
    served = {mode: Served(mode, batch, configuration) for mode in (FULL, NONE)}
    return Row(
        name=f"vllm_qwen3_06b_b{batch}" + "_two_threads" * (threads == 2),
        title=f"decode step of vLLM, Qwen3-0.6B's shape, batch {batch}, bfloat16"
        + ", two compute threads" * (threads == 2),
        unit="ms",
        contestants={
            **{mode: one.steps for mode, one in served.items()},
            BARE: lambda: served[FULL].replays(logits=True),
            TRANSFORMERS: in_transformers(batch, configuration),
        },
        reference=NONE,
        # A step within 25 % of the bare one: the bare one takes at least 1 / 1.25 of it.
        goals=(Goal(peer=BARE, faster_than=0.8), Goal(peer=TRANSFORMERS, faster_than=2.0)),
        part=BARE,
        long=True,
        threads=threads,
    )


def rows() -> list[Row]:
    of_qwen3 = (row_of_qwen3_06b(batch, threads) for threads in (1, 2) for batch in (1, 8))
    return [*(row(batch) for batch in (1, 8, 32)), *of_qwen3]
