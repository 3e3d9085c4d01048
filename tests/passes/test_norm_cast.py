"""norm_cast: a router that reads the norm in float32 beside experts that read it in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_compiler.passes import add_rms_norm, noop, norm_cast
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered


def test_router_in_float32() -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor, router: Tensor) -> tuple[Tensor, ...]:
        total = x + residual
        wide = total.float()
        normed = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
        return normed.float() @ router, normed, total

    args = *(torch.randn(5, 64).bfloat16() for _ in range(2)), torch.rand(64).bfloat16(), torch.randn(64, 4)
    program = lowered(block, *args)
    expected = block(*args)
    for entry in (
        Pass(noop.NAME, "", noop.run),
        Pass(add_rms_norm.NAME, "", rules=add_rms_norm.RULES),
        Pass(norm_cast.NAME, "", rules=norm_cast.RULES),
    ):
        apply(entry, program.graph)
    assert calls(program.graph) == ["npu_fused.add_rms_norm_cast.default", "aten.mm.default"]
    routed, *rest = program.graph(*args)
    for got, want in zip(rest, expected[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    one_rounding_each = torch.finfo(torch.bfloat16).eps * expected[1].float().abs() @ args[3].abs()
    assert ((routed - expected[0]).abs() <= one_rounding_each).all()
