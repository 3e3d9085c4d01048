"""geglu: the ways models write it, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu
from transformers.activations import ACT2FN

from npu_compiler.passes import geglu, noop
from npu_compiler.passes import gelu as written_out
from npu_compiler.passes.record import Pass, PassRecord
from tests.passes.lowered import apply, calls, lowered

FUSED = "npu_fused.geglu.default"
PASSES = (
    Pass(noop.NAME, "", noop.run),
    Pass(written_out.NAME, "", rules=written_out.RULES),
    Pass(geglu.NAME, "", rules=geglu.RULES),
)


def after(function: object, *args: Tensor, rows: bool = False) -> tuple[list[str], PassRecord]:
    """The operators behind geglu and the passes that it builds on, its record; the values are compared.

    Args:
        rows: the first size of the first argument is a symbol.
    """
    if rows:
        torch._dynamo.mark_dynamic(args[0], 0)
    program = lowered(function, *args, dynamic=None if rows else False)  # type: ignore[arg-type]
    records = [apply(entry, program.graph) for entry in PASSES]
    if not rows:
        torch.testing.assert_close(program.graph(*args)[0], function(*args))  # type: ignore[operator]
    return calls(program.graph), records[-1]


def by_erf(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gelu(gate) * up


def up_first(x: Tensor) -> Tensor:
    gate, up = x.split([x.shape[-1] // 2, x.shape[-1] // 2], dim=-1)
    return up * gelu(gate, approximate="tanh")


def written_out_by_hand(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return ACT2FN["gelu_new"](gate) * up


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("function", [by_erf, up_first, written_out_by_hand])
def test_halves_of_one_tensor(function: object, rows: bool) -> None:
    operators, record = after(function, torch.randn(3, 32), rows=rows)
    assert operators[-1] == FUSED
    assert not {"aten.gelu.default", "aten.mul.Tensor", "aten.tanh.default"} & set(operators)
    assert [fired.rule for fired in record.fired] == ["geglu"]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_approximation_is_kept(approximate: str) -> None:
    x = 3 * torch.randn(3, 32)
    program = lowered(lambda x: gelu(x[:, :16], approximate=approximate) * x[:, 16:], x)
    for entry in PASSES:
        apply(entry, program.graph)
    (call,) = (node for node in program.graph.graph.nodes if str(node.target) == FUSED)
    assert call.args[1] == approximate
    exact = gelu(x[:, :16].double(), approximate=approximate) * x[:, 16:].double()
    torch.testing.assert_close(program.graph(x)[0].double(), exact, rtol=1e-5, atol=1e-6)


def test_two_linears_stay() -> None:
    """CANN has no operator for them."""
    operators, record = after(
        lambda x, gate, up: gelu(x @ gate) * (x @ up), torch.randn(3, 8), torch.randn(8, 16), torch.randn(8, 16)
    )
    assert operators == ["aten.mm.default", "aten.gelu.default", "aten.mm.default", "aten.mul.Tensor"]
    assert not record.fired
