"""A layer of experts as calls of the program that it belongs to, in the place of vLLM's one opaque operator.

vLLM hides a layer behind `vllm.moe_forward`, which finds the layer by its name and calls the runner's `_forward_impl`.
This runner has Dynamo trace what that does, as vLLM itself does on CPU: router, experts and shared experts are calls of
the graph, and their weights its inputs like others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.distributed import GroupCoordinator, get_dp_group, get_ep_group, get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from npu_compiler.serving.moe_router import NPUGroupedTopKRouter
from npu_compiler.serving.routed_experts import NPURoutedExperts


@MoERunner.register_oot
class NPUMoERunner(MoERunner):
    """vLLM's runner, traced. vLLM makes it wherever a model asks for a layer of experts."""

    def __init__(self, *arguments: Any, router: FusedMoERouter, **settings: Any) -> None:
        super().__init__(*arguments, router=NPUGroupedTopKRouter.of(router), **settings)
        self._token_group = _token_group(self.moe_config)
        # Which part of its engine's tokens this rank has.
        self._part = get_tensor_model_parallel_rank() if self.moe_config.is_sequence_parallel else 0
        # vLLM's choice of operator. As a method it is not in the way of the module paths that Dynamo notes.
        del self._forward_entry

    @property
    def _is_placed(self) -> bool:
        """Whether the layer has a map of its experts."""
        return isinstance(self.routed_experts, NPURoutedExperts) and self.routed_experts.placement is not None

    def _forward_entry(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        shared_experts_input: Tensor | None,
        input_ids: Tensor | None,
        layer_name: object,
        hidden_dim_unpadded: int,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What `vllm.moe_forward` computes, with its arguments; the last two are for the operator only."""
        return self._forward_impl(hidden_states, router_logits, shared_experts_input, input_ids)

    def _forward_impl(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        shared_experts_input: Tensor | None,
        input_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Routed experts [tokens, hidden]; behind shared ones, where there are such.

        Where ranks have tokens of their own, experts are chosen for these; then the rank's experts see the tokens of
        all, as many of each rank, and what they add to a token goes back to its rank. Nothing is overlapped here: what
        is independent in the graph, the scheduler sees.
        """
        shared = None if self.shared_experts is None else self.shared_experts._layer(shared_experts_input)
        if self.gate is not None:
            router_logits, _ = self.gate(hidden_states)
        weights, experts = self.router.select_experts(
            hidden_states=hidden_states,
            router_logits=router_logits,
            topk_indices_dtype=self._quant_method.topk_indices_dtype,
            input_ids=input_ids,
        )
        rows, group = hidden_states, self._token_group
        if group is not None:
            if self._is_placed:
                experts = self.routed_experts.marked(experts, first=self._part * experts.shape[0])
            rows, weights, experts = (group.all_gather(own, dim=0) for own in (rows, weights, experts))
        routed = self.routed_experts.forward_modular(
            x=rows, topk_weights=weights, topk_ids=experts, shared_experts=None, shared_experts_input=None
        )
        if group is not None:
            routed = group.reduce_scatter(routed, dim=0)
        return routed if shared is None else (shared, routed)


def _token_group(moe: FusedMoEConfig) -> GroupCoordinator | None:
    """The ranks that have tokens of their own; None where all ranks have all tokens.

    With data parallelism each engine has its own requests. If the ranks of an engine also share its tokens among them
    (vLLM's sequence parallel layers of experts), those are the ranks of all engines.
    """
    if moe.is_sequence_parallel:
        return get_ep_group()
    return get_dp_group() if moe.dp_size > 1 else None
