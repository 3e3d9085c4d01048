"""Shortens the look-up of a rank that holds part of the vocabulary.

vLLM masks the ids of other ranks, and a second range of added ones, which is empty where there are none. Before::

    org = (ids >= 100) & (ids < 200);  added = (ids >= 320) & (ids < 320)
    mine = org | added
    local = mine * (ids - (100 * org + 220 * added))
    y = masked_fill(embedding(weight, local), ~mine[..., None], 0)

After::

    shifted = aten.sub.Tensor(ids, 100)
    local = aten.clamp.default(shifted, 0, 99)
    y = masked_fill(embedding(weight, local), (local != shifted)[..., None], 0)

That is 15 kernels before and 5 after, once a step. An id of another rank reads another row than before; either is
masked.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, at_least, known
from npu_compiler.passes.pattern import Any, Call, Cast, Exactly, Match, Number
from npu_compiler.passes.rewrite import Build, NearMiss, Rule

NAME = "masked_embedding"


def _range(low: str, high: str) -> Call:
    """low <= ids < high."""
    above = Call("aten.ge.Scalar", Any("ids"), Number(low))
    return Call("aten.bitwise_and.Tensor", above, Call("aten.lt.Scalar", Any("ids"), Number(high)), commutes=True)


def _times(factor: str, mask: Call) -> Call:
    return Call("aten.mul.Tensor", mask, Number(factor))


ORIGINAL, ADDED = _range("begin", "end"), _range("added_begin", "added_end")
MINE = Call("aten.bitwise_or.Tensor", ORIGINAL, ADDED, commutes=True)
OFFSET = Call("aten.add.Tensor", _times("shift", ORIGINAL), _times("added_shift", ADDED), commutes=True)
LOCAL = Call("aten.mul.Tensor", MINE, Call("aten.sub.Tensor", Any("ids"), OFFSET), commutes=True)
ROWS = Call("aten.embedding.default", Any("weight"), Cast(LOCAL))
OTHERS = Call("aten.unsqueeze.default", Call("aten.bitwise_not.default", MINE), Exactly(-1))


def _legal(match: Match) -> Fact:
    begin, end, shift, added_begin, added_end = (
        match.bindings[name] for name in ("begin", "end", "shift", "added_begin", "added_end")
    )
    numbers = (begin, end, shift, added_begin, added_end)
    if not all(type(number) is int for number in numbers):
        return known(False, f"the ranges {numbers} are not of integers")
    ids, weight = match.tensor("ids"), match.tensor("weight")
    return (
        known(ids.dtype in (torch.int32, torch.int64), f"ids are {ids.dtype}")
        & known(added_begin >= added_end, "the second range is not empty")  # type: ignore[operator]
        & known(begin == shift, f"ids are shifted by {shift}, the range begins at {begin}")
        & known(begin < end, "the first range is empty")  # type: ignore[operator]
        & at_least(weight.shape[0], end - begin, "rows of the weight")  # type: ignore[operator]
    )


def _replacement(build: Build, match: Match) -> fx.Node:
    aten = torch.ops.aten
    begin, end = match.bindings["begin"], match.bindings["end"]
    assert isinstance(begin, int) and isinstance(end, int)
    ids = match.node("ids")
    shifted = build(aten.sub.Tensor, ids, begin) if begin else ids
    local = build(aten.clamp.default, shifted, 0, end - begin - 1)
    others = build(aten.unsqueeze.default, build(aten.ne.Tensor, local, shifted), -1)
    rows = build(aten.embedding.default, match.bindings["weight"], local)
    return build(aten.masked_fill.Scalar, rows, others, 0)


def _lookup(ids: Tensor, weight: Tensor, begin: float, end: float, added: tuple[float, float], shift: float) -> Tensor:
    """The look-up as vLLM's VocabParallelEmbedding does it, without the sum over ranks."""
    original = (ids >= begin) & (ids < end)
    more = (ids >= added[0]) & (ids < added[1])
    offset = (shift * original) + ((added[0] - (end - begin)) * more)
    mine = original | more
    rows = torch.nn.functional.embedding((mine * (ids - offset)).long(), weight)
    return rows.masked_fill_((~mine).unsqueeze(-1), 0)


def _second_rank(ids: Tensor, weight: Tensor) -> Tensor:
    return _lookup(ids, weight, 100, 200, (320, 320), 100)


def _added_ids(ids: Tensor, weight: Tensor) -> Tensor:
    return _lookup(ids, weight, 100, 180, (320, 324), 100)


def _shifted_otherwise(ids: Tensor, weight: Tensor) -> Tensor:
    return _lookup(ids, weight, 100, 200, (320, 320), 90)


def _more_than_there_are(ids: Tensor, weight: Tensor) -> Tensor:
    return _lookup(ids.clamp(100, 150), weight, 100, 300, (320, 320), 100)


def _of_floats(ids: Tensor, weight: Tensor) -> Tensor:
    return _lookup(ids, weight, 100.0, 200.0, (320.0, 320.0), 100.0)


def _empty(ids: Tensor, weight: Tensor) -> Tensor:
    return _lookup(ids, weight, 100, 100, (320, 320), 100)


def _float_example(dtype: torch.dtype) -> tuple[object, ...]:
    ids, weight = _example(dtype)
    return ids.double(), weight  # type: ignore[attr-defined]


def _mask_kept(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    original = (ids >= 100) & (ids < 200)
    more = (ids >= 320) & (ids < 320)
    mine = original | more
    local = mine * (ids - ((100 * original) + (220 * more)))
    rows = torch.nn.functional.embedding(local, weight)
    return rows.masked_fill((~mine).unsqueeze(-1), 0), local


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    ids = torch.tensor([0, 99, 100, 101, 150, 199, 200, 319, 320, 323, 1000])
    return ids, torch.randn(128, 16, dtype=dtype)


RULES = (
    Rule(
        "masked_embedding",
        pattern=Call("aten.masked_fill.Scalar", ROWS, OTHERS, Exactly(0)),
        replacement=_replacement,
        legal=_legal,
        reference=_second_rank,
        example=_example,
        after=(
            "aten.sub.Tensor", "aten.clamp.default", "aten.ne.Tensor", "aten.unsqueeze.default",
            "aten.embedding.default", "aten.masked_fill.Scalar",
        ),
        near_misses=(
            NearMiss(_added_ids, reason="the second range is not empty"),
            NearMiss(_shifted_otherwise, reason="ids are shifted by 90, the range begins at 100"),
            NearMiss(_more_than_there_are, reason="rows of the weight"),
            NearMiss(_mask_kept, reason="is also used by output"),
            NearMiss(_of_floats, reason="the ranges (100.0, 200.0, 100.0, 320.0, 320.0) are not of integers"),
            NearMiss(_second_rank, _float_example, "ids are torch.float64"),
            NearMiss(_empty, reason="the first range is empty"),
        ),
    ),
)  # fmt: skip
