"""Inputs and comparison of the operator tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Values of both signs for floating dtypes, 1 to 6 for integers, so that every operator is defined somewhere."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    return torch.randint(1, 7, shape, generator=generator).to(dtype)


def to_device(value: Any) -> Any:
    """Moves tensors, also in lists, to the device, keeping their strides."""
    if isinstance(value, torch.Tensor):
        if value.dim() == 2 and not value.is_contiguous():
            return value.t().npu().t()
        return value.npu()
    if isinstance(value, list):
        return [to_device(v) for v in value]
    return value


def assert_close(got: Any, expected: Any) -> None:
    """Compares results of the device with those of the CPU: exactly for integers, in fp32 within TOLERANCE."""
    if isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for g, e in zip(got, expected, strict=True):
            assert_close(g, e)
        return
    if not isinstance(expected, torch.Tensor):
        assert got == expected
        return
    assert got.device.type == "npu"
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    tolerance = TOLERANCE.get(expected.dtype, 0)
    torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_same_as_cpu(operation: Callable[..., Any], *arguments: Any) -> None:
    """Runs `operation` on the CPU and on the device, and compares."""
    expected = operation(*arguments)
    got = operation(*(to_device(a) for a in arguments))
    torch.npu.synchronize()
    assert_close(got, expected)
