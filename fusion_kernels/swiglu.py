"""The gate of a SwiGLU block: silu(gate) * up.

CANN's aclnnSwiGlu reads gate and up as the two halves of one tensor (`swiglu`). Where a model computes them as two
tensors (`silu_mul`), joining them would move more bytes than the fused kernel saves: without Triton, silu and an
in-place product are what runs, and what the operator saves is one buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_compiler.fusion_kernels import triton_driver
from npu_compiler.fusion_kernels.norms import refuses_dtypes, refuses_triton
from npu_compiler.fusion_kernels.operator import FusedOperator, Provider


def swiglu_reference(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension; x [..., 2 H], the result [..., H]."""
    gate, up = x.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).contiguous()


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both [..., H] of one dtype."""
    return torch.nn.functional.silu(gate) * up


def _fake_swiglu(x: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


def _fake_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _cann_swiglu(x: Tensor) -> Tensor:
    return torch.ops.npu.npu_swiglu(x, -1)


def _in_place_product(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate.contiguous()).mul_(up)


def _swiglu_example(dtype: torch.dtype) -> tuple[Any, ...]:
    return (torch.randn(3, 5, 64, dtype=dtype),)


def _silu_mul_example(dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(3, 5, 32, dtype=dtype), torch.randn(3, 5, 32, dtype=dtype)


SWIGLU = FusedOperator(
    "swiglu(Tensor x) -> Tensor",
    reference=swiglu_reference,
    fake=_fake_swiglu,
    providers=(
        Provider("aclnnSwiGlu", _cann_swiglu, ("npu::npu_swiglu",), refuses_dtypes),
        Provider("Triton", triton_driver.kernel("swiglu"), ("triton",), refuses_triton),
        Provider("composition", swiglu_reference),
    ),
    example=_swiglu_example,
)
SILU_MUL = FusedOperator(
    "silu_mul(Tensor gate, Tensor up) -> Tensor",
    reference=silu_mul_reference,
    fake=_fake_silu_mul,
    providers=(
        Provider("Triton", triton_driver.kernel("silu_mul"), ("triton",), refuses_triton),
        Provider("composition", _in_place_product),
    ),
    example=_silu_mul_example,
)
