"""The report says what each fused operator runs on, and why not on something better."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import npu_compiler.backend


def report_of(function: Any, *args: Tensor) -> str:
    backend = npu_compiler.backend.AscendBackend()
    torch.compile(function, backend=backend, fullgraph=True)(*args)
    (graph,) = backend.compiled()
    return str(graph)


def norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    total = x + residual
    return weight * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_operator_of_cann() -> None:
    args = [torch.randn(3, 64).npu(), torch.randn(3, 64).npu(), torch.randn(64).npu()]
    assert "\n  add_rms_norm x1: aclnnAddRmsNorm\n" in report_of(norm, *args)


def test_host_tensors_have_no_kernel_of_cann() -> None:
    text = report_of(norm, torch.randn(3, 64), torch.randn(3, 64), torch.randn(64))
    assert "add_rms_norm x1: composition (not aclnnAddRmsNorm: npu::npu_add_rms_norm has no kernel for CPU" in text


def test_a_refusal_gives_its_reason_and_guards_no_dynamic_size() -> None:
    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.npu.npu_dynamic_quant(torch.nn.functional.silu(x[..., :48]) * x[..., 48:])

    backend = npu_compiler.backend.AscendBackend()
    run = torch.compile(quantized, backend=backend, fullgraph=True)
    for rows in (5, 7, 70):
        x = torch.randn(rows, 96, dtype=torch.float16).npu()
        torch._dynamo.mark_dynamic(x, 0)
        run(x)
        reports = [str(graph) for graph in backend.compiled()]
    (text,) = reports
    assert "swiglu_dynamic_quant x1: aclnnSwiGlu and aclnnDynamicQuant" in text
    assert "(not aclnnDequantSwigluQuant dynamic: 96 columns are no multiple of 64" in text
