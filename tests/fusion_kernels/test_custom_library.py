"""A fused operator runs on a custom operator library where one is loaded, and on the next provider where none is.

The library here has the name, the signature and the results of vllm-ascend's operator, which needs a card to be built:
x1, x2, gamma, beta, epsilon give (norm, 1 / rms, x1 + x2).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from npu_compiler.fusion_kernels import operator, register
from npu_compiler.fusion_kernels.norm_bias import ADD_RMS_NORM_BIAS, add_rms_norm_bias_reference
from tests.fusion_kernels.test_chosen import report_of

NAME = "vllm-ascend's npu_add_rms_norm_bias"
WITHOUT = "aclnnAddRmsNorm and aclnnAdd"


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """Which operators have kernels is asked once a process."""
    register()
    operator._has_kernel.cache_clear()
    yield
    operator._has_kernel.cache_clear()


@pytest.fixture
def calls() -> Iterator[list[torch.dtype]]:
    """Loads the library; the dtypes it was called with."""
    found: list[torch.dtype] = []

    def add_rms_norm_bias(
        x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor | None = None, epsilon: float = 1e-6
    ) -> tuple[Tensor, ...]:
        assert beta is not None
        found.append(x1.dtype)
        normed, total = add_rms_norm_bias_reference(x1, x2, gamma, beta, epsilon)
        return normed, torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + epsilon), total

    with torch.library._scoped_library("_C_ascend", "FRAGMENT") as library:
        library.define(
            "npu_add_rms_norm_bias(Tensor x1, Tensor x2, Tensor gamma, Tensor? beta=None, float epsilon=1e-6)"
            " -> (Tensor y, Tensor rstd, Tensor x)"
        )
        library.impl("npu_add_rms_norm_bias", add_rms_norm_bias, "PrivateUse1")
        yield found


def program(x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) + beta, total


def arguments(dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(*size, dtype=dtype).npu() for size in ((3, 64), (3, 64), (64,), (64,)))


def test_the_library_comes_first(calls: list[torch.dtype]) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        args = arguments(dtype)
        assert ADD_RMS_NORM_BIAS.provider(*args, 1e-6).name == NAME
        exact = add_rms_norm_bias_reference(*(arg.cpu().double() for arg in args), 1e-6)
        for got, expected in zip(ADD_RMS_NORM_BIAS(*args, 1e-6), exact, strict=True):
            torch.testing.assert_close(got.cpu().double(), expected, rtol=0.02, atol=0.02)
    assert calls == [torch.float32, torch.float16, torch.bfloat16]


def test_the_report_names_it(calls: list[torch.dtype]) -> None:
    assert f"\n  add_rms_norm_bias x1: {NAME}\n" in report_of(program, *arguments(torch.bfloat16))
    assert calls == [torch.bfloat16, torch.bfloat16], "the first call, and the capture"


def test_without_it_the_next_one_runs() -> None:
    args = arguments(torch.bfloat16)
    assert ADD_RMS_NORM_BIAS.provider(*args, 1e-6).name == WITHOUT
    assert f"{NAME}: _C_ascend::npu_add_rms_norm_bias has no kernel for PrivateUse1" in (
        ADD_RMS_NORM_BIAS.passed_over(*args, 1e-6)
    )
    assert f"add_rms_norm_bias x1: {WITHOUT} (not {NAME}: " in report_of(program, *args)


def test_what_it_does_not_take_goes_to_the_next(calls: list[torch.dtype]) -> None:
    x, residual, weight, beta = arguments(torch.bfloat16)
    assert ADD_RMS_NORM_BIAS.provider(x, residual, weight.float(), beta, 1e-6).name == "composition"
    assert not calls
