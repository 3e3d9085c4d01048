"""Mixture of experts for vLLM, by CANN's routing operators and grouped products. Imported once a process.

vLLM's routers call operators of its library `_moe_C`, which is built for CUDA only: those that choose experts are
given an implementation for npu here. The experts themselves are the method that vLLM leaves to a platform
(`UnquantizedMoeBackend.OOT`). A layer is then

    choose the experts, sort the tokens by expert, grouped product, activation, grouped product, add up a token's rows

and nothing of it is read back on the host, so a full graph holds it. Every step is a call of the compiled graph
(moe_runner.py, docs/moe.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch_npu
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, MoEActivation
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from npu_compiler.errors import UnservedError
from npu_compiler.serving.places import here
from npu_compiler.serving.routed_experts import NPURoutedExperts

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts

Formula = Callable[[Tensor, ApplyMoEActivationConfig], Tensor]
"""[rows, n] to [rows, n] or, of a gated activation, to [rows, n / 2]."""
SOFTMAX, SIGMOID = 0, 1
"""How npu_moe_gating_top_k makes scores of logits."""
_EPSILON = 1e-20  # keeps a sum of sigmoids that are all zero from dividing


@UnquantizedFusedMoEMethod.register_oot
class NPUFusedMoEMethod(UnquantizedFusedMoEMethod):
    """The experts of a layer, unquantised. Weights stay as vLLM loads them: [experts, out, in].

    Every rank sees all tokens (moe_runner.py), and with expert parallelism some of the experts; what its own experts
    add to each token is summed over the ranks, as the parts of a split expert are.
    """

    def __init__(self, moe: FusedMoEConfig) -> None:
        """Raises UnservedError for experts that are not served; it names the layer."""
        if _formula(moe.activation, moe.swiglu_limit) is None:
            raise _unserved_activation(moe.activation, here())
        super().__init__(moe)

    @property
    def is_monolithic(self) -> bool:
        return False

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: SharedExperts | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x [tokens, hidden], topk_weights [tokens, k] float32, topk_ids [tokens, k]; sums over a token's experts."""
        if layer.apply_router_weight_on_input:
            if topk_ids.shape[1] != 1:
                raise UnservedError(
                    f"router weights on the input of {topk_ids.shape[1]} experts a token are not served on npu",
                    where=here(layer.layer_name),
                    rule="with more than one expert a token would have several inputs",
                    fix="serve a model whose router weighs the experts' outputs (apply_router_weight_on_input=False)",
                )
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        first, end = experts_of(layer, self.moe)
        experts = self.moe.num_experts
        if isinstance(layer, NPURoutedExperts) and layer.placement is not None:
            experts, topk_ids = layer.slots, layer.slots_of(topk_ids)
        rows, places, counts, _ = torch_npu.npu_moe_init_routing_v2(
            x,
            topk_ids.to(torch.int32),
            active_num=-1,  # all rows
            expert_num=experts,
            expert_tokens_num_type=1,  # how many rows an expert has
            expert_tokens_num_flag=True,
            active_expert_range=[first, end],
            quant_mode=-1,
            row_idx_type=0,
        )
        quantisation = self.moe_quant_config or self.get_fused_moe_quant_config(layer)
        settings = ApplyMoEActivationConfig.from_configs(self.moe, quantisation)
        rows = grouped_product(rows, layer.w13_weight, getattr(layer, "w13_bias", None), counts)
        rows = activated(layer.activation, rows, settings, layer.layer_name)
        rows = grouped_product(rows, layer.w2_weight, getattr(layer, "w2_bias", None), counts)
        return combined(rows, places, topk_weights, all_here=end - first == experts)


def experts_of(layer: RoutedExperts, moe: FusedMoEConfig) -> tuple[int, int]:
    """The experts that this rank has, or the slots of its map: the first, and the one behind the last.

    Raises:
        UnservedError: they are not neighbours.
    """
    if not moe.moe_parallel_config.use_ep:
        return 0, moe.num_experts
    if isinstance(layer, NPURoutedExperts) and layer.placement is not None:
        return layer.slots_here
    if layer.expert_placement_strategy != "linear":
        raise UnservedError(
            f"experts placed {layer.expert_placement_strategy} are not served on npu",
            where=here(layer.layer_name),
            rule="the experts of a rank are neighbours",
            fix="use --expert-placement-strategy linear",
        )
    ranks, rank = moe.moe_parallel_config.ep_size, moe.moe_parallel_config.ep_rank
    each, more = divmod(moe.num_experts, ranks)  # vLLM's determine_expert_map: the first ranks have one more
    first = rank * each + min(rank, more)
    return first, first + each + (rank < more)


def combined(rows: Tensor, places: Tensor, weights: Tensor, all_here: bool) -> Tensor:
    """The sum of each token's rows: rows [tokens * k, hidden], places [tokens * k], weights [tokens, k].

    A place is -1 where the expert is another rank's: CANN's operator then reads no row. It calls that the mode of
    experts with a capacity, [experts, capacity, hidden]; every row is one of those here.
    """
    if rows.dtype == torch.float16:
        weights = weights.half()  # of float16 rows, CANN takes float16 weights only
    if all_here:
        return torch_npu.npu_moe_finalize_routing(rows, None, None, None, weights, places, None, drop_pad_mode=2)
    rows = rows.unsqueeze(1)
    return torch_npu.npu_moe_finalize_routing(rows, None, None, None, weights, places, None, drop_pad_mode=3)


def grouped_product(rows: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """rows [n, in], sorted by expert, `counts` [experts] of them for each; weight [experts, out, in]."""
    if bias is not None and bias.dtype == torch.bfloat16:
        bias = bias.float()  # GroupedMatmul adds a float32 bias to a bfloat16 product
    return torch_npu.npu_grouped_matmul(
        [rows],
        [weight.transpose(1, 2)],
        bias=None if bias is None else [bias],
        group_list=counts,
        split_item=3,
        group_type=0,
        group_list_type=1,
    )[0]


def activated(activation: MoEActivation, rows: Tensor, settings: ApplyMoEActivationConfig, layer: str) -> Tensor:
    """What vLLM's apply_moe_activation computes: gated kinds halve the last dimension.

    Args:
        layer: the layer's path, for the message.

    Raises:
        UnservedError: a kind that has no meaning here yet.
    """
    formula = _formula(activation, settings.clamp_limit)
    if formula is None:
        raise _unserved_activation(activation, here(layer))
    return formula(rows, settings)


def _formula(kind: MoEActivation, limit: float | None) -> Formula | None:
    """How an activation is computed; None where it is not served. `limit` clamps gate and up."""
    if kind == MoEActivation.SILU and limit is None:
        return _gated(functional.silu)  # one operator in the graph: passes/swiglu.py
    if kind in (MoEActivation.SILU_NO_MUL, MoEActivation.GELU_NO_MUL, MoEActivation.GELU_TANH_NO_MUL):
        return lambda rows, _: _plain(kind)(rows)
    if kind == MoEActivation.RELU2_NO_MUL:
        return lambda rows, _: torch.relu(rows).square()
    if kind == MoEActivation.SWIGLUOAI:  # gate and up alternate
        return lambda rows, _: _clamped_swiglu(rows[..., ::2], rows[..., 1::2], limit=7.0, alpha=1.702, beta=1.0)
    if kind in (MoEActivation.GELU, MoEActivation.GELU_TANH):
        return _gated(_plain(kind.without_mul()))
    if kind == MoEActivation.RELU2:
        return _gated(lambda gate: torch.relu(gate).square())
    if limit is not None and kind in (MoEActivation.SILU, MoEActivation.SWIGLUOAI_UNINTERLEAVE):
        return _clamped(limit)
    if kind == MoEActivation.SWIGLUSTEP:
        return lambda rows, _: _swiglu_step(*rows.chunk(2, dim=-1))
    return None


def _clamped(limit: float) -> Formula:
    def formula(rows: Tensor, settings: ApplyMoEActivationConfig) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return _clamped_swiglu(gate, up, limit, settings.alpha, settings.beta)

    return formula


def _gated(activation: Callable[[Tensor], Tensor]) -> Formula:
    def formula(rows: Tensor, settings: ApplyMoEActivationConfig) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return activation(gate) * up

    return formula


def _swiglu_step(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)


def _unserved_activation(kind: MoEActivation, where: str) -> UnservedError:
    return UnservedError(
        f"experts with the activation {kind.value} are not served on npu",
        where=where,
        rule="npu_compiler/serving/moe.py lists the activations that are",
        fix="serve a model with one of those, or report which model has this one",
    )


def _plain(kind: MoEActivation) -> torch.nn.Module:
    if kind == MoEActivation.SILU_NO_MUL:
        return torch.nn.SiLU()
    return torch.nn.GELU("tanh" if kind == MoEActivation.GELU_TANH_NO_MUL else "none")


def _clamped_swiglu(gate: Tensor, up: Tensor, limit: float, alpha: float, beta: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


# -- routing: operators of vLLM's library that write their outputs -----------------------------------------------------


def topk_softmax(
    topk_weights: Tensor,
    topk_indices: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool,
    bias: Tensor | None = None,
    is_padding: Tensor | None = None,
) -> None:
    """Writes the k largest of softmax(gating_output) [tokens, experts], chosen with `bias` where there is one.

    Rows of padding are routed like any other: nobody reads them. `token_expert_indices` is scratch of vLLM's kernel.
    """
    k = topk_weights.shape[-1]
    if bias is None:
        weights, chosen, _ = torch_npu.npu_moe_gating_top_k_softmax_v2(gating_output, k=k, renorm=int(renormalize))
    else:
        weights, chosen, _ = gating(gating_output, k, bias, SOFTMAX)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
    topk_weights.copy_(weights)
    topk_indices.copy_(chosen)


def topk_sigmoid(
    topk_weights: Tensor,
    topk_indices: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool,
    bias: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    is_padding: Tensor | None = None,
) -> None:
    """As `topk_softmax`, with sigmoids, times `routed_scaling_factor`."""
    k = topk_weights.shape[-1]
    weights, chosen, _ = gating(gating_output, k, bias, SIGMOID, routed_scaling_factor)
    if not renormalize:  # the operator always divides sigmoids by their sum
        weights = gating_output.float().sigmoid().gather(-1, chosen.long()) * routed_scaling_factor
    topk_weights.copy_(weights)
    topk_indices.copy_(chosen)


def gating(
    logits: Tensor, k: int, bias: Tensor | None, norm: int, scale: float = 1.0, **groups: int
) -> tuple[Tensor, ...]:
    """The k experts of the largest scores (plus `bias`) and their scores, logits [tokens, experts]; sigmoids divided by
    their sum. `groups`: npu_moe_gating_top_k's arguments about groups of experts."""
    if bias is not None and bias.dtype != logits.dtype:
        logits, bias = logits.float(), bias.float()
    return torch_npu.npu_moe_gating_top_k(
        logits, k, bias=bias, norm_type=norm, routed_scaling_factor=scale, eps=_EPSILON, **groups
    )


_SIGNATURE = (
    "(Tensor! topk_weights, Tensor! topk_indices, Tensor! token_expert_indices, Tensor gating_output, "
    "bool renormalize, Tensor? bias, {}Tensor? is_padding) -> ()"
)
_LIBRARY = torch.library.Library("_moe_C", "FRAGMENT")  # vLLM's own name; kept, as its end would undo what follows
for _function, _extra in ((topk_softmax, ""), (topk_sigmoid, "float routed_scaling_factor, ")):
    if not hasattr(torch.ops._moe_C, _function.__name__):
        _LIBRARY.define(_function.__name__ + _SIGNATURE.format(_extra))
    _LIBRARY.impl(_function.__name__, _function, "CompositeImplicitAutograd")
