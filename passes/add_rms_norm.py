"""Joins a residual addition and the RMS norm behind it; turns lone norms into one operator each.

Before::

    total = aten.add.Tensor(x, residual)
    wide = aten._to_copy.default(total, dtype=torch.float32)
    square = aten.pow.Tensor_Scalar(wide, 2)
    mean = aten.mean.dim(square, [-1], True)
    shifted = aten.add.Tensor(mean, 1e-06)
    scale = aten.rsqrt.default(shifted)
    scaled = aten.mul.Tensor(wide, scale)
    narrow = aten._to_copy.default(scaled, dtype=torch.bfloat16)
    normed = aten.mul.Tensor(weight, narrow)

After::

    normed, total = npu_fused.add_rms_norm(x, residual, weight, 1e-06)

vLLM's `vllm_ir.fused_add_rms_norm` and `vllm_ir.rms_norm` become the same operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_compiler.facts.sizes import Fact, equal, known, same_shape
from npu_compiler.passes.norm_patterns import legal_norm, rms_norm
from npu_compiler.passes.pattern import Any, Call, Exactly, Match, Number
from npu_compiler.passes.rewrite import NearMiss, Rule

NAME = "add_rms_norm"


def _legal_add(match: Match) -> Fact:
    if not match.is_tensor("residual"):
        return known(False, "a number is added, not a residual")
    left, right = match.tensor("x"), match.tensor("residual")
    return (
        known(left.dtype == right.dtype, f"dtypes {left.dtype} and {right.dtype} are added")
        & same_shape(left.shape, right.shape, "the addition broadcasts")
        & _legal_weight(match, left)
    )


def _legal_lone(match: Match) -> Fact:
    return _legal_weight(match, match.tensor("x"))


def _legal_weight(match: Match, x: Tensor) -> Fact:
    if not match.is_tensor("weight"):
        return known(False, f"{match.bindings['weight']} takes the place of the weight")
    return legal_norm(match, x.shape[-1] if x.dim() else 0)


def _legal_vllm(match: Match) -> Fact:
    if match.bindings["weight"] is None:
        return known(False, "the norm has no weight")
    x, residual, weight = (match.tensor(name) for name in ("x", "residual", "weight"))
    return (
        known(x.dtype == residual.dtype, f"dtypes {x.dtype} and {residual.dtype} are added")
        & same_shape(x.shape, residual.shape, "the addition broadcasts")
        & equal(weight.shape[0], x.shape[-1], "weight and last dimension")
    )


def _norm_program(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def _add_norm_program(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return _norm_program(total, weight), total


def _vllm_program(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.vllm_ir.fused_add_rms_norm(x, residual, weight, 1e-6, None)


def _norm_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(64, dtype=dtype)


def _add_norm_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(3, 5, 64, dtype=dtype), torch.randn(64, dtype=dtype)


def _no_weight(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.vllm_ir.fused_add_rms_norm(x, residual, None, 1e-6, None)


def _vllm_lone(x: Tensor, residual: Tensor) -> Tensor:
    return torch.ops.vllm_ir.rms_norm(x + residual, None, 1e-6, None)


def _number_added(x: Tensor, weight: Tensor) -> Tensor:
    return _norm_program(x + 1.5, weight)


def _scaled_by_a_number(x: Tensor) -> Tensor:
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * 1.5


def _sum_scaled_by_a_number(x: Tensor, residual: Tensor) -> Tensor:
    return _scaled_by_a_number(x + residual)


def _weight_of_the_sum(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _norm_program(total, total.sum((0, 1))), total


def _sum_over_another_dimension(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return _other_dimension(x + residual, weight)


def _other_dimension(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6))


def _scale_kept(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * (x * scale), scale


def _sum_of_squares(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6))


def _broadcast_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype)


def _two_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 64, dtype=dtype), torch.randn(3, 64, dtype=dtype)


def _mixed_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, residual, weight = _add_norm_example(dtype)
    return x, residual.double(), weight  # type: ignore[attr-defined]


def _two_rows_example(dtype: torch.dtype) -> tuple[object, ...]:
    return _add_norm_example(dtype)[:2]


def _scalar_weight_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(1, dtype=dtype)


def _add_scalar_weight_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), *_scalar_weight_example(dtype)


def _wide_weight_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(5, 64, dtype=dtype)


def _add_wide_weight_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), *_wide_weight_example(dtype)


def _operands(match: Match) -> tuple[object, ...]:
    return tuple(match.bindings[name] for name in ("x", "residual", "weight", "epsilon"))


RULES = (
    Rule(
        "vllm_fused_add_rms_norm",
        pattern=Call(
            "vllm_ir.fused_add_rms_norm.default",
            Any("x"), Any("residual"), Any("weight"), Number("epsilon"), Exactly(None),
        ),
        operator="add_rms_norm",
        operands=_operands,
        results=("root",),
        legal=_legal_vllm,
        reference=_vllm_program,
        example=_add_norm_example,
        oracle=_add_norm_program,
        near_misses=(
            NearMiss(_no_weight, _two_example, "the norm has no weight"),
            NearMiss(_vllm_program, _mixed_example, "torch.float64 are added"),
            NearMiss(_vllm_program, _broadcast_example, "the addition broadcasts"),
            NearMiss(_vllm_program, _add_scalar_weight_example, "weight and last dimension: 1 is not 64"),
        ),
    ),
    Rule(
        "add_rms_norm",
        pattern=rms_norm(Call("aten.add.Tensor", Any("x"), Any("residual"), name="total"), Any("total")),
        operator="add_rms_norm",
        operands=_operands,
        results=("root", "total"),
        legal=_legal_add,
        reference=_add_norm_program,
        example=_add_norm_example,
        near_misses=(
            NearMiss(_add_norm_program, _broadcast_example, "the addition broadcasts"),
            NearMiss(_add_norm_program, _mixed_example, "torch.float32 are added"),
            NearMiss(_number_added, _norm_example, "a number is added, not a residual"),
            NearMiss(_weight_of_the_sum, _two_rows_example, "an operand is computed after a result is first used"),
            NearMiss(_vllm_lone, _two_example, "None takes the place of the weight"),
            NearMiss(_sum_scaled_by_a_number, _two_example, "1.5 takes the place of the weight"),
            NearMiss(_add_norm_program, _add_wide_weight_example, "the weight has 2 dimensions"),
            NearMiss(_sum_over_another_dimension, reason="the mean is over dimensions [0]"),
            NearMiss(_add_norm_program, _add_scalar_weight_example, "weight and last dimension: 1 is not 64"),
        ),
    ),
    Rule(
        "rms_norm",
        pattern=rms_norm(Any("x"), Any("x")),
        operator="rms_norm",
        operands=lambda match: tuple(match.bindings[name] for name in ("x", "weight", "epsilon")),
        results=("root",),
        legal=_legal_lone,
        reference=_norm_program,
        example=_norm_example,
        near_misses=(
            NearMiss(_norm_program, _scalar_weight_example, "weight and last dimension: 1 is not 64"),
            NearMiss(_other_dimension, reason="the mean is over dimensions [0]"),
            NearMiss(_scale_kept, reason="inner value rsqrt is also used by output"),
            NearMiss(_norm_program, _wide_weight_example, "the weight has 2 dimensions"),
            NearMiss(_scaled_by_a_number, lambda dtype: _norm_example(dtype)[:1], "1.5 takes the place of the weight"),
            NearMiss(_sum_of_squares, reason="sum_1 is aten.sum.dim_IntList, the rule wants aten.mean.dim"),
        ),
    ),
)  # fmt: skip
