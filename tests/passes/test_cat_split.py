"""cat_split in every dimension, with dynamic sizes, and in the pipeline (its rules are tested in test_rules.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_compiler.config import Options
from npu_compiler.passes import cat_split, pipeline
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(cat_split.NAME, "", rules=cat_split.RULES)


def after_all(function: Any, *args: Tensor, dynamic: bool | None = False) -> list[str]:
    """The operators that are left; the result is compared."""
    program = lowered(function, *args, dynamic=dynamic)
    pipeline.run(program.graph, Options(check=True))
    if dynamic is False:
        torch.testing.assert_close(program.graph(*args)[0], function(*args))
    return calls(program.graph)


@pytest.mark.parametrize("dimension", [0, 1, 2, -1])
@pytest.mark.parametrize("sizes", [2, [1, 3], [3, 0, 1]], ids=str)
def test_all_parts_joined(dimension: int, sizes: Any) -> None:
    """Before: split, cat, sin. After: sin."""
    x = torch.randn(4, 4, 4)
    assert "aten.cat.default" not in after_all(
        lambda x: torch.cat(torch.split(x, sizes, dimension), dimension).sin(), x
    )


@pytest.mark.parametrize("dimension", [0, 1, 2, -2])
def test_a_joined_tensor_is_found_again(dimension: int) -> None:
    """Before: sin, cat, split, sum, sum. After: sin, sum, sum."""

    def program(x: Tensor) -> Tensor:
        a, b = torch.cat((x, x.sin()), dimension).chunk(2, dimension)
        return a.sum(-1) * b.sum(-1)

    left = after_all(program, torch.randn(2, 4, 6))
    assert left == ["aten.sin.default", "aten.sum.dim_IntList", "aten.sum.dim_IntList", "aten.mul.Tensor"]


@pytest.mark.parametrize("dynamic", [0, 1])
def test_dynamic_sizes(dynamic: int) -> None:
    """Borders are expressions: rows of unknown number, and columns of which half are one part."""
    x = torch.randn(6, 8)
    torch._dynamo.mark_dynamic(x, dynamic)

    def program(x: Tensor) -> Tensor:
        middle = x.shape[dynamic] // 2
        parts = torch.narrow(x, dynamic, 0, middle), torch.narrow(x, dynamic, middle, x.shape[dynamic] - middle)
        return torch.cat(parts, dynamic).sin()

    assert after_all(program, x, dynamic=None) == ["aten.sin.default"]


def test_a_gate_is_seen_through_a_join() -> None:
    """Gate and up joined and taken apart again: nothing is joined any more."""

    def program(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        joined = torch.cat((x @ gate, x @ up), dim=-1)
        return torch.nn.functional.silu(joined[:, :16]) * joined[:, 16:]

    args = torch.randn(4, 8), torch.randn(8, 16), torch.randn(8, 16)
    assert after_all(program, *args) == ["aten.mm.default", "aten.mm.default", "npu_fused.silu_mul.default"]


def test_a_write_between_is_a_border() -> None:
    """What the caller gets back in its own tensor is not what was joined before."""

    def program(x: Tensor) -> Tensor:
        whole = torch.cat(x.split(2), 0)
        x.add_(1)
        return whole * 2

    x = torch.randn(4, 3)
    program_graph = lowered(program, x.clone()).graph
    apply(PASS, program_graph)
    before, mine = x.clone(), x.clone()
    results = program_graph(mine)
    torch.testing.assert_close(mine, before + 1)
    torch.testing.assert_close(results[-1], before * 2)
