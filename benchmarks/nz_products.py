"""Matrix products whose weight lies in FRACTAL_NZ against the same with plain rows: `python -m benchmarks.nz_products
FILE ROUNDS`, one process, one core."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_npu
from torch import Tensor

SHAPES = ((1, 1024, 3072), (16, 1024, 3072), (256, 1024, 3072), (16, 2048, 2048))
"""Rows, inner size, columns."""
DTYPES = ("bfloat16", "int8")
NZ = 29
ROUND_SECONDS = 0.1


def products(dtype: str, rows: int, inner: int, columns: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The product with plain rows, and with the weight in fractals."""
    generator = torch.Generator().manual_seed(0)
    if dtype == "int8":
        x, weight = (
            torch.randint(-5, 6, size, generator=generator, dtype=torch.int8).npu()
            for size in ((rows, inner), (inner, columns))
        )
        scale = torch.full((columns,), 0.01).npu()

        def product(given: Tensor) -> Tensor:
            return torch_npu.npu_quant_matmul(x, given, scale, output_dtype=torch.bfloat16)

    else:
        x, weight = (
            torch.randn(size, generator=generator).bfloat16().npu() for size in ((rows, inner), (inner, columns))
        )

        def product(given: Tensor) -> Tensor:
            return x @ given

    fractals = torch_npu.npu_format_cast(weight.clone(), NZ)
    return lambda: product(weight), lambda: product(fractals)


def seconds(call: Callable[[], Tensor], loops: int) -> float:
    torch.npu.synchronize()
    begin = time.perf_counter()
    for _ in range(loops):
        call()
    torch.npu.synchronize()
    return (time.perf_counter() - begin) / loops


def measured(rounds: int) -> list[dict[str, Any]]:
    """A record for each dtype and shape: microseconds of both, and the ratio, medians over interleaved rounds.

    Raises:
        AssertionError: the two products differ.
    """
    torch.npu.config.allow_internal_format = True
    records = []
    for dtype in DTYPES:
        for shape in SHAPES:
            both = products(dtype, *shape)
            plain, fractals = (call().cpu() for call in both)
            assert torch.equal(plain, fractals), f"{dtype} {shape}: another result"
            loops = max(1, round(ROUND_SECONDS / seconds(both[0], 3)))
            found = [[seconds(call, loops) for call in both] for _ in range(rounds)]
            ratios = [fractal / row for row, fractal in found]
            records.append(
                {
                    "part": "nz",
                    "dtype": dtype,
                    "shape": list(shape),
                    "nd_microseconds": statistics.median(row for row, _ in found) * 1e6,
                    "nz_microseconds": statistics.median(fractal for _, fractal in found) * 1e6,
                    "ratio": statistics.median(ratios),
                    "ratio_min": min(ratios),
                    "ratio_max": max(ratios),
                }
            )
    return records


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps(measured(int(sys.argv[2]))))
