"""The steps of random graphs that write, in their functional forms: a copy with a part put in."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2

from tests.properties.graph_kinds import (
    END,
    Build,
    Step,
    aten,
    calls,
    filled,
    first_index,
    float32,
    rows_of,
    shape_of,
    static,
    two_rows,
    writable,
    writable_matrix,
)

NAMESPACE = "npu_properties"


def _index_put(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.index_put.default, x, [first_index(b, x)], rows_of(b, y, 0, 1))


def _index_add(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.index_put.default, x, [first_index(b, x)], rows_of(b, y, 0, 1), True)


def _index_put_column(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.index_put.default, x, [None, first_index(b, x)], b(aten.slice.Tensor, y, 1, 0, 1))


def _index_copy(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.index_copy.default, x, 0, first_index(b, x), rows_of(b, y, 0, 1))


def _index_copy_column(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.index_copy.default, x, -1, first_index(b, x), b(aten.slice.Tensor, y, 1, 0, 1))


def _scatter(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    where = filled(b, x, [1, b.size(x, 1)], 1, torch.int64)
    return b(aten.scatter.src, x, 0, where, y)


def _slice_scatter(b: Build, x: fx.Node, y: fx.Node) -> fx.Node:
    return b(aten.slice_scatter.default, x, rows_of(b, y, 0, 1), 0, 0, 1)


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
    return b(aten.as_strided_scatter.default, clone, rows_of(b, y, 0, 1), [1, columns], [columns, 1], 0)


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
    empty = b(aten.empty.memory_format, shape_of(b, x), dtype=tensor.dtype, device=tensor.device, pin_memory=False)
    return _written(b, "store", [empty], x=x, _out_base_index=0)


def _store_row(b: Build, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    """Writes the first row of x: the operator's argument is a slice of its base."""
    (written,) = _written(
        b,
        "store",
        [x],
        x=rows_of(b, y, 0, 1),
        _out_base_index=0,
        _out_slice_dim=0,
        _out_slice_start=0,
        _out_slice_end=1,
    )
    return [written, rows_of(b, written, 0, 1)]


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
    return _written(b, "store_two", [x], x=rows_of(b, y, 0, 1), **rows)


def _accumulate(b: Build, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    return _written(b, "accumulate", [x], x=y, _out_base_index=0)


WRITE: dict[str, Step] = {
    "index_put": Step(_index_put, writable, 2),
    "index_add": Step(_index_add, writable, 2),
    "index_put_column": Step(_index_put_column, writable_matrix, 2),
    "index_copy": Step(_index_copy, writable, 2),
    "index_copy_column": Step(_index_copy_column, writable_matrix, 2),
    "scatter": Step(_scatter, float32(two_rows), 2),
    "slice_scatter": Step(_slice_scatter, writable, 2),
    "select_scatter": Step(_select_scatter, writable, 2),
    "add_to_row": Step(_add_to_row, writable),
    "add_to_columns": Step(_add_to_columns, writable_matrix),
    "as_strided_scatter": Step(_as_strided_scatter, static(writable_matrix), 2),
    "fill_scalar": Step(calls(aten.fill.Scalar, 1.5), writable),
    "store": Step(_store, writable, 2),
    "store_clone": Step(_store_clone, writable, 2),
    "store_into_empty": Step(_store_into_empty, writable),
    "store_row": Step(_store_row, writable, 2),
    "store_alias": Step(_store_alias, writable, 2),
    "store_two": Step(_store_two, writable, 3, written=2),
    "store_rows_of_one": Step(_store_rows_of_one, two_rows, 2),
    "accumulate": Step(_accumulate, writable, 2),
}
"""Functional forms of writes."""
