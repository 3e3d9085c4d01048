"""Joins the rotary embedding of a layer's queries and keys, and their RMS norms where the model has them (Qwen3).

Before, for q and likewise for k (Hugging Face's form; the norm is as in add_rms_norm)::

    normed = ...rms norm of x [B, T, N, D]...
    q = aten.transpose.int(normed, 1, 2)
    first, second = the halves of q along D
    rotated = aten.cat.default([aten.neg.default(second), first], -1)
    out = aten.add.Tensor(aten.mul.Tensor(q, cos), aten.mul.Tensor(rotated, sin))

After::

    q_out, k_out = npu_fused.qk_norm_rope(x_q, x_k, q_weight, k_weight, 1e-06, 1e-06, cos', sin')
    out = aten.transpose.int(q_out, 1, 2)

vLLM's form, cat(first * cos - second * sin, second * cos + first * sin) with half-width cos, is found too, and so is
its rotation of neighbours (x[::2] and x[1::2] for the halves, stack for cat; GLM-4) and of a part of the head. There
cos and sin are rows of a table; another operator gathers them itself and reads q and k as parts of the projection::

    q_out, k_out = npu_fused.qk_rope_cached(q, k, positions, table, interleaved)

Norms then stay calls of their own, unless the head is within the limits of qkv_attention.py, which takes it all.
The fused operators work in the layout the projection leaves behind (tokens before heads), hence the transposes. That
goes for a part of a head too (GPT-NeoX, Phi), which is then joined with the rest as before. A rotation that the program
widens from bfloat16 to float32 (ModernBERT) is one of bfloat16, which the fused operator computes in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from npu_compiler.facts.sizes import Fact, Size, at_least, contiguous, equal, known, same_shape
from npu_compiler.fusion_kernels import register
from npu_compiler.graph.build import call
from npu_compiler.passes import qkv_attention
from npu_compiler.passes.matching import find
from npu_compiler.passes.norm_patterns import legal_norm, rms_norm
from npu_compiler.passes.pattern import (
    CASTS,
    VIEWS,
    Any,
    Call,
    Exactly,
    Half,
    Match,
    OneOf,
    Pattern,
    Viewed,
    root_targets,
)
from npu_compiler.passes.record import PassRecord
from npu_compiler.passes.rewrite import erase_unused, insertion_point, private, same_layouts, unpack

NAME = "qk_norm_rope"

_NORM = rms_norm(Any("x"), Any("x"))


def _rotations(operand: Pattern, again: Pattern) -> tuple[Pattern, ...]:
    """The ways the rotation is written. `operand` binds what is rotated, `again` meets it at the later uses."""
    turned = Call("aten.cat.default", [Call("aten.neg.default", Half(again, 1)), Half(again, 0)], Any("axis"))
    hugging_face = Call(
        "aten.add.Tensor",
        Call("aten.mul.Tensor", operand, Any("cos"), commutes=True),
        Call("aten.mul.Tensor", turned, Any("sin"), commutes=True),
        commutes=True,
    )
    halves = Call("aten.cat.default", _pair(Half(operand, 0), Half(again, 0), Half(again, 1)), Any("axis"))
    even, even_again, odd = (
        Call("aten.slice.Tensor", source, Any("along"), Exactly(start), Any("end"), Exactly(2))
        for source, start in ((operand, 0), (again, 0), (again, 1))
    )
    stacked = Call("aten.stack.default", _pair(even, even_again, odd), Any("axis"), name="stack")
    neighbours = Call("|".join(VIEWS), stacked, Any("shape"))
    return hugging_face, halves, neighbours


def _pair(first: Pattern, first_again: Pattern, second: Pattern) -> list[Pattern]:
    """first * cos - second * sin and second * cos + first * sin."""
    cos, sin = Any("half_cos"), Any("half_sin")
    return [
        Call(
            "aten.sub.Tensor",
            Call("aten.mul.Tensor", first, cos, commutes=True),
            Call("aten.mul.Tensor", second, sin, commutes=True),
        ),
        Call(
            "aten.add.Tensor",
            Call("aten.mul.Tensor", second, cos, commutes=True),
            Call("aten.mul.Tensor", first_again, sin, commutes=True),
            commutes=True,
        ),
    ]


ROTATION = OneOf(_rotations(Any("operand"), Any("operand")))
TRANSPOSED = Call("aten.transpose.int", Any("straight"), Any("axis_a"), Any("axis_b"))
NORMED = Viewed(_NORM)
_ROWS = Call("aten.index_select.default", Any("table"), Exactly(0), Any("positions"))
TABLES = tuple(Call("aten.unsqueeze.default", Half(_ROWS, half), Any("at")) for half in (0, 1))
"""vLLM's cos and sin: the halves of a table's rows, with a dimension for the heads."""
_REST = Call("aten.slice.Tensor", Any("whole"), Any("along"), Any("start"), Any("end"), Exactly(1), name="rest")
WHOLE = Call("aten.cat.default", [Any("rotated"), _REST], Any("axis"))
"""A rotated first part of a head with the rest of it."""


@dataclass(frozen=True)
class Rotated:
    """One rotated tensor of the program.

    Attributes:
        root: the call that yields it. `nodes`: all calls that fusion would replace.
        source: what the fused operator reads, [..., tokens, heads, D] (but see `turned`).
        weight, epsilon: of the norm before the rotation; None without one.
        cos, sin: the tables as the program has them. `half`: they are [..., D / 2].
        transposed: the program has heads before tokens.
        turned: `source` has too, though not in memory: it is no plain transposition, but a part of one (GPT-NeoX, Phi).
        cached: positions and table that cos and sin come from, where one operator takes them all.
        interleaved: neighbours are rotated, not halves.
    """

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    source: fx.Node
    weight: fx.Node | None
    epsilon: float | None
    cos: fx.Node
    sin: fx.Node
    half: bool
    transposed: bool = False
    turned: bool = False
    cached: tuple[fx.Node, fx.Node] | None = None
    interleaved: bool = False

    @property
    def inputs(self) -> list[fx.Node]:
        """What the fused operator reads."""
        if self.cached is not None:
            return [self.source, *self.cached]
        return [item for item in (self.source, self.weight, self.cos, self.sin) if item is not None]

    @property
    def shape(self) -> list[Size]:
        """[..., tokens, heads, D]."""
        sizes = list(self.source.meta["val"].shape)
        return [sizes[0], sizes[2], sizes[1], sizes[3]] if self.turned else sizes

    @property
    def family(self) -> tuple[object, ...]:
        """Two tensors of one family can be rotated by one call."""
        if self.cached is not None:
            return *self.cached, self.interleaved
        return self.cos, self.sin, self.half, self.transposed, self.weight is None


def run(module: fx.GraphModule, record: PassRecord) -> None:
    register()
    waiting: dict[tuple[object, ...], Rotated] = {}
    for rotated in list(_rotated(module.graph, record)):
        partner = waiting.pop(rotated.family, None)
        if partner is None:
            waiting[rotated.family] = rotated
        elif _first_use(partner, rotated) is None:  # rotated is computed from its predecessor
            record.refuse(NAME, partner.root, "no independent tensor is rotated by the same cos and sin")
            waiting[rotated.family] = rotated
        else:
            _fuse(module.graph, partner, rotated, record)
    for rotated in waiting.values():
        record.refuse(NAME, rotated.root, "no second tensor is rotated by the same cos and sin")


def _rotated(graph: fx.Graph, record: PassRecord) -> Iterator[Rotated]:
    targets = root_targets(ROTATION)
    for root in graph.nodes:
        if str(root.target) not in targets:
            continue
        match, _ = find(ROTATION, root)
        if match is None:
            continue
        rotated, verdict = _describe(match)
        if rotated is None:
            record.refuse(NAME, root, verdict.text)
        else:
            yield rotated


def _describe(match: Match) -> tuple[Rotated | None, Fact]:
    """What the match rotates, seen through a transpose and a norm, if fusion is legal for it alone."""
    half = "half_cos" in match.bindings
    names = ("half_cos", "half_sin") if half else ("cos", "sin")
    if not all(isinstance(match.bindings[name], fx.Node) for name in (*names, "operand")):
        return None, known(False, "a number takes the place of cos, sin or the operand")
    cos, sin = match.node(names[0]), match.node(names[1])
    operand = match.node("operand")
    nodes, root = list(match.nodes), match.root
    narrow = _in_bfloat16(match.root, operand, cos, sin)
    if narrow is not None:
        nodes += [operand, narrow.root]
        root, operand, cos, sin = narrow.root, narrow.operand, narrow.cos, narrow.sin
    source, transposed = operand, False
    turn, _ = find(TRANSPOSED, operand)
    if turn is not None and _swaps_tokens_and_heads(turn, operand):
        source, transposed = turn.node("straight"), True
        nodes.append(operand)
    turned = source is operand and _tokens_first_in_memory(operand, cos)
    transposed = transposed or turned
    verdict = _legal_tables(operand.meta["val"], cos.meta["val"], sin.meta["val"], half, transposed, match)
    if not verdict:
        return None, verdict
    cached = _cached(cos, sin) if half and operand.meta["val"].dim() == 3 else None
    norm = None if turned else _norm_before(source, nodes, root)
    one_kernel = norm is not None and "stack" not in match.bindings and bool(qkv_attention.takes(source.meta["val"]))
    if cached is not None and not one_kernel:
        return _described_cached(match, operand, cached)
    if "stack" in match.bindings:
        return None, known(False, "neighbours are rotated by cos and sin that are not rows of a table")
    verdict = private(nodes, [root])
    if not verdict:
        return None, verdict
    weight, epsilon = None, None
    if norm is not None:
        nodes += norm.nodes
        source, weight = norm.node("x"), norm.node("weight")
        epsilon = float(norm.bindings["epsilon"])  # type: ignore[arg-type]
    return (
        Rotated(root, tuple(sorted(set(nodes))), source, weight, epsilon, cos, sin, half, transposed, turned),
        verdict,
    )


@dataclass(frozen=True)
class Narrow:
    """A rotation in float32 of a bfloat16 tensor, by bfloat16 cosines and sines; its result becomes bfloat16 again."""

    root: fx.Node
    operand: fx.Node
    cos: fx.Node
    sin: fx.Node


def _in_bfloat16(root: fx.Node, operand: fx.Node, cos: fx.Node, sin: fx.Node) -> Narrow | None:
    """The rotation as one of bfloat16, if it is one that is widened (ModernBERT). The fused operator computes that in
    float32 and rounds once, as the program does; float16 it computes as it is."""
    users = list(root.users)
    if len(users) != 1 or _narrowed(operand) is operand or str(users[0].target) not in CASTS:
        return None
    found = Narrow(users[0], *map(_narrowed, (operand, cos, sin)))
    tensors = (item.meta["val"] for item in (found.root, found.operand, found.cos, found.sin))
    return found if all(tensor.dtype == torch.bfloat16 for tensor in tensors) else None


def _narrowed(node: fx.Node) -> fx.Node:
    """What a node widens to float32, or the node."""
    source = node.args[0] if str(node.target) in CASTS else None
    return source if isinstance(source, fx.Node) and node.meta["val"].dtype == torch.float32 else node


def _described_cached(match: Match, operand: fx.Node, cached: tuple[fx.Node, fx.Node]) -> tuple[Rotated | None, Fact]:
    """As `_describe`, for rows of a table: also where only the first part of the head is rotated."""
    root, source, nodes = match.root, operand, list(match.nodes)
    whole = _with_rest(match.root, operand)
    if whole is not None:
        root, source = whole.root, whole.node("whole")
        nodes += [operand, *whole.nodes]
    verdict = private(nodes, [root])
    if not verdict:
        return None, verdict
    cos, sin = match.node("half_cos"), match.node("half_sin")
    interleaved = "stack" in match.bindings
    rotated = Rotated(
        root, tuple(sorted(set(nodes))), source, None, None, cos, sin, True, cached=cached, interleaved=interleaved
    )
    return rotated, verdict


def _cached(cos: fx.Node, sin: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Positions and table that cos and sin are gathered from, if they are its two halves."""
    found = [find(pattern, node)[0] for pattern, node in zip(TABLES, (cos, sin), strict=True)]
    if found[0] is None or found[1] is None:
        return None
    places = [(match.node("positions"), match.node("table")) for match in found if match is not None]
    positions, table = places[0]
    plain = table.meta["val"].dim() == 2 and positions.meta["val"].dim() == 1
    same = places[0] == places[1]
    return places[0] if plain and same and contiguous(table.meta["val"], "the table") else None


def _with_rest(root: fx.Node, operand: fx.Node) -> Match | None:
    """The call that joins what is rotated, the first part of a head, with the rest of that head; None without one."""
    if len(root.users) != 1 or str(operand.target) != "aten.slice.Tensor":
        return None
    (user,) = root.users
    match, _ = find(WHOLE, user)
    if match is None or match.bindings["rotated"] is not root or match.bindings["whole"] is not operand.args[0]:
        return None
    width, rest, whole = (item.shape[-1] for item in map(match.tensor, ("rotated", "rest", "whole")))
    along = [operand.args[1], match.bindings["along"], match.bindings["axis"]]
    last = all(axis in (-1, root.meta["val"].dim() - 1) for axis in along)
    starts = operand.args[2] == 0 and bool(equal(match.bindings["start"], width, "start of the rest"))  # type: ignore[arg-type]
    return match if last and starts and equal(width + rest, whole, "parts of the head") else None


def _norm_before(source: fx.Node, nodes: list[fx.Node], root: fx.Node) -> Match | None:
    """The norm whose result is `source`, if fusion may take it over."""
    norm, _ = find(NORMED, source)
    if norm is None or not _legal_norm(norm, source) or not private([*nodes, *norm.nodes], [root]):
        return None
    # CANN's norms take a weight of the input's dtype; gemma_rms_norm.py knows where a wider one comes from
    return norm if norm.tensor("weight").dtype == norm.tensor("x").dtype else None


def _swaps_tokens_and_heads(turn: Match, operand: fx.Node) -> bool:
    rank = operand.meta["val"].dim()
    axes = {int(turn.bindings[name]) % rank for name in ("axis_a", "axis_b")}  # type: ignore[call-overload]
    return rank == 4 and axes == {1, 2}


def _tokens_first_in_memory(operand: fx.Node, cos: fx.Node) -> bool:
    """Whether [batch, heads, tokens, D], as cos tells, lies in memory with tokens before heads."""
    x, table = operand.meta["val"], cos.meta["val"]
    if x.dim() != 4 or table.dim() != 4 or not equal(table.shape[1], 1, "cos along the heads"):
        return False
    return not equal(x.shape[1], 1, "heads") and bool(at_least(x.stride(2), x.stride(1) + 1, "stride of the tokens"))


def _legal_tables(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: bool, transposed: bool, match: Match
) -> Fact:
    """Whether cos and sin run along tokens and head size only, in the dtype of x."""
    axis = match.bindings["axis"]
    last = x.dim() if "stack" in match.bindings else x.dim() - 1
    verdict = (
        known(x.dim() in (3, 4), f"the rotated tensor has {x.dim()} dimensions")
        & known(cos.dim() == x.dim() == sin.dim(), "cos and sin have another number of dimensions")
        & known(axis in (-1, last), f"halves are joined along dimension {axis}")
        & known(match.bindings.get("along", -1) in (-1, x.dim() - 1), "neighbours are not taken along the head")
        & same_shape(match.root.meta["val"].shape, x.shape, "shape of the result")
        & known(x.dtype == cos.dtype == sin.dtype, f"dtypes {x.dtype}, {cos.dtype}, {sin.dtype} are mixed")
        & same_shape(cos.shape, sin.shape, "shapes of cos and sin")
    )
    if not verdict:
        return verdict
    tokens, heads = (2, 1) if transposed else (x.dim() - 3, x.dim() - 2)
    return (
        equal(cos.shape[heads], 1, "cos along the heads (else heads come before tokens in memory)")
        & equal(cos.shape[-1] * (2 if half else 1), x.shape[-1], "cos along the head size")
        & equal(cos.shape[tokens], x.shape[tokens], "cos along the tokens")
    )


def _legal_norm(norm: Match, source: fx.Node) -> bool:
    """Whether the norm is over the head size, and reshapes behind it change nothing but the view."""
    if not norm.is_tensor("weight"):
        return False
    x = norm.tensor("x")
    return bool(same_shape(x.shape, source.meta["val"].shape, "shape") & legal_norm(norm, x.shape[-1]))


def _first_use(first: Rotated, second: Rotated) -> fx.Node | None:
    """Where one call for both can stand: everything it reads is known there, and nothing has used its results yet."""
    inputs = [*first.inputs, *second.inputs]
    return insertion_point(inputs, [first.root, second.root], [*first.nodes, *second.nodes])


def _fuse(graph: fx.Graph, first: Rotated, second: Rotated, record: PassRecord) -> None:
    roots = [first.root, second.root]
    nodes = sorted({*first.nodes, *second.nodes})
    shapes = [first.shape, second.shape]
    verdict = same_shape(shapes[0][:-2], shapes[1][:-2], "tokens of the pair") & equal(
        shapes[0][-1], shapes[1][-1], "head sizes of the pair"
    )
    if not verdict:
        record.refuse(NAME, second.root, verdict.text)
        return
    point = _first_use(first, second)
    made: list[fx.Node] = []
    with graph.inserting_before(point):
        name, operands = _operator(graph, first, second, made)
        fused = call(graph, getattr(torch.ops.npu_fused, name).default, operands, replaces=nodes, made_by=NAME)
        made.append(fused)
        outputs = unpack(graph, fused, NAME)
        made += outputs
        if first.transposed:
            swap = torch.ops.aten.transpose.int
            outputs = [call(graph, swap, (out, 1, 2), replaces=[out], made_by=NAME) for out in outputs]
            made += outputs
    layout = same_layouts(roots, outputs)
    if not layout:
        record.refuse(NAME, second.root, layout.text)
        for node in reversed(made):
            graph.erase_node(node)
        return
    record.fire(name, second.root, nodes)
    for root, output in zip(roots, outputs, strict=True):
        root.replace_all_uses_with(output)
    erase_unused(graph, nodes)


def _operator(graph: fx.Graph, first: Rotated, second: Rotated, made: list[fx.Node]) -> tuple[str, tuple[object, ...]]:
    """Name and arguments of the fused operator for the pair; adds to `made` what has to be computed for it."""
    if first.cached is not None:
        return "qk_rope_cached", (first.source, second.source, *first.cached, first.interleaved)
    cos, sin = (_table(graph, table, first, made) for table in (first.cos, first.sin))
    if first.weight is None:
        q, k = (_tokens_first(graph, one, made) for one in (first, second))
        return "qk_rope", (q, k, cos, sin)
    norms = (first.weight, second.weight, first.epsilon, second.epsilon)
    return "qk_norm_rope", (first.source, second.source, *norms, cos, sin)


def _tokens_first(graph: fx.Graph, one: Rotated, made: list[fx.Node]) -> fx.Node:
    """What is rotated, as the fused operator takes it: [..., tokens, heads, D]."""
    if one.turned:
        made.append(call(graph, torch.ops.aten.transpose.int, (one.source, 1, 2), replaces=[one.root], made_by=NAME))
        return made[-1]
    return one.source


def _table(graph: fx.Graph, table: fx.Node, like: Rotated, made: list[fx.Node]) -> fx.Node:
    """cos or sin as the fused operator takes it: [..., tokens, 1, D]."""
    if like.transposed:
        table = call(graph, torch.ops.aten.transpose.int, (table, 1, 2), replaces=[table, like.root], made_by=NAME)
        made.append(table)
    if like.half:
        table = call(graph, torch.ops.aten.cat.default, ([table, table], -1), replaces=[table, like.root], made_by=NAME)
        made.append(table)
    return table
