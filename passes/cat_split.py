"""Takes tensors out that are joined only to be taken apart again, or taken apart only to be joined.

Before::

    low, high = aten.split.Tensor(x, 32, 1)
    whole = aten.cat.default([low, high], 1)
    y = aten.mm.default(whole, weight)

After::

    y = aten.mm.default(x, weight)

In any dimension, and by any borders that are proven equal: all parts of a tensor joined in order; a join of joins; a
slice or a part of a split that lies within one of the joined tensors. What takes the place of a slice need not have its
strides where nobody sees them (rewrite.same_layouts). Parts of a split are views, which cost nothing as they are.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, Size, at_least, equal, known
from npu_compiler.graph.effects import storage, tensors, value
from npu_compiler.passes.pattern import SPLITS, Among, Any, Call, Match, Result
from npu_compiler.passes.record import Saving
from npu_compiler.passes.rewrite import Build, NearMiss, Rule

NAME = "cat_split"
CAT = "aten.cat.default"
SLICE = "aten.slice.Tensor"
GETITEM = str(operator.getitem)

Piece: TypeAlias = "tuple[fx.Node, Size, Size]"
"""A tensor, and where a part of it begins and ends."""


def _dimension(node: fx.Node, position: int) -> int:
    """The dimension that a cat, split or slice works on, counted from the front."""
    given = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    assert isinstance(given, int)
    tensor = next(tensors(node))
    return given % tensor.dim() if tensor.dim() else 0


def _piece(node: fx.Node, dimension: int) -> Piece | None:
    """What `node` is a part of along `dimension`; None if it is not known to be one."""
    if node.target is operator.getitem:
        split, index = node.args
        if not isinstance(split, fx.Node) or str(split.target) not in SPLITS or _dimension(split, 2) != dimension:
            return None
        sizes = [part.shape[dimension] for part in tensors(split)]
        assert isinstance(index, int)
        start: Size = sum(sizes[:index])
        return split.args[0], start, start + sizes[index]  # type: ignore[return-value]
    if str(node.target) != SLICE or _dimension(node, 1) != dimension or len(node.args) > 4:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    start = value(node.args[2]) if len(node.args) > 2 else 0  # type: ignore[assignment]
    start = start or 0
    if isinstance(start, int) and start < 0:
        start = start + source.meta["val"].shape[dimension]
    return source, start, start + node.meta["val"].shape[dimension]


def _parts(match: Match) -> list[fx.Node]:
    found = match.bindings["parts"]
    assert isinstance(found, Sequence)
    return list(found)


def _unreturned(node: fx.Node) -> Fact:
    """Whether the caller does not get a tensor: it would share memory with another one."""
    returned = {storage(tensor) for item in node.graph.output_node().all_input_nodes for tensor in tensors(item)}
    return known(storage(node.meta["val"]) not in returned, f"the caller gets {node.name} as a tensor of its own")


def _legal_parts(match: Match) -> Fact:
    dimension = _dimension(match.root, 1)
    pieces = [_piece(part, dimension) for part in _parts(match)]
    if any(piece is None or piece[0] is not pieces[0][0] for piece in pieces):  # type: ignore[index]
        return known(False, "not all that is joined is part of one tensor")
    found = [piece for piece in pieces if piece is not None]
    verdict = _unreturned(match.root)
    for left, right in itertools.pairwise(found):
        verdict = verdict & equal(left[2], right[1], "the end of a part and the begin of the next")
    return verdict


def _whole(build: Build, match: Match) -> fx.Node:
    dimension = _dimension(match.root, 1)
    pieces = [piece for piece in (_piece(part, dimension) for part in _parts(match)) if piece is not None]
    source, start, end = pieces[0][0], pieces[0][1], pieces[-1][2]
    return _cut(build, source, dimension, start, end)


def _cut(build: Build, source: fx.Node, dimension: int, start: Size, end: Size) -> fx.Node:
    """A part of a tensor, or the tensor where the part is all of it."""
    size = source.meta["val"].shape[dimension]
    if equal(start, 0, "start") and equal(end, size, "end"):
        return source
    return build(torch.ops.aten.slice.Tensor, source, dimension, start, end)


def _legal_joins(match: Match) -> Fact:
    inner = _inner_joins(match)
    return known(bool(inner), "nothing that is joined is a join in the same dimension that is read only here")


def _inner_joins(match: Match) -> list[fx.Node]:
    dimension = _dimension(match.root, 1)
    joins = [part for part in _parts(match) if str(part.target) == CAT and _dimension(part, 1) == dimension]
    return [join for join in joins if list(join.users) == [match.root]]


def _flat(build: Build, match: Match) -> fx.Node:
    inner = _inner_joins(match)
    parts: list[fx.Node] = []
    for part in _parts(match):
        parts += part.args[0] if part in inner else [part]  # type: ignore[arg-type,operator]
    return build(torch.ops.aten.cat.default, parts, _dimension(match.root, 1))


def _flat_saves(match: Match, made: Sequence[fx.Node]) -> Saving:
    return Saving.between((*_inner_joins(match), match.root), made)


def _within(match: Match) -> tuple[Fact, fx.Node | None, Size, Size]:
    """Which joined tensor a slice, or part of a split, lies in, and where there."""
    join = match.node("join")
    dimension = _dimension(join, 1)
    piece = _piece(match.root, dimension)
    if piece is None or piece[0] is not join:
        return known(False, "the cut is in another dimension than the join"), None, 0, 0
    if any(part.meta["val"].dim() != join.meta["val"].dim() for part in join.args[0]):  # type: ignore[union-attr]
        return known(False, "a tensor without elements is joined, of one dimension"), None, 0, 0
    begin: Size = 0
    for part in join.args[0]:  # type: ignore[union-attr]
        assert isinstance(part, fx.Node)
        end = begin + part.meta["val"].shape[dimension]
        if bool(at_least(piece[1], begin, "begin") & at_least(end, piece[2], "end")):
            return _unreturned(match.root), part, piece[1] - begin, piece[2] - begin
        begin = end
    return known(False, f"the cut from {piece[1]} to {piece[2]} lies in no single part"), None, 0, 0


def _legal_within(match: Match) -> Fact:
    return _within(match)[0]


def _part(build: Build, match: Match) -> fx.Node:
    _, part, start, end = _within(match)
    assert part is not None, "_legal_within has found it"
    return _cut(build, part, _dimension(match.node("join"), 1), start, end)


def _part_saves(match: Match, made: Sequence[fx.Node]) -> Saving:
    """Nothing by itself; the join goes with the last that reads it."""
    join = match.node("join")
    readers = {user for node in (join, *match.nodes) for user in node.users if node is not match.root}
    return Saving.between(() if readers - set(match.nodes) else (join,), made)


def _split_and_joined(x: Tensor, weight: Tensor) -> Tensor:
    low, middle, high = torch.split(x, [8, 16, 40], dim=-1)
    return torch.cat((low, middle, high), dim=-1) @ weight


def _joined_in_another_order(x: Tensor, weight: Tensor) -> Tensor:
    low, middle, high = torch.split(x, [8, 16, 40], dim=-1)
    return torch.cat((middle, low, high), dim=-1) @ weight


def _joined_in_another_dimension(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat(torch.split(x, 32, dim=-1), dim=0).view(-1, 64) @ weight


def _joined_and_returned(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat(torch.split(x @ weight, 32, dim=-1), dim=-1)


def _joined_with_another(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((x[:, :32], weight[:6, 32:]), dim=-1) @ weight


def _joins_joined(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((torch.cat((x, weight), dim=0), x), dim=0)


def _joins_in_two_dimensions(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((torch.cat((x, x), dim=1), torch.cat((weight, weight), dim=1)), dim=0)


def _join_read_twice(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    inner = torch.cat((x, weight), dim=0)
    return torch.cat((inner, x), dim=0), inner.sin()


def _sliced_join(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((x, x.sin()), dim=1)[:, 64:128] @ weight


def _sliced_over_a_border(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((x, x.sin()), dim=1)[:, 48:80] @ weight[:32]


def _sliced_across(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((x, x.sin()), dim=1)[2:4] @ weight.repeat(2, 1)


def _sliced_and_seen(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((x, x.sin()), dim=1)[:, 64:].t() @ x @ weight


def _sliced_and_returned(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((x, weight.sin()), dim=0)[6:]


def _sliced_and_widened(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((x, weight.double()), dim=0)[:6].sin()


def _joined_with_nothing(x: Tensor, weight: Tensor) -> Tensor:
    """A tensor of one dimension without elements joins with everything."""
    return torch.cat((x.new_empty(0), x, x.sin()), dim=1)[:, 64:].cos()


def _split_across(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((x, x.sin()), dim=1).split([2, 4], dim=0)[1].cos()


def _split_and_returned(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((x, weight.sin()), dim=0).split([6, 64], dim=0)[1]


def _split_join(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((x, x.sin()), dim=1).split([64, 64], dim=1)[1] @ weight


def _split_join_over_a_border(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((x, x.sin()), dim=1).split([32, 64, 32], dim=1)[1] @ weight


def _split_product(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight).split(32, dim=1)[1] @ weight[:32]


def _example(dtype: torch.dtype) -> tuple[object, ...]:
    return torch.randn(6, 64, dtype=dtype), torch.randn(64, 64, dtype=dtype)


RULES = (
    Rule(
        "cat_of_parts",
        pattern=Call(CAT, Among(f"{GETITEM}|{SLICE}", "parts"), Any("dim")),
        replacement=_whole,
        legal=_legal_parts,
        reference=_split_and_joined,
        example=_example,
        after=("aten.mm.default",),
        near_misses=(
            NearMiss(_joined_in_another_order, reason="the end of a part and the begin of the next"),
            NearMiss(_joined_in_another_dimension, reason="not all that is joined is part of one tensor"),
            NearMiss(_joined_and_returned, reason="the caller gets cat as a tensor of its own"),
            NearMiss(_joined_with_another, reason="not all that is joined is part of one tensor"),
        ),
    ),
    Rule(
        "cat_of_cats",
        pattern=Call(CAT, Among(CAT, "parts"), Any("dim")),
        replacement=_flat,
        legal=_legal_joins,
        cost=_flat_saves,
        reference=_joins_joined,
        example=_example,
        after=("aten.cat.default",),
        near_misses=(
            NearMiss(_joins_in_two_dimensions, reason="is a join in the same dimension"),
            NearMiss(_join_read_twice, reason="is a join in the same dimension that is read only here"),
        ),
    ),
    Rule(
        "slice_of_cat",
        pattern=Call(SLICE, Result(CAT, "join"), Any("dim"), Any("start"), Any("end")),
        replacement=_part,
        legal=_legal_within,
        cost=_part_saves,
        reference=_sliced_join,
        example=_example,
        after=("aten.sin.default", "aten.mm.default"),
        near_misses=(
            NearMiss(_sliced_over_a_border, reason="the cut from 48 to 80 lies in no single part"),
            NearMiss(_sliced_across, reason="the cut is in another dimension than the join"),
            NearMiss(_sliced_and_returned, reason="as a tensor of its own"),
            NearMiss(_sliced_and_widened, reason="result slice_1: dtypes torch.float64 and torch.float32"),
            NearMiss(_joined_with_nothing, reason="a tensor without elements is joined"),
            NearMiss(_sliced_and_seen, reason="the rest of the program relies on the old one"),
        ),
    ),
    Rule(
        "part_of_cat",
        pattern=Call(GETITEM, Call("|".join(SPLITS), Result(CAT, "join"), Any("sizes"), Any("dim")), Any("index")),
        replacement=_part,
        legal=_legal_within,
        cost=_part_saves,
        reference=_split_join,
        example=_example,
        after=("aten.sin.default", "aten.mm.default"),
        near_misses=(
            NearMiss(_split_join_over_a_border, reason="the cut from 32 to 96 lies in no single part"),
            NearMiss(_split_across, reason="the cut is in another dimension than the join"),
            NearMiss(_split_and_returned, reason="as a tensor of its own"),
            NearMiss(_split_product),
        ),
    ),
)  # fmt: skip
