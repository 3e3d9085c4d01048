"""noop and dead_code: needless calls go, needed ones stay."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_compiler.passes import dead_code, noop
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered

NOOP = Pass(noop.NAME, "", noop.run)
DEAD = Pass(dead_code.NAME, "", dead_code.run)


def test_clone_view_and_empty_cat_go() -> None:
    """Before: clone, view, slice, cat, add. After: add (the unused slice is dead code)."""

    def idle(x: Tensor) -> Tensor:
        y = x.clone().view(4, 8)
        return torch.cat((y, y[:, 8:]), dim=-1) + 1

    x = torch.rand(4, 8)
    program = lowered(idle, x)
    apply(NOOP, program.graph)
    record = apply(DEAD, program.graph)
    assert calls(program.graph) == ["aten.add.Tensor"]
    assert [fired.nodes for fired in record.fired] == [("slice_1",)]
    torch.testing.assert_close(program.graph(x)[0], x + 1)


def test_real_work_stays() -> None:
    def works(x: Tensor) -> Tensor:
        return torch.cat((x.view(8, 4), x.view(8, 4)), dim=-1).to(torch.float64)

    x = torch.rand(4, 8)
    program = lowered(works, x)
    before = calls(program.graph)
    apply(NOOP, program.graph)
    assert calls(program.graph) == before


def test_output_does_not_become_an_alias_of_an_input() -> None:
    x = torch.rand(4)
    program = lowered(lambda x: x.clone(), x)
    apply(NOOP, program.graph)
    assert program.graph(x)[0].data_ptr() != x.data_ptr()


def test_unused_chain_goes_and_random_draw_stays() -> None:
    """Dropping an unused random draw would shift the numbers every later one gives."""

    def unused(x: Tensor) -> Tensor:
        (x * 2).exp()
        torch.rand(4)
        return x + 1

    program = lowered(unused, torch.rand(4))
    apply(DEAD, program.graph)
    left = calls(program.graph)
    assert "aten.exp.default" not in left
    assert "aten.mul.Tensor" not in left
