"""Mixture of experts: routing and experts against plain programs, and a model's tokens against transformers'."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, MoEActivation
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

from npu_compiler.inspect import bundle
from npu_compiler.inspect.outcome import Point
from npu_compiler.inspect.replay import Subject
from npu_compiler.serving import moe
from npu_compiler.serving.expert_maps import recorded
from npu_compiler.serving.moe_router import NPUGroupedTopKRouter
from tests.models import checkpoints, tokenizer
from tests.runtime import reference
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs, report
from tests.serving.pairs.features import MAP

TOKENS, EXPERTS, K, HIDDEN, INNER = 7, 6, 2, 32, 48
GROUPED = 16
"""Experts, in four groups."""
Kind = MoEActivation


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


# -- routing -----------------------------------------------------------------------------------------------------------


def route(name: str, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Weights and experts as vLLM's routers ask for them."""
    weights = torch.empty(TOKENS, K, device="npu")
    experts, scratch = (torch.empty(TOKENS, K, dtype=torch.int32, device="npu") for _ in range(2))
    getattr(torch.ops._moe_C, name)(weights, experts, scratch, logits.npu(), *arguments)
    return weights.cpu(), experts.cpu()


def chosen(scores: Tensor, bias: Tensor | None, renormalize: bool, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same in float64: the bias decides who is chosen, not with what weight."""
    experts = (scores if bias is None else scores + bias.double()).topk(K).indices
    weights = scores.gather(1, experts)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights) * scale, experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_routing_by_softmax(biased: bool, renormalize: bool, dtype: torch.dtype) -> None:
    logits, bias = torch.randn(TOKENS, EXPERTS).to(dtype), torch.randn(EXPERTS) if biased else None
    weights, experts = route("topk_softmax", logits, renormalize, None if bias is None else bias.npu(), None)
    expected = chosen(logits.double().softmax(-1), bias, renormalize)
    reference.assert_close(weights, expected[0], dtype)
    assert torch.equal(experts.long(), expected[1])


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_routing_by_sigmoid(biased: bool, renormalize: bool) -> None:
    logits, bias = torch.randn(TOKENS, EXPERTS), torch.randn(EXPERTS) if biased else None
    weights, experts = route("topk_sigmoid", logits, renormalize, None if bias is None else bias.npu(), 2.5, None)
    expected = chosen(logits.double().sigmoid(), bias, renormalize, 2.5)
    reference.assert_close(weights, expected[0], torch.float32)
    assert torch.equal(experts.long(), expected[1])


def grouped_router(scoring: str, biased: bool, renormalize: bool, **changes: Any) -> GroupedTopKRouter:
    bias = torch.randn(GROUPED) if biased else None
    settings: dict[str, Any] = {"num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5} | changes
    return GroupedTopKRouter(
        K, GROUPED, scoring_func=scoring, renormalize=renormalize, e_score_correction_bias=bias, **settings
    )


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_routing_within_groups(scoring: str, biased: bool, renormalize: bool) -> None:
    """Against the groups' definition in float64: those with the largest score, or the largest sum of two if biased."""
    router, logits = grouped_router(scoring, biased, renormalize), torch.randn(TOKENS, GROUPED)
    scores = logits.double().softmax(-1) if scoring == "softmax" else logits.double().sigmoid()
    choice = scores if router.e_score_correction_bias is None else scores + router.e_score_correction_bias.double()
    groups = choice.view(TOKENS, 4, -1)
    of_groups = groups.topk(2).values.sum(-1) if biased else groups.amax(-1)
    kept = torch.zeros_like(of_groups).scatter(1, of_groups.topk(2).indices, 1).bool()
    experts = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).view(TOKENS, -1).topk(K).indices
    weights = scores.gather(1, experts)
    expected = (weights / weights.sum(-1, keepdim=True) if renormalize else weights) * 1.5
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias = router.e_score_correction_bias.npu()
    found, chosen_ones = NPUGroupedTopKRouter.of(router)._compute_routing(logits.npu(), logits.npu(), None)
    reference.assert_close(found.cpu(), expected, torch.float32)
    assert torch.equal(chosen_ones.cpu().long(), experts)


def test_which_groups_are_one_operator() -> None:
    def is_one(experts: int, **changes: Any) -> bool:
        router = NPUGroupedTopKRouter.of(grouped_router("softmax", False, False, **changes))
        assert isinstance(router, NPUGroupedTopKRouter)
        return router._is_one_operator(experts)

    assert is_one(12)
    assert not is_one(8), "two experts a group"
    assert not is_one(14), "groups are not equal"
    assert not is_one(2052, num_expert_group=4)
    assert not is_one(260, num_expert_group=65), "65 groups of 32, as they are aligned"
    assert not is_one(12, num_expert_group=4, topk_group=0)


# -- experts -----------------------------------------------------------------------------------------------------------


def oai(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


FORMULAS = {
    Kind.SILU: lambda x: functional.silu(x[:, :INNER]) * x[:, INNER:],
    # torch_npu's gelu is CANN's Gelu, which has the tanh form whatever it is asked for
    Kind.GELU: lambda x: functional.gelu(x[:, :INNER], approximate="tanh") * x[:, INNER:],
    Kind.GELU_TANH: lambda x: functional.gelu(x[:, :INNER], approximate="tanh") * x[:, INNER:],
    Kind.SWIGLUOAI: lambda x: oai(x[:, ::2], x[:, 1::2]),
    Kind.SWIGLUSTEP: lambda x: functional.silu(x[:, :INNER]).clamp(max=7) * x[:, INNER:].clamp(-7, 7),
    Kind.SILU_NO_MUL: functional.silu,
    Kind.RELU2_NO_MUL: lambda x: functional.relu(x).square(),
}


def layer(kind: Kind, dtype: torch.dtype, with_bias: bool, on_input: bool = False) -> SimpleNamespace:
    inner = 2 * INNER if kind.is_gated else INNER
    made = SimpleNamespace(layer_name="model.layers.0.mlp", activation=kind, apply_router_weight_on_input=on_input)
    made.w13_weight = torch.randn(EXPERTS, inner, HIDDEN).to(dtype) / 4
    made.w2_weight = torch.randn(EXPERTS, HIDDEN, INNER).to(dtype) / 8
    if with_bias:
        made.w13_bias, made.w2_bias = torch.randn(EXPERTS, inner).to(dtype), torch.randn(EXPERTS, HIDDEN).to(dtype)
    return made


def on_device(made: SimpleNamespace) -> Any:
    return SimpleNamespace(**{k: v.npu() if isinstance(v, Tensor) else v for k, v in vars(made).items()})


def method(rank: int = 0, ranks: int = 1) -> moe.NPUFusedMoEMethod:
    """The method without what vLLM builds around it: `apply` reads these settings only."""
    made = object.__new__(moe.NPUFusedMoEMethod)
    torch.nn.Module.__init__(made)
    made.moe = SimpleNamespace(  # type: ignore[assignment]  # the part of FusedMoEConfig that is read
        swiglu_limit=None, swiglu_alpha=None, swiglu_beta=None, activation_situ_beta=None,
        activation_situ_linear_beta=None, has_bias=False, num_experts=EXPERTS,
        moe_parallel_config=SimpleNamespace(use_ep=ranks > 1, ep_size=ranks, ep_rank=rank),
    )  # fmt: skip
    made.moe_quant_config = None
    return made


def plain(made: SimpleNamespace, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    total = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(weights[token].double(), experts[token].tolist(), strict=True):
            row = x[token : token + 1].double() * (weight if made.apply_router_weight_on_input else 1)
            row = row @ made.w13_weight[expert].double().T
            if hasattr(made, "w13_bias"):
                row = row + made.w13_bias[expert].double()
            row = FORMULAS[made.activation](row) @ made.w2_weight[expert].double().T
            if hasattr(made, "w2_bias"):
                row = row + made.w2_bias[expert].double()
            total[token] += row[0] * (1 if made.apply_router_weight_on_input else weight)
    return total


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMULAS, ids=lambda kind: kind.value)
def test_experts(kind: Kind, dtype: torch.dtype, with_bias: bool) -> None:
    made, x = layer(kind, dtype, with_bias), torch.randn(TOKENS, HIDDEN).to(dtype)
    weights, experts = torch.rand(TOKENS, K), torch.stack([torch.randperm(EXPERTS - 1)[:K] for _ in range(TOKENS)])
    actual = method().apply(on_device(made), x.npu(), weights.npu(), experts.int().npu(), None, None)
    # bfloat16 is rounded after each of the two products and the activation
    reference.assert_close(actual, plain(made, x, weights, experts), dtype, factor=3.0)


def test_weights_on_the_input() -> None:
    made, x = layer(Kind.SILU, torch.float32, False, on_input=True), torch.randn(TOKENS, HIDDEN)
    weights, experts = torch.rand(TOKENS, 1), torch.randint(EXPERTS, (TOKENS, 1))
    actual = method().apply(on_device(made), x.npu(), weights.npu(), experts.int().npu(), None, None)
    reference.assert_close(actual, plain(made, x, weights, experts), torch.float32, factor=3.0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_shares_add_up(ranks: int) -> None:
    """4 ranks: two have two experts, two have one; and as many tokens as leave some rank without any."""
    made = layer(Kind.SILU, torch.float32, True)
    for tokens in (TOKENS, 1):
        x, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, K)
        experts = torch.stack([torch.randperm(EXPERTS)[:K] for _ in range(tokens)])
        total = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
        for rank in range(ranks):
            of_rank = method(rank, ranks)
            local, places, _ = determine_expert_map(ranks, rank, EXPERTS)
            own = (places >= 0).nonzero().flatten()
            share = SimpleNamespace(**{k: v[own] if isinstance(v, Tensor) else v for k, v in vars(made).items()})
            share.expert_placement_strategy = "linear"
            assert moe.experts_of(share, of_rank.moe) == (int(own[0]), int(own[0]) + local)  # type: ignore[arg-type]
            given = (x.npu(), weights.npu(), experts.int().npu())
            total += of_rank.apply(on_device(share), *given, None, None).cpu().double()
        reference.assert_close(total.float(), plain(made, x, weights, experts), torch.float32, factor=3.0)


def test_experts_that_are_no_neighbours_are_refused() -> None:
    scattered = SimpleNamespace(expert_placement_strategy="round_robin", layer_name="layers.3.mlp.experts")
    with pytest.raises(NotImplementedError, match=r"experts placed round_robin(.|\n)*where: layers\.3\.mlp\.experts"):
        moe.experts_of(scattered, method(0, 2).moe)  # type: ignore[arg-type]


def test_a_limit_of_the_gate() -> None:
    rows = torch.randn(5, 2 * INNER) * 4
    settings = ApplyMoEActivationConfig(clamp_limit=2.0, alpha=1.5, beta=1.0)
    gate, up = rows[:, :INNER].double().clamp(max=2.0), rows[:, INNER:].double().clamp(-2.0, 2.0)
    expected = gate * torch.sigmoid(1.5 * gate) * (up + 1)
    actual = moe.activated(Kind.SWIGLUOAI_UNINTERLEAVE, rows.npu(), settings, "model.layers.0.mlp")
    reference.assert_close(actual, expected, torch.float32)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="experts with the activation situ are not served on npu"):
        moe.activated(Kind.SITU, torch.ones(1, 4).npu(), ApplyMoEActivationConfig(), "model.layers.0.mlp")


# -- a model -----------------------------------------------------------------------------------------------------------


LAYER = (
    "npu.npu_moe_gating_top_k_softmax_v2.default", "npu.npu_moe_init_routing_v2.default",
    "npu.npu_grouped_matmul.default", "npu_fused.swiglu.default", "npu.npu_grouped_matmul.default",
    "npu.npu_moe_finalize_routing.default",
)  # fmt: skip
"""The calls of a layer in order, between the norm and the sum over the ranks."""
Made = tuple[type[PretrainedConfig], type[PreTrainedModel], dict[str, Any]]
GROUPS = {"n_group": 4, "topk_group": 2, "n_routed_experts": GROUPED, "first_k_dense_replace": 1}
FAMILIES: dict[str, Made] = {
    "qwen3": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 32}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "head_dim": 32}),
    "deepseek_v2": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        GROUPS
        | {"topk_method": "group_limited_greedy", "n_shared_experts": 2, "moe_intermediate_size": 64, "v_head_dim": 32}
        | {"q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32}
        | {"routed_scaling_factor": 1.0, "num_key_value_heads": 4},
    ),
    "glm4": (
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        GROUPS | {"n_shared_experts": 1, "moe_intermediate_size": 64, "routed_scaling_factor": 1.5, "head_dim": 32},
    ),
}
"""Softmax over all; the same in another model; softmax within groups and shared experts; sigmoids within groups, with a
bias and a scale."""


def saved(family: str, folder: Path, **changes: Any) -> Path:
    shape = checkpoints.configuration(checkpoints.Shape()).to_dict()
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    made, model_class, settings = FAMILIES[family]
    common = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "intermediate_size": 128, "dtype": "float32"}
    config = made(
        **{name: shape[name] for name in names} | common | settings | changes, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=tokenizer.TURN_END_ID, pad_token_id=tokenizer.END_OF_TEXT_ID,
    )  # fmt: skip
    model = model_class(config).float()
    checkpoints.initialise(model, seed=0)
    return checkpoints.save(model.to(config.dtype).eval(), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("qwen3", tmp_path_factory.mktemp("moe"))


def test_tokens_are_those_of_transformers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the layers are calls of the graph, under the layers' names, which runs alone (npu-compiler replay)."""
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")  # a program that is loaded is not dumped
    prompts = oracle.prompts()[:4]
    expected = [oracle.greedy(folder, prompt, 16) for prompt in prompts]
    options = {"additional_config": {"compile": {"dump": str(tmp_path)}}}
    with engine(folder, **options, **graphs("FULL_DECODE_ONLY")) as llm:
        assert generate(llm, prompts, 16) == expected
        steps = report(llm)["decode_steps"]
    assert steps["replayed"] > 0
    assert steps["eager"] == 0
    (stored,) = bundle.all_of(tmp_path)
    (graph,) = stored.graphs
    found = [call for call in graph.program(graph.stage("final")).calls if call.target in LAYER]
    assert [call.target for call in found] == list(LAYER) * checkpoints.Shape().layers
    assert [call.place.module for call in found[:: len(LAYER)]] == [
        f"layers.{layer}.mlp.experts" for layer in range(checkpoints.Shape().layers)
    ]
    outcome = Subject.of(graph).run(Point())
    assert outcome.right, str(outcome)


@pytest.mark.full
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3"])
def test_other_families(family: str, tmp_path: Path) -> None:
    model, prompts = saved(family, tmp_path), oracle.prompts()[:4]
    expected = [oracle.greedy(model, prompt, 16) for prompt in prompts]
    with engine(model, **graphs("FULL_DECODE_ONLY")) as llm:
        assert generate(llm, prompts, 16) == expected
        assert report(llm)["decode_steps"]["eager"] == 0


@pytest.mark.parametrize("communication", ["auto", pytest.param("alltoall", marks=pytest.mark.full)])
def test_tokens_with_the_experts_on_two_ranks(communication: str, folder: Path) -> None:
    """Every rank has whole experts instead of a part of each."""
    prompts = oracle.prompts()[:4]
    expected = [oracle.greedy(folder, prompt, 16) for prompt in prompts]
    settings: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    settings |= {"enable_expert_parallel": True}
    settings["additional_config"] = {"compile": {"expert_communication": communication}}
    with engine(folder, **settings, **graphs("FULL_DECODE_ONLY")) as llm:
        assert generate(llm, prompts, 16) == expected
        reports = llm.collective_rpc("report")
    assert len(reports) == 2
    for data in reports:
        assert data["decode_steps"]["replayed"] > 0
        assert data["decode_steps"]["eager"] == 0


@pytest.mark.full
@pytest.mark.parametrize("placed", [{}, {"expert_map": recorded([MAP] * checkpoints.Shape().layers)}], ids=["", "map"])
def test_tokens_by_mc2(placed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an A3, in float16 and with rows of 1024, as CANN's operators want it. A token that is not transformers' own
    has to be one that transformers, in float32, has as near to it as float16 is exact (test_precision.py)."""
    monkeypatch.setenv("NPU_COMPILER_HOST", "soc=Ascend910_9391")  # of the ranks, which are processes of their own
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")  # a program that is loaded is not dumped
    model = saved("qwen3", tmp_path / "model", hidden_size=1024, dtype="float16")
    prompts = oracle.prompts()[:4]
    options = {**placed, "compile": {"expert_communication": "mc2", "dump": str(tmp_path / "dump")}}
    settings: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "dtype": "float16"}
    settings |= {"enable_expert_parallel": True, "additional_config": options, **graphs("FULL_DECODE_ONLY")}
    with engine(model, **settings) as llm:
        found = generate(llm, prompts, 16)
        reports = llm.collective_rpc("report")
    behind = []
    for prompt, tokens in zip(prompts, found, strict=True):
        scores = oracle.log_probabilities(model, prompt + tokens)[len(prompt) - 1 : -1]
        behind += (scores.amax(-1) - scores.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)).tolist()
    assert max(behind) < 0.08 and behind.count(0.0) >= 0.9 * len(behind), behind
    assert len(reports) == 2
    for data in reports:
        assert data["decode_steps"]["replayed"] > 0
        assert data["decode_steps"]["eager"] == 0
    for item in bundle.all_of(tmp_path / "dump"):
        (program,) = [graph.program(graph.stage("final")) for graph in item.graphs]
        targets = [call.target for call in program.calls]
        for operator in ("mc2_dispatch", "mc2_combine"):
            assert targets.count(f"npu_fused.{operator}.default") == checkpoints.Shape().layers
        assert "npu.npu_moe_init_routing_v2.default" not in targets
