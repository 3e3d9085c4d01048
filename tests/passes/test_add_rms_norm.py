"""add_rms_norm: what the rules leave alone, and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npu_compiler.passes import add_rms_norm, noop
from npu_compiler.passes.record import Pass, PassRecord
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(add_rms_norm.NAME, "", rules=add_rms_norm.RULES)


def norm(x: Tensor, weight: Tensor, dim: int = -1) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + 1e-6))


def after(function: object, *args: Tensor, dynamic: bool = False) -> tuple[list[str], PassRecord]:
    program = lowered(function, *args, dynamic=dynamic)  # type: ignore[arg-type]
    apply(Pass(noop.NAME, "", noop.run), program.graph)
    record = apply(PASS, program.graph)
    return calls(program.graph), record


def test_residual_stream_keeps_its_sum() -> None:
    """Before: add, pow, mean, add, rsqrt, mul, mul; the sum is used again. After: one call and the use of the sum."""

    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        total = x + residual
        return norm(total, weight) + total

    operators, record = after(block, torch.randn(3, 8), torch.randn(3, 8), torch.randn(8))
    assert operators == ["npu_fused.add_rms_norm.default", "aten.add.Tensor"]
    assert [fired.rule for fired in record.fired] == ["add_rms_norm"]


def test_dynamic_shapes() -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return norm(x + residual, weight)

    operators, _ = after(block, torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), dynamic=True)
    assert operators == ["npu_fused.add_rms_norm.default"]


def test_torch_rms_norm() -> None:
    """torch.nn.functional.rms_norm falls apart into the same arithmetic."""
    operators, _ = after(
        lambda x, r, w: torch.nn.functional.rms_norm(x + r, (8,), w, 1e-6),
        torch.randn(3, 8), torch.randn(3, 8), torch.randn(8),
    )  # fmt: skip
    assert operators == ["npu_fused.add_rms_norm.default"]


@pytest.mark.parametrize(
    ("function", "args", "reason"),
    [
        (lambda x, w: norm(x, w, dim=0), (torch.randn(8, 8), torch.randn(8)), "the mean is over dimensions [0]"),
        (lambda x, w: norm(x, w), (torch.randn(3, 8), torch.randn(3, 8)), "the weight has 2 dimensions"),
        (lambda x, w: norm(x, w), (torch.randn(3, 8), torch.randn(1)), "weight and last dimension: 1 is not 8"),
    ],
)
def test_left_out_with_a_reason(function: object, args: tuple[Tensor, ...], reason: str) -> None:
    operators, record = after(function, *args)
    assert not any(operator.startswith("npu_fused") for operator in operators)
    assert reason in [refused.reason for refused in record.refused]


def test_broadcast_addition_becomes_a_lone_norm() -> None:
    operators, record = after(lambda x, r, w: norm(x + r, w), torch.randn(3, 8), torch.randn(8), torch.randn(8))
    assert operators == ["aten.add.Tensor", "npu_fused.rms_norm.default"]
    assert any("the addition broadcasts" in refused.reason for refused in record.refused)


def test_inner_value_that_is_used_elsewhere() -> None:
    def leaks(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * (x * scale), scale

    operators, record = after(leaks, torch.randn(3, 8), torch.randn(8))
    assert not any(operator.startswith("npu_fused") for operator in operators)
    assert any("inner value rsqrt is also used by output" in refused.reason for refused in record.refused)


def test_near_miss_is_reported() -> None:
    def cubed(x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    _, record = after(
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)), torch.randn(3, 8), torch.randn(8)
    )
    assert any(
        "sum_1 is aten.sum.dim_IntList, the rule wants aten.mean.dim" in refused.reason for refused in record.refused
    )
