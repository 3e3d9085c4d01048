"""Passes that are functions: each reason for which one may leave a program alone is the reason of a near miss."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_compiler.passes import constant_folding, qk_norm_rope
from npu_compiler.passes.record import Pass
from tests.passes.conditions import conditions
from tests.passes.lowered import apply, lowered

Program = Callable[..., object]
NearMiss = tuple[Program, tuple[Any, ...], str]


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotated(x: Tensor, cos: Tensor | float, sin: Tensor) -> Tensor:
    return x * cos + turned(x) * sin


def pair(q: Tensor, cos: Tensor, sin: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return rotated(q, cos, sin), rotated(k, cos, sin)


def chain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotated(rotated(x, cos, sin), cos, sin)


def halves_joined_along_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=1)


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def neighbouring_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[:, ::2], x[:, 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).view(x.shape)


def kept(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    other = turned(x)
    return x * cos + other * sin, other


def heads_of_two_sizes(table: Tensor, positions: Tensor, q: Tensor, k: Tensor) -> list[Tensor]:
    cos, sin = (part.unsqueeze(-2) for part in table.index_select(0, positions).chunk(2, dim=-1))
    out = []
    for x in (q, k):
        first, second = x[..., :8].chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        out.append(torch.cat((turned, x[..., 8:]), dim=-1))
    return out


X, TABLE = ones(5, 4, 16), ones(5, 1, 16)
ROTATIONS: tuple[NearMiss, ...] = (
    (rotated, (X, TABLE, TABLE + 1), "no second tensor is rotated by the same cos and sin"),
    (chain, (X, TABLE, TABLE + 1), "no independent tensor is rotated by the same cos and sin"),
    (
        pair,
        (ones(2, 5, 4, 16), ones(1, 5, 1, 16), ones(1, 5, 1, 16), ones(1, 5, 4, 16)),
        "tokens of the pair, dimension 0: 2 is not 1",
    ),
    (
        heads_of_two_sizes,
        (ones(32, 8), torch.arange(5), ones(5, 4, 16), ones(5, 4, 32)),
        "head sizes of the pair: 16 is not 32",
    ),
    (lambda x, sin: rotated(x, 2.0, sin), (X, TABLE), "a number takes the place of cos, sin or the operand"),
    (
        lambda x, cos, sin: neighbours(x, cos, sin).flatten(-2),
        (X, ones(5, 1, 8), ones(5, 1, 8)),
        "neighbours are rotated by cos and sin that are not rows of a table",
    ),
    (
        lambda x, cos, sin: neighbours(x, cos, sin).flatten(1),
        (X, ones(5, 1, 8), ones(5, 1, 8)),
        "shape of the result: 2 and 3 dimensions",
    ),
    (neighbouring_heads, (X, TABLE, TABLE + 1), "neighbours are not taken along the head"),
    (rotated, (ones(5, 16), ones(5, 16), ones(5, 16)), "the rotated tensor has 2 dimensions"),
    (rotated, (X, ones(16), ones(16)), "cos and sin have another number of dimensions"),
    (halves_joined_along_heads, (X, ones(5, 1, 8), ones(5, 1, 8)), "halves are joined along dimension 1"),
    (
        rotated,
        (X, TABLE.double(), TABLE.double()),
        "dtypes torch.float32, torch.float64, torch.float64 are mixed",
    ),
    (rotated, (X, TABLE, ones(5, 1, 1)), "shapes of cos and sin, dimension 2: 16 is not 1"),
    (rotated, (X, ones(5, 4, 16), ones(5, 4, 16)), "cos along the heads"),
    (rotated, (X, ones(5, 1, 1), ones(5, 1, 1)), "cos along the head size: 1 is not 16"),
    (rotated, (X, ones(1, 1, 16), ones(1, 1, 16)), "cos along the tokens: 1 is not 5"),
    (kept, (X, TABLE, TABLE + 1), "is also used by output"),
    (
        pair,
        (ones(4, 5, 16).transpose(0, 1), TABLE, TABLE + 1, ones(4, 5, 16).transpose(0, 1)),
        "the rest of the program relies on the old one",
    ),
)
CONSTANTS: tuple[NearMiss, ...] = (
    (lambda x: (x + torch.arange(4.0).exp(), torch.arange(4.0).exp()), (X[..., :4],), ", and may write it"),
    (lambda x: x * torch.arange(4.0).sort(descending=True)[0], (X[..., :4],), "has several results"),
    (lambda x: x * torch.arange(3).sum(), (X.npu(),), "is in host memory, which a captured graph does not read"),
    (lambda x: x + torch.ones(4, 1 << 20) * 2, (ones(4, 1),), "would keep 16777216 bytes, allowed are 1048576"),
)
PASSES: tuple[tuple[ModuleType, tuple[NearMiss, ...]], ...] = (
    (qk_norm_rope, ROTATIONS),
    (constant_folding, CONSTANTS),
)


def reasons(module: ModuleType, program: Program, args: tuple[Any, ...]) -> list[str]:
    """Why the pass did not fire."""
    record = apply(Pass(module.NAME, "", module.run), lowered(program, *args).graph)
    return [entry.reason for entry in record.refused]


@pytest.mark.parametrize(
    ("module", "program", "args", "reason"),
    [pytest.param(module, *miss, id=miss[-1]) for module, misses in PASSES for miss in misses],
)
def test_near_miss(module: ModuleType, program: Program, args: tuple[Any, ...], reason: str) -> None:
    graph = lowered(program, *args).graph
    record = apply(Pass(module.NAME, "", module.run), graph)
    assert not record.fired or module is constant_folding, str(record)
    assert any(reason in entry.reason for entry in record.refused), str(record)


@pytest.mark.parametrize(("module", "misses"), PASSES, ids=lambda value: getattr(value, "NAME", ""))
def test_every_condition_has_a_near_miss(module: ModuleType, misses: tuple[NearMiss, ...]) -> None:
    given = [reason for program, args, _ in misses for reason in reasons(module, program, args)]
    asked = [condition for condition in conditions(module.run) if condition.where.startswith(f"{module.__name__}:")]
    assert len(asked) >= len(misses) // 2, "the conditions were not found"
    open_ = [condition for condition in asked if not any(map(condition.explains, given))]
    assert not open_, "\n".join(f"no near miss is refused for {item.text} ({item.where})" for item in open_)
