"""Drops multiplications and divisions by one.

Before::

    a = aten.cos.default(x)
    b = aten.mul.Tensor(a, 1.0)      # Llama's attention_scaling; a residual or logits scale that is not set

After::

    a = aten.cos.default(x)

Exact in every dtype: x * 1.0 is x, infinity and -0.0 included. Adding zero is not such a case (-0.0 + 0.0 is 0.0).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, known
from npu_compiler.graph.effects import storage, tensors
from npu_compiler.passes.pattern import Any, Call, Exactly, Match
from npu_compiler.passes.rewrite import Build, NearMiss, Rule

NAME = "scale_by_one"


def _legal(match: Match) -> Fact:
    root = match.root
    returned = {storage(tensor) for node in root.graph.output_node().all_input_nodes for tensor in tensors(node)}
    return known(storage(root.meta["val"]) not in returned, f"the caller gets {root.name} as a tensor of its own")


def _unscaled(build: Build, match: Match) -> fx.Node:
    return match.node("x")


def _multiplied(x: Tensor) -> Tensor:
    return (x.cos() * 1.0).sin()


def _by_another(x: Tensor) -> Tensor:
    return (x.cos() * 1.5).sin()


def _by_a_tensor(x: Tensor) -> Tensor:
    return (x.cos() * torch.ones_like(x)).sin()


def _widened(x: Tensor) -> Tensor:
    return ((x > 0) * 1.0).sin()


def _input(x: Tensor) -> Tensor:
    return x * 1.0


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    return (torch.randn(3, 5, dtype=dtype),)


RULES = (
    Rule(
        "scale_by_one",
        pattern=Call("aten.mul.Tensor|aten.div.Tensor", Any("x"), Exactly(1)),
        replacement=_unscaled,
        legal=_legal,
        reference=_multiplied,
        example=_example,
        after=("aten.cos.default", "aten.sin.default"),
        near_misses=(
            NearMiss(_by_another),
            NearMiss(_by_a_tensor),
            NearMiss(_widened, reason="dtypes"),
            NearMiss(_input, reason="as a tensor of its own"),
        ),
    ),
)
