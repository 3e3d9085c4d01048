"""mul_add: one kernel for a product and an addition, with broadcasting, and numbers left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npu_compiler.fusion_kernels import register
from npu_compiler.passes import mul_add
from npu_compiler.passes.record import Pass, PassRecord
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(mul_add.NAME, "", rules=mul_add.RULES)


def after(function: object, *args: Tensor, **how: bool) -> tuple[list[str], PassRecord, object]:
    program = lowered(function, *args, **how)  # type: ignore[arg-type]
    record = apply(PASS, program.graph)
    return calls(program.graph), record, program.graph


def test_all_three_broadcast() -> None:
    x, y, z = torch.randn(3, 1, 8), torch.randn(5, 1), torch.randn(3, 5, 8)
    operators, _, graph = after(lambda z, y, x: z + y * x, z, y, x)
    assert operators == ["npu_fused.mul_add.default"]
    torch.testing.assert_close(graph(y, x, z)[0], z + y * x)  # type: ignore[operator]


def test_each_addition_takes_one_product() -> None:
    """x * cos + y * sin: one of the two products goes into the addition, the other stays."""
    args = [torch.randn(4, 8) for _ in range(4)]
    operators, record, graph = after(lambda a, b, c, d: a * b + c * d, *args)
    assert sorted(operators) == ["aten.mul.Tensor", "npu_fused.mul_add.default"]
    assert len(record.fired) == 1
    torch.testing.assert_close(graph(*args)[0], args[0] * args[1] + args[2] * args[3])  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64], ids=str)
def test_dtypes_that_the_device_has_no_kernel_for(dtype: torch.dtype) -> None:
    numbers = torch.arange(8).to(dtype)
    operators, record, _ = after(lambda x, y, z: x * y + z, numbers, numbers + 1, numbers + 2)
    assert "npu_fused.mul_add.default" not in operators
    assert any(f"{dtype} is not one of" in refused.reason for refused in record.refused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_device(dtype: torch.dtype) -> None:
    x, y, z = (torch.randn(size, dtype=dtype) for size in ((3, 1, 8), (5, 1), (3, 5, 8)))
    register()
    got = torch.ops.npu_fused.mul_add(x.npu(), y.npu(), z.npu()).cpu()
    torch.testing.assert_close(got, (x.double() * y.double() + z.double()).to(dtype))


def test_dynamic_sizes() -> None:
    x = torch.randn(5, 8)
    torch._dynamo.mark_dynamic(x, 0)
    operators, _, _ = after(lambda x, y, z: x * y + z, x, torch.randn(8), torch.randn(8), dynamic=True)
    assert operators == ["npu_fused.mul_add.default"]
