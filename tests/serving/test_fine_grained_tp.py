"""Weights split over data-parallel engines: layers on simulated ranks, what is refused, and a model served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vllm import SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.v1.sample.logits_processor import validate_logits_processors_parameters

from npu_compiler.errors import UnservedError
from npu_compiler.inspect import bundle
from npu_compiler.inspect.run import SplitWeights
from npu_compiler.serving import fine_grained_tp, split_layers
from npu_compiler.serving.options import FineGrainedTP, ServingOptions
from npu_compiler.serving.report import RunReport
from npu_compiler.serving.split_layers import split_weights
from tests import world
from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import graphs
from tests.serving.pairs.start import ENVIRONMENT
from tests.serving.test_moe import saved
from tests.serving.two_engines import Engines, served

KINDS = ("lm_head", "o_proj", "mlp", "embedding")
HIDDEN, VOCABULARY = 12, 150  # of 192 rows with padding
Load = Callable[..., None]
WIDE = torch.float64  # where the order of a sum does not show


class Group:
    """What layers ask of vLLM's GroupCoordinator, among the threads of tests/world.py."""

    unique_name = world.DEFAULT

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank_in_group, self.world_size = rank, ranks

    def all_gather(self, rows: Tensor, dim: int) -> Tensor:
        assert dim == 0
        found = rows.new_empty((self.world_size * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_single(found, rows.contiguous())
        return found

    def reduce_scatter(self, rows: Tensor, dim: int) -> Tensor:
        assert dim == 0
        found = rows.new_empty((rows.shape[0] // self.world_size, *rows.shape[1:]))
        dist.reduce_scatter_single(found, rows.contiguous())
        return found


@pytest.fixture(autouse=True, scope="module")
def of_one_rank() -> Iterator[None]:
    """vLLM makes layers for its tensor-parallel group, which has one rank here."""
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        patch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1))
        yield


def made(make: Callable[[], nn.Module], rank: int = 0, ranks: int = 1) -> Any:
    """A layer on one of several ranks that split all kinds of weights; of one: whole."""
    group: Any = Group(rank, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine_grained_tp, "_groups", dict.fromkeys(KINDS, group) if ranks > 1 else {})
        return make()


class Head(nn.Module):
    """Embedding and head: two weights, one weight in two layers (tied), or one layer."""

    def __init__(self, tied: bool = False, bias: bool = False, one: bool = False) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(VOCABULARY, HIDDEN, WIDE)
        self.lm_head: Any = ParallelLMHead(VOCABULARY, HIDDEN, bias, WIDE, prefix="lm_head")
        if tied:
            self.lm_head = self.lm_head.tie_weights(self.embed_tokens)
        if one:
            self.lm_head = self.embed_tokens
        self.logits_processor = LogitsProcessor(VOCABULARY, soft_cap=3.0, scale=0.5)

    def forward(self, ids: Tensor, sampled: Tensor) -> Tensor:
        hidden = self.embed_tokens(ids)
        return self.logits_processor(self.lm_head, hidden[sampled].tanh(), getattr(self.lm_head, "bias", None))


class Layer(nn.Module):
    def __init__(self, bias: bool, inner: int) -> None:
        super().__init__()
        of: Any = {"bias": bias, "params_dtype": WIDE}
        self.o_proj = RowParallelLinear(inner, HIDDEN, **of, prefix="layers.0.self_attn.o_proj")
        gate_up = MergedColumnParallelLinear(HIDDEN, [inner] * 2, **of, prefix="layers.0.mlp.gate_up_proj")
        down = RowParallelLinear(inner, HIDDEN, **of, return_bias=False, prefix="layers.0.mlp.down_proj")
        self.mlp = nn.ModuleDict({"gate_up_proj": gate_up, "down_proj": down})

    def forward(self, heads: Tensor) -> Tensor:
        hidden, _ = self.o_proj(heads)
        gate, up = self.mlp["gate_up_proj"](hidden)[0].chunk(2, dim=-1)
        return hidden + self.mlp["down_proj"](gate.tanh() * up)


def load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """As a checkpoint is loaded: each weight whole, gate and up one after the other."""
    for name, parameter in module.named_parameters():
        loader: Load = parameter.weight_loader  # type: ignore[attr-defined]  # vLLM's
        if "gate_up" in name:
            for shard, part in enumerate(weights[name].chunk(2)):
                loader(parameter, part, shard)
        else:
            loader(parameter, weights[name])


def same_on_parts(
    make: Callable[[], nn.Module], kinds: Sequence[str], ranks: int, inputs: list[tuple[Tensor, ...]], rows: int = 0
) -> None:
    """Each rank's own rows through parts of the weights are what they are through the whole ones."""
    whole = made(make)
    weights = {}
    for name, parameter in whole.named_parameters():
        size = VOCABULARY if parameter.shape[0] == 192 else parameter.shape[0]
        weights[name] = torch.randn(size, *parameter.shape[1:], dtype=WIDE)
    load(whole, weights)
    parts = [made(make, rank, ranks) for rank in range(ranks)]
    for part in parts:
        load(part, weights)
        for layer in part.modules():
            if isinstance(layer, split_layers.NPULogitsProcessor):
                layer.rows = rows
    found = world.together(ranks, lambda rank: parts[rank](*inputs[rank]))
    for own, came in zip(inputs, found, strict=True):
        torch.testing.assert_close(came, whole(*own), atol=1e-9, rtol=1e-9)
    for entry in split_weights(parts[0], kinds):
        assert entry.engines == ranks and entry.whole == ranks * entry.here


@settings(max_examples=20)
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from(["tied", "bias", "one"]), st.data())
def test_engines_that_sample_different_numbers_of_rows(ranks: int, head: str, data: st.DataObject) -> None:
    """Also none: an engine without requests comes with zeros."""
    counts = [data.draw(st.integers(0, 3)) for _ in range(ranks)]
    inputs = []
    for count in counts:
        ids = torch.tensor(data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=3, max_size=3)))
        inputs.append((ids, torch.arange(count)))
    with torch.no_grad():
        rows = data.draw(st.integers(max(1, *counts), 5))
        same_on_parts(lambda: Head(**{head: True}), ["embedding", "lm_head"], ranks, inputs, rows)


@settings(max_examples=20)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 5), st.booleans())
def test_products(ranks: int, rows: int, bias: bool) -> None:
    """A bias is added once, whichever rank adds it."""
    inner = 5 * ranks
    inputs = [(torch.randn(rows, inner, dtype=WIDE),) for _ in range(ranks)]
    with torch.no_grad():
        same_on_parts(lambda: Layer(bias, inner), ["o_proj", "mlp"], ranks, inputs)


def test_shared_experts_stay_whole() -> None:
    name = "layers.3.mlp.shared_experts.down_proj"
    assert made(lambda: RowParallelLinear(8, HIDDEN, prefix=name), 1, 2).split_over is None


def test_more_rows_than_the_others_bring() -> None:
    part = made(lambda: Head(), 0, 2)
    part.logits_processor.rows = 2
    with pytest.raises(UnservedError, match="3 rows of logits are asked for in a step in which engines compute 2 each"):
        part.logits_processor(part.lm_head, torch.zeros(3, HIDDEN, dtype=WIDE))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (2, "fine_grained_tp must be a JSON object, got 2"),
        ({"lm_head": 0}, "fine_grained_tp: lm_head must be engines >= 1, got 0"),
        ({"lm_head": True}, "fine_grained_tp: lm_head must be engines >= 1, got True"),
        ({"lmhead": 2}, "fine_grained_tp: unknown key 'lmhead'; did you mean 'lm_head'"),
    ],
)
def test_wrong_settings_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingOptions.parse({"fine_grained_tp": given})


def configuration(model: dict[str, Any], parallel: dict[str, Any], **sizes: int) -> Any:
    """The part of VllmConfig that `settle` reads."""
    usual: dict[str, Any] = {"is_moe": True, "is_multimodal_model": False, "enable_prompt_embeds": False}
    usual |= {"runner_type": "generate", "architecture": "Experts", "logits_processors": None}
    usual["hf_text_config"] = SimpleNamespace(tie_word_embeddings=model.pop("tied", False))
    engines = {"data_parallel_size": 4, "world_size": 1, "enable_elastic_ep": False}
    engines["distributed_executor_backend"] = "mp"
    return SimpleNamespace(
        additional_config={"fine_grained_tp": sizes},
        model_config=SimpleNamespace(**(usual | model)),
        parallel_config=SimpleNamespace(**(engines | parallel)),
    )


@pytest.mark.parametrize(
    ("model", "parallel", "sizes", "message"),
    [
        ({"is_moe": False}, {}, {"o_proj": 2}, "needs a mixture of experts and --data-parallel-size of at least 2"),
        ({}, {"data_parallel_size": 1}, {"o_proj": 2}, "needs a mixture of experts and --data-parallel-size"),
        ({}, {"world_size": 2}, {"o_proj": 2}, "for engines of one rank, and these have 2"),
        ({}, {"enable_elastic_ep": True}, {"o_proj": 2}, "excludes --enable-elastic-ep"),
        ({}, {}, {"o_proj": 2, "mlp": 3}, "mlp can't be split over 3 of 4 engines, which leaves some over"),
        (
            {"is_multimodal_model": True},
            {},
            {"lm_head": 2, "o_proj": 2},
            "o_proj can't be split in Experts, which takes",
        ),
        ({"enable_prompt_embeds": True}, {}, {"embedding": 2}, "embedding excludes --enable-prompt-embeds"),
        ({"tied": True}, {}, {"embedding": 2}, "one weight for embedding and lm_head"),
        ({"tied": True}, {}, {"embedding": 2, "lm_head": 4}, "give both the same number, or leave both out"),
        ({"runner_type": "pooling"}, {}, {"lm_head": 2}, "Experts pools, which takes no lm_head"),
        (
            *({}, {"distributed_executor_backend": "external_launcher"}, {"lm_head": 2}),
            "lm_head excludes --distributed-executor-backend external_launcher",
        ),
    ],
)
def test_what_does_not_go_with_it(
    model: dict[str, Any], parallel: dict[str, Any], sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"additional_config: fine_grained_tp: .*{message}"):
        fine_grained_tp.settle(configuration(model, parallel, **sizes))


@pytest.mark.parametrize(("sizes", "refused"), [({"lm_head": 4, "o_proj": 2}, True), ({"o_proj": 2}, False)])
def test_prompt_logprobs_are_refused_with_the_head_only(sizes: dict[str, int], refused: bool) -> None:
    """By vLLM's own look at a request, also where the settings are looked at twice."""
    config = configuration({"tied": False}, {}, **sizes)
    fine_grained_tp.settle(config)
    fine_grained_tp.settle(config)
    asked = SamplingParams(prompt_logprobs=0)
    validate_logits_processors_parameters(config.model_config.logits_processors, SamplingParams(logprobs=3))
    if refused:
        with pytest.raises(VLLMValidationError, match="prompt_logprobs are not served where the LM head is split"):
            validate_logits_processors_parameters(config.model_config.logits_processors, asked)
    else:
        validate_logits_processors_parameters(config.model_config.logits_processors, asked)


def test_nothing_is_split_by_default() -> None:
    assert FineGrainedTP.of({}).sizes == FineGrainedTP.of(dict.fromkeys(KINDS, 1)).sizes == {}
    config = configuration({"is_moe": False}, {"data_parallel_size": 1})
    fine_grained_tp.settle(config)
    assert config.model_config.logits_processors is None


def test_a_tied_weight_is_counted_once() -> None:
    part = made(lambda: Head(tied=True), 0, 3)
    embedding, head = split_weights(part, ["embedding", "lm_head"])
    each = 192 // 3 * HIDDEN * 8
    assert embedding == SplitWeights(kind="embedding", engines=3, weights=1, here=each, whole=3 * each)
    assert (head.weights, head.here) == (0, 0)
    report = RunReport(split_weights=[embedding])
    report.clear()
    said = "fine_grained_tp: embedding: 1 weights split over 3 engines, 6.0 KiB on each instead of 18.0 KiB"
    assert said in report.text()
    assert report.as_dict()["split_weights"][0]["here"] == each


# -- a model -----------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(("mode", "ranks"), [("FULL_DECODE_ONLY", 2), ("eager", 2), ("FULL_DECODE_ONLY", 4)])
def test_tokens(mode: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that split all kinds, four of them in groups of two and of four: with several requests each, of which
    prompts are read beside decode steps of the other engines, and which end one by one; with all requests, or one,
    beside engines that have none."""
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    folder = saved("deepseek_v2", tmp_path / "model")
    prompts, counts = oracle.prompts()[:5], [20, 3, 9, 1, 5]
    expected = [oracle.greedy(folder, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    reports = []

    async def asks(engines: Engines) -> None:
        assert await engines.answers(prompts, counts) == expected
        for engine in (0, ranks - 1):
            assert await engines.answers(prompts[:1], counts[:1], engine) == expected[:1]
            assert await engines.answers(prompts[1:], counts[1:], engine) == expected[1:]
        with pytest.raises(VLLMValidationError, match="prompt_logprobs are not served where the LM head is split"):
            await engines.ask(prompts[0], SamplingParams(max_tokens=1, prompt_logprobs=1))
        assert await engines.answers(prompts[:1], counts[:1]) == expected[:1]
        reports.extend(await engines.reports(tmp_path))

    sizes = {"lm_head": ranks, "o_proj": 2, "mlp": 2, "embedding": ranks}
    options: dict[str, Any] = {"fine_grained_tp": sizes}
    started: dict[str, Any] = {"enforce_eager": True}
    if mode != "eager":
        options["compile"] = {"dump": str(tmp_path / "dump")}
        started = graphs(mode)
    served(folder, asks, data_parallel_size=ranks, enable_expert_parallel=True, additional_config=options, **started)
    assert len(reports) == ranks
    for data in reports:
        check_kept(data, sizes)
        assert data["decode_steps"]["replayed"] > 0 or mode == "eager"
        others = {entry["reason"] for entry in data["not_replayed"] if entry["kind"] == "decode"}
        assert others <= ({"graphs_off"} if mode == "eager" else {"other_rank"}), "beside a prompt of the other engine"
    for item in bundle.all_of(tmp_path / "dump") if mode != "eager" else []:
        for graph in item.graphs:
            found = [call.target for call in graph.program(graph.stage("final")).calls]
            assert found.count("_c10d_functional.all_to_all_single.default") == checkpoints.Shape().layers


def check_kept(report: dict[str, Any], sizes: dict[str, int]) -> None:
    """What an engine has of the model's float32 weights: hidden 128, vocabulary 320, two layers with output projections
    of 128 columns, the first with an MLP of 128."""
    own = {entry["kind"]: (entry["weights"], entry["here"], entry["whole"]) for entry in report["split_weights"]}
    whole = {"lm_head": (1, 320 * 128), "o_proj": (2, 2 * 128 * 128), "mlp": (2, 3 * 128 * 128)}
    whole["embedding"] = whole["lm_head"]
    assert own == {kind: (count, 4 * size // sizes[kind], 4 * size) for kind, (count, size) in whole.items()}
