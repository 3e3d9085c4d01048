"""Joins a SwiGLU gate and the int8 quantization of its result.

Before::

    active = npu_fused.swiglu(x)
    values, scale = npu.npu_dynamic_quant(active)

After::

    values, scale = npu_fused.swiglu_dynamic_quant(x, None)

Static quantization (`npu.npu_quantize` with div_mode) becomes `npu_fused.swiglu_quant`; its zero is
widened to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, known
from npu_compiler.fusion_kernels import register
from npu_compiler.fusion_kernels.norm_quant import HALVES
from npu_compiler.fusion_kernels.swiglu_quant import swiglu_dynamic_quant_reference, swiglu_quant_reference
from npu_compiler.passes.norm_quant import legal_int8, legal_rows, quantized, row_quantized
from npu_compiler.passes.pattern import Any, Call, Match
from npu_compiler.passes.rewrite import Build, NearMiss, Rule

NAME = "swiglu_quant"
SWIGLU = Call("npu_fused.swiglu.default", Any("x"))


def _legal_dynamic(match: Match) -> Fact:
    return _legal_dtype(match) & legal_rows(match)


def _legal_dtype(match: Match) -> Fact:
    dtype = match.tensor("x").dtype
    return known(dtype in HALVES, f"quantization operators take half precision, not {dtype}")


def _legal_static(match: Match) -> Fact:
    return _legal_dtype(match) & legal_int8(match)


def _static(build: Build, match: Match) -> fx.Node:
    zero = match.bindings["zero"]
    if isinstance(zero, fx.Node) and match.tensor("zero").dtype != torch.float32:
        zero = build(torch.ops.aten._to_copy.default, zero, dtype=torch.float32)
    return build(torch.ops.npu_fused.swiglu_quant.default, match.bindings["x"], match.bindings["scale"], zero)


def _dynamic_program(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.npu.npu_dynamic_quant(torch.ops.npu_fused.swiglu(x))


def _dynamic_oracle(x: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_dynamic_quant_reference(x.cpu(), None)


def _kept(x: Tensor) -> tuple[Tensor, ...]:
    active = torch.ops.npu_fused.swiglu(x)
    return *torch.ops.npu.npu_dynamic_quant(active), active


def _static_program(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.ops.npu.npu_quantize(torch.ops.npu_fused.swiglu(x), scale, zero, torch.qint8, -1, True)


def _along_rows(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.ops.npu.npu_quantize(torch.ops.npu_fused.swiglu(x), scale, zero, torch.qint8, 0, True)


def _unsigned(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.ops.npu.npu_quantize(torch.ops.npu_fused.swiglu(x), scale, zero, torch.quint8, -1, True)


def _to_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.npu.npu_dynamic_quant(torch.ops.npu_fused.swiglu(x), dst_type=torch.quint4x2)


def _static_oracle(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return swiglu_quant_reference(x.cpu(), scale.cpu(), zero.cpu())


def _dynamic_example(dtype: torch.dtype) -> tuple[object, ...]:
    """On the device, the only place where torch_npu quantizes."""
    register()
    return (torch.randn(6, 128, dtype=dtype).npu(),)


def _static_example(dtype: torch.dtype) -> tuple[object, ...]:
    return *_dynamic_example(dtype), torch.full((1,), 0.03125).npu(), torch.full((1,), 3, dtype=torch.int32).npu()


def _float_example(dtype: torch.dtype) -> tuple[object, ...]:
    return _static_example(torch.float32)


def _row_example(dtype: torch.dtype) -> tuple[object, ...]:
    return *_dynamic_example(dtype), torch.rand(6).add(0.1).npu(), torch.zeros(6, dtype=torch.int32).npu()


RULES = (
    Rule(
        "swiglu_dynamic_quant",
        pattern=row_quantized(SWIGLU),
        operator="swiglu_dynamic_quant",
        operands=lambda match: (match.bindings["x"], match.bindings["smooth"]),
        legal=_legal_dynamic,
        reference=_dynamic_program,
        oracle=_dynamic_oracle,
        example=_dynamic_example,
        near_misses=(
            NearMiss(_kept, reason="is also used by output"),
            NearMiss(_to_int4, reason="the result is no int8: dtype 16"),
        ),
        dtypes=HALVES,
    ),
    Rule(
        "swiglu_quant",
        pattern=quantized(SWIGLU),
        replacement=_static,
        legal=_legal_static,
        reference=_static_program,
        oracle=_static_oracle,
        example=_static_example,
        after=("aten._to_copy.default", "npu_fused.swiglu_quant.default"),
        near_misses=(
            NearMiss(_along_rows, _row_example, "scale runs along dimension 0"),
            NearMiss(_unsigned, reason="the result is no int8: dtype "),
            NearMiss(_static_program, _float_example, "take half precision, not torch.float32"),
        ),
        dtypes=HALVES,
    ),
)
