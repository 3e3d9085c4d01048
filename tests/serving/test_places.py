"""What a vLLM user is told about a layer of their model names it, the model's line, and what to do next: every place in
npu_compiler/serving that raises or warns is either provoked here or says nothing about a layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, MoEActivation
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from npu_compiler.errors import UnservedError
from npu_compiler.serving import moe, split_layers
from npu_compiler.serving.attention import NPUAttentionImpl
from npu_compiler.serving.expert_loads import ExpertLoads
from npu_compiler.serving.expert_maps import placed_in_turn, recorded
from npu_compiler.serving.plain_attention import Extras
from npu_compiler.serving.platform import NPUPlatform
from npu_compiler.serving.routed_experts import NPURoutedExperts, placement_of
from npu_compiler.serving.runner import NPUModelRunner
from tests.compiler.message_sites import sites
from tests.models import checkpoints
from tests.serving.engine import engine

NO_LAYER = {
    "alone.py:fit": "names the layer; of bundles, whose errors tests/serving/test_bisect.py has",
    "attention.py:build": "what vLLM gave for a step",
    "capture_sizes.py:check_capture_sizes": "an option",
    "communicator.py:all_gatherv": "runs inside of a program, whose caller names the call (graph/running.py)",
    "compiler.py:load": "a stored program, whose error names where its graph begins",
    "expert_maps.py:_entry": "a file, whose layer it names by its number",
    "expert_maps.py:_layer": "likewise",
    "expert_maps.py:_rank": "likewise",
    "expert_maps.py:content": "a file",
    "expert_maps.py:maps_of": "a file",
    "expert_maps.py:refuse_without_ranks": "options",
    "expert_maps.py:settle": "options",
    "dump.py:note_capture": "a file that can't be written",
    "fine_grained_tp.py:_refuse_engines": "options",
    "fine_grained_tp.py:_refuse_lone_logits": "options",
    "fine_grained_tp.py:_refuse_models": "options",
    "graph_wrapper.py:__call__": "what vLLM asked for in a step",
    "graph_wrapper.py:_capture": "noted on an error that names its call itself (graph/running.py)",
    "graph_wrapper.py:_replay": "the inputs of the whole model",
    "options.py:_check_values": "an option",
    "options.py:_refuse_idle": "options",
    "options.py:compile_options": "an option",
    "expert_maps.py:_check_rebalance": "options",
    "options.py:of": "an option",
    "options.py:parse": "an option",
    "padding.py:spread_padding": "a batch",
    "platform.py:_refuse_missing_devices": "an option",
    "platform.py:_refuse_placements": "options",
    "platform.py:_refuse_uncapturable": "a variable of the environment",
    "platform.py:_refuse_unserved": "options, and kinds of models: before there are layers",
    "platform.py:check_if_supports_dtype": "an option",
    "prompt_logprobs.py:validate_params": "a request",
    "runner.py:_warmup_and_capture": "a size",
    "triton_overrides.py:compute_slot_mapping": "an option",
    "worker.py:_refuse_other_weights": "options",
    "worker.py:_without_profiler": "an option",
    "worker.py:determine_available_memory": "an option",
    "worker.py:init_device": "an option",
}
"""Those that say nothing about a layer, and what they are about."""
PATH = "model.layers.3.mlp"


class Layer(nn.Module):
    """A layer of a user's own model: made by vLLM's convention, with its path as `prefix`."""

    def __init__(self, make: Callable[[], Any], prefix: str) -> None:
        super().__init__()
        make()  # what makes the layer

    @classmethod
    def called(cls, run: Callable[[], Any]) -> Any:
        return cls(lambda: None, PATH)(run)

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()  # what calls the layer


def experts(activation: MoEActivation = MoEActivation.SILU, **parallel: Any) -> Any:
    """The part of FusedMoEConfig that is read before vLLM's own."""
    return SimpleNamespace(moe_parallel_config=SimpleNamespace(**parallel), activation=activation, swiglu_limit=None)


def made(config: Any) -> Any:
    return Layer(lambda: moe.NPUFusedMoEMethod(config), PATH)


def weights_on_the_input() -> Any:
    method = object.__new__(moe.NPUFusedMoEMethod)
    layer: Any = SimpleNamespace(layer_name=PATH, apply_router_weight_on_input=True)
    two = torch.zeros(1, 2)
    return method.apply(layer, torch.zeros(1, 4), two, two.int(), None, None)


def experts_in_turn() -> Any:
    layer: Any = SimpleNamespace(layer_name=PATH, expert_placement_strategy="round_robin")
    return moe.experts_of(layer, experts(use_ep=True))


def an_unknown_activation() -> Any:
    return moe.activated(MoEActivation.SITU, torch.ones(1, 4), ApplyMoEActivationConfig(), PATH)


def a_window_over_a_fractal_cache() -> Any:
    attention = object.__new__(NPUAttentionImpl)
    attention.extras, attention.fractal, attention.cache_owner = Extras(window=4), True, "model.layers.0.attn"
    layer: Any = SimpleNamespace(layer_name=PATH)
    nothing = torch.empty(0)
    return attention._attend(layer, nothing, nothing, nothing, None, nothing)  # type: ignore[arg-type]  # not read


def placed(layers_before: int, quantised: object) -> Any:
    config: Any = SimpleNamespace(
        additional_config={"expert_map": recorded([placed_in_turn(4, 2)])},
        model_config=None,
        compilation_config=SimpleNamespace(mode=None, static_all_moe_layers=["layer"] * layers_before),
    )
    moe: Any = SimpleNamespace(num_experts=4, moe_parallel_config=SimpleNamespace(ep_size=2))
    return Layer(lambda: placement_of(config, PATH, moe, quantised), PATH)


TWO: Any = SimpleNamespace(world_size=2)
"""Of a group of engines, its size."""


def too_many_rows() -> Any:
    logits = object.__new__(split_layers.NPULogitsProcessor)
    head: Any = SimpleNamespace(split_over=TWO, prefix=PATH)
    return logits._get_logits(torch.zeros(3, 4), head, None)


def quantised_columns() -> Any:
    layer = SimpleNamespace(quant_method=None, prefix=PATH)
    return Layer(lambda: split_layers._refuse_quantised(layer, "mlp"), PATH)


MADE, CALLED = "make()  # what makes the layer", "return run()  # what calls the layer"
PROVOKED: list[tuple[str, str, Callable[[], Any]]] = [
    ("moe.py:__init__", MADE, lambda: made(experts(MoEActivation.SITU))),
    ("routed_experts.py:placement_of", MADE, lambda: placed(1, None)),
    ("routed_experts.py:placement_of", MADE, lambda: placed(0, "fp8")),
    ("moe.py:experts_of", CALLED, lambda: Layer.called(experts_in_turn)),
    ("moe.py:apply", CALLED, lambda: Layer.called(weights_on_the_input)),
    ("moe.py:activated", CALLED, lambda: Layer.called(an_unknown_activation)),
    ("split_layers.py:_get_logits", CALLED, lambda: Layer.called(too_many_rows)),
    ("split_layers.py:_refuse_quantised", MADE, quantised_columns),
    (
        *("split_layers.py:_check_size", MADE),
        lambda: Layer(lambda: split_layers._check_size("mlp", PATH, "columns", 7, TWO), PATH),
    ),
    ("attention.py:_attend", CALLED, lambda: Layer.called(a_window_over_a_fractal_cache)),
    (
        "platform.py:get_attn_backend_cls",
        MADE,
        lambda: Layer(lambda: NPUPlatform.get_attn_backend_cls(AttentionBackendEnum.FLASH_ATTN, None), PATH),  # type: ignore[arg-type]  # not read
    ),
]
IN_A_MODEL = {
    *("expert_loads.py:find", "platform.py:get_attn_backend_cls", "runner.py:initialize_kv_cache_tensors"),
    "split_layers.py:_check_found",
}
"""Provoked by the tests below."""


@pytest.mark.parametrize(("site", "line", "provoke"), PROVOKED)
def test_a_message_names_the_layer_and_the_line(site: str, line: str, provoke: Callable[[], Any]) -> None:
    with pytest.raises(UnservedError) as caught:
        provoke()
    assert re.fullmatch(rf"{re.escape(PATH)} at {re.escape(__file__)}:\d+: {re.escape(line)}", caught.value.where)
    assert caught.value.rule and caught.value.fix


def test_a_layer_of_a_model_of_vllms() -> None:
    """Heads of 20 elements don't fit the operator: vLLM's own way from the model to the platform."""
    folder = checkpoints.cached(checkpoints.Shape(family="qwen3", head_dim=20))
    with pytest.raises(UnservedError) as caught, engine(folder, enforce_eager=True):
        pass
    assert caught.value.where.startswith("model.layers.0.self_attn.attn at ")
    assert re.search(r"vllm/model_executor/models/qwen3\.py:\d+: self\.attn = ", caught.value.where)
    assert "head_size not supported" in caught.value.what and caught.value.fix


def test_a_map_with_more_layers_than_the_model() -> None:
    layer = object.__new__(NPURoutedExperts)
    nn.Module.__init__(layer)
    layer.layer_name, layer.placement = PATH, placed_in_turn(4, 2)
    config: Any = SimpleNamespace(
        additional_config={"expert_map": recorded([placed_in_turn(4, 2)] * 3)},
        model_config=None,
        compilation_config=SimpleNamespace(mode=None),
    )
    with pytest.raises(UnservedError, match="expert_map has 3 layers, the model 1 that have experts") as caught:
        ExpertLoads().find(config, nn.ModuleList([layer]))
    assert caught.value.where == PATH and caught.value.fix


def test_an_mlp_that_is_split_by_halves() -> None:
    lone = object.__new__(split_layers.NPUMergedColumnParallelLinear)
    nn.Module.__init__(lone)
    lone.split_over = TWO
    mlp = nn.ModuleDict({"gate_up_proj": lone})
    with pytest.raises(UnservedError, match="one half of an MLP alone can't be split over engines") as caught:
        split_layers.split_weights(nn.ModuleDict({"mlp": mlp}), ["mlp"])
    assert caught.value.where == "mlp" and caught.value.fix
    with pytest.raises(UnservedError, match="the model has no layer of the kind o_proj"):
        split_layers.split_weights(nn.ModuleDict({"mlp": mlp}), ["o_proj", "mlp"])


def test_caches_of_several_kinds_name_their_layers() -> None:
    spec: Any = SimpleNamespace()
    groups = [
        SimpleNamespace(layer_names=["model.layers.0.attn", "model.layers.2.attn"], kv_cache_spec=spec),
        SimpleNamespace(layer_names=["model.layers.1.attn"], kv_cache_spec=spec),
    ]
    runner = object.__new__(NPUModelRunner)
    with pytest.raises(UnservedError) as caught:
        runner.initialize_kv_cache_tensors(SimpleNamespace(kv_cache_groups=groups), [])  # type: ignore[arg-type]
    assert caught.value.where == "model.layers.0.attn and 1 more: SimpleNamespace; model.layers.1.attn: SimpleNamespace"


def test_every_message_is_in_the_table() -> None:
    found = {site.removeprefix("npu_compiler/serving/") for site in sites("npu_compiler/serving")}
    provoked = {site for site, _, _ in PROVOKED} | IN_A_MODEL
    assert provoked.isdisjoint(NO_LAYER)
    assert found - provoked - NO_LAYER.keys() == set(), "provoke it here, or say what else it is about in NO_LAYER"
    assert (provoked | NO_LAYER.keys()) - found == set(), "these are gone"
