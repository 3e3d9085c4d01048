"""Prepared operators against PyTorch on the CPU: every layout, eager, and captured and replayed with other values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.runtime import reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int32, torch.int64]
Function = Callable[..., Tensor | tuple[Tensor, ...]]
# One unit in the last place of the dtype, relative; kernels and PyTorch order their float sums differently.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)


def values(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random values: floats of both signs away from zero, integers -9 to 9, booleans."""
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    if not dtype.is_floating_point:
        return torch.randint(-9, 10, shape, dtype=dtype)
    return ((torch.rand(shape) + 0.25) * torch.where(torch.rand(shape) > 0.5, 2.0, -2.0)).to(dtype)


def laid_out(layout: str, dtype: torch.dtype) -> Tensor:
    """A tensor that broadcasts with (3, 5, 20), in the given layout. Call it again for other values."""
    views: dict[str, Callable[[], Tensor]] = {
        "contiguous": lambda: values((3, 5, 20), dtype),
        "one": lambda: values((1, 1, 1), dtype),
        "scalar": lambda: values((), dtype),
        "row": lambda: values((20,), dtype),
        "column": lambda: values((5, 1), dtype),
        "transposed": lambda: values((20, 5, 3), dtype).permute(2, 1, 0),
        "sliced": lambda: values((3, 7, 43), dtype)[:, 1:6, 2:42:2],
        "expanded": lambda: values((3, 1, 20), dtype).expand(3, 5, 20),
    }
    return views[layout]()


LAYOUTS = ["contiguous", "one", "scalar", "row", "column", "transposed", "sliced", "expanded"]


def on_device(tensor: Tensor) -> Tensor:
    """The same layout on the device: the storage is copied, the view taken again."""
    base = tensor.untyped_storage()
    flat = torch.empty(0, dtype=tensor.dtype).set_(base).npu()
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def refill(device: Tensor, tensor: Tensor) -> None:
    """Puts another tensor of the same layout into the memory of `device`."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    device.as_strided((flat.numel(),), (1,), 0).copy_(flat)


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def compare(
    given: Tensor | tuple[Tensor, ...], right: Tensor | tuple[Tensor, ...], scale: float, noise: float = 0.0
) -> None:
    for ours, theirs in zip(as_tuple(given), as_tuple(right), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        tolerance = TOLERANCE.get(theirs.dtype, 0.0) * scale
        torch.testing.assert_close(ours.cpu(), theirs, rtol=tolerance, atol=tolerance + noise, equal_nan=True)


def check(function: Function, make: Callable[[], Sequence[Tensor]], scale: float = 1.0, noise: float = 0.0) -> None:
    """`function` on the device, eager and replayed from a graph, gives what it gives on the CPU.

    Inputs that `function` writes are compared too. A result may differ by `scale` roundings of itself, and by `noise`.
    """
    inputs = list(make())
    device = [on_device(tensor) for tensor in inputs]
    compare(function(*device), function(*inputs), scale, noise)
    for ours, theirs in zip(device, inputs, strict=True):
        compare(ours, theirs, scale)
    graph = torch.npu.NPUGraph()
    stream = torch.npu.Stream()
    torch.npu.synchronize()
    # Not `torch.npu.graph`, which collects garbage each time: that would be most of this module's time.
    with torch.npu.stream(stream):
        graph.capture_begin()
        captured = function(*device)
        graph.capture_end()
    torch.npu.synchronize()
    for _ in range(2):
        inputs = list(make())
        for ours, theirs in zip(device, inputs, strict=True):
            refill(ours, theirs)
        graph.replay()
        compare(captured, function(*inputs), scale, noise)
        for ours, theirs in zip(device, inputs, strict=True):
            compare(ours, theirs, scale)


def add_three_times(a: Tensor, b: Tensor) -> Tensor:
    """a + 3 b, rounded once. PyTorch's CPU kernel rounds 3 b to 16 bits before it adds."""
    if a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16):
        return torch.add(a.float(), b.float(), alpha=3).to(a.dtype)
    return torch.add(a, b, alpha=3)


BINARY: dict[str, Function] = {
    "add": lambda a, b: a + b,
    "add_alpha": add_three_times,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
}


@pytest.mark.parametrize("name", [*BINARY, "div"])
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_binary(name: str, dtype: torch.dtype) -> None:
    if name == "div" and not dtype.is_floating_point:
        pytest.skip("true division of integers is ATen's")
    function = BINARY.get(name, torch.div)
    for left, right in [("contiguous", other) for other in LAYOUTS] + [(one, "contiguous") for one in LAYOUTS[1:]]:
        check(function, lambda a=left, b=right: [laid_out(a, dtype), laid_out(b, dtype)])  # type: ignore[misc]


@pytest.mark.parametrize("left", ["transposed", "sliced"])
@pytest.mark.parametrize("right", ["transposed", "sliced", "row"])
def test_binary_of_views(left: str, right: str) -> None:
    check(lambda a, b: a * b, lambda: [laid_out(left, torch.float32), laid_out(right, torch.float32)])


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_in_place(dtype: torch.dtype) -> None:
    check(lambda a, b: a.add_(b), lambda: [laid_out("sliced", dtype), laid_out("row", dtype)])
    check(lambda a, b: a.mul_(b), lambda: [laid_out("transposed", dtype), laid_out("contiguous", dtype)])
    check(lambda a: a.sub_(2), lambda: [laid_out("contiguous", dtype)])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", [0.1, 3, -2.5])
def test_number_on_the_right(dtype: torch.dtype, number: float) -> None:
    functions: list[Function] = [
        lambda a: a + number,
        lambda a: a - number,
        lambda a: a * number,
        lambda a: a / number,
        lambda a: a > number,
        lambda a: a == number,
        lambda a: torch.add(a, number, alpha=0.5),
    ]
    for function in functions:
        for layout in ("contiguous", "transposed", "scalar"):
            check(function, lambda layout=layout: [laid_out(layout, dtype)])  # type: ignore[misc]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_on_the_right(dtype: torch.dtype) -> None:
    functions: list[Function] = [
        lambda a: a + 3,
        lambda a: a * -2,
        lambda a: a >= 2,
        lambda a: a != 0,
        lambda a: a < 2.5,
    ]
    for function in functions:
        check(function, lambda: [laid_out("sliced", dtype)])


UNARY: dict[str, Function] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "reciprocal": torch.reciprocal,
    "sin": torch.sin,
    "cos": torch.cos,
    "square": lambda a: a.pow(2),
    "cube": lambda a: a.pow(3),
    "inverse": lambda a: a.pow(-1),
}


@pytest.mark.parametrize("name", [*UNARY, "sqrt", "rsqrt", "power of a half"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_unary(name: str, dtype: torch.dtype) -> None:
    roots: dict[str, Function] = {"sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "power of a half": lambda a: a.pow(0.5)}
    for layout in LAYOUTS:
        if name in roots:
            check(roots[name], lambda layout=layout: [laid_out(layout, dtype).abs()])  # type: ignore[misc]
        else:
            check(UNARY[name], lambda layout=layout: [laid_out(layout, dtype)])  # type: ignore[misc]


@pytest.mark.parametrize("name", ["exp", "sigmoid", "silu", "tanh", "relu", "neg"])
def test_unary_of_extreme_values(name: str) -> None:
    extremes = [0.0, -0.0, 1e-30, -1e-30, 87.0, 89.0, -87.0, -104.0, float("inf"), float("-inf"), float("nan")]
    if name == "silu":
        extremes.remove(float("-inf"))  # NaN or -0, by the order of operations
    check(UNARY[name], lambda: [torch.tensor(extremes)])


def test_maximum_and_comparisons_with_nan() -> None:
    nan, inf = float("nan"), float("inf")
    left, right = torch.tensor([nan, 1.0, nan, inf, 0.0]), torch.tensor([1.0, nan, nan, -inf, -0.0])
    for name in ("maximum", "minimum", "eq", "ne", "lt", "ge"):
        check(BINARY[name], lambda: [left.clone(), right.clone()])


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool])
def test_choice(dtype: torch.dtype) -> None:
    def inputs(mask: str, left: str, right: str) -> list[Tensor]:
        return [laid_out(mask, torch.bool), laid_out(left, dtype), laid_out(right, dtype)]

    for mask, left, right in [
        ("contiguous", "contiguous", "contiguous"),
        ("row", "transposed", "scalar"),
        ("sliced", "column", "row"),
    ]:
        check(torch.where, lambda m=mask, a=left, b=right: inputs(m, a, b))  # type: ignore[misc]
    fill = True if dtype == torch.bool else 3
    check(lambda a, m: a.masked_fill_(m, fill), lambda: [laid_out("sliced", dtype), laid_out("row", torch.bool)])
    check(
        lambda a, m, v: a.masked_fill_(m, v),
        lambda: [laid_out("contiguous", dtype), laid_out("column", torch.bool), laid_out("scalar", dtype)],
    )


def test_logic() -> None:
    functions: list[Function] = [torch.logical_and, torch.logical_or, torch.logical_xor, torch.bitwise_and]
    for function in functions:
        check(function, lambda: [laid_out("contiguous", torch.bool), laid_out("row", torch.bool)])
    check(torch.logical_not, lambda: [laid_out("transposed", torch.bool)])


@pytest.mark.parametrize("source", [*FLOATS, *INTEGERS, torch.bool])
@pytest.mark.parametrize("target", [*FLOATS, *INTEGERS, torch.bool])
def test_casts_and_copies(source: torch.dtype, target: torch.dtype) -> None:
    for layout in ("contiguous", "transposed", "sliced", "scalar"):
        check(lambda a: a.to(target), lambda layout=layout: [laid_out(layout, source)])  # type: ignore[misc]
    for to, since in [("contiguous", "transposed"), ("sliced", "contiguous"), ("transposed", "row")]:
        check(
            lambda a, b: a.copy_(b),
            lambda to=to, since=since: [laid_out(to, target), laid_out(since, source)],  # type: ignore[misc]
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits(dtype: torch.dtype) -> None:
    ties = torch.tensor(
        [1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, 1e-7, 6e-8, 2e-8, 3e38]
    )
    check(lambda a: a.to(dtype), lambda: [torch.cat([ties, -ties])])
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    check(lambda a: a.float(), lambda: [every.clone()])
    check(lambda a: a.to(torch.bfloat16 if dtype == torch.float16 else torch.float16), lambda: [every.clone()])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.bool])
def test_fill(dtype: torch.dtype) -> None:
    check(lambda a: a.fill_(1), lambda: [laid_out("sliced", dtype)])
    check(lambda a: a.zero_(), lambda: [laid_out("transposed", dtype)])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.bool])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat(dtype: torch.dtype, dim: int) -> None:
    def parts() -> list[Tensor]:
        first, second = laid_out("contiguous", dtype), laid_out("transposed", dtype)
        return [first, second, laid_out("sliced", dtype).narrow(dim, 1, 2)]

    check(lambda *tensors: torch.cat(tensors, dim), parts)


@pytest.mark.parametrize("index_dtype", INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_reading_slices(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    def index(limit: int, *shape: int) -> Tensor:
        return torch.randint(0, limit, shape, dtype=index_dtype)

    for layout in ("contiguous", "transposed", "sliced"):
        for dim, size in enumerate((3, 5, 20)):
            check(
                lambda a, i, dim=dim: a.index_select(dim, i),  # type: ignore[misc]
                lambda layout=layout, size=size: [laid_out(layout, dtype), index(size, 4)],  # type: ignore[misc]
            )
    if dtype.is_floating_point:
        check(lambda i, w: torch.nn.functional.embedding(i, w), lambda: [index(9, 2, 3), values((9, 17), dtype)])
    check(lambda a, i: a[i], lambda: [values((6, 2, 3), dtype), index(6, 4)])
    check(lambda a, i: a[:, i], lambda: [values((6, 7, 3), dtype), index(7, 2, 2) - 7])
    check(lambda a, i: a.gather(1, i), lambda: [values((4, 30), dtype), torch.randint(0, 30, (4, 6))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_writing_slices(dtype: torch.dtype) -> None:
    def index(limit: int, count: int) -> Tensor:
        return torch.randperm(limit)[:count]

    def put(a: Tensor, i: Tensor, v: Tensor) -> Tensor:
        a[:, i] = v
        return a

    check(put, lambda: [values((2, 8, 3), dtype), index(8, 4), values((2, 4, 3), dtype)])
    check(put, lambda: [values((2, 8, 3), dtype), index(8, 4), values((3,), dtype)])
    check(put, lambda: [values((2, 8, 3), dtype), index(8, 1), values((2, 1, 3), dtype)])
    check(
        lambda a, i, v: a.index_copy_(2, i, v),
        lambda: [values((1, 2, 8, 3), dtype), index(8, 2), values((1, 2, 2, 3), dtype)],
    )
    check(
        lambda a, i, v: a.scatter_(1, i, v),
        lambda: [values((4, 30), dtype), torch.stack([index(30, 6) for _ in range(4)]), values((4, 6), dtype)],
    )


def test_index_outside_is_an_error_at_the_next_synchronisation() -> None:
    # The stream is lost after a failed kernel, as on a card, so a process of its own looks at it.
    import subprocess
    import sys

    program = (
        "import torch\ntorch.zeros(4, 3).npu().index_select(0, torch.tensor([1, 4]).npu())\ntorch.npu.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "index 4 at position 1 is outside of 0..3" in done.stdout + done.stderr


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 7, 16, 129, 4096])
def test_reductions(dtype: torch.dtype, width: int) -> None:
    functions: list[Function] = [
        lambda a: a.amax(-1),
        lambda a: a.amin(-1, keepdim=True),
        lambda a: a.argmax(-1),
        lambda a: a.max(-1).indices,
        lambda a: a.max(-1, keepdim=True).values,
        lambda a: torch.softmax(a, -1),
    ]
    for function in functions:
        for make in rows_of(width, dtype):
            check(function, make, scale=16)


def rows_of(width: int, dtype: torch.dtype) -> list[Callable[[], list[Tensor]]]:
    """Makers of six rows of `width` values: contiguous ones, and a part of wider ones in another order."""
    return [
        lambda: [values((3, 2, width), dtype)],
        lambda: [values((2, 3, width + 5), dtype).transpose(0, 1)[..., 2 : 2 + width]],
    ]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 7, 16, 129, 4096])
def test_sums(dtype: torch.dtype, width: int) -> None:
    """Against float64. Values of both signs cancel, so a sum's error is not measured by the sum: each of n values goes
    through some 100 additions at most, each off by half a unit in the last place of a part of the sum, up or down. The
    error's standard deviation is below 10 of these half units of the values' norm, which allows 5 deviations.
    """

    def exactly(a: Tensor) -> Tensor:
        return a.double() if a.device.type == "cpu" else a

    functions: list[tuple[Function, int, int]] = [
        (lambda a: exactly(a).sum(-1).to(a.dtype), width, 1),
        (lambda a: exactly(a).mean(-1, keepdim=True).to(a.dtype), width, width),
        (lambda a: exactly(a).sum((1, 2)).to(a.dtype), 2 * width, 1),
        (lambda a: exactly(a).mean((-1, -2), keepdim=True).to(a.dtype), 2 * width, 2 * width),
    ]
    half_unit, root_mean_square = torch.finfo(torch.float32).eps / 2, 1.6
    for function, count, divisor in functions:
        noise = 50 * half_unit * root_mean_square * count**0.5 / divisor
        for make in rows_of(width, dtype):
            check(function, make, noise=noise)


def test_sums_of_many_equal_values_are_added_up_in_blocks() -> None:
    """Equal values are rounded the same way again and again, so a single chain of additions shows. In blocks of 32 with
    8 lanes, a value goes through 102 additions, each off by half a unit in the last place at most.
    """
    for value in (0.1, 0.3, 0.7, 1.1):
        row = torch.full((65536,), value)
        torch.testing.assert_close(
            row.npu().sum().cpu().double(), row.double().sum(), rtol=102 * torch.finfo(torch.float32).eps / 2, atol=0.0
        )


@pytest.mark.parametrize("dtype", FLOATS)
def test_reductions_with_special_values(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[1.0, 3.0, 3.0, -inf], [nan, inf, nan, 0.0], [-inf, -inf, -inf, -inf], [0.0, -0.0, inf, inf]]
    functions: list[Function] = [lambda a: a.argmax(-1), lambda a: a.amax(-1), lambda a: a.amin(-1), torch.Tensor.max]
    for function in functions:
        check(function, lambda: [torch.tensor(rows, dtype=dtype)])
        check(function, lambda: [torch.tensor(rows, dtype=dtype).repeat(1, 9)])
    finite = torch.tensor([[1e4, -1e4, 0.0], [-inf, 0.0, 1.0]], dtype=dtype)
    check(lambda a: torch.softmax(a, -1), lambda: [finite.clone()])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 2, 7, 32, 40, 64])
@pytest.mark.parametrize(("inner", "columns"), [(1, 1), (7, 5), (32, 96), (130, 67), (256, 300)])
def test_products(dtype: torch.dtype, rows: int, inner: int, columns: int) -> None:
    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape).div(inner**0.5).to(dtype)

    check(lambda a, b: a @ b, lambda: [matrix(rows, inner), matrix(inner, columns)], scale=4)
    check(torch.nn.functional.linear, lambda: [matrix(rows, inner), matrix(columns, inner)], scale=4)
    check(
        torch.nn.functional.linear,
        lambda: [matrix(rows, inner), matrix(columns, inner), matrix(columns)],
        scale=4,
    )
    check(lambda a, b: a @ b, lambda: [matrix(rows, inner), matrix(inner, 2 * columns)[:, ::2]], scale=4)


@pytest.mark.parametrize("rows", [1, 3, 4, 16, 23, 50])
@pytest.mark.parametrize(("inner", "columns"), [(96, 544), (200, 529)])
def test_products_with_weights_apart(rows: int, inner: int, columns: int) -> None:
    """Bfloat16 by tiles (AMX) where there are any: columns of the weight with and without gaps, results in a wider
    matrix, which keeps what lies beside them."""
    dtype = torch.bfloat16
    x, wide = torch.randn(rows, inner + 8).to(dtype), torch.randn(columns, inner + 24).div(inner**0.5).to(dtype)
    bias, given = torch.randn(columns).to(dtype), x.npu()[:, :inner]
    for weight in (wide[:, :inner], wide[:, 24:].contiguous()):
        expected = x[:, :inner].double() @ weight.double().t()
        out = torch.full((rows, columns + 3), 7.0, dtype=dtype, device="npu")
        torch.mm(given, on_device(weight).t(), out=out[:, :columns])
        reference.assert_close(out[:, :columns], expected, dtype)
        assert bool((out[:, columns:] == 7).all())
        scaled = torch.addmm(bias.npu(), given, on_device(weight).t(), beta=0.5, alpha=2)
        reference.assert_close(scaled, 2 * expected + 0.5 * bias.double(), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(70, 424, 130), (545, 67, 96), (50, 1100, 1090)])
def test_products_of_many_rows(dtype: torch.dtype, rows: int, inner: int, columns: int) -> None:
    """Bfloat16 by panels of tiles (AMX) where there are any: several blocks of rows, of depth and of columns."""
    x, weight = torch.randn(rows, inner + 5).to(dtype), torch.randn(columns, inner).div(inner**0.5).to(dtype)
    bias, given = torch.randn(rows, columns).to(dtype), x.npu()[:, :inner]
    expected = x[:, :inner].double() @ weight.double().t()
    reference.assert_close(torch.nn.functional.linear(given, weight.npu()), expected, dtype)
    reference.assert_close(given @ weight.t().contiguous().npu(), expected, dtype)
    for w in (weight.t().contiguous().npu(), weight.npu().t()):
        scaled = torch.addmm(bias.npu(), given, w, beta=0.5, alpha=2)
        reference.assert_close(scaled, 2 * expected + 0.5 * bias.double(), dtype)
    batches = given[: rows // 5 * 5].reshape(5, -1, inner) @ weight.npu().t()
    reference.assert_close(batches.reshape(-1, columns), expected[: rows // 5 * 5], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_batched_products(dtype: torch.dtype, rows: int) -> None:
    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape).div(4).to(dtype)

    check(torch.bmm, lambda: [matrix(4, rows, 16), matrix(4, 16, 50)], scale=4)
    check(torch.bmm, lambda: [matrix(4, rows, 16), matrix(4, 50, 16).transpose(1, 2)], scale=4)
    check(torch.matmul, lambda: [matrix(2, 3, rows, 16), matrix(2, 3, 21, 16).transpose(2, 3)], scale=4)
    check(torch.matmul, lambda: [matrix(2, 3, rows, 16), matrix(16, 21)], scale=4)
    check(torch.bmm, lambda: [matrix(rows, 4, 16).transpose(0, 1), matrix(4, 16, 33)], scale=4)
    check(torch.bmm, lambda: [matrix(rows, 4, 48).transpose(0, 1), matrix(4, 35, 48).transpose(1, 2)], scale=8)
    check(torch.bmm, lambda: [matrix(4, rows, 20), matrix(4, 20, 150)], scale=4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threads", [1, 3])
def test_products_that_threads_share(threads: int, dtype: torch.dtype) -> None:
    """A million weights and more; columns and depth that end within a vector. The result is the same for any number
    of threads. A stream's worker takes the number when it first needs it, so each gets a stream of its own."""
    rows, inner, columns = 2, 1030, 1041
    x = torch.randn(rows, inner).div(inner**0.5).to(dtype)
    weight, bias = torch.randn(columns, inner).to(dtype), torch.randn(columns).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            with torch.npu.stream(torch.npu.Stream()):
                results.append(torch.nn.functional.linear(x.npu(), weight.npu(), bias.npu()).cpu())
                results.append((x.npu() @ weight.t().contiguous().npu()).cpu())
    finally:
        torch.set_num_threads(before)
    reference.assert_close(results[0], x.double() @ weight.double().t() + bias.double(), dtype, factor=2)
    reference.assert_close(results[1], x.double() @ weight.double().t(), dtype, factor=2)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_addmm_scales_and_ignores_the_bias_without_beta() -> None:
    def inputs() -> list[Tensor]:
        return [torch.randn(20), torch.randn(2, 30), torch.randn(30, 20)]

    def many() -> list[Tensor]:
        return [tensor.bfloat16() for tensor in (torch.randn(9, 40), torch.randn(9, 50), torch.randn(40, 50))]

    check(lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), inputs, scale=8)
    check(lambda c, a, b: torch.addmm(c, a, b.t(), beta=0.5, alpha=2), many, scale=8)
    check(
        lambda c, a, b: torch.addmm(c, a, b, beta=0),
        lambda: [torch.full((20,), float("nan")), *inputs()[1:]],
        scale=8,
    )


def test_empty_tensors() -> None:
    check(lambda a, b: a + b, lambda: [torch.zeros(0, 4), torch.zeros(4)])
    check(lambda a: a * 2, lambda: [torch.zeros(3, 0)])
    check(lambda a, b: torch.cat([a, b]), lambda: [torch.zeros(0, 4), torch.ones(2, 4)])
    check(lambda a: a.sum(-1), lambda: [torch.zeros(3, 0)])
    check(lambda a, i: a.index_select(0, i), lambda: [torch.ones(3, 2), torch.zeros(0, dtype=torch.int64)])
    check(lambda a, b: a @ b, lambda: [torch.zeros(0, 4), torch.ones(4, 3)])
