"""Joins gelu(gate) * up, where gate and up are the halves of one tensor.

Before::

    gate = aten.slice.Tensor(x, 1, 0, 96)
    active = aten.gelu.default(gate, approximate="tanh")
    up = aten.slice.Tensor(x, 1, 96, 9223372036854775807)
    y = aten.mul.Tensor(active, up)

After::

    y = npu_fused.geglu(x, "tanh")

Where gate and up are results of two linears nothing is joined: CANN has no operator for it, and to put the two side by
side would move more bytes than the fused kernel saves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from npu_compiler.passes.pattern import Any, Call, Half
from npu_compiler.passes.rewrite import NearMiss, Rule

NAME = "geglu"


def _program(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return gelu(x[..., :half], approximate="tanh") * x[..., half:]


def _second_half_active(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return gelu(x[..., half:]) * x[..., :half]


def _activation_kept(x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = x.chunk(2, dim=-1)
    active = gelu(gate)
    return active * up, active


RULES = (
    Rule(
        "geglu",
        pattern=Call(
            "aten.mul.Tensor",
            Call("aten.gelu.default", Half(Any("x"), 0), Any("approximate")),
            Half(Any("x"), 1),
            commutes=True,
        ),
        operator="geglu",
        operands=lambda match: (match.bindings["x"], match.bindings["approximate"]),
        reference=_program,
        example=lambda dtype: (torch.randn(3, 5, 64, dtype=dtype),),
        near_misses=(
            NearMiss(_second_half_active),  # two calls deep: no reason
            NearMiss(_activation_kept, reason="inner value gelu is also used by output"),
        ),
    ),
)
