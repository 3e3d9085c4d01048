"""The steps of random graphs: what each takes and which calls of `aten` it adds.

Programs in this form are what lowering leaves to the passes: functional calls on fake values, custom operators that
write wrapped as AOTAutograd wraps them. Many of the calls do nothing, are views, or can be written in place, since that
is what the passes look for.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tests.properties.graph_kinds import (
    END,
    Build,
    Step,
    anything,
    aten,
    calls,
    contiguous,
    filled,
    float32,
    floating,
    given,
    halves,
    known_columns,
    matrix,
    on_host,
    rows_of,
    shape_of,
    two_rows,
    writable,
)
from tests.properties.graph_writes import WRITE


def _widened(b: Build, x: fx.Node) -> fx.Node:
    dtype = x.meta["val"].dtype
    wide = b(aten._to_copy.default, x, dtype=torch.float64)
    return b(aten._to_copy.default, wide, dtype=dtype)


def _summed(b: Build, x: fx.Node) -> fx.Node:
    return b(aten.expand.default, b(aten.sum.dim_IntList, x, [-1], True), shape_of(b, x))


def _viewed(b: Build, x: fx.Node, shape: Sequence[Any]) -> fx.Node:
    return b(aten.view.default, x, list(shape))


def _split(b: Build, x: fx.Node) -> list[fx.Node]:
    half = x.meta["val"].shape[-1] // 2
    parts = b(aten.split.Tensor, x, half, -1)
    return [b(operator.getitem, parts, index) for index in range(2)]


def _swapped(b: Build, x: fx.Node) -> fx.Node:
    half = x.meta["val"].shape[-1] // 2
    parts = b(aten.split_with_sizes.default, x, [half, half], -1)
    return b(aten.cat.default, [b(operator.getitem, parts, 1), b(operator.getitem, parts, 0)], -1)


def _rejoined(b: Build, x: fx.Node) -> fx.Node:
    return b(aten.cat.default, _split(b, x), -1)


def _half(b: Build, x: fx.Node, second: bool) -> fx.Node:
    half = x.meta["val"].shape[-1] // 2
    last = x.meta["val"].dim() - 1
    return b(aten.slice.Tensor, x, last, half, END) if second else b(aten.slice.Tensor, x, last, 0, half)


def _gated(b: Build, x: fx.Node) -> fx.Node:
    gate = b(aten.silu.default, _half(b, x, False))
    return b(aten.mul.Tensor, gate, _half(b, x, True))


def _row_again(b: Build, x: fx.Node) -> fx.Node:
    return b(aten.unsqueeze.default, b(aten.select.int, x, 0, 0), 0)


def _of_two_rows(b: Build, x: fx.Node) -> fx.Node:
    return b(aten.expand.default, rows_of(b, x, 0, 1), [2, b.size(x, 1)])


def _norm(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    weight = b(aten.select.int, y, 0, 0)
    mean = b(aten.mean.dim, b(aten.pow.Tensor_Scalar, x, 2), [-1], True)
    scale = b(aten.rsqrt.default, b(aten.add.Tensor, mean, 1e-6))
    return b(aten.mul.Tensor, weight, b(aten.mul.Tensor, x, scale))


def _add_norm(b: Build, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    added = b(aten.add.Tensor, x, y)
    return [_norm(b, added, y), added]


def _masked(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.where.self, b(aten.gt.Scalar, x, 0.0), x, y)


def _product(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    square = b(aten.mm.default, x, b(aten.permute.default, y, [1, 0]))
    return b(aten.mm.default, b(aten.tanh.default, square), x)


def _linear(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    """A product with a bias, which matmul_bias joins: the columns of x by y."""
    square = b(aten.mm.default, b(aten.t.default, y), x)
    bias = b(aten.select.int, x, 0, 0)
    return b(aten.add.Tensor, b(aten.tanh.default, square), bias)


def _end_of_cat(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return rows_of(b, b(aten.cat.default, [x, y]), b.size(x, 0), END)


def _cat_columns(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    columns = x.meta["val"].shape[-1]
    return b(aten.slice.Tensor, b(aten.cat.default, [x, y], 1), 1, 0, columns)


def _cat_of_cats(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    joined = b(aten.cat.default, [b(aten.cat.default, [x, y]), x])
    return rows_of(b, joined, 0, b.size(x, 0))


def _cat_nothing(b: Build, x: fx.Node) -> fx.Node:
    last = x.meta["val"].dim() - 1
    return b(aten.cat.default, [x, b(aten.slice.Tensor, x, last, 0, 0)], -1)


def _of_stack(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.select.int, b(aten.stack.default, [x, y]), 0, 1)


def _twice_as_many(b: Build, x: fx.Node) -> fx.Node:
    """A constant of a size worked out in the program."""
    rows = b.size(x, 0)
    double = b(operator.mul, rows, 2) if isinstance(rows, fx.Node) else rows * 2
    return b(aten.add.Tensor, rows_of(b, filled(b, x, [double, b.size(x, 1)], 0.5), 0, rows), x)


def _constants(b: Build, x: fx.Node) -> fx.Node:
    columns = x.meta["val"].shape[-1]
    device = x.meta["val"].device
    counted = b(
        aten.arange.start_step,
        0,
        columns,
        1,
        dtype=torch.float32,
        layout=torch.strided,
        device=device,
        pin_memory=False,
    )
    return b(aten.mul.Tensor, x, b(aten.cos.default, counted))


COMPUTE: dict[str, Step] = {
    "cos": Step(calls(aten.cos.default), floating),
    "sigmoid": Step(calls(aten.sigmoid.default), floating),
    "silu": Step(calls(aten.silu.default), floating),
    "tanh": Step(calls(aten.tanh.default), floating),
    "relu": Step(calls(aten.relu.default), floating),
    "gelu": Step(calls(aten.gelu.default), floating),
    "neg": Step(calls(aten.neg.default), floating),
    "softmax": Step(calls(aten._softmax.default, -1, False), floating),
    "add_one": Step(calls(aten.add.Tensor, 1), floating),
    "scale": Step(calls(aten.mul.Tensor, 0.5), floating),
    "halve": Step(calls(aten.div.Tensor, 2), floating),
    "zeros_like": Step(calls(aten.zeros_like.default, pin_memory=False), floating),
    "full_like": Step(calls(aten.full_like.default, 0.25, pin_memory=False), floating),
    "widened": Step(_widened, float32(floating)),
    "summed": Step(_summed, floating),
    "gated": Step(_gated, halves),
    "constants": Step(_constants, float32(known_columns)),
    "twice_as_many": Step(_twice_as_many, matrix),
    "drawn": Step(calls(aten.rand_like.default, pin_memory=False), on_host(float32(floating))),
    "swapped": Step(_swapped, halves),
    "rejoined": Step(_rejoined, halves),
    "add": Step(calls(aten.add.Tensor), floating, 2),
    "add_scaled": Step(calls(aten.add.Tensor, alpha=2), float32(floating), 2),
    "sub": Step(calls(aten.sub.Tensor), floating, 2),
    "mul": Step(lambda b, x, y: b(aten.mul.Tensor, b(aten.tanh.default, x), y), floating, 2),
    "maximum": Step(calls(aten.maximum.default), floating, 2),
    "masked": Step(_masked, given(floating), 2),
    "norm": Step(_norm, matrix, 2),
    "add_norm": Step(_add_norm, matrix, 2),
    "product": Step(_product, matrix, 2),
    "linear": Step(_linear, known_columns, 2),
    "end_of_cat": Step(_end_of_cat, matrix, 2),
    "cat_columns": Step(_cat_columns, known_columns, 2),
    "cat_of_cats": Step(_cat_of_cats, matrix, 2),
    "of_stack": Step(_of_stack, floating, 2),
    "addcmul": Step(
        lambda b, x, y, z: b(aten.add.Tensor, b(aten.mul.Tensor, b(aten.tanh.default, x), y), z), floating, 3
    ),
}
"""Steps that make tensors of their own."""
NOTHING: dict[str, Step] = {
    "clone": Step(calls(aten.clone.default), anything),
    "contiguous": Step(calls(aten.clone.default, memory_format=torch.contiguous_format), anything),
    "alias": Step(calls(aten.alias.default), anything),
    "same_view": Step(lambda b, x: _viewed(b, x, shape_of(b, x)), contiguous(anything)),
    "same_slice": Step(calls(aten.slice.Tensor, 0, 0, END), anything),
    "same_expand": Step(lambda b, x: b(aten.expand.default, x, shape_of(b, x)), anything),
    "same_permute": Step(calls(aten.permute.default, [0, 1]), matrix),
    "same_dtype": Step(lambda b, x: b(aten._to_copy.default, x, dtype=x.meta["val"].dtype), anything),
    "repeat_once": Step(calls(aten.repeat.default, [1, 1]), matrix),
    "pad_nothing": Step(calls(aten.constant_pad_nd.default, [0, 0, 0, 0], 0.0), matrix),
    "cat_one": Step(lambda b, x: b(aten.cat.default, [x]), floating),
    "cat_nothing": Step(_cat_nothing, matrix),
    "times_one": Step(calls(aten.mul.Tensor, 1.0), floating),
    "divided_by_one": Step(calls(aten.div.Tensor, 1), floating),
    "double_transpose": Step(lambda b, x: b(aten.t.default, b(aten.t.default, x)), matrix),
    "copy_of": Step(calls(aten.copy.default), writable, 2),
    "scatter_all": Step(calls(aten.slice_scatter.default, 0, 0, END), writable, 2),
}
"""Steps that leave a value as it is, or take another one whole."""
VIEW: dict[str, Step] = {
    "transposed": Step(calls(aten.t.default), matrix),
    "permuted": Step(calls(aten.permute.default, [1, 0]), matrix),
    "first_row": Step(lambda b, x: rows_of(b, x, 0, 1), matrix),
    "later_rows": Step(lambda b, x: rows_of(b, x, 1, END), two_rows),
    "even_columns": Step(calls(aten.slice.Tensor, 1, 0, END, 2), halves),
    "left": Step(lambda b, x: _half(b, x, False), halves),
    "right": Step(lambda b, x: _half(b, x, True), halves),
    "split": Step(_split, halves),
    "row_again": Step(_row_again, matrix),
    "row": Step(calls(aten.select.int, 0, 0), matrix),
    "wide": Step(_of_two_rows, matrix),
    "three_dimensions": Step(
        lambda b, x: _viewed(b, x, [b.size(x, 0), 2, x.meta["val"].shape[1] // 2]),
        contiguous(lambda kind: kind.matrix and halves(kind)),
    ),
    "two_dimensions": Step(
        lambda b, x: _viewed(b, x, [b.size(x, 0), x.meta["val"].shape[1] * x.meta["val"].shape[2]]),
        contiguous(lambda kind: kind.rank == 3 and None not in kind.sizes[1:]),
    ),
    "flat": Step(lambda b, x: b(aten.reshape.default, x, [-1]), matrix),
    "unsqueezed": Step(calls(aten.unsqueeze.default, 0), lambda kind: kind.rank in (1, 2)),
}
"""Steps that look at memory in another way."""
STEPS: dict[str, Step] = {**COMPUTE, **NOTHING, **VIEW, **WRITE}
