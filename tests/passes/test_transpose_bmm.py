"""transpose_bmm: the forms that latent attention gives, and what is left alone."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_compiler.passes import noop, transpose_bmm
from npu_compiler.passes.record import Pass, PassRecord
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(transpose_bmm.NAME, "", rules=transpose_bmm.RULES)


def after(function: object, *args: Tensor, **how: bool) -> tuple[list[str], PassRecord, object]:
    program = lowered(function, *args, **how)  # type: ignore[arg-type]
    apply(Pass(noop.NAME, "", noop.run), program.graph)
    record = apply(PASS, program.graph)
    return calls(program.graph), record, program.graph


def up_projection(x: Tensor, weight: Tensor) -> Tensor:
    """Latent attention's last step: a matrix for each head, then the heads of a token side by side."""
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1).reshape(x.shape[0], -1)


def test_a_reshape_becomes_a_view() -> None:
    x, weight = torch.randn(5, 3, 16), torch.randn(3, 16, 32)
    operators, record, graph = after(up_projection, x, weight, inference=True)
    assert operators == ["npu_fused.transpose_bmm.default", "aten._unsafe_view.default"]
    assert [fired.rule for fired in record.fired] == ["transpose_bmm"]
    torch.testing.assert_close(graph(x, weight)[0], up_projection(x, weight))  # type: ignore[operator]


def test_dynamic_tokens() -> None:
    x, weight = torch.randn(5, 3, 16), torch.randn(3, 16, 32)
    torch._dynamo.mark_dynamic(x, 0)
    operators, _, _ = after(up_projection, x, weight, dynamic=True, inference=True)
    assert "npu_fused.transpose_bmm.default" in operators
    assert "aten.bmm.default" not in operators


def test_a_transposed_view_that_nobody_copies_stays() -> None:
    """The rest of the program may rely on the strides of a view."""
    operators, record, _ = after(
        lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), torch.randn(5, 3, 16), torch.randn(3, 16, 32)
    )
    assert "aten.bmm.default" in operators
    assert not record.fired
