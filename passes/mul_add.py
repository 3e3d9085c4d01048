"""Joins a product and the addition behind it.

Before::

    product = aten.mul.Tensor(x, y)
    total = aten.add.Tensor(product, z)

After::

    total = npu_fused.mul_add(x, y, z)
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_compiler.facts.sizes import Fact, known
from npu_compiler.fusion_kernels.norms import CANN_DTYPES
from npu_compiler.passes.pattern import Any, Call, Match
from npu_compiler.passes.rewrite import NearMiss, Rule

NAME = "mul_add"


def _legal(match: Match) -> Fact:
    names = ("x", "y", "z")
    if not all(match.is_tensor(name) for name in names):
        return known(False, "a number is multiplied or added")
    tensors = [match.tensor(name) for name in names]
    dtypes = [tensor.dtype for tensor in tensors]
    verdict = known(len(set(dtypes)) == 1, f"dtypes {dtypes} are mixed")
    verdict = verdict & known(dtypes[0] in CANN_DTYPES, f"{dtypes[0]} is not one of {CANN_DTYPES}")
    return verdict & known(all(tensor.dim() for tensor in tensors), "a tensor without dimensions takes part")


def _program(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return x * y + z


def _scaled(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.add(x * y, z, alpha=2)


def _kept(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    product = x * y
    return product + z, product


def _number(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    return x * 2.0 + y, z * 1.5


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(3, 5, 64, dtype=dtype), torch.randn(64, dtype=dtype), torch.randn(3, 5, 64, dtype=dtype)


def _mixed_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, y, z = _example(torch.float32)
    return x, y.double(), z  # type: ignore[attr-defined]


def _double_example(dtype: torch.dtype) -> tuple[object, ...]:
    return _example(torch.float64)


def _scalar_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, _, z = _example(dtype)
    return x, torch.tensor(1.5, dtype=dtype), z


RULES = (
    Rule(
        "mul_add",
        pattern=Call("aten.add.Tensor", Call("aten.mul.Tensor", Any("x"), Any("y")), Any("z"), commutes=True),
        operator="mul_add",
        operands=lambda match: tuple(match.bindings[name] for name in ("x", "y", "z")),
        legal=_legal,
        reference=_program,
        example=_example,
        near_misses=(
            NearMiss(_scaled),
            NearMiss(_kept, reason="is also used by output"),
            NearMiss(_number, reason="a number is multiplied or added"),
            NearMiss(_program, _mixed_example, "are mixed"),
            NearMiss(_program, _double_example, "torch.float64 is not one of"),
            NearMiss(_program, _scalar_example, "a tensor without dimensions takes part"),
        ),
    ),
)
