"""Joins a residual addition with its norm and a bias that is added to the norm's result.

Before::

    normed, total = npu_fused.add_rms_norm(x, residual, weight, 1e-06)
    shifted = aten.add.Tensor(normed, beta)

After::

    shifted, total = npu_fused.add_rms_norm_bias(x, residual, weight, beta, 1e-06)

One kernel where a custom operator library or Triton has it, two as before where not (fusion_kernels/norm_bias.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_compiler.facts.sizes import Fact, known
from npu_compiler.fusion_kernels import register
from npu_compiler.fusion_kernels.norm_bias import add_rms_norm_bias_reference
from npu_compiler.fusion_kernels.norms import CANN_DTYPES
from npu_compiler.passes.norm_quant import ADD_NORM, legal_beta, no_kernel, shifted
from npu_compiler.passes.pattern import Match
from npu_compiler.passes.rewrite import NearMiss, Rule

NAME = "norm_bias"
EPSILON = 1e-6


def _legal(match: Match) -> Fact:
    dtype, normed = match.tensor("x").dtype, match.node("normed")
    alone = known(len(normed.users) == 1, f"the norm's result {normed.name} is also read as it is")
    return alone & known(dtype in CANN_DTYPES, f"{dtype} is not one of {CANN_DTYPES}") & legal_beta(match)


def _program(x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    normed, total = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return normed + beta, total


def _oracle(x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm_bias_reference(x, residual, weight, beta, EPSILON)


def _read_as_it_is(x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    normed, _ = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return normed + beta, normed


def _number_added(x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
    normed, _ = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return normed + 1.5


def _added_twice(x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
    normed, _ = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return torch.add(normed, beta, alpha=2)


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    register()
    x, residual = (torch.randn(3, 5, 64, dtype=dtype) for _ in range(2))
    return x, residual, torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype)


def _residual_example(dtype: torch.dtype) -> tuple[object, ...]:
    return *_example(dtype)[:3], torch.randn(3, 5, 64, dtype=dtype)


def _half_beta_example(dtype: torch.dtype) -> tuple[object, ...]:
    return *_example(dtype)[:3], torch.randn(64, dtype=torch.float16)


def _double_example(dtype: torch.dtype) -> tuple[object, ...]:
    return _example(torch.float64)


RULES = (
    Rule(
        "add_rms_norm_bias",
        pattern=shifted(ADD_NORM),
        operator="add_rms_norm_bias",
        operands=lambda match: tuple(match.bindings[name] for name in ("x", "residual", "weight", "beta", "epsilon")),
        results=("root", "total"),
        legal=_legal,
        cost=no_kernel,
        reference=_program,
        oracle=_oracle,
        example=_example,
        near_misses=(
            NearMiss(_program, _residual_example, "shape of beta: 3 and 1 dimensions"),
            NearMiss(_program, _half_beta_example, "beta is torch.float16, the weight torch.float32"),
            NearMiss(_program, _double_example, "torch.float64 is not one of"),
            NearMiss(_number_added, reason="beta is a number"),
            NearMiss(_read_as_it_is, reason="is also read as it is"),
            NearMiss(_added_twice),
        ),
    ),
)
