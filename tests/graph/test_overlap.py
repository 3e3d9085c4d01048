"""Overlap of views: never denied where there is one, and told for the views that programs have."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from npu_compiler.graph.overlap import may_overlap

WHOLE = torch.arange(240)


def elements(view: Tensor) -> set[int]:
    return set(view.flatten().tolist())


def random_view(draw: random.Random) -> Tensor:
    view = WHOLE.view(draw.choice([(240,), (24, 10), (4, 6, 10), (2, 3, 4, 10), (6, 40)]))
    for _ in range(draw.randint(0, 3)):
        dim = draw.randrange(view.dim()) if view.dim() else 0
        if not view.dim() or not view.shape[dim]:
            break
        start = draw.randrange(view.shape[dim])
        step = draw.choice(["slice", "select", "transpose", "unsqueeze", "strided", "expand"])
        if step == "slice":
            view = view.narrow(dim, start, draw.randint(0, view.shape[dim] - start))
        elif step == "select":
            view = view.select(dim, start)
        elif step == "transpose":
            view = view.transpose(0, dim)
        elif step == "unsqueeze":
            view = view.unsqueeze(dim)
        elif step == "strided":
            view = view[start::2] if dim == 0 else view
        else:
            view = view.unsqueeze(0).expand(2, *view.shape)
    return view


def test_overlap_is_never_denied() -> None:
    draw = random.Random(1)
    told = denied = 0
    for _ in range(4000):
        one, other = random_view(draw), random_view(draw)
        apart = not elements(one) & elements(other)
        found = may_overlap(one, other)
        assert found or apart, (one.shape, one.stride(), one.storage_offset(), other.shape, other.stride())
        told += apart and not found
        denied += apart
    assert told > 0.8 * denied  # most of what does not overlap is known not to


@pytest.mark.parametrize(
    "one, other",
    [
        ((slice(0, 2),), (slice(2, 4),)),  # rows
        ((slice(None), slice(0, 16)), (slice(None), slice(16, 48))),  # q and k of a packed projection
        ((slice(None), 3), (slice(None), slice(4, None))),
        ((0,), (1, slice(2, 5))),
        ((slice(0, 2), slice(0, 8)), (slice(0, 4), slice(8, 9))),
    ],
)
def test_parts_of_a_matrix(one: tuple[object, ...], other: tuple[object, ...]) -> None:
    matrix = torch.empty(4, 60)
    for left, right in itertools.permutations((matrix[one], matrix[other])):  # type: ignore[index]
        assert not may_overlap(left, right)
        assert may_overlap(left, matrix)
        assert may_overlap(left, left)


def test_symbolic_rows_add_no_guard() -> None:
    """Columns of a matrix of any number of rows are apart; rows up to a size nobody knows are not known to be."""
    environment = ShapeEnv()
    matrix = FakeTensorMode(shape_env=environment).from_tensor(torch.empty(6, 64), static_shapes=False)
    rows, columns = matrix.shape
    matrix = matrix.new_empty(rows, 64)
    before = len(environment.guards)
    left, right = matrix.narrow(1, 0, 16), matrix.narrow(1, 16, 48)
    assert not may_overlap(left, right)
    assert may_overlap(left, matrix)
    symbolic = matrix.new_empty(rows, columns)
    assert may_overlap(symbolic.select(0, 0), symbolic.select(1, 0))
    assert len(environment.guards) == before


def test_views_of_other_element_sizes_may_overlap() -> None:
    whole = torch.empty(4, 8)
    assert may_overlap(whole[:2], whole[2:].view(torch.int16))
