"""Joins a matrix product and the bias added to it.

Before::

    product = aten.mm.default(x, weight)
    y = aten.add.Tensor(product, bias)

After::

    y = aten.addmm.default(bias, x, weight)

The product may be reshaped in between, as that of an input with batches is.
CANN's aclnnAddmm adds a bias of one dimension in the product's own kernel. F.linear with a bias comes as addmm already.
An activation behind it stays a kernel of its own. aclnnFusedMatmul, which would take relu and gelu, is for Ascend 950
only. aclnnFFN (`npu_ffn`) computes activation(x @ w1 + b1) @ w2 + b2 on Atlas A2 and A3, but makes its weights
contiguous first: those of nn.Linear, which come transposed, would be copied at every call. Beside bfloat16 it wants
float32 biases, which are two more kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, equal, known
from npu_compiler.fusion_kernels.norms import CANN_DTYPES
from npu_compiler.passes.pattern import VIEWS, Any, Call, Match, OneOf
from npu_compiler.passes.rewrite import Build, NearMiss, Rule

NAME = "matmul_bias"
PRODUCT = Call("aten.mm.default|aten.matmul.default", Any("x"), Any("weight"))


def _legal(match: Match) -> Fact:
    if not match.is_tensor("bias"):
        return known(False, "a number is added")
    x, weight, bias = (match.tensor(name) for name in ("x", "weight", "bias"))
    columns = match.root.meta["val"].shape[-1]
    return (
        known(x.dim() == 2 and weight.dim() == 2, f"{x.dim()} and {weight.dim()} dimensions are multiplied, not 2")
        & known(bias.dim() == 1, f"what is added has {bias.dim()} dimensions: no bias")
        & known(x.dtype == weight.dtype == bias.dtype, f"dtypes {x.dtype}, {weight.dtype} and {bias.dtype} are mixed")
        & known(x.dtype in CANN_DTYPES, f"{x.dtype} is not one of {CANN_DTYPES}")
        & equal(bias.shape[0], columns, "bias and last dimension")
        & equal(columns, weight.shape[1], "columns, and last dimension of what the bias is added to")
    )


def _replacement(build: Build, match: Match) -> fx.Node:
    product = build(torch.ops.aten.addmm.default, *(match.bindings[name] for name in ("bias", "x", "weight")))
    shape = match.bindings.get("shape")
    return product if shape is None else build(torch.ops.aten.view.default, product, shape)


def _program(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight + bias


def _kept(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    product = x @ weight
    return product + bias, product


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(5, 32, dtype=dtype), torch.randn(32, 48, dtype=dtype), torch.randn(48, dtype=dtype)


def _reshaped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x @ weight).view(-1, 16) + bias


def _heads_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, weight, bias = _example(dtype)
    return x, weight, bias[:16]  # type: ignore[index]


def _number_added(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight + 1.5


def _mixed_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, weight, bias = _example(torch.float64)
    return x, weight, bias.float()  # type: ignore[attr-defined]


def _double_example(dtype: torch.dtype) -> tuple[object, ...]:
    return _example(torch.float64)


def _batched_example(dtype: torch.dtype) -> tuple[object, ...]:
    _, weight, bias = _example(dtype)
    return torch.randn(3, 5, 32, dtype=dtype).npu(), weight.npu(), bias.npu()  # type: ignore[attr-defined]


def _residual_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(5, 32, dtype=dtype), torch.randn(32, 48, dtype=dtype), torch.randn(5, 48, dtype=dtype)


def _one_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(5, 32, dtype=dtype), torch.randn(32, 48, dtype=dtype), torch.randn(1, dtype=dtype)


RULES = (
    Rule(
        "matmul_bias",
        pattern=Call(
            "aten.add.Tensor", OneOf((PRODUCT, Call("|".join(VIEWS), PRODUCT, Any("shape")))), Any("bias"),
            commutes=True,
        ),
        replacement=_replacement,
        legal=_legal,
        reference=_program,
        example=_example,
        after=("aten.addmm.default",),
        near_misses=(
            NearMiss(_program, _residual_example, "what is added has 2 dimensions: no bias"),
            NearMiss(_program, _one_example, "bias and last dimension: 1 is not 48"),
            NearMiss(_reshaped, _heads_example, "columns, and last dimension of what the bias is added to"),
            NearMiss(_kept, reason="is also used by output"),
            NearMiss(_number_added, lambda dtype: _example(dtype)[:2], "a number is added"),
            NearMiss(_program, _mixed_example, "torch.float64 and torch.float32 are mixed"),
            NearMiss(_program, _double_example, "torch.float64 is not one of"),
            NearMiss(_program, _batched_example, "3 and 2 dimensions are multiplied, not 2", inference=True),
        ),
    ),
)  # fmt: skip
