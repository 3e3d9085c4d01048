"""Turns GELUs that a model writes out into one operator each.

Before::

    half = aten.mul.Tensor(x, 0.5)
    cube = aten.pow.Tensor_Scalar(x, 3.0)
    bent = aten.mul.Tensor(cube, 0.044715)
    inner = aten.add.Tensor(x, bent)
    scaled = aten.mul.Tensor(inner, 0.7978845608028654)
    angle = aten.tanh.default(scaled)
    shifted = aten.add.Tensor(angle, 1.0)
    y = aten.mul.Tensor(half, shifted)

After::

    y = aten.gelu.default(x, approximate="tanh")

That is "gelu_new" of GPT-2, ALBERT and Phi; "gelu_fast" and Bloom's factor the polynomial otherwise.
`x * sigmoid(1.702 * x)`, "quick_gelu" of CLIP, becomes `npu_fused.fast_gelu`. The form by erf is left alone when
written out: torch_npu computes aten.gelu by tanh, whatever is asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, known
from npu_compiler.fusion_kernels.gelu import STEEPNESS
from npu_compiler.fusion_kernels.norms import CANN_DTYPES
from npu_compiler.passes.pattern import Any, Call, Exactly, Match, Number, OneOf
from npu_compiler.passes.rewrite import Build, NearMiss, Rule

NAME = "gelu"
CONSTANTS = {"half": 0.5, "scale": math.sqrt(2 / math.pi), "cubic": 0.044715, "one": 1.0}
CLOSE = 1e-6
"""Models write the constants with seven digits or more."""

_times = functools.partial(Call, "aten.mul.Tensor", commutes=True)
_plus = functools.partial(Call, "aten.add.Tensor", commutes=True)
X = Any("x")
INNER = OneOf(
    (
        _times(_plus(X, _times(Call("aten.pow.Tensor_Scalar", X, Exactly(3)), Number("cubic"))), Number("scale")),
        _times(_times(X, Number("scale")), _plus(_times(_times(X, Number("cubic")), X), Number("one"))),
    )
)
SHIFTED = _plus(Call("aten.tanh.default", INNER), Number("one"))


def _legal(constants: Mapping[str, float], match: Match) -> Fact:
    dtype = match.tensor("x").dtype
    verdict = known(dtype in CANN_DTYPES, f"{dtype} is not one of {CANN_DTYPES}")
    for name, value in constants.items():
        found = match.bindings[name]
        assert isinstance(found, (int, float))
        verdict = verdict & known(math.isclose(found, value, rel_tol=CLOSE), f"{found} is not {value:.7g}")
    return verdict


def _tanh(build: Build, match: Match) -> fx.Node:
    return build(torch.ops.aten.gelu.default, match.bindings["x"], approximate="tanh")


def _program(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(CONSTANTS["scale"] * (x + 0.044715 * torch.pow(x, 3.0))))


def _other_polynomial(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(CONSTANTS["scale"] * (x + 0.0447 * torch.pow(x, 3.0))))


def _square(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(CONSTANTS["scale"] * (x + 0.044715 * torch.pow(x, 2.0))))


def _tanh_kept(x: Tensor) -> tuple[Tensor, Tensor]:
    angle = torch.tanh(CONSTANTS["scale"] * (x + 0.044715 * torch.pow(x, 3.0)))
    return 0.5 * x * (1.0 + angle), angle


def _fast_program(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _steeper(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.8 * x)


def _sigmoid_kept(x: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(1.702 * x)
    return x * gate, gate


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    return (3 * torch.randn(3, 5, 64, dtype=dtype),)


def _double_example(dtype: torch.dtype) -> tuple[object, ...]:
    return _example(torch.float64)


RULES = (
    Rule(
        "tanh_gelu",
        pattern=OneOf((_times(_times(X, Number("half")), SHIFTED), _times(_times(X, SHIFTED), Number("half")))),
        replacement=_tanh,
        legal=functools.partial(_legal, CONSTANTS),
        reference=_program,
        example=_example,
        after=("aten.gelu.default",),
        near_misses=(
            NearMiss(_other_polynomial, reason="0.0447 is not 0.044715"),
            NearMiss(_square, reason="the rule wants"),
            NearMiss(_tanh_kept, reason="is also used by output"),
            NearMiss(_program, _double_example, "torch.float64 is not one of"),
        ),
    ),
    Rule(
        "fast_gelu",
        pattern=_times(X, Call("aten.sigmoid.default", _times(X, Number("steepness")))),
        operator="fast_gelu",
        operands=lambda match: (match.bindings["x"],),
        legal=functools.partial(_legal, {"steepness": STEEPNESS}),
        reference=_fast_program,
        example=_example,
        near_misses=(
            NearMiss(_steeper, reason="1.8 is not 1.702"),
            NearMiss(_sigmoid_kept, reason="is also used by output"),
            NearMiss(_fast_program, _double_example, "torch.float64 is not one of"),
        ),
    ),
)
