"""Routers that choose experts within groups of them (DeepSeek, GLM), by one operator of CANN."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

from npu_compiler.serving.moe import SIGMOID, SOFTMAX, gating

_MOST_EXPERTS, _ALIGNED = 2048, 32  # npu_moe_gating_top_k's page, as the rest of `_refuses`
_BY_LARGEST, _BY_TWO_LARGEST = 0, 1


class NPUGroupedTopKRouter(GroupedTopKRouter):
    """vLLM's router, whose fourteen calls are one operator where that takes the groups."""

    @classmethod
    def of(cls, router: FusedMoERouter) -> FusedMoERouter:
        """`router`, or one of these in its place."""
        if type(router) is not GroupedTopKRouter:
            return router
        return cls(
            top_k=router.top_k,
            global_num_experts=router.global_num_experts,
            num_expert_group=router.num_expert_group,
            topk_group=router.topk_group,
            renormalize=router.renormalize,
            scoring_func=router.scoring_func,
            routed_scaling_factor=router.routed_scaling_factor,
            e_score_correction_bias=router.e_score_correction_bias,
            num_fused_shared_experts=router.num_fused_shared_experts,
            eplb_state=router.eplb_state,
            skip_padding=router.skip_padding,
        )

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weights [tokens, k] float32 and experts [tokens, k] int32, from logits [tokens, experts]."""
        if not self._is_one_operator(router_logits.shape[-1]):
            return super()._compute_routing(hidden_states, router_logits, indices_type, input_ids=input_ids)
        norm = {"softmax": SOFTMAX, "sigmoid": SIGMOID}[self.scoring_func]
        bias = self.e_score_correction_bias
        weights, experts, _ = gating(
            router_logits.float(),
            self.top_k,
            bias,
            norm,
            k_group=self.topk_group,
            group_count=self.num_expert_group,
            group_select_mode=_BY_LARGEST if bias is None else _BY_TWO_LARGEST,
        )
        if norm == SIGMOID and not self.renormalize:  # the operator always divides sigmoids by their sum
            weights = router_logits.float().sigmoid().gather(-1, experts.long())
        elif norm == SOFTMAX and self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.routed_scaling_factor != 1.0:
            weights = weights * self.routed_scaling_factor
        return weights, experts

    def _is_one_operator(self, experts: int) -> bool:
        """Whether CANN's operator takes the groups, by its documented limits."""
        each, rest = divmod(experts, self.num_expert_group)
        aligned = -(-each // _ALIGNED) * _ALIGNED * self.num_expert_group
        return (
            not rest
            and each > 2
            and max(experts, aligned) <= _MOST_EXPERTS
            and self.top_k <= each * self.topk_group
            and self.scoring_func in ("softmax", "sigmoid")
            and not self.skip_padding
        )
