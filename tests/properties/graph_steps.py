"""The steps of random graphs: what each takes and which calls of `aten` it adds.

Programs in this form are what lowering leaves to the passes: functional calls on fake values, custom operators that
write wrapped as AOTAutograd wraps them. Many of the calls do nothing, are views, or can be written in place, since that
is what the passes look for.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx.experimental.symbolic_shapes import is_concrete_int

NAMESPACE = "npu_properties"
END = sys.maxsize
"""What AOTAutograd writes for "to the end"."""
aten = torch.ops.aten


class Build(Protocol):
    """Adds calls to a graph under construction."""

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call and infers its value."""

    def size(self, node: fx.Node, dimension: int) -> Any:
        """A size as calls take it: a number, or the node that holds it."""


@dataclass(frozen=True)
class Kind:
    """What decides whether a step takes a value.

    Attributes:
        key: equal for values of one dtype and shape, symbols included.
        sizes: of each dimension; None for a symbolic one.
        given: the value is an input, or a view of one.
    """

    key: tuple[str, ...]
    dtype: torch.dtype
    sizes: tuple[int | None, ...]
    contiguous: bool
    overlaps: bool
    given: bool

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def matrix(self) -> bool:
        return self.rank == 2

    @property
    def even_columns(self) -> bool:
        return self.rank > 1 and self.sizes[-1] is not None and self.sizes[-1] >= 2 and self.sizes[-1] % 2 == 0

    @property
    def static(self) -> bool:
        return None not in self.sizes


Takes = Callable[[Kind], bool]
Emit = Callable[..., "fx.Node | Sequence[fx.Node]"]


@dataclass(frozen=True)
class Step:
    """`operands` values of one kind; `takes` tells whether the step takes the first one, and for the first `written`
    of them."""

    emit: Emit
    takes: Takes
    operands: int = 1
    written: int = 1


def _floating(kind: Kind) -> bool:
    return kind.dtype.is_floating_point and kind.rank > 0


def _matrix(kind: Kind) -> bool:
    return kind.matrix and _floating(kind)


def _anything(kind: Kind) -> bool:
    return kind.rank > 0


def _halves(kind: Kind) -> bool:
    return kind.even_columns and _floating(kind)


def _writable(kind: Kind) -> bool:
    return _floating(kind) and kind.rank > 1 and not kind.overlaps


def _writable_matrix(kind: Kind) -> bool:
    return kind.matrix and _writable(kind)


def _calls(target: Callable[..., Any], *rest: Any, **kwargs: Any) -> Emit:
    return lambda b, *nodes: b(target, *nodes, *rest, **kwargs)


def _shape(b: Build, x: fx.Node) -> list[Any]:
    return [b.size(x, dimension) for dimension in range(x.meta["val"].dim())]


def _full(b: Build, x: fx.Node, shape: Sequence[Any], number: float, dtype: torch.dtype | None = None) -> fx.Node:
    tensor = x.meta["val"]
    return b(
        aten.full.default,
        list(shape),
        number,
        dtype=dtype or tensor.dtype,
        device=tensor.device,
        pin_memory=False,
    )


def _first(b: Build, x: fx.Node) -> fx.Node:
    """The index 0 as a tensor."""
    return _full(b, x, [1], 0, torch.int64)


def _rows(b: Build, x: fx.Node, start: Any, end: Any) -> fx.Node:
    return b(aten.slice.Tensor, x, 0, start, end)


def _widened(b: Build, x: fx.Node) -> fx.Node:
    dtype = x.meta["val"].dtype
    wide = b(aten._to_copy.default, x, dtype=torch.float64)
    return b(aten._to_copy.default, wide, dtype=dtype)


def _summed(b: Build, x: fx.Node) -> fx.Node:
    return b(aten.expand.default, b(aten.sum.dim_IntList, x, [-1], True), _shape(b, x))


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
    return b(aten.expand.default, _rows(b, x, 0, 1), [2, b.size(x, 1)])


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
    return _rows(b, b(aten.cat.default, [x, y]), b.size(x, 0), END)


def _cat_columns(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    columns = x.meta["val"].shape[-1]
    return b(aten.slice.Tensor, b(aten.cat.default, [x, y], 1), 1, 0, columns)


def _cat_of_cats(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    joined = b(aten.cat.default, [b(aten.cat.default, [x, y]), x])
    return _rows(b, joined, 0, b.size(x, 0))


def _cat_nothing(b: Build, x: fx.Node) -> fx.Node:
    last = x.meta["val"].dim() - 1
    return b(aten.cat.default, [x, b(aten.slice.Tensor, x, last, 0, 0)], -1)


def _of_stack(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.select.int, b(aten.stack.default, [x, y]), 0, 1)


def _twice_as_many(b: Build, x: fx.Node) -> fx.Node:
    """A constant of a size worked out in the program."""
    rows = b.size(x, 0)
    double = b(operator.mul, rows, 2) if isinstance(rows, fx.Node) else rows * 2
    return b(aten.add.Tensor, _rows(b, _full(b, x, [double, b.size(x, 1)], 0.5), 0, rows), x)


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


def _index_put(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.index_put.default, x, [_first(b, x)], _rows(b, y, 0, 1))


def _index_add(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.index_put.default, x, [_first(b, x)], _rows(b, y, 0, 1), True)


def _index_put_column(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.index_put.default, x, [None, _first(b, x)], b(aten.slice.Tensor, y, 1, 0, 1))


def _index_copy(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.index_copy.default, x, 0, _first(b, x), _rows(b, y, 0, 1))


def _index_copy_column(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.index_copy.default, x, -1, _first(b, x), b(aten.slice.Tensor, y, 1, 0, 1))


def _scatter(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    where = _full(b, x, [1, b.size(x, 1)], 1, torch.int64)
    return b(aten.scatter.src, x, 0, where, y)


def _slice_scatter(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.slice_scatter.default, x, _rows(b, y, 0, 1), 0, 0, 1)


def _select_scatter(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.select_scatter.default, x, b(aten.select.int, y, 0, 0), 0, 0)


def _add_to_row(b: Build, x: fx.Node) -> fx.Node:
    """What `x[0] += 1` becomes."""
    row = b(aten.select.int, x, 0, 0)
    return b(aten.select_scatter.default, x, b(aten.add.Tensor, row, 1), 0, 0)


def _add_to_columns(b: Build, x: fx.Node) -> list[fx.Node]:
    """What `x[:, 1:] *= 2` becomes, with the view that AOTAutograd reads again behind it."""
    columns = b(aten.slice.Tensor, x, 1, 1, END)
    written = b(aten.slice_scatter.default, x, b(aten.mul.Tensor, columns, 2), 1, 1, END)
    return [written, b(aten.slice.Tensor, written, 1, 1, END)]


def _as_strided_scatter(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    columns = x.meta["val"].shape[1]
    clone = b(aten.clone.default, x, memory_format=torch.contiguous_format)
    return b(aten.as_strided_scatter.default, clone, _rows(b, y, 0, 1), [1, columns], [columns, 1], 0)


def _operator(name: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _written(b: Build, name: str, bases: Sequence[fx.Node], **kwargs: Any) -> list[fx.Node]:
    """A custom operator that writes, as AOTAutograd wraps it; returns its bases as they are afterwards."""
    target = _operator(name)
    found = b(auto_functionalized_v2, target, **kwargs, _all_bases=list(bases))
    first = max(len(target._schema.returns), 1)
    results = [b(operator.getitem, found, 0)] if target._schema.returns else []
    return [*(b(operator.getitem, found, first + index) for index in range(len(bases))), *results]


def _store(b: Build, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    return _written(b, "store", [x], x=y, _out_base_index=0)


def _store_clone(b: Build, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    return _written(b, "store", [b(aten.clone.default, x)], x=y, _out_base_index=0)


def _store_into_empty(b: Build, x: fx.Node) -> list[fx.Node]:
    tensor = x.meta["val"]
    empty = b(aten.empty.memory_format, _shape(b, x), dtype=tensor.dtype, device=tensor.device, pin_memory=False)
    return _written(b, "store", [empty], x=x, _out_base_index=0)


def _store_row(b: Build, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    """Writes the first row of x: the operator's argument is a slice of its base."""
    (written,) = _written(
        b,
        "store",
        [x],
        x=_rows(b, y, 0, 1),
        _out_base_index=0,
        _out_slice_dim=0,
        _out_slice_start=0,
        _out_slice_end=1,
    )
    return [written, _rows(b, written, 0, 1)]


def _store_alias(b: Build, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    return _written(b, "store", [x], x=y, _out_base_index=0, _out_alias=True)


def _store_two(b: Build, x: fx.Node, y: fx.Node, z: fx.Node) -> list[fx.Node]:
    if x is y:
        return _written(b, "store", [x], x=z, _out_base_index=0)
    return _written(b, "store_two", [x, y], x=z, _one_base_index=0, _other_base_index=1)


def _store_rows_of_one(b: Build, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    """Two arguments that are different rows of one base."""
    rows = {
        f"_{name}_{part}": number
        for index, name in enumerate(("one", "other"))
        for part, number in (("base_index", 0), ("slice_dim", 0), ("slice_start", index), ("slice_end", index + 1))
    }
    return _written(b, "store_two", [x], x=_rows(b, y, 0, 1), **rows)


def _accumulate(b: Build, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    return _written(b, "accumulate", [x], x=y, _out_base_index=0)


def _static(takes: Takes) -> Takes:
    return lambda kind: kind.static and takes(kind)


def _float32(takes: Takes) -> Takes:
    return lambda kind: kind.dtype is torch.float32 and takes(kind)


def _given(takes: Takes) -> Takes:
    """For steps that make a large difference of a small one: only of what is the same in every form of a program."""
    return lambda kind: kind.given and takes(kind)


def _two_rows(kind: Kind) -> bool:
    """At least two rows; a symbolic size is never 0 or 1."""
    return _writable_matrix(kind) and kind.sizes[0] != 1 and "-" not in kind.key[1] and "//" not in kind.key[1]


def _contiguous(takes: Takes) -> Takes:
    return lambda kind: kind.contiguous and takes(kind)


def _known_columns(kind: Kind) -> bool:
    return _matrix(kind) and kind.sizes[1] is not None


COMPUTE: dict[str, Step] = {
    "cos": Step(_calls(aten.cos.default), _floating),
    "sigmoid": Step(_calls(aten.sigmoid.default), _floating),
    "silu": Step(_calls(aten.silu.default), _floating),
    "tanh": Step(_calls(aten.tanh.default), _floating),
    "relu": Step(_calls(aten.relu.default), _floating),
    "gelu": Step(_calls(aten.gelu.default), _floating),
    "neg": Step(_calls(aten.neg.default), _floating),
    "softmax": Step(_calls(aten._softmax.default, -1, False), _floating),
    "add_one": Step(_calls(aten.add.Tensor, 1), _floating),
    "scale": Step(_calls(aten.mul.Tensor, 0.5), _floating),
    "halve": Step(_calls(aten.div.Tensor, 2), _floating),
    "zeros_like": Step(_calls(aten.zeros_like.default, pin_memory=False), _floating),
    "full_like": Step(_calls(aten.full_like.default, 0.25, pin_memory=False), _floating),
    "widened": Step(_widened, _float32(_floating)),
    "summed": Step(_summed, _floating),
    "gated": Step(_gated, _halves),
    "constants": Step(_constants, _float32(_known_columns)),
    "twice_as_many": Step(_twice_as_many, _matrix),
    "drawn": Step(_calls(aten.rand_like.default, pin_memory=False), _float32(_floating)),
    "swapped": Step(_swapped, _halves),
    "rejoined": Step(_rejoined, _halves),
    "add": Step(_calls(aten.add.Tensor), _floating, 2),
    "add_scaled": Step(_calls(aten.add.Tensor, alpha=2), _float32(_floating), 2),
    "sub": Step(_calls(aten.sub.Tensor), _floating, 2),
    "mul": Step(lambda b, x, y: b(aten.mul.Tensor, b(aten.tanh.default, x), y), _floating, 2),
    "maximum": Step(_calls(aten.maximum.default), _floating, 2),
    "masked": Step(_masked, _given(_floating), 2),
    "norm": Step(_norm, _matrix, 2),
    "add_norm": Step(_add_norm, _matrix, 2),
    "product": Step(_product, _matrix, 2),
    "linear": Step(_linear, _known_columns, 2),
    "end_of_cat": Step(_end_of_cat, _matrix, 2),
    "cat_columns": Step(_cat_columns, _known_columns, 2),
    "cat_of_cats": Step(_cat_of_cats, _matrix, 2),
    "of_stack": Step(_of_stack, _floating, 2),
    "addcmul": Step(
        lambda b, x, y, z: b(aten.add.Tensor, b(aten.mul.Tensor, b(aten.tanh.default, x), y), z), _floating, 3
    ),
}
"""Steps that make tensors of their own."""
NOTHING: dict[str, Step] = {
    "clone": Step(_calls(aten.clone.default), _anything),
    "contiguous": Step(_calls(aten.clone.default, memory_format=torch.contiguous_format), _anything),
    "alias": Step(_calls(aten.alias.default), _anything),
    "same_view": Step(lambda b, x: _viewed(b, x, _shape(b, x)), _contiguous(_anything)),
    "same_slice": Step(_calls(aten.slice.Tensor, 0, 0, END), _anything),
    "same_expand": Step(lambda b, x: b(aten.expand.default, x, _shape(b, x)), _anything),
    "same_permute": Step(_calls(aten.permute.default, [0, 1]), _matrix),
    "same_dtype": Step(lambda b, x: b(aten._to_copy.default, x, dtype=x.meta["val"].dtype), _anything),
    "repeat_once": Step(_calls(aten.repeat.default, [1, 1]), _matrix),
    "pad_nothing": Step(_calls(aten.constant_pad_nd.default, [0, 0, 0, 0], 0.0), _matrix),
    "cat_one": Step(lambda b, x: b(aten.cat.default, [x]), _floating),
    "cat_nothing": Step(_cat_nothing, _matrix),
    "times_one": Step(_calls(aten.mul.Tensor, 1.0), _floating),
    "divided_by_one": Step(_calls(aten.div.Tensor, 1), _floating),
    "double_transpose": Step(lambda b, x: b(aten.t.default, b(aten.t.default, x)), _matrix),
    "copy_of": Step(_calls(aten.copy.default), _writable, 2),
    "scatter_all": Step(_calls(aten.slice_scatter.default, 0, 0, END), _writable, 2),
}
"""Steps that leave a value as it is, or take another one whole."""
VIEW: dict[str, Step] = {
    "transposed": Step(_calls(aten.t.default), _matrix),
    "permuted": Step(_calls(aten.permute.default, [1, 0]), _matrix),
    "first_row": Step(lambda b, x: _rows(b, x, 0, 1), _matrix),
    "later_rows": Step(lambda b, x: _rows(b, x, 1, END), _two_rows),
    "even_columns": Step(_calls(aten.slice.Tensor, 1, 0, END, 2), _halves),
    "left": Step(lambda b, x: _half(b, x, False), _halves),
    "right": Step(lambda b, x: _half(b, x, True), _halves),
    "split": Step(_split, _halves),
    "row_again": Step(_row_again, _matrix),
    "row": Step(_calls(aten.select.int, 0, 0), _matrix),
    "wide": Step(_of_two_rows, _matrix),
    "three_dimensions": Step(
        lambda b, x: _viewed(b, x, [b.size(x, 0), 2, x.meta["val"].shape[1] // 2]),
        _contiguous(lambda kind: kind.matrix and _halves(kind)),
    ),
    "two_dimensions": Step(
        lambda b, x: _viewed(b, x, [b.size(x, 0), x.meta["val"].shape[1] * x.meta["val"].shape[2]]),
        _contiguous(lambda kind: kind.rank == 3 and None not in kind.sizes[1:]),
    ),
    "flat": Step(lambda b, x: b(aten.reshape.default, x, [-1]), _matrix),
    "unsqueezed": Step(_calls(aten.unsqueeze.default, 0), lambda kind: kind.rank in (1, 2)),
}
"""Steps that look at memory in another way."""
WRITE: dict[str, Step] = {
    "index_put": Step(_index_put, _writable, 2),
    "index_add": Step(_index_add, _writable, 2),
    "index_put_column": Step(_index_put_column, _writable_matrix, 2),
    "index_copy": Step(_index_copy, _writable, 2),
    "index_copy_column": Step(_index_copy_column, _writable_matrix, 2),
    "scatter": Step(_scatter, _float32(_two_rows), 2),
    "slice_scatter": Step(_slice_scatter, _writable, 2),
    "select_scatter": Step(_select_scatter, _writable, 2),
    "add_to_row": Step(_add_to_row, _writable),
    "add_to_columns": Step(_add_to_columns, _writable_matrix),
    "as_strided_scatter": Step(_as_strided_scatter, _static(_writable_matrix), 2),
    "fill_scalar": Step(_calls(aten.fill.Scalar, 1.5), _writable),
    "store": Step(_store, _writable, 2),
    "store_clone": Step(_store_clone, _writable, 2),
    "store_into_empty": Step(_store_into_empty, _writable),
    "store_row": Step(_store_row, _writable, 2),
    "store_alias": Step(_store_alias, _writable, 2),
    "store_two": Step(_store_two, _writable, 3, written=2),
    "store_rows_of_one": Step(_store_rows_of_one, _two_rows, 2),
    "accumulate": Step(_accumulate, _writable, 2),
}
"""Functional forms of writes."""
TABLES = (COMPUTE, NOTHING, VIEW, WRITE)
WRITES = {*WRITE, "copy_of", "scatter_all"}
STEPS: dict[str, Step] = {**COMPUTE, **NOTHING, **VIEW, **WRITE}


def kind_of(tensor: Tensor, given: bool) -> Kind:
    """What a fake tensor is to the steps; asks the shape environment nothing."""
    sizes = tuple(int(size) if is_concrete_int(size) else None for size in tensor.shape)
    strides = [str(stride) for stride in tensor.stride()]
    expected, dense = 1, True
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        dense = dense and str(stride) == str(expected)
        expected = expected * size
    return Kind((str(tensor.dtype), *map(str, tensor.shape)), tensor.dtype, sizes, dense, "0" in strides, given)
