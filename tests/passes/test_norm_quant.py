"""norm_quant behind the passes that it builds on, on the device: one kernel each, int8 as from PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_compiler.backend
from npu_compiler.backend import CompiledGraph
from tests.passes.lowered import calls

HALVES = [torch.float16, torch.bfloat16]
EPSILON = 1e-6


def compiled(function: Any, *args: Tensor) -> tuple[Any, CompiledGraph]:
    """The result of a captured call on the device, and what became of the graph."""
    torch._dynamo.reset()
    backend = npu_compiler.backend.AscendBackend()
    run = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            result = run(*args)
    (graph,) = backend.compiled()
    return result, graph


def operators(graph: CompiledGraph) -> list[str]:
    assert graph.graph is not None
    return calls(graph.graph)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.cpu().double()
    return weight.cpu().double() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, residual = (torch.randint(-32, 33, (6, 64)).div(16).to(dtype).npu() for _ in range(2))
    return x, residual, torch.rand(64, dtype=dtype).add(0.5).npu()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dynamic_quantization_from_written_out_norm(dtype: torch.dtype) -> None:
    """The sum goes on in the residual stream; 8 calls become 1."""

    def block(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        total = x + residual
        return *torch.ops.npu.npu_dynamic_quant(norm(total, weight)), total

    x, residual, weight = inputs(dtype)
    (values, scale, total), graph = compiled(block, x, residual, weight)
    assert operators(graph) == ["npu_fused.add_rms_norm_dynamic_quant.default"]
    exact = exact_norm(x + residual, weight)
    row = exact.abs().amax(-1) / 127
    torch.testing.assert_close(scale.cpu().double(), row, rtol=1e-6, atol=0)
    assert (values.cpu().double() * row[:, None] - exact).abs().div(row[:, None]).max() < 0.501, (
        "rounded to the nearest"
    )
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_static_quantization_one_scale_a_channel(dtype: torch.dtype) -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return torch.ops.npu.npu_quantize(norm(x + residual, weight), scale, None, torch.qint8, -1, True)

    x, residual, weight = inputs(dtype)
    scale = torch.rand(64).add(0.5).div(32).to(torch.float32 if dtype == torch.float16 else dtype).npu()
    values, graph = compiled(block, x, residual, weight, scale)
    assert operators(graph) == ["npu_fused.add_rms_norm_quant.default"]
    scaled = exact_norm(x + residual, weight) / scale.cpu().double()
    assert (values.cpu().double() - scaled.clamp(-128, 127)).abs().max() < 0.501


def test_other_reader_of_the_norm_keeps_it() -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        normed = norm(x + residual, weight)
        return *torch.ops.npu.npu_dynamic_quant(normed), normed

    _, graph = compiled(block, *inputs(torch.float16))
    assert operators(graph) == ["npu_fused.add_rms_norm.default", "npu.npu_dynamic_quant.default"]
    assert "is also read as it is" in str(graph)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_lone_norm_and_dynamic_quantization(dtype: torch.dtype) -> None:
    """The first norm of a model follows no addition."""

    def block(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.npu.npu_dynamic_quant(norm(x, weight))

    x, _, weight = inputs(dtype)
    (values, scale), graph = compiled(block, x, weight)
    assert operators(graph) == ["npu_fused.rms_norm_dynamic_quant.default"]
    assert "rms_norm_dynamic_quant x1: aclnnRmsNorm and aclnnDynamicQuant (not Triton: " in str(graph)
    exact = exact_norm(x, weight)
    row = exact.abs().amax(-1) / 127
    rounding = 2 * torch.finfo(dtype).eps  # the norm in between, of up to 127 steps
    torch.testing.assert_close(scale.cpu().double(), row, rtol=rounding, atol=0)
    assert (values.cpu().double() * row[:, None] - exact).abs().div(row[:, None]).max() < 0.5 + 127 * rounding
