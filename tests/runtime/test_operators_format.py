"""FRACTAL_NZ is physical: raw storage is as a card's, casts round-trip, products read it."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch_npu
from torch.nn import functional

from . import reference
from .operator_cases import make

NZ, ND = 29, 2


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the tensor's storage, as its dtype."""
    torch.npu.synchronize()
    storage = tensor.untyped_storage()
    data = ctypes.string_at(storage.data_ptr(), storage.nbytes())
    return torch.frombuffer(bytearray(data), dtype=tensor.dtype)


@pytest.fixture(autouse=True)
def internal_formats() -> None:
    torch.npu.config.allow_internal_format = True


@pytest.mark.parametrize("shape", [(32, 48), (33, 17), (2, 20, 40)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_storage_is_as_the_format_says(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = make(shape, dtype)
    packed = torch_npu.npu_format_cast(x.npu(), NZ)
    assert torch_npu.get_npu_format(packed) == NZ
    rows, columns = -(-shape[-2] // 16), -(-shape[-1] // 16)
    padded = functional.pad(x, (0, columns * 16 - shape[-1], 0, rows * 16 - shape[-2]))
    expected = padded.reshape(-1, rows, 16, columns, 16).permute(0, 3, 1, 2, 4).reshape(-1)
    assert torch.equal(raw(packed)[: expected.numel()], expected)
    assert torch.equal(torch_npu.npu_format_cast(packed, ND).cpu(), x)
    assert torch.equal(packed.cpu(), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [1, 5, 16, 20, 32, 33])
@pytest.mark.parametrize(("inner", "columns"), [(40, 50), (7, 130), (272, 16), (100, 200)])
def test_product_with_packed_weight(dtype: torch.dtype, m: int, inner: int, columns: int) -> None:
    """Few rows by vectors, more of bfloat16 by tiles (AMX) where there are any, more than 32 by panels of them."""
    x, by_rows, bias = make((m, inner), dtype), make((columns, inner), dtype, seed=1), make((columns,), dtype, seed=2)
    packed = torch_npu.npu_format_cast(by_rows.npu(), NZ)
    across = torch_npu.npu_format_cast(by_rows.t().contiguous().npu(), NZ)
    expected = x.double() @ by_rows.double().t()
    with_bias = expected + bias.double()
    pairs = [
        (functional.linear(x.npu(), packed), expected),
        (functional.linear(x.npu(), packed, bias.npu()), with_bias),
        (x.npu() @ across, expected),
        (torch.addmm(bias.npu(), x.npu(), across), with_bias),
    ]
    for result, wanted in pairs:
        torch.testing.assert_close(result.cpu().double() / inner, wanted / inner, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(33, 900, 130), (545, 424, 66), (1, 1030, 1041), (16, 1030, 1041), (40, 1030, 1041)],
)
def test_larger_products_with_packed_weights(dtype: torch.dtype, rows: int, inner: int, columns: int) -> None:
    """Sizes that end within a tile, more than one block of rows and of depth, weights that come from memory even for
    one row, and whose columns threads share."""
    x, bias = make((rows, inner), dtype), make((columns,), dtype, seed=2)
    by_rows = (make((columns, inner), torch.float32, seed=1) / inner**0.5).to(dtype)
    packed = torch_npu.npu_format_cast(by_rows.npu(), NZ)
    across = torch_npu.npu_format_cast(by_rows.t().contiguous().npu(), NZ)
    expected = x.double() @ by_rows.double().t()
    reference.assert_close(functional.linear(x.npu(), packed), expected, dtype)
    reference.assert_close(functional.linear(x.npu(), packed, bias.npu()), expected + bias.double(), dtype)
    reference.assert_close(x.npu() @ across, expected, dtype)
    reference.assert_close(torch.addmm(bias.npu(), x.npu(), across), expected + bias.double(), dtype)


def test_a_captured_product_sees_a_rewritten_weight() -> None:
    x = make((2, 32), torch.float16).npu()
    first, second = make((32, 48), torch.float16, seed=1), make((32, 48), torch.float16, seed=2)
    weight = torch_npu.npu_format_cast(first.npu(), NZ)
    x @ weight
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = x @ weight
    replacement = torch_npu.npu_format_cast(second.npu(), NZ)
    size = weight.untyped_storage().nbytes()
    torch.npu.synchronize()
    ctypes.memmove(weight.untyped_storage().data_ptr(), replacement.untyped_storage().data_ptr(), size)
    graph.replay()
    torch.npu.synchronize()
    expected = x.cpu().double() @ second.double()
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-2, atol=5e-2)
