"""One matrix product, captured, with its weight in FRACTAL_NZ (option `weight_nz`) and in plain rows."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor, nn

from benchmarks import devices
from benchmarks.harness import Contestant, Factory, Row
from benchmarks.row_decode_step import contestant

SHAPES = ((1, 1024, 3072), (16, 1024, 3072), (256, 1024, 3072), (16, 2048, 2048))
"""Rows, inner size, columns."""
DTYPES = (torch.bfloat16, torch.int8)
FORMATS = {"NZ": ("all", 29), "ND": ("off", 2)}
"""The option's value, and the format that it leaves a weight in (aclFormat)."""
SCALE = 0.01


class Product(nn.Module):
    """x [rows, inner] @ weight [inner, columns]; of int8 operands times SCALE, in bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.full((weight.shape[1],), SCALE), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.int8:
            return torch_npu.npu_quant_matmul(x, self.weight, self.scale, output_dtype=torch.bfloat16)
        return x @ self.weight


class Plain(Product):
    """The same in PyTorch on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.int8:
            return (torch._int_mm(x, self.weight).float() * SCALE).bfloat16()
        return x @ self.weight


def operands(dtype: torch.dtype, rows: int, inner: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.int8:
        x, weight = (
            torch.randint(-5, 6, size, generator=generator, dtype=dtype) for size in ((rows, inner), (inner, columns))
        )
        return x, weight
    x, weight = (torch.randn(size, generator=generator) for size in ((rows, inner), (inner, columns)))
    return x.to(dtype), (weight / inner**0.5).to(dtype)


def on_npu(name: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> Factory:
    policy, wanted = FORMATS[name]

    def factory() -> Contestant:
        device = devices.npu()
        with devices.needed(name), torch.inference_mode():
            x, weight = operands(dtype, *shape)
            model, x = Product(weight).to(device), x.to(device)
            step = torch.compile(model, backend="ascend", dynamic=False, options={"weight_nz": policy})
            for _ in range(3):  # compile, warm up and capture
                step(x)
            torch.npu.synchronize()
            found = torch_npu.get_npu_format(model.weight)
            assert found in (wanted, 0 if name == "ND" else wanted), f"a weight of format {found}, expected {wanted}"
        return contestant(name, step, (x,), devices.wait())

    return factory


def on_cpu(dtype: torch.dtype, shape: tuple[int, int, int]) -> Factory:
    def factory() -> Contestant:
        x, weight = operands(dtype, *shape)
        return contestant("cpu eager", Plain(weight), (x,), devices.nothing)

    return factory


def row(dtype: torch.dtype, shape: tuple[int, int, int]) -> Row:
    kind, sizes = str(dtype).removeprefix("torch."), " x ".join(map(str, shape))
    return Row(
        name=f"nz_{kind}_{'x'.join(map(str, shape))}",
        title=f"{kind}, {sizes}",
        unit="us",
        contestants={**{name: on_npu(name, dtype, shape) for name in FORMATS}, "cpu eager": on_cpu(dtype, shape)},
        reference="cpu eager",
        tolerance=0.05,  # of values up to 5, which bfloat16 rounds to parts of 1/32
    )


def rows() -> list[Row]:
    return [row(dtype, shape) for dtype in DTYPES for shape in SHAPES]
