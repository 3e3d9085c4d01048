"""Joins a residual addition and the layer norm behind it.

Before::

    total = aten.add.Tensor(x, residual)
    normed = aten.layer_norm.default(total, [768], weight, bias, 1e-12)

After::

    normed, total = npu_fused.add_layer_norm(x, residual, weight, bias, 1e-12)

`aten.native_layer_norm`, of which only the first output is used, likewise. The sum may be reshaped in front of the norm
(OPT), and the norm may have no bias (ModernBERT): then it is given zeros, which `common` makes one tensor a model.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, equal, known, same_shape
from npu_compiler.passes.pattern import VIEWS, Any, Call, Item, Match, Number, OneOf
from npu_compiler.passes.rewrite import Build, NearMiss, Rule

NAME = "add_layer_norm"
EPSILON = 1e-5
SUM = Call("aten.add.Tensor", Any("x"), Any("residual"), name="total")
NORMED = OneOf((SUM, Call("|".join(VIEWS), SUM, Any("view"), name="viewed")))
OPERANDS = (NORMED, Any("shape"), Any("weight"), Any("bias"), Number("epsilon"))


def _legal(match: Match) -> Fact:
    missing = [name for name in ("x", "residual", "weight") if not match.is_tensor(name)]
    if missing:
        return known(False, f"{missing[0]} is {match.bindings[missing[0]]}, not a tensor")
    x, residual, weight = (match.tensor(name) for name in ("x", "residual", "weight"))
    shape = match.bindings["shape"]
    assert isinstance(shape, (list, tuple))
    return (
        known(x.dtype == residual.dtype, f"dtypes {x.dtype} and {residual.dtype} are added")
        & same_shape(x.shape, residual.shape, "the addition broadcasts")
        & known(len(shape) == 1, f"the norm is over {len(shape)} dimensions")
        & equal(weight.shape[0], x.shape[-1], "weight and last dimension")
        & known(
            match.is_tensor("bias") or isinstance(weight.shape[0], int),
            "there is no bias, and the size of one is not known",
        )
    )


def _replacement(build: Build, match: Match) -> list[fx.Node]:
    x, residual, weight, bias, epsilon = (
        match.bindings[name] for name in ("x", "residual", "weight", "bias", "epsilon")
    )
    if bias is None:
        like = match.tensor("weight")
        bias = build(torch.ops.aten.full.default, [like.shape[0]], 0.0, dtype=like.dtype, device=like.device)
    fused = build(torch.ops.npu_fused.add_layer_norm.default, x, residual, weight, bias, epsilon)
    normed, total = build.unpack(fused)
    if "viewed" not in match.bindings:
        return [normed, total, total]  # the last is left out: there is no such result
    view = match.bindings["view"]
    return [build(torch.ops.aten.view.default, normed, view), total, build(torch.ops.aten.view.default, total, view)]


def _program(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return torch.nn.functional.layer_norm(total, (total.shape[-1],), weight, bias, EPSILON), total


def _no_weight(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    total = x + residual
    return torch.nn.functional.layer_norm(total, (total.shape[-1],), None, None, EPSILON) * weight + bias


def _two_dimensions(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x + residual, tuple(x.shape[1:]), weight, bias, EPSILON)


def _statistics(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    normed, mean, _ = torch.native_layer_norm(x + residual, (x.shape[-1],), weight, bias, EPSILON)
    return normed, mean


def _unbiased(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x + residual, (x.shape[-1],), weight, None, EPSILON)


def _number_added(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x + 1.5, (x.shape[-1],), weight, bias, EPSILON)


def _heads(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm((x + residual).view(3, 20, 16), (16,), weight[:16], bias[:16], EPSILON)


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    weight, bias = torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype)
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(3, 5, 64, dtype=dtype), weight, bias


def _broadcast_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, _, weight, bias = _example(dtype)
    return x, torch.randn(64, dtype=dtype), weight, bias


def _mixed_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, residual, weight, bias = _example(torch.float64)
    return x, residual.float(), weight, bias  # type: ignore[attr-defined]


def _wide_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, residual, *_ = _example(dtype)
    return x, residual, torch.randn(5, 64, dtype=dtype), torch.randn(5, 64, dtype=dtype)


RULES = (
    Rule(
        "add_layer_norm",
        pattern=OneOf(
            (Item(Call("aten.native_layer_norm.default", *OPERANDS), 0), Call("aten.layer_norm.default", *OPERANDS))
        ),
        replacement=_replacement,
        results=("root", "total", "viewed"),
        legal=_legal,
        reference=_program,
        example=_example,
        after=("npu_fused.add_layer_norm.default",),
        near_misses=(
            NearMiss(_program, _broadcast_example, "the addition broadcasts"),
            NearMiss(_no_weight, reason="weight is None, not a tensor"),
            NearMiss(_two_dimensions, _wide_example, "the norm is over 2 dimensions"),
            NearMiss(_statistics, reason="is also used by"),
            NearMiss(_program, _mixed_example, "dtypes torch.float64 and torch.float32 are added"),
            NearMiss(_number_added, lambda dtype: _example(dtype)[1:], "residual is 1.5, not a tensor"),
            NearMiss(_heads, reason="weight and last dimension: 16 is not 64"),
            NearMiss(_unbiased, lambda dtype: _example(dtype)[:3], "the size of one is not known", dynamic=True),
        ),
    ),
)
