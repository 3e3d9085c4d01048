"""swiglu: the ways models write it, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from npu_compiler.passes import noop, swiglu
from npu_compiler.passes.record import Pass, PassRecord
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(swiglu.NAME, "", rules=swiglu.RULES)


def after(function: object, *args: Tensor, dynamic: bool = False) -> tuple[list[str], PassRecord]:
    program = lowered(function, *args, dynamic=dynamic)  # type: ignore[arg-type]
    apply(Pass(noop.NAME, "", noop.run), program.graph)
    record = apply(PASS, program.graph)
    return calls(program.graph), record


def sliced(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return silu(x[..., :half]) * x[..., half:]


def chunked(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return up * silu(gate)


def split(x: Tensor) -> Tensor:
    gate, up = x.split([x.shape[-1] // 2, x.shape[-1] // 2], dim=-1)
    return silu(gate) * up


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [sliced, chunked, split])
def test_one_tensor(function: object, dynamic: bool) -> None:
    x = torch.randn(3, 64)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    operators, _ = after(function, x)
    assert operators[-1] == "npu_fused.swiglu.default"
    assert "aten.silu.default" not in operators
    assert "aten.mul.Tensor" not in operators


def test_two_linears() -> None:
    operators, record = after(
        lambda x, gate, up: silu(x @ gate) * (x @ up), torch.randn(3, 8), torch.randn(8, 16), torch.randn(8, 16)
    )
    assert operators == ["aten.mm.default", "aten.mm.default", "npu_fused.silu_mul.default"]
    assert [fired.rule for fired in record.fired] == ["silu_mul"]


def test_halves_in_the_other_order_are_two_tensors() -> None:
    def swapped(x: Tensor) -> Tensor:
        return silu(x[..., 8:]) * x[..., :8]

    x = torch.randn(3, 16)
    program = lowered(swapped, x)
    record = apply(PASS, program.graph)
    assert [fired.rule for fired in record.fired] == ["silu_mul"]
    torch.testing.assert_close(program.graph(x)[0], swapped(x))


def test_unequal_parts_are_not_halves() -> None:
    _, record = after(lambda x: silu(x[..., :1]) * x[..., 1:], torch.randn(3, 16))
    assert not record.fired
    assert any("the product broadcasts" in refused.reason for refused in record.refused)


def test_broadcast_is_left_alone() -> None:
    _, record = after(lambda gate, up: silu(gate) * up, torch.randn(3, 16), torch.randn(16))
    assert not record.fired
