"""Joins a norm and the int8 quantization of its result.

Before::

    normed, total = npu_fused.add_rms_norm(x, residual, weight, 1e-06)
    values, scale = npu.npu_dynamic_quant(normed)

After::

    values, scale, total = npu_fused.add_rms_norm_dynamic_quant(x, residual, weight, None, None, 1e-06)

Static quantization (`npu.npu_quantize` with div_mode) likewise, with one scale a channel; with one scale in all it is
joined to a lone norm that adds a bias. A bias that is added to the norm's result goes along. A lone norm and its
dynamic quantization become `npu_fused.rms_norm_dynamic_quant`, one kernel by Triton and two without.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import sympy
import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, known, same_shape
from npu_compiler.fusion_kernels import register
from npu_compiler.fusion_kernels.norm_quant import (
    HALVES,
    add_rms_norm_dynamic_quant_reference,
    add_rms_norm_quant_reference,
    rms_norm_dynamic_quant_reference,
    rms_norm_quant_reference,
)
from npu_compiler.passes.pattern import Any, Call, Exactly, Item, Match, Number, OneOf, Pattern
from npu_compiler.passes.record import Saving
from npu_compiler.passes.rewrite import Build, NearMiss, Rule

NAME = "norm_quant"
EPSILON = 1e-6
INT8 = (torch.int8, torch.qint8, 1, 12)  # as torch_npu's functions name the type: a dtype, or its number

ADD_NORM = Item(
    Call("npu_fused.add_rms_norm.default", Any("x"), Any("residual"), Any("weight"), Number("epsilon")),
    0, "normed", ((1, "total"),),
)  # fmt: skip
NORM = Call("npu_fused.rms_norm.default", Any("x"), Any("weight"), Number("epsilon"), name="normed")


def shifted(norm: Pattern) -> Pattern:
    """A norm and what is added to it."""
    return Call("aten.add.Tensor", norm, Any("beta"), commutes=True)


def quantized(inner: Pattern) -> Pattern:
    """Static quantization of `inner` along its last dimension."""
    axis, div_mode = Any("axis"), Exactly(True)
    return Call("npu.npu_quantize.default", inner, Any("scale"), Any("zero"), Any("dtype"), axis, div_mode)


def row_quantized(inner: Pattern) -> Pattern:
    """Dynamic quantization of `inner`, with one scale a row."""
    return Call("npu.npu_dynamic_quant.default", inner, Any("smooth"), Exactly(None), Any("dtype"))


def legal_rows(match: Match) -> Fact:
    """Whether the dynamic quantization is to int8."""
    dtype = match.bindings["dtype"]
    return known(dtype is None or dtype in INT8, f"the result is no int8: dtype {dtype}")


def legal_int8(match: Match) -> Fact:
    """Whether the static quantization is to int8, with a scale (and zero) in all or one a channel."""
    rank = match.root.meta["val"].dim()
    axis, dtype = match.bindings["axis"], match.bindings["dtype"]
    along = axis in (-1, rank - 1) or match.tensor("scale").shape == (1,)  # zero has the shape of scale
    return known(dtype in INT8, f"the result is no int8: dtype {dtype}") & known(
        along, f"scale runs along dimension {axis}"
    )


def no_kernel(match: Match, made: Sequence[fx.Node]) -> Saving:
    """The saving of a fused operator that is as many kernels as before, but for Triton or a custom library."""
    return Saving(0, sympy.Integer(0))


def _legal(match: Match) -> Fact:
    """Whether only the quantization reads the norm, and what is added to it is a bias."""
    normed = match.node("normed")
    verdict = known(len(normed.users) == 1, f"the norm's result {normed.name} is also read as it is")
    dtype = match.tensor("x").dtype
    verdict = verdict & known(dtype in HALVES, f"quantization operators take half precision, not {dtype}")
    if "beta" in match.bindings:
        verdict = verdict & legal_beta(match)
    return verdict & (legal_int8(match) if "axis" in match.bindings else legal_rows(match))


def legal_beta(match: Match) -> Fact:
    """Whether what is added to a norm is a bias."""
    if not match.is_tensor("beta"):
        return known(False, "beta is a number")
    beta, weight = match.tensor("beta"), match.tensor("weight")
    return same_shape(beta.shape, weight.shape, "shape of beta") & known(
        beta.dtype == weight.dtype, f"beta is {beta.dtype}, the weight {weight.dtype}"
    )


def _dynamic(build: Build, match: Match) -> Sequence[fx.Node]:
    operands = [match.bindings.get(name) for name in ("x", "residual", "weight", "smooth", "beta", "epsilon")]
    fused = build(torch.ops.npu_fused.add_rms_norm_dynamic_quant.default, *operands)
    return fused, build(operator.getitem, fused, 2)


def _static_operands(match: Match) -> tuple[object, ...]:
    names = ("x", "residual", "weight", "scale", "zero", "beta", "epsilon")
    return tuple(match.bindings.get(name) for name in names)


def _lone_operands(match: Match) -> tuple[object, ...]:
    return tuple(match.bindings[name] for name in ("x", "weight", "beta", "scale", "zero", "epsilon"))


def _lone_dynamic_operands(match: Match) -> tuple[object, ...]:
    return tuple(match.bindings.get(name) for name in ("x", "weight", "smooth", "beta", "epsilon"))


def _dynamic_program(x: Tensor, residual: Tensor, weight: Tensor, smooth: Tensor) -> tuple[Tensor, ...]:
    normed, total = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    values, scale = torch.ops.npu.npu_dynamic_quant(normed, smooth_scales=smooth)
    return values, scale, total


def _dynamic_oracle(*args: Tensor) -> tuple[Tensor, ...]:
    x, residual, weight, smooth = (arg.cpu() for arg in args)
    return add_rms_norm_dynamic_quant_reference(x, residual, weight, smooth, None, EPSILON)


def _read_as_it_is(x: Tensor, residual: Tensor, weight: Tensor, smooth: Tensor) -> tuple[Tensor, ...]:
    normed, _ = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return *torch.ops.npu.npu_dynamic_quant(normed, smooth_scales=smooth), normed


def _number_added(x: Tensor, residual: Tensor, weight: Tensor, smooth: Tensor) -> tuple[Tensor, ...]:
    normed, _ = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return torch.ops.npu.npu_dynamic_quant(normed + 1.0, smooth_scales=smooth)


def _static_program(
    x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    normed, total = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return torch.ops.npu.npu_quantize(normed + beta, scale, zero, torch.qint8, -1, True), total


def _multiplied(
    x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    normed, total = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return torch.ops.npu.npu_quantize(normed + beta, scale, zero, torch.qint8, -1, False), total


def _unsigned(
    x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    normed, total = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return torch.ops.npu.npu_quantize(normed + beta, scale, zero, torch.quint8, -1, True), total


def _along_rows(
    x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    normed, total = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return torch.ops.npu.npu_quantize(normed + beta, scale, zero, torch.qint8, 1, True), total


def _to_int4(x: Tensor, residual: Tensor, weight: Tensor, smooth: Tensor) -> tuple[Tensor, ...]:
    normed, _ = torch.ops.npu_fused.add_rms_norm(x, residual, weight, EPSILON)
    return torch.ops.npu.npu_dynamic_quant(normed, smooth_scales=smooth, dst_type=torch.quint4x2)


def _static_oracle(*args: Tensor) -> tuple[Tensor, Tensor]:
    x, residual, weight, beta, scale, zero = (arg.cpu() for arg in args)
    return add_rms_norm_quant_reference(x, residual, weight, scale, zero, beta, EPSILON)


def _lone_program(x: Tensor, weight: Tensor, beta: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    normed = torch.ops.npu_fused.rms_norm(x, weight, EPSILON)
    return torch.ops.npu.npu_quantize(normed + beta, scale, zero, torch.qint8, -1, True)


def _lone_unshifted(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    normed = torch.ops.npu_fused.rms_norm(x, weight, EPSILON)
    return torch.ops.npu.npu_quantize(normed, scale, zero, torch.qint8, -1, True)


def _lone_kept(x: Tensor, weight: Tensor, beta: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    normed = torch.ops.npu_fused.rms_norm(x, weight, EPSILON)
    return torch.ops.npu.npu_quantize(normed + beta, scale, zero, torch.qint8, -1, True), normed


def _lone_dynamic_program(x: Tensor, weight: Tensor, beta: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    normed = torch.ops.npu_fused.rms_norm(x, weight, EPSILON)
    return torch.ops.npu.npu_dynamic_quant(normed + beta, smooth_scales=smooth)


def _lone_dynamic_kept(x: Tensor, weight: Tensor, beta: Tensor, smooth: Tensor) -> tuple[Tensor, ...]:
    normed = torch.ops.npu_fused.rms_norm(x, weight, EPSILON)
    return *torch.ops.npu.npu_dynamic_quant(normed + beta, smooth_scales=smooth), normed


def _lone_to_int4(x: Tensor, weight: Tensor, beta: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    normed = torch.ops.npu_fused.rms_norm(x, weight, EPSILON)
    return torch.ops.npu.npu_dynamic_quant(normed + beta, smooth_scales=smooth, dst_type=torch.quint4x2)


def _lone_dynamic_oracle(*args: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, beta, smooth = (arg.cpu() for arg in args)
    return rms_norm_dynamic_quant_reference(x, weight, smooth, beta, EPSILON)


def _lone_oracle(*args: Tensor) -> Tensor:
    x, weight, beta, scale, zero = (arg.cpu() for arg in args)
    return rms_norm_quant_reference(x, weight, beta, scale, zero, EPSILON)


def _add_example(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """On the device, the only place where torch_npu quantizes; sums of sixteenths are exact in every dtype."""
    register()
    x, residual = (torch.randint(-32, 33, (3, 5, 64)).div(16).to(dtype).npu() for _ in range(2))
    return x, residual, torch.randn(64, dtype=dtype).npu()


def _dynamic_example(dtype: torch.dtype) -> tuple[object, ...]:
    return *_add_example(dtype), (torch.rand(64, dtype=dtype) + 0.5).npu()


def _lone_dynamic_example(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows whose squares have a mean of 1, so that norm, weight and beta give 32nds below 8, which every dtype holds
    exactly: CANN's two calls, which round to it in between, then give the same int8 values as one."""
    register()
    sizes = torch.tensor([0.5] * 24 + [1.0] * 8 + [1.25] * 32)
    x = torch.stack([sizes[torch.randperm(64)] * torch.randint(0, 2, (64,)).mul(2).sub(1) for _ in range(15)])
    weight, beta = (torch.randint(-15, 16, (64,)).div(8).to(dtype) for _ in range(2))
    smooth = torch.rand(64, dtype=dtype) + 0.5
    return x.reshape(3, 5, 64).to(dtype).npu(), weight.npu(), beta.npu(), smooth.npu()


def _lone_wide_beta_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, weight, beta, smooth = _lone_dynamic_example(dtype)
    return x, weight, beta.repeat(5, 1), smooth


def _static_example(dtype: torch.dtype) -> tuple[object, ...]:
    scale = torch.rand(64).add(0.5).div(32).to(torch.float32 if dtype == torch.float16 else dtype)
    zero = torch.randint(-8, 8, (64,)).to(torch.int32 if dtype == torch.float16 else dtype)
    return *_add_example(dtype), torch.zeros(64, dtype=dtype).npu(), scale.npu(), zero.npu()


def _lone_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, _, weight = _add_example(dtype)
    scale = torch.full((1,), 0.03125, dtype=dtype)
    return x, weight, torch.zeros(64, dtype=dtype).npu(), scale.npu(), torch.full((1,), 3, dtype=torch.int8).npu()


def _wide_beta_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, residual, weight, _, *rest = _static_example(dtype)
    return x, residual, weight, torch.zeros(5, 64, dtype=dtype).npu(), *rest


def _float_beta_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, residual, weight, _, *rest = _static_example(dtype)
    return x, residual, weight, torch.zeros(64).npu(), *rest


def _row_example(dtype: torch.dtype) -> tuple[object, ...]:
    *rest, scale, zero = _static_example(dtype)
    return *rest, scale[:5].clone(), zero[:5].clone()  # type: ignore[index]


def _unsigned_example(dtype: torch.dtype) -> tuple[object, ...]:
    *rest, zero = _static_example(dtype)
    return *rest, zero.abs()  # type: ignore[attr-defined]


def _float_example(dtype: torch.dtype) -> tuple[object, ...]:
    *rest, zero = _static_example(torch.float32)
    return *rest, zero.int()  # type: ignore[attr-defined]


def _unshifted_example(dtype: torch.dtype) -> tuple[object, ...]:
    x, weight, _, scale, zero = _lone_example(dtype)
    return x, weight, scale, zero


RULES = (
    Rule(
        "add_rms_norm_dynamic_quant",
        pattern=row_quantized(OneOf((shifted(ADD_NORM), ADD_NORM))),
        replacement=_dynamic,
        results=("root", "total"),
        legal=_legal,
        reference=_dynamic_program,
        oracle=_dynamic_oracle,
        example=_dynamic_example,
        after=("npu_fused.add_rms_norm_dynamic_quant.default",),
        near_misses=(
            NearMiss(_read_as_it_is, reason="is also read as it is"),
            NearMiss(_number_added, reason="beta is a number"),
            NearMiss(_to_int4, reason="the result is no int8: dtype 16"),
        ),
        dtypes=HALVES,
    ),
    Rule(
        "rms_norm_dynamic_quant",
        pattern=row_quantized(OneOf((shifted(NORM), NORM))),
        operator="rms_norm_dynamic_quant",
        operands=_lone_dynamic_operands,
        legal=_legal,
        cost=no_kernel,
        reference=_lone_dynamic_program,
        oracle=_lone_dynamic_oracle,
        example=_lone_dynamic_example,
        near_misses=(
            NearMiss(_lone_dynamic_kept, reason="is also read as it is"),
            NearMiss(_lone_to_int4, reason="the result is no int8: dtype 16"),
            NearMiss(_lone_dynamic_program, _lone_wide_beta_example, "shape of beta: 2 and 1 dimensions"),
        ),
        dtypes=HALVES,
    ),
    Rule(
        "add_rms_norm_quant",
        pattern=quantized(OneOf((shifted(ADD_NORM), ADD_NORM))),
        operator="add_rms_norm_quant",
        operands=_static_operands,
        results=("root", "total"),
        legal=_legal,
        reference=_static_program,
        oracle=_static_oracle,
        example=_static_example,
        near_misses=(
            NearMiss(_multiplied),
            NearMiss(_unsigned, _unsigned_example, "the result is no int8: dtype "),
            NearMiss(_along_rows, _row_example, "scale runs along dimension 1"),
            NearMiss(_static_program, _wide_beta_example, "shape of beta: 2 and 1 dimensions"),
            NearMiss(_static_program, _float_beta_example, "beta is torch.float32, the weight torch.float16"),
            NearMiss(_static_program, _float_example, "take half precision, not torch.float32"),
        ),
        dtypes=HALVES,
    ),
    Rule(
        "rms_norm_quant",
        pattern=quantized(shifted(NORM)),
        operator="rms_norm_quant",
        operands=_lone_operands,
        legal=_legal,
        reference=_lone_program,
        oracle=_lone_oracle,
        example=_lone_example,
        near_misses=(
            NearMiss(_lone_unshifted, _unshifted_example),
            NearMiss(_lone_kept, reason="is also read as it is"),
        ),
        dtypes=HALVES,
    ),
)
