"""Joins a matrix product and the bias added to it.

Before::

    product = aten.mm.default(x, weight)
    y = aten.add.Tensor(product, bias)

After::

    y = aten.addmm.default(bias, x, weight)

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
from npu_compiler.passes.pattern import Any, Call, Match
from npu_compiler.passes.rewrite import Build, NearMiss, Rule

NAME = "matmul_bias"


def _legal(match: Match) -> Fact:
    if not match.is_tensor("bias"):
        return known(False, "a number is added")
    x, weight, bias = (match.tensor(name) for name in ("x", "weight", "bias"))
    return (
        known(x.dim() == 2 and weight.dim() == 2, f"{x.dim()} and {weight.dim()} dimensions are multiplied, not 2")
        & known(bias.dim() == 1, f"what is added has {bias.dim()} dimensions: no bias")
        & known(x.dtype == weight.dtype == bias.dtype, f"dtypes {x.dtype}, {weight.dtype} and {bias.dtype} are mixed")
        & known(x.dtype in CANN_DTYPES, f"{x.dtype} is not one of {CANN_DTYPES}")
        & equal(bias.shape[0], weight.shape[1], "bias and columns")
    )


def _replacement(build: Build, match: Match) -> fx.Node:
    return build(torch.ops.aten.addmm.default, *(match.bindings[name] for name in ("bias", "x", "weight")))


def _program(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight + bias


def _kept(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    product = x @ weight
    return product + bias, product


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(5, 32, dtype=dtype), torch.randn(32, 48, dtype=dtype), torch.randn(48, dtype=dtype)


def _residual_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(5, 32, dtype=dtype), torch.randn(32, 48, dtype=dtype), torch.randn(5, 48, dtype=dtype)


def _one_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(5, 32, dtype=dtype), torch.randn(32, 48, dtype=dtype), torch.randn(1, dtype=dtype)


RULES = (
    Rule(
        "matmul_bias",
        pattern=Call(
            "aten.add.Tensor", Call("aten.mm.default|aten.matmul.default", Any("x"), Any("weight")), Any("bias"),
            commutes=True,
        ),
        replacement=_replacement,
        legal=_legal,
        reference=_program,
        example=_example,
        after=("aten.addmm.default",),
        near_misses=(
            NearMiss(_program, _residual_example, "what is added has 2 dimensions: no bias"),
            NearMiss(_program, _one_example, "bias and columns"),
            NearMiss(_kept, reason="is also used by output"),
        ),
    ),
)  # fmt: skip
