"""Kernels that a waiting thread helps with give the same results as on one thread, bit for bit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch_npu
from torch import Tensor
from torch.nn import functional

from runtime import counters
from tests.runtime.test_attention_operators import Paged

INNER, COLUMNS = 600, 1041
NZ = 29
HELPED = 3
"""Times that a waiting thread has to have helped with each kernel."""
CPU = Path("/proc/cpuinfo").read_text()

Kernel = Callable[[], Tensor]
pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """A stream's worker takes torch's number when it first needs it, so each test makes a stream."""
    torch.manual_seed(11)
    torch.npu.config.allow_internal_format = True
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(kernel: Kernel) -> None:
    torch.npu.synchronize()
    torch.set_num_threads(1)
    with torch.npu.stream(torch.npu.Stream()):
        before = counters.read()
        alone = kernel().cpu()
        assert counters.difference(before)["helped_kernels"] == 0
    torch.set_num_threads(2)
    stream = torch.npu.Stream()
    with torch.npu.stream(stream):
        before, end = counters.read(), time.monotonic() + 60
        while counters.difference(before)["helped_kernels"] < HELPED:
            assert time.monotonic() < end, "nobody helped"
            several = [kernel() for _ in range(8)]
            stream.synchronize()
            for found in several:
                assert torch.equal(found.cpu(), alone)


def operands(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(rows, INNER).to(dtype).npu(),
        torch.randn(COLUMNS, INNER).to(dtype).npu(),
        torch.randn(COLUMNS).to(dtype).npu(),
    )


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products(rows: int, dtype: torch.dtype) -> None:
    """Columns and depth that end within a vector, columns within a part."""
    x, weight, bias = operands(rows, dtype)
    across = weight.t().contiguous()
    check(lambda: functional.linear(x, weight, bias))
    check(lambda: x @ across)


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_with_packed_weights(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = operands(rows, dtype)
    packed = torch_npu.npu_format_cast(weight, NZ)
    check(lambda: functional.linear(x, packed, bias))


@pytest.mark.skipif("amx_bf16" not in CPU, reason="needs a processor with AMX: elsewhere ATen computes them")
@pytest.mark.parametrize("rows", [16, 40, 130])
def test_products_of_tiles(rows: int) -> None:
    x, weight, bias = operands(rows, torch.bfloat16)
    packed = torch_npu.npu_format_cast(weight, NZ)
    check(lambda: functional.linear(x, weight, bias))
    check(lambda: functional.linear(x, packed, bias))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_with_int8_weights(rows: int, dtype: torch.dtype) -> None:
    x, _, _ = operands(rows, dtype)
    weight = torch.randint(-128, 128, (COLUMNS, INNER), dtype=torch.int8).npu()
    scale = torch.rand(COLUMNS).to(dtype).npu()
    check(lambda: torch_npu.npu_weight_quant_batchmatmul(x, weight.t(), scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "lengths", [([1] * 5, [300, 1, 700, 129, 40]), ([140, 1], [340, 700])], ids=["decode", "chunk"]
)
def test_attention(lengths: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    """Each thread has scratch of its own."""
    arguments = Paged(*lengths, dtype, heads=8, key_heads=2, width=64).arguments()
    check(lambda: torch_npu.npu_fused_infer_attention_score(**arguments)[0])
