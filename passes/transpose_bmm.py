"""Joins a batched product and the transposition of its result.

Before::

    heads = aten.transpose.int(x, 0, 1)
    product = aten.bmm.default(heads, weight)
    back = aten.transpose.int(product, 0, 1)
    y = aten.clone.default(back, memory_format=torch.contiguous_format)

After::

    y = npu_fused.transpose_bmm(x, weight, False)

A reshape of the transposed result is such a copy too. A transposed result that nobody copies is a view, and costs
nothing as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, known
from npu_compiler.passes.pattern import Any, Call, Match, OneOf
from npu_compiler.passes.rewrite import Build, NearMiss, Rule

NAME = "transpose_bmm"
SWAPPED = OneOf(
    (
        Call("aten.transpose.int", Any("x"), Any("x_a"), Any("x_b")),
        Call("aten.permute.default", Any("x"), Any("x_order")),
    )
)
PRODUCT = OneOf((Call("aten.bmm.default", SWAPPED, Any("weight")), Call("aten.bmm.default", Any("x"), Any("weight"))))
BACK = OneOf(
    (Call("aten.transpose.int", PRODUCT, Any("a"), Any("b")), Call("aten.permute.default", PRODUCT, Any("order")))
)


def _swaps(match: Match, prefix: str) -> bool:
    """Whether a transposition exchanges the first two of three dimensions; there may be none of the input."""
    order = match.bindings.get(f"{prefix}order")
    if order is not None:
        return [int(axis) % 3 for axis in order] == [1, 0, 2]  # type: ignore[attr-defined]
    axes = [match.bindings.get(f"{prefix}{name}") for name in ("a", "b")]
    return {int(axis) % 3 for axis in axes} == {0, 1}  # type: ignore[call-overload]


def _batch_first(match: Match) -> bool:
    return "x_a" not in match.bindings and "x_order" not in match.bindings


def _legal(match: Match) -> Fact:
    into = _batch_first(match) or _swaps(match, "x_")
    return known(_swaps(match, ""), "the result's batch and rows are not what is exchanged") & known(
        into, "the input's batch and rows are not what is exchanged"
    )


def _replacement(build: Build, match: Match) -> fx.Node:
    operands = match.bindings["x"], match.bindings["weight"], _batch_first(match)
    product = build(torch.ops.npu_fused.transpose_bmm.default, *operands)
    shape = match.bindings.get("shape")
    return product if shape is None else build(torch.ops.aten.view.default, product, shape)


def _copy_program(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1).contiguous()


def _columns_first(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight).transpose(1, 2).contiguous()


def _kept(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    product = torch.bmm(x.transpose(0, 1), weight)
    return product.transpose(0, 1).contiguous(), product


def _rows_and_columns(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(1, 2), weight).transpose(0, 1).contiguous()


def _copied_as_it_lies(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1).clone()


def _columns_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 16, 5, dtype=dtype), torch.randn(3, 16, 32, dtype=dtype)


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(5, 3, 16, dtype=dtype), torch.randn(3, 16, 32, dtype=dtype)


RULES = (
    Rule(
        "transpose_bmm",
        pattern=OneOf(
            (Call("aten.clone.default", BACK, Any("format")), Call("aten.reshape.default", BACK, Any("shape")))
        ),
        replacement=_replacement,
        legal=_legal,
        reference=_copy_program,
        example=_example,
        after=("npu_fused.transpose_bmm.default",),
        near_misses=(
            NearMiss(_columns_first, reason="the result's batch and rows are not what is exchanged"),
            NearMiss(_kept, reason="is also used by output"),
            NearMiss(_rows_and_columns, _columns_example, "the input's batch and rows are not what is exchanged"),
            NearMiss(_copied_as_it_lies, reason="result clone: stride of dimension 0"),
        ),
    ),
)
