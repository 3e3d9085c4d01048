"""Joins a GeGLU gate and the dynamic int8 quantization of its result.

Before::

    active = npu_fused.geglu(x, "tanh")
    values, scale = npu.npu_dynamic_quant(active)

After::

    values, scale = npu_fused.geglu_dynamic_quant(x, "tanh", None)

One kernel by Triton, two as before without (fusion_kernels/geglu_quant.py). Static quantization stays a call of its
own: neither CANN nor our Triton kernels have the two as one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_compiler.facts.sizes import Fact, known
from npu_compiler.fusion_kernels import register
from npu_compiler.fusion_kernels.geglu_quant import geglu_dynamic_quant_reference
from npu_compiler.fusion_kernels.norm_quant import HALVES
from npu_compiler.passes.norm_quant import legal_rows, no_kernel, row_quantized
from npu_compiler.passes.pattern import Any, Call, Match
from npu_compiler.passes.rewrite import NearMiss, Rule

NAME = "geglu_quant"


def _legal(match: Match) -> Fact:
    dtype = match.tensor("x").dtype
    half = known(dtype in HALVES, f"quantization operators take half precision, not {dtype}")
    return half & legal_rows(match)


def _program(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.npu.npu_dynamic_quant(torch.ops.npu_fused.geglu(x, "tanh"))


def _oracle(x: Tensor) -> tuple[Tensor, Tensor]:
    return geglu_dynamic_quant_reference(x.cpu(), "tanh", None)


def _kept(x: Tensor) -> tuple[Tensor, ...]:
    active = torch.ops.npu_fused.geglu(x, "tanh")
    return *torch.ops.npu.npu_dynamic_quant(active), active


def _to_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.npu.npu_dynamic_quant(torch.ops.npu_fused.geglu(x, "tanh"), dst_type=torch.quint4x2)


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    """On the device, the only place where torch_npu quantizes. Each row has an outlier, as activations have, that every
    dtype holds exactly: CANN's two calls round the gate's result in between, which moves int8 values near it most."""
    register()
    x = torch.randn(6, 128, dtype=dtype)
    x[:, 5], x[:, 64 + 5] = 8.0, 2.0  # gelu(8) is 8
    return (x.npu(),)


def _float_example(dtype: torch.dtype) -> tuple[object, ...]:
    return _example(torch.float32)


RULES = (
    Rule(
        "geglu_dynamic_quant",
        pattern=row_quantized(Call("npu_fused.geglu.default", Any("x"), Any("approximate"))),
        operator="geglu_dynamic_quant",
        operands=lambda match: tuple(match.bindings[name] for name in ("x", "approximate", "smooth")),
        legal=_legal,
        cost=no_kernel,
        reference=_program,
        oracle=_oracle,
        example=_example,
        near_misses=(
            NearMiss(_kept, reason="is also used by output"),
            NearMiss(_to_int4, reason="the result is no int8: dtype 16"),
            NearMiss(_program, _float_example, "take half precision, not torch.float32"),
        ),
        dtypes=HALVES,
    ),
)
