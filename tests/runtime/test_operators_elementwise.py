"""Elementwise operators on the device against PyTorch on the CPU, in fp64 where the dtype is a floating one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .operator_cases import assert_same_as_cpu, make

UNARY = [
    "abs",
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "ceil",
    "cos",
    "cosh",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "frac",
    "log",
    "log10",
    "log1p",
    "log2",
    "neg",
    "reciprocal",
    "round",
    "rsqrt",
    "sigmoid",
    "sign",
    "sin",
    "sinc",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
    "trunc",
    "signbit",
    "isfinite",
    "isinf",
    "isnan",
    "isposinf",
    "isneginf",
    "nan_to_num",
    "relu",
]
BINARY = [
    "add",
    "sub",
    "mul",
    "div",
    "maximum",
    "minimum",
    "atan2",
    "fmod",
    "remainder",
    "floor_divide",
    "pow",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_and",
    "logical_or",
    "logical_xor",
    "logaddexp",
    "logaddexp2",
    "xlogy",
]
INTEGER = [
    "add",
    "sub",
    "mul",
    "maximum",
    "minimum",
    "remainder",
    "floor_divide",
    "eq",
    "lt",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "gcd",
]
FLOATING = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 5), (), (0, 4), (2, 1, 7)]


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_unary(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        assert_same_as_cpu(getattr(torch, name), make(shape, dtype))
    assert_same_as_cpu(getattr(torch, name), make((4, 6), dtype).t())


@pytest.mark.parametrize("name", [n for n in UNARY if hasattr(torch.Tensor, n + "_") and n not in ("sinc",)])
def test_unary_in_place(name: str) -> None:
    def in_place(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        getattr(y, name + "_")()
        return y

    assert_same_as_cpu(in_place, make((3, 5), torch.float32))


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_binary_with_broadcasting(name: str, dtype: torch.dtype) -> None:
    operation = getattr(torch, name)
    for left, right in [((3, 5), (3, 5)), ((3, 1), (5,)), ((), (2, 3)), ((0, 3), (1, 3))]:
        assert_same_as_cpu(operation, make(left, dtype), make(right, dtype, seed=1))
    assert_same_as_cpu(operation, make((4, 6), dtype).t(), make((6, 4), dtype, seed=1))


@pytest.mark.parametrize(
    "name", [n for n in BINARY if n not in ("logaddexp", "logaddexp2", "maximum", "minimum", "atan2")]
)
def test_binary_with_a_number(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        if name.startswith("logical"):
            continue
        assert_same_as_cpu(lambda x: getattr(torch, name)(x, 3), make((3, 5), dtype))


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_integer(name: str, dtype: torch.dtype) -> None:
    assert_same_as_cpu(getattr(torch, name), make((3, 5), dtype), make((5,), dtype, seed=1))


MORE: dict[str, Callable[..., torch.Tensor]] = {
    "alpha": lambda x, y: torch.add(x, y, alpha=2.5),
    "rsub": lambda x, y: 2 - x,
    "clamp": lambda x, y: x.clamp(-0.2, 0.4),
    "clamp_tensor": lambda x, y: torch.clamp(x, max=y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, y, y, value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, y, value=0.5),
    "where": lambda x, y: torch.where(x > y, x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, -1.5),
    "div_floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "div_trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "scalar_power": lambda x, y: 2.0**x,
    "isclose": lambda x, y: torch.isclose(x, y),
    "promotion": lambda x, y: x + torch.ones(5, dtype=torch.int64, device=x.device),
    "chain": lambda x, y: ((x * y + 1).sigmoid() - y).mul_(x),
    "silu": lambda x, y: torch.nn.functional.silu(x),
    "gelu_tanh": lambda x, y: torch.nn.functional.gelu(x, approximate="tanh"),
    "softplus": lambda x, y: torch.nn.functional.softplus(x),
    "leaky_relu": lambda x, y: torch.nn.functional.leaky_relu(x, 0.2),
    "hardswish": lambda x, y: torch.nn.functional.hardswish(x),
    "elu": lambda x, y: torch.nn.functional.elu(x),
    "glu": lambda x, y: torch.nn.functional.glu(x, 0),
}


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more(name: str, dtype: torch.dtype) -> None:
    assert_same_as_cpu(MORE[name], make((4, 5), dtype), make((4, 5), dtype, seed=1))


CASTS = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


@pytest.mark.parametrize("source", CASTS, ids=str)
def test_casts(source: torch.dtype) -> None:
    for target in CASTS:
        x = make((3, 5), source)
        if source.is_floating_point:
            x = x.abs() * 4
        assert_same_as_cpu(lambda t: t.to(target), x)  # noqa: B023
        assert_same_as_cpu(lambda t: t.t().to(target), x)  # noqa: B023


def test_gelu_is_the_tanh_form_as_cann_documents() -> None:
    x = make((3, 5), torch.float32)
    got = torch.nn.functional.gelu(x.npu(), approximate="none").cpu()
    torch.testing.assert_close(got, torch.nn.functional.gelu(x, approximate="tanh"))


def test_bfloat16_rounds_to_nearest_even() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    x[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan"), float("inf")])
    got = x.npu().to(torch.bfloat16).cpu()
    expected = x.to(torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()], expected[~got.isnan()])
