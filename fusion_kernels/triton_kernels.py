"""Fused operators as Triton kernels. Imported only where Triton is there (triton_driver.py).

Written for triton-ascend: a one-dimensional grid of at most PROGRAMS programs, each of which walks over rows; blocks of
columns that fit a vector core's 192 KiB of unified buffer; plain loads, stores, arithmetic and reductions. No program
reads what one has written: a row is read again instead. All compute in float32 and round once. Nothing here was
compiled for a card; Triton's interpreter tests the numerics.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 40
"""Vector cores of a 910B3: more programs would wait for one another."""
LARGEST_BLOCK = 4096
"""Columns at a time: five float32 rows of it take 80 KiB."""
INT8 = tl.constexpr(127.0)
ACTIVATIONS = ("silu", "none", "tanh")
"""By the number that a kernel is given: SiLU, and GELU by torch's names of its approximations."""


@triton.jit
def _summed(x, residual, at, inside, ADD: tl.constexpr):
    """x, or x + residual as that sum is stored, in float32."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _scale(x, residual, start, columns, epsilon, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """1 / sqrt(mean(row^2) + epsilon) of the row that begins at `start`."""
    squares = tl.zeros((BLOCK,), tl.float32)
    for block in range(0, columns, BLOCK):
        column = block + tl.arange(0, BLOCK)
        value = _summed(x, residual, start + column, column < columns, ADD)
        squares += value * value
    return 1.0 / tl.sqrt(tl.sum(squares, axis=0) / columns + epsilon)


@triton.jit
def _gated(gate, up, ACTIVATION: tl.constexpr):
    """The activation named by its place in ACTIVATIONS, of gate, times up. The hyperbolic tangent is written with exp,
    which every Triton has."""
    if ACTIVATION == 0:
        active = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == 1:
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = 0.5 * gate * (2.0 - 2.0 / (1.0 + tl.exp(2.0 * inner)))
    return active * up


@triton.jit
def _quantized(value, scale):
    """value / scale rounded to the nearest integer, half to even; 0 where the scale is."""
    scaled = value / tl.where(scale == 0.0, 1.0, scale)
    below = tl.floor(scaled)
    rest = scaled - below
    odd = below - 2.0 * tl.floor(below * 0.5)
    return (below + tl.where(rest == 0.5, odd, tl.where(rest > 0.5, 1.0, 0.0))).to(tl.int8)


@triton.jit
def norm_kernel(
    x, residual, weight, beta, normed, total, rows, columns, epsilon,
    ADD: tl.constexpr, SHIFT: tl.constexpr, BETA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """normed = rms_norm(x [+ residual]) * (weight + SHIFT) [+ beta], total = x + residual; all contiguous
    [rows, columns]."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * columns
        scale = _scale(x, residual, start, columns, epsilon, ADD, BLOCK)
        for block in range(0, columns, BLOCK):
            column = block + tl.arange(0, BLOCK)
            inside = column < columns
            value = _summed(x, residual, start + column, inside, ADD)
            factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + SHIFT
            result = value * scale * factor
            if BETA:
                result += tl.load(beta + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(normed + start + column, result.to(normed.dtype.element_ty), mask=inside)
            if ADD:
                tl.store(total + start + column, value.to(total.dtype.element_ty), mask=inside)


@triton.jit
def norm_quant_kernel(
    x, residual, weight, smooth, beta, values, scales, total, rows, columns, epsilon,
    ADD: tl.constexpr, SMOOTH: tl.constexpr, BETA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values, scales = quantized (rms_norm(x [+ residual]) * weight + beta) * smooth, total = x + residual."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * columns
        scale = _scale(x, residual, start, columns, epsilon, ADD, BLOCK)
        largest = tl.zeros((BLOCK,), tl.float32)
        for block in range(0, columns, BLOCK):
            column = block + tl.arange(0, BLOCK)
            inside = column < columns
            value = _summed(x, residual, start + column, inside, ADD)
            if ADD:
                tl.store(total + start + column, value.to(total.dtype.element_ty), mask=inside)
            value = _affine(value * scale, weight, smooth, beta, column, inside, SMOOTH, BETA)
            largest = tl.maximum(largest, tl.abs(value))
        step = tl.max(largest, axis=0) / INT8
        tl.store(scales + row, step)
        for block in range(0, columns, BLOCK):
            column = block + tl.arange(0, BLOCK)
            inside = column < columns
            value = _summed(x, residual, start + column, inside, ADD)
            value = _affine(value * scale, weight, smooth, beta, column, inside, SMOOTH, BETA)
            tl.store(values + start + column, _quantized(value, step), mask=inside)


@triton.jit
def _affine(value, weight, smooth, beta, column, inside, SMOOTH: tl.constexpr, BETA: tl.constexpr):
    """(value * weight + beta) * smooth in a block of columns."""
    value *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if BETA:
        value += tl.load(beta + column, mask=inside, other=0.0).to(tl.float32)
    if SMOOTH:
        value *= tl.load(smooth + column, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def gate_kernel(gate, up, result, rows, columns, gate_stride, up_stride, BLOCK: tl.constexpr):
    """result = silu(gate) * up; rows of `columns` elements, `gate_stride` and `up_stride` apart."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        wide = tl.cast(row, tl.int64)
        for block in range(0, columns, BLOCK):
            column = block + tl.arange(0, BLOCK)
            inside = column < columns
            left = tl.load(gate + wide * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
            right = tl.load(up + wide * up_stride + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(result + wide * columns + column, _gated(left, right, 0).to(result.dtype.element_ty), mask=inside)


@triton.jit
def gate_quant_kernel(
    x, smooth, values, scales, rows, columns,
    ACTIVATION: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values, scales = quantized activation(first half) * second half * smooth; x [rows, 2 columns], contiguous."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * columns
        largest = tl.zeros((BLOCK,), tl.float32)
        for block in range(0, columns, BLOCK):
            column = block + tl.arange(0, BLOCK)
            value = _smoothed_gate(x + 2 * start, smooth, column, columns, ACTIVATION, SMOOTH)
            largest = tl.maximum(largest, tl.abs(value))
        step = tl.max(largest, axis=0) / INT8
        tl.store(scales + row, step)
        for block in range(0, columns, BLOCK):
            column = block + tl.arange(0, BLOCK)
            value = _smoothed_gate(x + 2 * start, smooth, column, columns, ACTIVATION, SMOOTH)
            tl.store(values + start + column, _quantized(value, step), mask=column < columns)


@triton.jit
def _smoothed_gate(row, smooth, column, columns, ACTIVATION: tl.constexpr, SMOOTH: tl.constexpr):
    inside = column < columns
    left = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(row + columns + column, mask=inside, other=0.0).to(tl.float32)
    value = _gated(left, right, ACTIVATION)
    if SMOOTH:
        value *= tl.load(smooth + column, mask=inside, other=0.0).to(tl.float32)
    return value


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See norms.rms_norm_reference."""
    return _norm(x, None, weight, None, epsilon, shift=0.0)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See norms.add_rms_norm_reference."""
    return _norm(x, residual, weight, None, epsilon, shift=0.0)


def add_rms_norm_bias(
    x: Tensor, residual: Tensor, weight: Tensor, beta: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """See norm_bias.add_rms_norm_bias_reference."""
    return _norm(x, residual, weight, beta, epsilon, shift=0.0)


def gemma_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See norms.gemma_rms_norm_reference."""
    return _norm(x, None, weight, None, epsilon, shift=1.0)[0]


def gemma_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See norms.gemma_add_rms_norm_reference."""
    return _norm(x, residual, weight, None, epsilon, shift=1.0)


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, beta: Tensor | None, epsilon: float, *, shift: float
) -> tuple[Tensor, Tensor]:
    """(norm, x + residual); without a residual the second is the first."""
    x, weight = x.contiguous(), weight.contiguous()
    normed = torch.empty_like(x)
    total = normed if residual is None else torch.empty_like(x)
    shape = _rows_and_columns(x)
    _launch(
        norm_kernel, shape, x, _given(residual, x), weight, _given(beta, weight), normed, total, *shape, epsilon,
        ADD=residual is not None, SHIFT=shift, BETA=beta is not None,
    )  # fmt: skip
    return normed, total


def rms_norm_dynamic_quant(
    x: Tensor, weight: Tensor, smooth: Tensor | None, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """See norm_quant.rms_norm_dynamic_quant_reference."""
    return _norm_quant(x, None, weight, smooth, beta, epsilon)[:2]


def add_rms_norm_dynamic_quant(
    x: Tensor, residual: Tensor, weight: Tensor, smooth: Tensor | None, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See norm_quant.add_rms_norm_dynamic_quant_reference."""
    return _norm_quant(x, residual, weight, smooth, beta, epsilon)


def _norm_quant(
    x: Tensor, residual: Tensor | None, weight: Tensor, smooth: Tensor | None, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(int8 values, scales, x + residual); without a residual the third is x."""
    x, weight = x.contiguous(), weight.contiguous()
    values, scales, total = _int8(x), _scales(x), x if residual is None else torch.empty_like(x)
    shape = _rows_and_columns(x)
    _launch(
        norm_quant_kernel, shape, x, _given(residual, x), weight, _given(smooth, weight), _given(beta, weight),
        values, scales, total, *shape, epsilon,
        ADD=residual is not None, SMOOTH=smooth is not None, BETA=beta is not None,
    )  # fmt: skip
    return values, scales, total


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See swiglu.silu_mul_reference."""
    result = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _gate(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]), result)
    return result


def swiglu(x: Tensor) -> Tensor:
    """See swiglu.swiglu_reference."""
    columns = x.shape[-1] // 2
    result = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    halves = x.reshape(-1, 2 * columns).split(columns, dim=-1)
    _gate(halves[0], halves[1], result)
    return result


def _gate(gate: Tensor, up: Tensor, result: Tensor) -> None:
    gate, up = (part if part.stride(1) == 1 else part.contiguous() for part in (gate, up))
    _launch(gate_kernel, _rows_and_columns(gate), gate, up, result, *gate.shape, gate.stride(0), up.stride(0))


def swiglu_dynamic_quant(x: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """See swiglu_quant.swiglu_dynamic_quant_reference."""
    return _gate_quant(x, "silu", smooth)


def geglu_dynamic_quant(x: Tensor, approximate: str, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """See geglu_quant.geglu_dynamic_quant_reference."""
    return _gate_quant(x, approximate, smooth)


def _gate_quant(x: Tensor, activation: str, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    half = x[..., : x.shape[-1] // 2]
    values, scales = _int8(half), _scales(x)
    shape = _rows_and_columns(half)
    _launch(
        gate_quant_kernel, shape, x, _given(smooth, x), values, scales, *shape,
        ACTIVATION=ACTIVATIONS.index(activation), SMOOTH=smooth is not None,
    )  # fmt: skip
    return values, scales


def _launch(kernel: Any, shape: tuple[int, int], *args: object, **constants: object) -> None:
    """Runs `kernel` over `shape` rows and columns, of which there may be none."""
    rows, columns = shape
    if rows and columns:
        block = min(triton.next_power_of_2(columns), LARGEST_BLOCK)
        kernel[(min(rows, PROGRAMS),)](*args, **constants, BLOCK=block)


def _rows_and_columns(x: Tensor) -> tuple[int, int]:
    columns = x.shape[-1]
    return (x.numel() // columns if columns else 0), columns


def _given(optional: Tensor | None, instead: Tensor) -> Tensor:
    """A pointer for an argument that the kernel then does not read."""
    return instead if optional is None else optional.contiguous()


def _int8(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


def _scales(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
