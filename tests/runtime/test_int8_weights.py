"""Rows of floats times int8 weights: values that integers hold badly or not at all, and rows of any length.

Where the processor has dot products of bytes, up to three rows are multiplied as integers, else as floats.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.runtime import reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [1, 2, 3, 5]
INNER, COLUMNS = 330, 37


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)


def operands(rows: int, dtype: torch.dtype, inner: int = INNER, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """x [rows, inner] of normal values, and weights [columns, inner]."""
    return torch.randn(rows, inner).to(dtype), torch.randint(-128, 128, (columns, inner), dtype=torch.int8)


def product(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    factor = torch.tensor([scale], dtype=x.dtype).npu()
    return torch_npu.npu_weight_quant_batchmatmul(x.npu(), weight.npu().t(), factor).cpu()


def check(x: Tensor, weight: Tensor, scale: float) -> None:
    """Row by row, as a row's tolerance follows its own largest result."""
    actual = product(x, weight, scale)
    assert actual.dtype == x.dtype
    for row, expected in zip(actual, x.double() @ weight.double().t() * scale, strict=True):
        largest = expected.abs().max().item() or 1.0
        reference.assert_close(row.double() / largest, expected / largest, x.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inner", "columns"), [(1, 1), (63, 16), (64, 17), (65, 2), (1100, 1029)])
def test_int8_weights_of_any_size(inner: int, columns: int, rows: int, dtype: torch.dtype) -> None:
    """The last one is shared among threads."""
    check(*operands(rows, dtype, inner, columns), 2.0**-10)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outlier", [1e2, 1e4, 6e4, 1e10])
def test_int8_weights_with_an_outlier_in_every_row(outlier: float, rows: int, dtype: torch.dtype) -> None:
    """Columns that do not see it keep the others' digits."""
    x, weight = operands(rows, dtype)
    x[:, 7] = min(outlier, torch.finfo(dtype).max)
    weight[::2, 7] = 0
    check(x, weight, 2.0**-10)
    unseen = (x.double() @ weight.double().t() * 2.0**-10)[:, ::2]
    reference.assert_close(product(x, weight, 2.0**-10)[:, ::2], unseen, dtype, factor=4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ROWS)
def test_int8_weights_times_zeros(rows: int, dtype: torch.dtype) -> None:
    x, weight = operands(rows, dtype)
    x[rows // 2] = 0
    check(x, weight, 2.0**-10)
    assert (product(x, weight, 2.0**-10)[rows // 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("power", [-135, -127, -98, -97, -96, -50, 60, 116])
def test_int8_weights_times_rows_of_any_magnitude(power: int, rows: int, dtype: torch.dtype) -> None:
    """Denormal, at both sides of what is scaled to integers, and large; the rows differ by powers of two."""
    x, weight = operands(rows, torch.float32)
    steps = 2.0 ** -torch.arange(rows)
    magnitude = 2.0**power / x.abs().amax(1) * steps * 1.5
    check((x.double() * magnitude.double()[:, None]).to(dtype), weight, 2.0 ** -max(-100, min(power, 100)))


@pytest.mark.parametrize("rows", ROWS)
def test_int8_weights_times_denormal_halves(rows: int) -> None:
    x, weight = operands(rows, torch.float32)
    check((x * 1e-6).half(), weight, 100.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_int8_weights_times_what_is_not_finite(value: float, rows: int, dtype: torch.dtype) -> None:
    """Infinity times no weight is no number, and the other rows are as they would be without."""
    x, weight = operands(rows, dtype)
    x[rows - 1, 300] = value
    weight[3, 300] = 0
    actual, expected = product(x, weight, 2.0**-10), x.double() @ weight.double().t() * 2.0**-10
    assert not expected[rows - 1].isfinite().any() and expected[rows - 1, 3].isnan()
    torch.testing.assert_close(actual[rows - 1].double(), expected[rows - 1], equal_nan=True)
    reference.assert_close(actual[: rows - 1], expected[: rows - 1], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("gap", [1, 64, 4000])
def test_int8_weights_with_gaps_between_columns(gap: int, rows: int, dtype: torch.dtype) -> None:
    """As a part of a packed weight lies in it."""
    x, weight = operands(rows, dtype, INNER, COLUMNS)
    packed = torch.full((COLUMNS, INNER + gap), 127, dtype=torch.int8)
    packed[:, :INNER] = weight
    part = packed.npu()[:, :INNER]
    assert part.stride() == (INNER + gap, 1)
    scale = torch.tensor([2.0**-10], dtype=dtype).npu()
    actual = torch_npu.npu_weight_quant_batchmatmul(x.npu(), part.t(), scale)
    reference.assert_close(actual, x.double() @ weight.double().t() * 2.0**-10, dtype)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("inner", [64 * 32767, 64 * 32767 + 1])
def test_int8_weights_of_very_long_rows(inner: int, rows: int) -> None:
    """The second digit of this x is -128 everywhere: its sums fill 32 bits with the first length, and would not hold
    the second one."""
    x = torch.full((rows, inner), 0.9921875, dtype=torch.bfloat16)
    weight = torch.full((3, inner), -128, dtype=torch.int8)
    weight[1] = 127
    weight[2, ::2] = 0
    check(x, weight, 2.0**-20)
