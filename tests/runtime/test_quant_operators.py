"""Quantisation and int8 matmuls against references written from the documents' formulas."""

from __future__ import annotations

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.runtime import reference


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def int8(values: Tensor) -> Tensor:
    return values.round().clamp(-128, 127).to(torch.int8)


def near(actual: Tensor, expected: Tensor) -> None:
    """Int8 results may differ by one where the float32 value lies on a rounding edge."""
    difference = (actual.cpu().int() - expected.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 64), (2, 3, 33)])
def test_dynamic_quant(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    x[0] *= 100
    y, scale = torch_npu.npu_dynamic_quant(x.npu())
    expected = x.double().abs().amax(-1) / 127
    assert y.dtype == torch.int8 and scale.dtype == torch.float32
    reference.assert_close(scale, expected, torch.float32)
    near(y, int8(x.double() / expected[..., None]))
    assert (y.cpu().abs().amax(-1) == 127).all(), "every row uses the whole range"


def test_dynamic_quant_of_zeros_and_with_smooth_scales() -> None:
    x, smooth = torch.randn(3, 16).half(), torch.rand(16).half() + 0.5
    x[1] = 0
    y, scale = torch_npu.npu_dynamic_quant(x.npu(), smooth_scales=smooth.npu())
    smoothed = x.double() * smooth.double()
    reference.assert_close(scale, smoothed.abs().amax(-1) / 127, torch.float32)
    assert (y.cpu()[1] == 0).all() and scale.cpu()[1] == 0
    near(y[::2], int8(smoothed[::2] / (smoothed[::2].abs().amax(-1, True) / 127)))


def test_quantize_saturates() -> None:
    x = torch.tensor([[-300.0, -1.5, 0.5, 2.5, 300.0, 1.0]])
    scale, zero = torch.tensor([1.0]), torch.tensor([0.0])
    y = torch_npu.npu_quantize(x.npu(), scale.npu(), zero.npu(), torch.qint8, -1, False)
    assert y.cpu().to(torch.int8).tolist() == [[-128, -2, 0, 2, 127, 1]], "to nearest even, then saturated"


def test_quantize_per_channel() -> None:
    x, scale, zero = torch.randn(5, 12) * 4, torch.rand(12) * 10, torch.randint(-5, 5, (12,)).float()
    y = torch_npu.npu_quantize(x.npu(), scale.npu(), zero.npu(), torch.qint8, -1, False)
    near(y.cpu().to(torch.int8), int8(x.double() * scale.double() + zero.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "low", "high"), [(torch.qint8, -128, 127), (torch.quint8, 0, 255)])
@pytest.mark.parametrize("axis", [0, -1])
def test_quantize_divides(axis: int, kind: torch.dtype, low: int, high: int, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 6).mul(4).to(dtype)
    scale, zero = torch.rand(x.shape[axis]) * 0.1 + 0.01, torch.randint(-5, 6, (x.shape[axis],), dtype=torch.int32)
    scale = scale.to(dtype)
    y = torch_npu.npu_quantize(x.npu(), scale.npu(), zero.npu(), kind, axis)
    shape = (4, 1, 1) if axis == 0 else (6,)
    expected = x.double() / scale.double().view(shape) + zero.double().view(shape)
    actual = y.cpu().double()
    assert (actual - expected.round().clamp(low, high)).abs().max() <= 1
    assert actual.min() >= low and actual.max() <= high


def test_quantize_per_tensor_without_zero_point_rounds_to_even() -> None:
    x = torch.tensor([[0.5, 1.5, -0.5, -1.5, 300.0, -300.0]])
    y = torch_npu.npu_quantize(x.npu(), torch.ones(1).npu(), None, torch.qint8)
    assert y.cpu().tolist() == [[0, 2, 0, -2, 127, -128]]


def test_quantize_refuses() -> None:
    x = torch.zeros(2, 6).npu()
    with pytest.raises(RuntimeError, match="one for each of x along axis"):
        torch_npu.npu_quantize(x, torch.ones(5).npu(), None, torch.qint8, 1)
    with pytest.raises(RuntimeError, match="only with a bfloat16 x"):
        torch_npu.npu_quantize(x, torch.ones(6).bfloat16().npu(), None, torch.qint8, 1)


WIDTHS = [32, 77]
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", HALVES)
def test_add_rms_norm_quant(dtype: torch.dtype, width: int, divide: bool) -> None:
    x1, x2, gamma = torch.randn(4, width).to(dtype), torch.randn(4, width).to(dtype), torch.rand(width).to(dtype)
    scales, zeros = torch.rand(width) * 0.1 + 0.02, torch.randint(-3, 4, (width,)).to(dtype)
    factor = (scales if divide else 1 / scales).to(dtype)
    y, _, total = torch_npu.npu_add_rms_norm_quant(
        x1.npu(), x2.npu(), gamma.npu(), factor.npu(), zeros.npu(), epsilon=1e-6, div_mode=divide
    )
    assert torch.equal(total.cpu(), x1 + x2)
    normed = reference.rms_norm(x1 + x2, gamma, 1e-6)[0]
    scaled = normed / factor.double() if divide else normed * factor.double()
    near(y, int8(scaled + zeros.double()))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", HALVES)
def test_add_rms_norm_dynamic_quant(dtype: torch.dtype, width: int) -> None:
    x1, x2, gamma, smooth, beta = (torch.randn(s).to(dtype) for s in ((4, width), (4, width), *[(width,)] * 3))
    y1, y2, total, scale1, scale2 = torch_npu.npu_add_rms_norm_dynamic_quant(
        x1.npu(), x2.npu(), gamma.npu(), smooth_scale1=smooth.npu(), smooth_scale2=smooth.abs().npu(), beta=beta.npu()
    )
    assert torch.equal(total.cpu(), x1 + x2)
    normed = reference.rms_norm(x1 + x2, gamma, 1e-6)[0] + beta.double()
    for y, scale, factor in ((y1, scale1, smooth), (y2, scale2, smooth.abs())):
        values = normed * factor.double()
        expected = values.abs().amax(-1) / 127
        reference.assert_close(scale, expected, torch.float32, factor=4)
        near(y, int8(values / expected[:, None]))


def test_a_captured_quantisation_reads_its_scales_at_replay() -> None:
    """One task a call, and nothing of its operands is kept from the capture."""
    x, smooth = torch.ones(3, 40).half().npu(), torch.ones(40).half().npu()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y, scale = torch_npu.npu_dynamic_quant(x, smooth_scales=smooth)
    fresh, factors = torch.randn(3, 40).half(), (torch.rand(40) + 0.5).half()
    x.copy_(fresh)
    smooth.copy_(factors)
    graph.replay()
    values = fresh.double() * factors.double()
    expected = values.abs().amax(-1) / 127
    reference.assert_close(scale, expected, torch.float32, factor=4)
    near(y, int8(values / expected[:, None]))


def test_rows_of_a_view_are_quantised_where_they_lie() -> None:
    packed = torch.randn(5, 3, 48).bfloat16()
    y, scale = torch_npu.npu_dynamic_quant(packed.npu()[:, 1, 8:40])
    values = packed[:, 1, 8:40].double()
    expected = values.abs().amax(-1) / 127
    reference.assert_close(scale, expected, torch.float32, factor=4)
    near(y, int8(values / expected[:, None]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_token", [True, False])
def test_quant_matmul(per_token: bool, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and not per_token:
        pytest.skip("float16 without per-token scales takes a packed scale: test_quant_matmul_with_a_packed_scale")
    x = torch.randint(-127, 128, (5, 64), dtype=torch.int8)
    weight = torch.randint(-127, 128, (64, 32), dtype=torch.int8)
    scale, token = torch.rand(32) * 1e-3, torch.rand(5) + 0.5
    scale = scale if per_token or dtype != torch.bfloat16 else scale.bfloat16()
    actual = torch_npu.npu_quant_matmul(
        x.npu(), weight.npu(), scale.npu(), pertoken_scale=token.npu() if per_token else None, output_dtype=dtype
    )
    expected = x.double() @ weight.double() * scale.double()
    if per_token:
        expected = expected * token.double()[:, None]
    assert actual.dtype == dtype
    reference.assert_close(actual, expected, dtype)


def test_quant_matmul_with_a_packed_scale() -> None:
    x = torch.randint(-127, 128, (5, 64), dtype=torch.int8)
    weight = torch.randint(-127, 128, (64, 32), dtype=torch.int8)
    scale = torch.rand(32) * 1e-3
    actual = torch_npu.npu_quant_matmul(x.npu(), weight.npu(), scale.npu(), output_dtype=torch.float16)
    kept = (scale.view(torch.int32) & ~0x1FFF).view(torch.float32)
    reference.assert_close(actual, x.double() @ weight.double() * kept.double(), torch.float16)


def test_packed_scale_layout() -> None:
    packed = torch_npu.npu_trans_quant_param(torch.tensor([1.0, 2.5]).npu(), torch.tensor([3.0, -2.0]).npu()).cpu()
    words = [int(v) for v in packed.view(torch.int64)]
    assert [w & 0xFFFFFFFF for w in words] == [0x3F800000, 0x40200000]
    assert [(w >> 46) & 1 for w in words] == [1, 1]
    assert [(w >> 37) & 0x1FF for w in words] == [3, 0x1FE]


def test_quant_matmul_int32_and_bias() -> None:
    x = torch.randint(-127, 128, (3, 48), dtype=torch.int8)
    weight = torch.randint(-127, 128, (16, 48), dtype=torch.int8)
    bias = torch.randint(-1000, 1000, (16,), dtype=torch.int32)
    actual = torch_npu.npu_quant_matmul(
        x.npu(), weight.npu().t(), torch.ones(1).npu(), bias=bias.npu(), output_dtype=torch.int32
    )
    assert torch.equal(actual.cpu(), x.int() @ weight.int().t() + bias)


def test_weight_quant_matmul() -> None:
    x, weight = torch.randn(4, 64).half(), torch.randint(-127, 128, (64, 32), dtype=torch.int8)
    scale, offset = torch.rand(32).half() * 0.01, torch.randint(-5, 5, (32,)).half()
    actual = torch_npu.npu_weight_quant_batchmatmul(x.npu(), weight.npu(), scale.npu(), offset.npu())
    expected = x.double() @ ((weight.double() + offset.double()) * scale.double())
    reference.assert_close(actual, expected, torch.float16)


def laid_out(weight: Tensor, layout: str) -> Tensor:
    """`weight` [inner, columns] on the device, as that."""
    if layout.startswith("NZ"):
        torch.npu.config.allow_internal_format = True
    try:
        plain = (weight if layout.endswith("rows") else weight.t()).contiguous().npu()
        found = torch_npu.npu_format_cast(plain, 29) if layout.startswith("NZ") else plain
        assert (torch_npu.get_npu_format(found) == 29) == layout.startswith("NZ")
        return found if layout.endswith("rows") else found.t()
    finally:
        torch.npu.config.allow_internal_format = False  # its default


@pytest.mark.parametrize("layout", ["NZ rows", "NZ columns", "ND rows", "ND columns"])
@pytest.mark.parametrize("rows", [1, 6, 40, 545])
@pytest.mark.parametrize(("inner", "columns"), [(7, 5), (130, 67), (2100, 130)])
def test_int8_products_of_any_number_of_rows(layout: str, rows: int, inner: int, columns: int) -> None:
    """Sizes that end within a tile, and more than one block of rows and of depth. Sums are exact in every layout."""
    x = torch.randint(-128, 128, (rows, inner), dtype=torch.int8)
    weight = torch.randint(-128, 128, (inner, columns), dtype=torch.int8)
    weight[:, 0], x[0] = -128, -128
    scale, token = torch.rand(columns) * 1e-3, torch.rand(rows) + 0.5
    integers = torch.randint(-1000, 1000, (columns,), dtype=torch.int32)
    sums, given = x.double() @ weight.double(), laid_out(weight, layout)
    actual = torch_npu.npu_quant_matmul(
        x.npu(), given, scale.npu(), pertoken_scale=token.npu(), bias=integers.npu(), output_dtype=torch.half
    )
    expected = (sums + integers) * scale.double() * token.double()[:, None]
    reference.assert_close(actual, expected, torch.float16)
    single = torch.tensor([2.0**-7])
    actual = torch_npu.npu_quant_matmul(x.npu(), given, single.npu(), output_dtype=torch.bfloat16)
    assert torch.equal(actual.cpu(), (sums.float() * single).bfloat16())


@pytest.mark.parametrize("rows", [1, 6, 7, 9, 32, 33])
@pytest.mark.parametrize(("inner", "columns"), [(1, 1), (7, 5), (64, 32), (130, 67), (1100, 1029)])
def test_products_with_the_int8_weight_of_a_linear_layer(rows: int, inner: int, columns: int) -> None:
    """The largest sums of int8 need all 32 bits, and more than float32 has; the last size is shared among threads."""
    x = torch.randint(-128, 128, (rows, inner), dtype=torch.int8)
    weight = torch.randint(-128, 128, (columns, inner), dtype=torch.int8)
    weight[0], x[0] = -128, -128
    scale, token = torch.rand(columns) * 1e-3, torch.rand(rows) + 0.5
    integers = torch.randint(-1000, 1000, (columns,), dtype=torch.int32)
    sums = x.double() @ weight.double().t()
    actual = torch_npu.npu_quant_matmul(
        x.npu(), weight.npu().t(), scale.npu(), pertoken_scale=token.npu(), bias=integers.npu(), output_dtype=torch.half
    )
    expected = (sums + integers) * scale.double() * token.double()[:, None]
    reference.assert_close(actual, expected, torch.float16)
    for dtype in (torch.float16, torch.bfloat16):
        floats, bias = (torch.randn(rows, inner) / inner**0.5).to(dtype), torch.randn(columns)
        bias = bias.to(dtype) if dtype == torch.float16 else bias
        narrow = scale.to(dtype)
        actual = torch_npu.npu_weight_quant_batchmatmul(floats.npu(), weight.npu().t(), narrow.npu(), bias=bias.npu())
        expected = floats.double() @ (weight.double() * narrow.double()[:, None]).t() + bias.double()
        reference.assert_close(actual, expected, dtype, factor=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_quant(dtype: torch.dtype) -> None:
    x, gamma, beta = (torch.randn(s).to(dtype) for s in ((3, 4, 48), (48,), (48,)))
    scale, offset = torch.tensor([0.03]).to(dtype), torch.tensor([-7], dtype=torch.int8)
    y = torch_npu.npu_rms_norm_quant(x.npu(), gamma.npu(), beta.npu(), scale.npu(), offset.npu(), 1e-6)
    normed = reference.rms_norm(x, gamma, 1e-6)[0] + beta.double()
    near(y, int8(normed / scale.double() + offset.double()))


def test_rms_norm_quant_refuses_a_scale_per_channel() -> None:
    x, gamma = torch.zeros(2, 16).half().npu(), torch.ones(16).half().npu()
    with pytest.raises(RuntimeError, match="one element"):
        torch_npu.npu_rms_norm_quant(x, gamma, gamma, gamma, torch.zeros(16, dtype=torch.int8).npu())


def swiglu(x: Tensor, left: bool) -> Tensor:
    halves = x.double().chunk(2, -1)
    gate, linear = halves if left else halves[::-1]
    return torch.nn.functional.silu(gate) * linear


@pytest.mark.parametrize("left", [True, False])
def test_swiglu_quant_gives_factors(left: bool) -> None:
    """The scale of a row is what its values were multiplied by, not what they have to be multiplied by."""
    x = torch.randn(2, 3, 64).half()
    smooth = torch.rand(1, 32) + 0.5
    y, scale = torch_npu.npu_swiglu_quant(x.npu(), smooth_scales=smooth.npu(), activate_left=left, quant_mode=1)
    values = swiglu(x, left) * smooth.double()
    factors = 127 / values.abs().amax(-1)
    assert scale.shape == (2, 3)
    reference.assert_close(scale / factors.float().npu(), torch.ones(2, 3).double(), torch.float32, factor=4)
    near(y, int8(values * factors[..., None]))


@pytest.mark.parametrize(("listed", "kind"), [([2, 2, 7], 0), ([2, 0, 5], 1)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_swiglu_quant_of_groups(listed: list[int], kind: int, per_channel: bool) -> None:
    """Rows 0 to 1 are the first group's, none the second's, 2 to 6 the third's."""
    x = torch.randn(7, 40)
    scales, offsets = (torch.randn(3, 20) if per_channel else torch.randn(3) for _ in range(2))
    groups = torch.tensor(listed, dtype=torch.int32)
    own = torch.tensor([0, 0, 2, 2, 2, 2, 2])
    values = swiglu(x, True)
    smoothed = values * scales[own].double().reshape(7, -1)
    y, _ = torch_npu.npu_swiglu_quant(
        x.npu(), smooth_scales=scales.npu(), offsets=offsets.npu(), group_index=groups.npu(),
        activate_left=True, quant_mode=0, group_list_type=kind,
    )  # fmt: skip
    near(y, int8(smoothed + offsets[own].double().reshape(7, -1)))
    y, scale = torch_npu.npu_swiglu_quant(
        x.npu(), smooth_scales=scales.npu(), group_index=groups.npu(), activate_left=True, quant_mode=1,
        group_list_type=kind,
    )  # fmt: skip
    factors = 127 / smoothed.abs().amax(-1)
    reference.assert_close(scale, factors, torch.float32, factor=4)
    near(y, int8(smoothed * factors[:, None]))


def test_swiglu_quant_refuses() -> None:
    x = torch.zeros(2, 8).npu()
    with pytest.raises(RuntimeError, match="needed for static quantisation"):
        torch_npu.npu_swiglu_quant(x, quant_mode=0)
    with pytest.raises(RuntimeError, match="must be one of"):
        torch_npu.npu_swiglu_quant(x, smooth_scales=torch.ones(4).half().npu(), quant_mode=1)


@pytest.mark.parametrize("left", [True, False])
def test_dequant_swiglu_quant_per_token(left: bool) -> None:
    """int32 sums of an int8 product, their scales, and the scales that npu_quant_matmul takes next."""
    x = torch.randint(-5000, 5000, (6, 32), dtype=torch.int32)
    weight, token = torch.rand(32) * 1e-3, torch.rand(6, 1)
    y, scale = torch_npu.npu_dequant_swiglu_quant(
        x.npu(), weight_scale=weight.npu(), activation_scale=token.npu(), activate_left=left, quant_mode=1
    )
    values = swiglu(x.double() * weight.double() * token.double(), left)
    expected = values.abs().amax(-1) / 127
    reference.assert_close(scale, expected, torch.float32, factor=4)
    near(y, int8(values / expected[:, None]))


def test_dequant_swiglu_quant_of_floats_and_static() -> None:
    x = torch.randn(4, 64).bfloat16()
    smooth = torch.rand(32) + 0.5
    y, scale = torch_npu.npu_dequant_swiglu_quant(x.npu(), quant_scale=smooth.npu(), activate_left=True, quant_mode=1)
    values = swiglu(x, True) * smooth.double()
    expected = values.abs().amax(-1) / 127
    reference.assert_close(scale, expected, torch.float32, factor=4)
    near(y, int8(values / expected[:, None]))
    factor, offset = torch.tensor([0.02]), torch.tensor([3.0])
    y, _ = torch_npu.npu_dequant_swiglu_quant(
        x.npu(), quant_scale=factor.npu(), quant_offset=offset.npu(), activate_left=True, quant_mode=0
    )
    near(y, int8(swiglu(x, True) / 0.02 + 3))
