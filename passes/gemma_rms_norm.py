"""Norms of Gemma models, whose weights are stored less one: residual addition, the one, and the norm as one operator.

Before::

    wide = aten._to_copy.default(weight, dtype=torch.float32)
    factor = aten.add.Tensor(wide, 1.0)
    normed, total = vllm_ir.fused_add_rms_norm.default(x, residual, factor, 1e-06)

After::

    normed, total = npu_fused.gemma_add_rms_norm(x, residual, weight, 1e-06)

Lone norms become `npu_fused.gemma_rms_norm`; so do norms that are written out, as in Hugging Face's Gemma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, equal, known, same_shape
from npu_compiler.passes.norm_patterns import GEMMA_WEIGHT, legal_norm, rms_norm
from npu_compiler.passes.pattern import Any, Call, Exactly, Match, Number
from npu_compiler.passes.record import Saving
from npu_compiler.passes.rewrite import NearMiss, Rule

NAME = "gemma_rms_norm"
EPSILON = 1e-6


def _legal_factor(match: Match) -> Fact:
    factor = match.tensor("factor").dtype
    return known(factor in (torch.float32, torch.float64), f"one is added to the weight in {factor}, not in float32")


def _legal_lone(match: Match) -> Fact:
    x = match.tensor("x")
    same = known(x.dtype == match.root.meta["val"].dtype, "the norm changes the dtype")
    return _legal_factor(match) & same & legal_norm(match, x.shape[-1] if x.dim() else 0)


def _legal_add(match: Match) -> Fact:
    if not match.is_tensor("residual"):
        return known(False, "a number is added, not a residual")
    x, residual = match.tensor("x"), match.tensor("residual")
    added = known(x.dtype == residual.dtype, f"dtypes {x.dtype} and {residual.dtype} are added") & same_shape(
        x.shape, residual.shape, "the addition broadcasts"
    )
    return _legal_factor(match) & added & legal_norm(match, x.shape[-1] if x.dim() else 0)


def _legal_vllm(match: Match) -> Fact:
    x, residual, weight = (match.tensor(name) for name in ("x", "residual", "weight"))
    return (
        _legal_factor(match)
        & known(x.dtype == residual.dtype, f"dtypes {x.dtype} and {residual.dtype} are added")
        & same_shape(x.shape, residual.shape, "the addition broadcasts")
        & equal(weight.shape[0], x.shape[-1], "weight and last dimension")
    )


def _two_kernels(match: Match, made: Sequence[fx.Node]) -> Saving:
    """The fused operator is two kernels: see fusion_kernels/norms.py."""
    saved = Saving.between(match.nodes, made)
    return Saving(saved.kernels - 1, saved.bytes)


def _norm_program(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)


def _add_norm_program(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return _norm_program(total, weight), total


# Arguments in the order of their first use: that is the order of a traced program's inputs.
def _vllm_program(weight: Tensor, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.vllm_ir.fused_add_rms_norm(x, residual, weight.float() + 1.0, EPSILON, None)


def _plus_two(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return (normed * (2.0 + weight.to(wide.dtype))).to(x.dtype)


def _vllm_oracle(weight: Tensor, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return _add_norm_program(x, residual, weight)


def _factor_kept(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = x * 1.0
    factor = 1.0 + weight.to(x.dtype)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON) * factor).to(x.dtype), factor


def _narrow_factor(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(x.dtype)
    return normed * (1.0 + weight)


def _number_added(x: Tensor, weight: Tensor) -> Tensor:
    return _norm_program(x + 1.5, weight)


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON) * (1.0 + weight.float())


def _other_dimension(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPSILON) * (1.0 + weight)


def _sum_over_another_dimension(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return _other_dimension(x + residual, weight)


def _vllm_factor_kept(weight: Tensor, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    factor = weight.float() + 1.0
    return (*torch.ops.vllm_ir.fused_add_rms_norm(x, residual, factor, EPSILON, None), factor)


def _norm_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(64, dtype=dtype)


def _half_example(dtype: torch.dtype) -> tuple[object, ...]:
    return _norm_example(torch.bfloat16)


def _add_norm_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), *_norm_example(dtype)


def _vllm_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, residual, weight = _add_norm_example(dtype)
    return weight, x, residual


def _broadcast_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype)


def _mixed_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, residual, weight = _add_norm_example(dtype)
    return x, residual.double(), weight  # type: ignore[attr-defined]


def _wide_weight_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(5, 64, dtype=dtype)


def _one_weight_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(1, dtype=dtype)


def _with_residual(example: Callable[[torch.dtype], tuple[object, ...]]) -> Callable[[torch.dtype], tuple[object, ...]]:
    return lambda dtype: (torch.randn(3, 5, 64, dtype=dtype), *example(dtype))


def _weight_first(example: Callable[[torch.dtype], tuple[object, ...]]) -> Callable[[torch.dtype], tuple[object, ...]]:
    return lambda dtype: (example(dtype)[-1], *example(dtype)[:-1])


def _operands(match: Match) -> tuple[object, ...]:
    return tuple(match.bindings[name] for name in ("x", "residual", "weight", "epsilon"))


RULES = (
    Rule(
        "vllm_gemma_add_rms_norm",
        pattern=Call(
            "vllm_ir.fused_add_rms_norm.default",
            Any("x"), Any("residual"), GEMMA_WEIGHT, Number("epsilon"), Exactly(None),
        ),
        operator="gemma_add_rms_norm",
        operands=_operands,
        legal=_legal_vllm,
        cost=_two_kernels,
        reference=_vllm_program,
        oracle=_vllm_oracle,
        example=_vllm_example,
        near_misses=(
            NearMiss(_vllm_factor_kept, reason="is also used by output"),
            NearMiss(_vllm_program, _weight_first(_mixed_example), "torch.float64 are added"),
            NearMiss(_vllm_program, _weight_first(_broadcast_example), "the addition broadcasts"),
            NearMiss(_vllm_program, _weight_first(_with_residual(_one_weight_example)), "weight and last dimension"),
        ),
    ),
    Rule(
        "gemma_add_rms_norm",
        pattern=rms_norm(
            Call("aten.add.Tensor", Any("x"), Any("residual"), name="total"), Any("total"), factor=GEMMA_WEIGHT
        ),
        operator="gemma_add_rms_norm",
        operands=_operands,
        results=("root", "total"),
        legal=_legal_add,
        cost=_two_kernels,
        reference=_add_norm_program,
        example=_add_norm_example,
        near_misses=(
            NearMiss(_add_norm_program, _broadcast_example, "the addition broadcasts"),
            NearMiss(_add_norm_program, _mixed_example, "torch.float32 are added"),
            NearMiss(_number_added, _norm_example, "a number is added, not a residual"),
            NearMiss(_sum_over_another_dimension, reason="the mean is over dimensions [1]"),
            NearMiss(_add_norm_program, _with_residual(_wide_weight_example), "the weight has 2 dimensions"),
            NearMiss(_add_norm_program, _with_residual(_one_weight_example), "weight and last dimension: 1 is not 64"),
        ),
    ),
    Rule(
        "gemma_rms_norm",
        pattern=rms_norm(Any("x"), Any("x"), factor=GEMMA_WEIGHT),
        operator="gemma_rms_norm",
        operands=lambda match: tuple(match.bindings[name] for name in ("x", "weight", "epsilon")),
        legal=_legal_lone,
        reference=_norm_program,
        example=_norm_example,
        near_misses=(
            NearMiss(_plus_two),
            NearMiss(_widened, _half_example, "the norm changes the dtype"),
            NearMiss(_other_dimension, reason="the mean is over dimensions [1]"),
            NearMiss(_norm_program, _wide_weight_example, "the weight has 2 dimensions"),
            NearMiss(_norm_program, _one_weight_example, "weight and last dimension: 1 is not 64"),
            NearMiss(_factor_kept, reason="is also used by output"),
            NearMiss(_narrow_factor, _half_example, "one is added to the weight in torch.bfloat16, not in float32"),
        ),
    ),
)  # fmt: skip
