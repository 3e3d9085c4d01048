"""Joins silu(gate) * up.

Before::

    gate = aten.slice.Tensor(x, 1, 0, 96)
    active = aten.silu.default(gate)
    up = aten.slice.Tensor(x, 1, 96, 9223372036854775807)
    y = aten.mul.Tensor(active, up)

After::

    y = npu_fused.swiglu(x)

Where gate and up are results of two linears, they become `npu_fused.silu_mul(gate, up)`.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from npu_compiler.facts.sizes import Fact, known, same_shape
from npu_compiler.passes.pattern import Any, Call, Half, Match
from npu_compiler.passes.record import Saving
from npu_compiler.passes.rewrite import NearMiss, Rule

NAME = "swiglu"


def _legal_joined(match: Match) -> Fact:
    dtype = match.tensor("x").dtype
    return known(dtype.is_floating_point, f"{dtype} is not a floating dtype")


def _legal_apart(match: Match) -> Fact:
    if not match.is_tensor("up"):
        return known(False, "a number is multiplied")
    left, right = match.tensor("gate"), match.tensor("up")
    return known(left.dtype == right.dtype, f"dtypes {left.dtype} and {right.dtype} are multiplied") & same_shape(
        left.shape, right.shape, "the product broadcasts"
    )


def _joined_program(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :half]) * x[..., half:]


def _apart_program(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def _one_element_gate(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x[..., :1]) * x[..., 1:]


def _broadcast_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 32, dtype=dtype), torch.randn(32, dtype=dtype)


def _mixed_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 32, dtype=dtype), torch.randn(3, 5, 32, dtype=torch.float64)


def _scaled(gate: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * 1.5


def _activation_kept(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    active = torch.nn.functional.silu(gate)
    return active * up, active


RULES = (
    Rule(
        "swiglu",
        pattern=Call("aten.mul.Tensor", Call("aten.silu.default", Half(Any("x"), 0)), Half(Any("x"), 1), commutes=True),
        operator="swiglu",
        operands=lambda match: (match.bindings["x"],),
        results=("root",),
        legal=_legal_joined,
        reference=_joined_program,
        example=lambda dtype: (torch.randn(3, 5, 64, dtype=dtype),),
        # unequal parts leave no reason: the failed attempt is two calls deep
        near_misses=(
            NearMiss(_one_element_gate),
            NearMiss(
                _joined_program,
                lambda dtype: (torch.randn(3, 64, dtype=torch.complex64),),
                "torch.complex64 is not a floating dtype",
            ),
        ),
    ),
    Rule(
        "silu_mul",
        pattern=Call("aten.mul.Tensor", Call("aten.silu.default", Any("gate")), Any("up"), commutes=True),
        operator="silu_mul",
        operands=lambda match: (match.bindings["gate"], match.bindings["up"]),
        results=("root",),
        legal=_legal_apart,
        reference=_apart_program,
        example=lambda dtype: (torch.randn(3, 5, 32, dtype=dtype), torch.randn(3, 5, 32, dtype=dtype)),
        cost=lambda match, made: Saving(0, sympy.Integer(0)),  # a buffer, no kernel: see fusion_kernels/swiglu.py
        near_misses=(
            NearMiss(_apart_program, _broadcast_example, "the product broadcasts"),
            NearMiss(_apart_program, _mixed_example, "torch.float64 are multiplied"),
            NearMiss(_scaled, lambda dtype: (torch.randn(3, 5, dtype=dtype),), "a number is multiplied"),
            NearMiss(_activation_kept, reason="inner value silu is also used by output"),
        ),
    ),
)
