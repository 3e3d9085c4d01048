"""Questions about layouts with symbolic strides: they are answered, and add no guard."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from npu_compiler.facts.sizes import Truth, contiguous


def symbolic(tensor: torch.Tensor, strides: DimDynamic = DimDynamic.INFER_STRIDE) -> torch.Tensor:
    environment = ShapeEnv()
    context = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC] * tensor.dim(), dynamic_strides=[strides] * tensor.dim()
    )
    return FakeTensorMode(shape_env=environment).from_tensor(tensor, symbolic_context=context)


def test_contiguous() -> None:
    assert contiguous(torch.empty(2, 3, 4), "x")
    assert contiguous(torch.empty(3, 1, 4).as_strided((3, 1, 4), (4, 77, 1)), "a stride of one element")
    assert contiguous(torch.empty(()), "a scalar")
    assert contiguous(torch.empty(4, 3).t(), "x").truth is Truth.FALSE


def test_contiguous_of_symbolic_sizes_adds_no_guard() -> None:
    fake = symbolic(torch.empty(5, 7))
    environment = fake.shape[0].node.shape_env
    guards = len(environment.guards)
    assert contiguous(fake, "x")
    assert contiguous(fake.t(), "x").truth is not Truth.TRUE
    assert contiguous(symbolic(torch.empty(5, 14)[:, ::2]), "x").truth is not Truth.TRUE
    assert len(environment.guards) == guards


def test_contiguous_of_a_symbolic_stride_adds_no_guard() -> None:
    gaps = symbolic(torch.empty(5, 9)[:, :7], DimDynamic.DYNAMIC)
    environment = gaps.shape[0].node.shape_env
    guards = len(environment.guards)
    assert contiguous(gaps, "x").truth is Truth.UNKNOWN
    assert len(environment.guards) == guards
