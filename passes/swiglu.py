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

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, known, same_shape
from npu_compiler.fusion_kernels import register
from npu_compiler.passes.pattern import Any, Call, Half, Match
from npu_compiler.passes.record import PassRecord
from npu_compiler.passes.rewrite import Rule, apply

NAME = "swiglu"


def run(module: fx.GraphModule, record: PassRecord) -> None:
    register()
    apply(module, RULES, record)


def _legal_joined(match: Match) -> Fact:
    return known(match.tensor("x").dtype.is_floating_point, "the dtype is not a floating one")


def _legal_apart(match: Match) -> Fact:
    gate, up = match.bindings["gate"], match.bindings["up"]
    if not (isinstance(gate, fx.Node) and isinstance(up, fx.Node)):
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
    ),
)
