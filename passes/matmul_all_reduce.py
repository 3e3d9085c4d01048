"""Joins a matrix product and the sum of its results over the ranks: the row-parallel linear of tensor parallelism.

Before::

    product = aten.mm.default(x, weight)
    y = vllm.all_reduce.default(product, "tp:0")

After::

    y = npu_fused.matmul_all_reduce(x, weight, None, "tp:0", 256)

`_c10d_functional.all_reduce` and its `wait_tensor` likewise; the product may have a bias, and may be viewed in another
shape before it is summed. The option `matmul_all_reduce` switches the pass on: CANN's operator is for Atlas A2 only,
and pays where a prompt is read. The option's number, fewest rows, goes along to the operator, which looks at each call.

All ranks have to take the same way. They do, since they compile the same program but for the bias, which vLLM adds on
rank 0 alone: a product with a bias is joined exactly where one without is.

The norm behind it stays an operator of its own: torch_npu has no function for aclnnMatmulAllReduceAddRmsNorm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, at_least, known
from npu_compiler.fusion_kernels.matmul_all_reduce import HALF
from npu_compiler.passes.pattern import VIEWS, Any, Call, Match, OneOf
from npu_compiler.passes.rewrite import Build, NearMiss, Rule

NAME = "matmul_all_reduce"
PRODUCT = OneOf(
    (
        Call("aten.addmm.default", Any("bias"), Any("x"), Any("weight")),
        Call("aten.mm.default|aten.matmul.default", Any("x"), Any("weight")),
    )
)
SUMMED = OneOf((PRODUCT, Call("|".join(VIEWS), PRODUCT, Any("shape"))))
PATTERN = OneOf(
    (
        Call("vllm.all_reduce.default", SUMMED, Any("group")),
        Call(
            "_c10d_functional.wait_tensor.default",
            Call("_c10d_functional.all_reduce.default", SUMMED, Any("reduction"), Any("group")),
        ),
    )
)


def _legal(match: Match) -> Fact:
    x, weight = match.tensor("x"), match.tensor("weight")
    reduction = match.bindings.get("reduction", "sum")
    return (
        known(reduction == "sum", f"the ranks' results are joined by {reduction}, not by sum")
        & known(x.dtype in HALF, f"the kernel takes float16 or bfloat16, not {x.dtype}")
        & known(x.dim() in (2, 3) and weight.dim() == 2, f"{x.dim()} and {weight.dim()} dimensions are multiplied")
        & known(_is_bias(match), "what is added to the product is no bias")
    )


def _is_bias(match: Match) -> bool:
    return "bias" not in match.bindings or match.tensor("bias").dim() == 1


def _enough(match: Match, rows: int) -> Fact:
    """Whether the program may ever have `rows` rows: where sizes don't say, the operator looks at each call."""
    count = math.prod(match.tensor("x").shape[:-1])
    never = at_least(rows - 1, count, "rows")
    return known(not never, f"{count} rows, fewer than the option matmul_all_reduce={rows}")


def _program(x: Tensor, weight: Tensor) -> Tensor:
    summed = torch.ops._c10d_functional.all_reduce(x @ weight, "sum", "0")
    return torch.ops._c10d_functional.wait_tensor(summed)


def _largest(x: Tensor, weight: Tensor) -> Tensor:
    largest = torch.ops._c10d_functional.all_reduce(x @ weight, "max", "0")
    return torch.ops._c10d_functional.wait_tensor(largest)


def _kept(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    product = x @ weight
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(product, "sum", "0")), product


def _residual(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    summed = torch.ops._c10d_functional.all_reduce(torch.addmm(residual, x, weight), "sum", "0")
    return torch.ops._c10d_functional.wait_tensor(summed)


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(5, 32, dtype=dtype), torch.randn(32, 48, dtype=dtype)


def _wide_example(dtype: torch.dtype) -> tuple[object, ...]:
    return _example(torch.float32)


def _batches_example(dtype: torch.dtype) -> tuple[object, ...]:
    _, weight = _example(dtype)
    return torch.randn(2, 3, 5, 32, dtype=dtype).npu(), weight.npu()  # type: ignore[attr-defined]


def _no_rows_example(dtype: torch.dtype) -> tuple[object, ...]:
    _, weight = _example(dtype)
    return torch.empty(0, 32, dtype=dtype), weight


def _residual_example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(5, 48, dtype=dtype), *_example(dtype)


def rules(rows: int) -> tuple[Rule, ...]:
    """The pass's rules for products of at least `rows` rows; none for 0."""
    if not rows:
        return ()

    def replacement(build: Build, match: Match) -> fx.Node:
        operands = (match.bindings.get(name) for name in ("x", "weight", "bias", "group"))
        fused = build(torch.ops.npu_fused.matmul_all_reduce.default, *operands, rows)
        shape = match.bindings.get("shape")
        return fused if shape is None else build(torch.ops.aten.view.default, fused, shape)

    return (
        Rule(
            "matmul_all_reduce",
            pattern=PATTERN,
            replacement=replacement,
            legal=lambda match: _legal(match) & _enough(match, rows),
            reference=_program,
            example=_example,
            after=("npu_fused.matmul_all_reduce.default",),
            near_misses=(
                NearMiss(_largest, reason="joined by max, not by sum"),
                NearMiss(_kept, reason="is also used by output"),
                NearMiss(_residual, _residual_example, "what is added to the product is no bias"),
                NearMiss(_program, _no_rows_example, "0 rows, fewer than the option matmul_all_reduce="),
                NearMiss(_program, _batches_example, "4 and 2 dimensions are multiplied", inference=True),
                NearMiss(_program, _wide_example, "the kernel takes float16 or bfloat16, not torch.float32"),
            ),
            oracle=lambda x, weight: x @ weight,
            dtypes=HALF,
        ),
    )


RULES = rules(rows=1)
