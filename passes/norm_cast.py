"""Joins a residual addition with its norm and the widening of the norm's result to float32, as a router wants it.

Before::

    normed, total = npu_fused.add_rms_norm(x, residual, weight, 1e-06)
    wide = aten._to_copy.default(normed, dtype=torch.float32)

After::

    wide, normed, total = npu_fused.add_rms_norm_cast(x, residual, weight, 1e-06)

`wide` is the norm before it is rounded: at least as close to the exact one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_compiler.facts.sizes import Fact, known
from npu_compiler.fusion_kernels import register
from npu_compiler.fusion_kernels.norm_quant import HALVES
from npu_compiler.fusion_kernels.norms import add_rms_norm_reference
from npu_compiler.passes.norm_quant import ADD_NORM
from npu_compiler.passes.pattern import Any, Call, Match
from npu_compiler.passes.rewrite import NearMiss, Rule

NAME = "norm_cast"
EPSILON = 1e-6


def _legal(match: Match) -> Fact:
    dtype, wide = match.tensor("x").dtype, match.bindings["dtype"]
    return known(wide == torch.float32, f"the norm is converted to {wide}, not to float32") & known(
        dtype in HALVES, f"the norm is in {dtype} already, not in half precision"
    )


def _program(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    normed, total = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return normed.float(), normed, total


def _oracle(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    normed, total = add_rms_norm_reference(x, residual, weight, EPSILON)
    return normed, normed, total


def _to_double(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    normed, total = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return normed.double(), normed, total


def _sum_widened(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    normed, total = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return total.float(), normed


def _double_example(dtype: torch.dtype) -> tuple[object, ...]:
    return _example(torch.float64)


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    register()
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(3, 5, 64, dtype=dtype), torch.randn(64, dtype=dtype)


RULES = (
    Rule(
        "add_rms_norm_cast",
        pattern=Call("aten._to_copy.default", ADD_NORM, Any("dtype")),
        operator="add_rms_norm_cast",
        operands=lambda match: tuple(match.bindings[name] for name in ("x", "residual", "weight", "epsilon")),
        results=("root", "normed", "total"),
        legal=_legal,
        reference=_program,
        oracle=_oracle,
        example=_example,
        near_misses=(
            NearMiss(_to_double, reason="the norm is converted to torch.float64, not to float32"),
            NearMiss(_program, _double_example, "the norm is in torch.float64 already, not in half precision"),
            NearMiss(_sum_widened),
        ),
        dtypes=HALVES,
    ),
)
