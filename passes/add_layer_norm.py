"""Joins a residual addition and the layer norm behind it.

Before::

    total = aten.add.Tensor(x, residual)
    normed = aten.layer_norm.default(total, [768], weight, bias, 1e-12)

After::

    normed, total = npu_fused.add_layer_norm(x, residual, weight, bias, 1e-12)

`aten.native_layer_norm`, of which only the first output is used, likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_compiler.facts.sizes import Fact, equal, known, same_shape
from npu_compiler.passes.pattern import Any, Call, Item, Match, Number, OneOf
from npu_compiler.passes.rewrite import NearMiss, Rule

NAME = "add_layer_norm"
EPSILON = 1e-5
SUM = Call("aten.add.Tensor", Any("x"), Any("residual"), name="total")
OPERANDS = (SUM, Any("shape"), Any("weight"), Any("bias"), Number("epsilon"))


def _legal(match: Match) -> Fact:
    names = ("x", "residual", "weight", "bias")
    missing = [name for name in names if not match.is_tensor(name)]
    if missing:
        return known(False, f"{missing[0]} is {match.bindings[missing[0]]}, not a tensor")
    x, residual, weight, bias = (match.tensor(name) for name in names)
    shape = match.bindings["shape"]
    assert isinstance(shape, (list, tuple))
    return (
        known(x.dtype == residual.dtype, f"dtypes {x.dtype} and {residual.dtype} are added")
        & same_shape(x.shape, residual.shape, "the addition broadcasts")
        & known(len(shape) == 1, f"the norm is over {len(shape)} dimensions")
        & known(match.tensor("total").dtype == x.dtype, "the addition changes the dtype")
        & equal(weight.shape[0], x.shape[-1], "weight and last dimension")
        & equal(bias.shape[0], x.shape[-1], "bias and last dimension")
    )


def _program(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return torch.nn.functional.layer_norm(total, (total.shape[-1],), weight, bias, EPSILON), total


def _no_bias(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    total = x + residual
    return torch.nn.functional.layer_norm(total, (total.shape[-1],), weight, None, EPSILON) + bias


def _two_dimensions(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x + residual, tuple(x.shape[1:]), weight, bias, EPSILON)


def _statistics(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    normed, mean, _ = torch.native_layer_norm(x + residual, (x.shape[-1],), weight, bias, EPSILON)
    return normed, mean


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    weight, bias = torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype)
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(3, 5, 64, dtype=dtype), weight, bias


def _broadcast_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, _, weight, bias = _example(dtype)
    return x, torch.randn(64, dtype=dtype), weight, bias


def _wide_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, residual, *_ = _example(dtype)
    return x, residual, torch.randn(5, 64, dtype=dtype), torch.randn(5, 64, dtype=dtype)


RULES = (
    Rule(
        "add_layer_norm",
        pattern=OneOf(
            (Item(Call("aten.native_layer_norm.default", *OPERANDS), 0), Call("aten.layer_norm.default", *OPERANDS))
        ),
        operator="add_layer_norm",
        operands=lambda match: tuple(match.bindings[name] for name in ("x", "residual", "weight", "bias", "epsilon")),
        results=("root", "total"),
        legal=_legal,
        reference=_program,
        example=_example,
        near_misses=(
            NearMiss(_program, _broadcast_example, "the addition broadcasts"),
            NearMiss(_no_bias, reason="bias is None, not a tensor"),
            NearMiss(_two_dimensions, _wide_example, "the norm is over 2 dimensions"),
            NearMiss(_statistics, reason="is also used by"),
        ),
    ),
)
