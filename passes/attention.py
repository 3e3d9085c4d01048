"""Joins attention that is written out in matrix products.

Before, as transformers' `attn_implementation="eager"` has it::

    keys = aten.clone.default(aten.expand.default(aten.unsqueeze.default(key, 2), [2, 2, 4, 7, 16]), ...)
    product = aten.matmul.default(query, aten.transpose.int(view(keys), 2, 3))
    scores = aten.add.Tensor(aten.mul.Tensor(product, 0.25), mask)
    shares = aten._softmax.default(scores, -1, False)
    heads = aten.matmul.default(shares, view(values))

After::

    shifts = aten.clone.default(aten.expand.default(mask, [-1, 8, -1, -1]), ...)
    heads = npu_fused.attention.default(query, key, value, shifts, 0.25, "BNSD")

Under `inference_mode` softmax is `aten.softmax.int`; products may be `bmm` too, between reshapes. Copies that were made
for the products are passed by: of transposed heads, and of key heads that several query heads share. CANN wants the
mask for each head; the copy is the same in all layers, so one is left (common.py). Scores were rounded to the dtype of
the query at every step, and no longer are. Where -inf hides all keys of a row, that row was NaN, and is now what the
kernel leaves there.

Where heads come transposed and go back transposed, as in a prompt without a cache, the second rule has the kernel read
and write them as they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any as Anything

import torch
from torch import Tensor, fx

from npu_compiler.facts.sizes import Fact, Size, at_least, equal, known, same_shape
from npu_compiler.fusion_kernels.attention import (
    HEADS_FIRST,
    MOST_HEADS,
    ROWS_FIRST,
    WIDEST_HEAD,
    attention_reference,
)
from npu_compiler.passes.pattern import VIEWS, Any, Call, Cast, Exactly, Match, Number, OneOf, Viewed
from npu_compiler.passes.record import Saving
from npu_compiler.passes.rewrite import DTYPES, Build, NearMiss, Rule

NAME = "attention"
COPY = "aten.clone.default"
PRODUCT = OneOf(
    (
        Call("aten.matmul.default", Any("query"), Any("keys")),
        Viewed(Call("aten.bmm.default", Any("query"), Any("keys"))),
    )
)
SCALED = OneOf(
    (
        Call("aten.mul.Tensor", PRODUCT, Number("scale")),
        Call("aten.div.Tensor", PRODUCT, Number("divisor")),
        PRODUCT,
    )
)
SHIFTED = OneOf((Call("aten.add.Tensor", SCALED, Any("mask"), commutes=True), SCALED))
SHARES = Cast(
    OneOf(
        (
            Call("aten._softmax.default", Cast(SHIFTED), Any("axis"), Exactly(False), name="shares"),
            Call("aten.softmax.int", Cast(SHIFTED), Any("axis"), Any("dtype"), name="shares"),
        )
    )
)


def _copied_from(node: fx.Node) -> Iterator[fx.Node]:
    """The node and what it is a reshaped copy of, step by step: the same elements in the same order."""
    yield node
    while str(node.target) in (*VIEWS, COPY):
        node = node.args[0]  # type: ignore[assignment]
        yield node


def _origin(node: fx.Node, shape: Sequence[Size]) -> fx.Node | None:
    """The first tensor of this shape that `node` is a reshaped copy of, and whose rows lie in one piece."""
    found = None
    for source in _copied_from(node):
        tensor = source.meta["val"]
        if tensor.stride(-1) == 1 and same_shape(tensor.shape, shape, "shape"):
            found = source
    return found


def _each_once(node: fx.Node | None, shape: Sequence[Size]) -> fx.Node | None:
    """Keys or values [B, Nk, Skv, D], of which `node`, [B, N, Skv, D], has each head once or several times."""
    if node is None:
        return None
    *_, repeated = _copied_from(node)
    once = repeated.args[0] if str(repeated.target) == "aten.expand.default" else None
    if not isinstance(once, fx.Node) or str(once.target) != "aten.unsqueeze.default" or once.args[1] not in (2, -3):
        return _origin(node, shape)
    heads = once.args[0]
    assert isinstance(heads, fx.Node)
    batch, _, *rest = shape
    large, small = repeated.meta["val"].shape, heads.meta["val"].shape
    fits = (
        len(small) == 4
        and same_shape(small, (batch, small[1], *rest), "shape")  # else requests, keys or columns are repeated too
        and same_shape(large, (batch, small[1], large[2], *rest), "shape")
    )
    return _origin(heads, small) if fits else _origin(node, shape)


def _transposed(node: fx.Node) -> fx.Node | None:
    """What `node` is a reshaped copy of, with its last two dimensions exchanged."""
    *_, source = _copied_from(node)
    axes = {int(axis) % source.meta["val"].dim() for axis in source.args[1:]} if _is_transpose(source) else set()
    last = source.meta["val"].dim() - 1
    return source.args[0] if axes == {last - 1, last} else None  # type: ignore[return-value]


def _is_transpose(node: fx.Node) -> bool:
    return str(node.target) == "aten.transpose.int" and not node.kwargs


def _operands(match: Match) -> tuple[fx.Node | None, fx.Node | None, fx.Node | None]:
    """Query, key and value of the kernel, where there are such tensors."""
    batch, heads, rows, keys = match.tensor("shares").shape
    width = match.tensor("query").shape[-1]
    query = _origin(match.node("query"), (batch, heads, rows, width))
    turned, values, shape = _transposed(match.node("keys")), match.node("values"), (batch, heads, keys, width)
    key, value = _each_once(turned, shape), _each_once(values, shape)
    if turned and key and value and not equal(key.meta["val"].shape[1], value.meta["val"].shape[1], "heads"):
        return query, _origin(turned, shape), _origin(values, shape)  # CANN wants as many heads of both
    return query, key, value


def _legal(match: Match) -> Fact:
    shares = match.tensor("shares")
    if shares.dim() != 4:
        return known(False, f"scores have {shares.dim()} dimensions, not batch, heads, rows and keys")
    query, key, value = _operands(match)
    width = match.tensor("query").shape[-1]
    verdict = (
        known(match.bindings["axis"] in (-1, 3), "the softmax is not over the keys")
        & known(key is not None, "the keys are no transposed [batch, heads, keys, width], rows in one piece")
        & known(query is not None, "the queries are no [batch, heads, rows, width], rows in one piece")
        & known(value is not None, "the values are no [batch, heads, keys, width], rows in one piece")
        & same_shape(match.root.meta["val"].shape, (*shares.shape[:3], width), "heads of the result")
    )
    if not verdict:
        return verdict
    dtype = match.tensor("query").dtype
    return (
        known(dtype in DTYPES, f"{dtype} is not a dtype of the kernel")
        & known(shares.dtype in (dtype, torch.float32), f"the softmax is in {shares.dtype}")
        & known(match.bindings.get("divisor") != 0, "scores are divided by zero")
        & _mask_fits(match)
        & at_least(WIDEST_HEAD, width, "width of a head")
        & at_least(MOST_HEADS, shares.shape[1], "number of heads")
    )


def _mask_fits(match: Match) -> Fact:
    if "mask" not in match.bindings:
        return known(True, "there is no mask")
    if not match.is_tensor("mask"):
        return known(False, "the mask is no tensor")
    mask, shares = match.tensor("mask"), match.tensor("shares")
    if not 2 <= mask.dim() <= 4:
        return known(False, f"the mask has {mask.dim()} dimensions")
    return (
        known(mask.dtype == match.tensor("query").dtype, f"the mask's dtype {mask.dtype} is not that of the query")
        & equal(mask.shape[-1], shares.shape[3], "the mask's columns")
        & known(_mask_sizes(match) is not None, "the mask's sizes by batch and head are not numbers")
    )


def _mask_sizes(match: Match) -> list[int] | None:
    """What the mask is expanded to, -1 for a size it has; None where that is not known. CANN takes [B, N, Sq, Skv],
    [B, N, 1, Skv] and [1, N, Sq, Skv]."""
    mask, (batch, heads, _, _) = match.tensor("mask"), match.tensor("shares").shape
    if not isinstance(heads, int):
        return None
    own = mask.shape[0] if mask.dim() == 4 else 1
    if not equal(own, 1, "batch") or not equal(mask.shape[-2], 1, "rows"):
        return [-1 if mask.dim() == 4 else 1, heads, -1, -1]
    return [batch, heads, -1, -1] if isinstance(batch, int) else None


def _scale(match: Match) -> float:
    if "divisor" in match.bindings:
        return 1.0 / float(match.bindings["divisor"])  # type: ignore[arg-type]
    return float(match.bindings.get("scale", 1.0))  # type: ignore[arg-type]


def _mask_by_head(build: Build, match: Match) -> fx.Node | None:
    if "mask" not in match.bindings:
        return None
    mask, sizes = match.node("mask"), _mask_sizes(match)
    tensor = match.tensor("mask")
    assert sizes is not None, "_legal asked"
    if sizes[0] == -1 and equal(tensor.shape[1], sizes[1], "heads") and tensor.stride(-1) == 1:
        return mask
    expanded = build(torch.ops.aten.expand.default, mask, sizes)
    return build(torch.ops.aten.clone.default, expanded, memory_format=torch.contiguous_format)


def _replacement(build: Build, match: Match) -> fx.Node:
    mask = _mask_by_head(build, match)
    return build(torch.ops.npu_fused.attention.default, *_operands(match), mask, _scale(match), HEADS_FIRST)


def _saving(match: Match, made: Sequence[fx.Node]) -> Saving:
    """Counts the copies that are passed by, where nothing else uses them."""
    gone = list(match.nodes)
    for name, operand in zip(("query", "keys", "values"), _operands(match), strict=True):
        node = match.node(name)
        while node is not operand and len(node.users) == 1:
            gone.append(node)
            node = node.args[0]  # type: ignore[assignment]
    return Saving.between(gone, made)


def _transposed_heads(name: str) -> Call:
    return Call("aten.transpose.int", Any(name), Exactly(1), Exactly(2))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """torch.matmul of four dimensions, as it reaches the passes."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


def _repeated(heads: Tensor, times: int) -> Tensor:
    """transformers' repeat_kv."""
    batch, number, rows, width = heads.shape
    return heads[:, :, None].expand(batch, number, times, rows, width).reshape(batch, number * times, rows, width)


def _program(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    key, value = (_repeated(item, query.shape[1] // item.shape[1]) for item in (key, value))
    scores = _product(query, key.transpose(2, 3)) * 0.25 + mask
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return _product(shares, value)


def _plain(query: Tensor, key: Tensor, value: Tensor, **softmax: Anything) -> Tensor:
    shares = torch.softmax(_product(query, key.transpose(2, 3)) / 4.0, **{"dim": -1, **softmax})
    return _product(shares.to(query.dtype), value)


def _over_rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _plain(query, key, value, dim=2)


def _in_float64(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _plain(query, key, value, dtype=torch.float64)


def _shares_kept(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    shares = torch.softmax(_product(query, key.transpose(2, 3)), dim=-1)
    return _product(shares, value), shares


def _keys_by_column(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _product(torch.softmax(_product(query, key), dim=-1), value)


def _values_by_column(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _plain(query, key, value.transpose(2, 3))


def _queries_by_column(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _plain(query.transpose(2, 3), key, value)


def _three_dimensions(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    shares = torch.softmax(torch.bmm(query, key.transpose(1, 2)), dim=-1)
    return torch.bmm(shares, value).view(2, -1, query.shape[1], value.shape[2])


def _other_result(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, rows, width = query.shape
    shares = torch.softmax(_product(query, key.transpose(2, 3)), dim=-1)
    return torch.bmm(shares.flatten(0, 1), value.flatten(0, 1)).view(batch, heads * rows, width)


def _shifted_by_number(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _product(torch.softmax(_product(query, key.transpose(2, 3)) + 1.0, dim=-1), value)


def _turned_and_copied(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    query, key, value = (item.transpose(1, 2) for item in (query, key, value))
    heads = torch.ops.npu_fused.attention(query, key, value, mask, 0.25, HEADS_FIRST)
    return heads.transpose(1, 2).contiguous()


def _rows_first(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return attention_reference(query, key, value, mask, 0.25, ROWS_FIRST)


def _key_in_its_cache(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    heads = torch.ops.npu_fused.attention(query.transpose(1, 2), key, value, mask, 0.25, HEADS_FIRST)
    return heads.transpose(1, 2).contiguous()


def _also_heads_first(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    query, key, value = (item.transpose(1, 2) for item in (query, key, value))
    heads = torch.ops.npu_fused.attention(query, key, value, mask, 0.25, HEADS_FIRST)
    return heads.transpose(1, 2).contiguous(), heads


def _divided_by_zero(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _product(torch.softmax(_product(query, key.transpose(2, 3)) / 0.0, dim=-1), value)


def _shape(*shapes: Sequence[int]) -> Callable[[torch.dtype], tuple[object, ...]]:
    return lambda dtype: tuple(torch.randn(shape).to(dtype) for shape in shapes)


def _wide_mask(dtype: torch.dtype) -> tuple[object, ...]:
    *heads, mask = _shape(*_HEADS, (2, 1, 1, 7))(torch.bfloat16)
    return *heads, mask.float()  # type: ignore[attr-defined]


def _float64(dtype: torch.dtype) -> tuple[object, ...]:
    return _example_without_mask(torch.float64)


_HEADS = (2, 4, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16)
_example = _shape((2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 16), (2, 1, 5, 7))
_example_without_mask = _shape(*_HEADS)
_example_rows_first = _shape((2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16), (2, 4, 5, 7))
_example_of_cache = _shape((2, 5, 4, 16), (2, 2, 7, 16), (2, 2, 7, 16), (2, 4, 5, 7))

RULES = (
    Rule(
        "attention",
        pattern=OneOf(
            (
                Call("aten.matmul.default", SHARES, Any("values")),
                Call("|".join(VIEWS), Call("aten.bmm.default", Viewed(SHARES), Any("values")), Any("shape")),
            )
        ),
        replacement=_replacement,
        legal=_legal,
        cost=_saving,
        reference=_program,
        example=_example,
        after=("aten.expand.default", "aten.clone.default", "npu_fused.attention.default"),
        near_misses=(
            NearMiss(_over_rows, _example_without_mask, "the softmax is not over the keys"),
            NearMiss(_in_float64, _example_without_mask, "the softmax is in torch.float64"),
            NearMiss(_shares_kept, _example_without_mask, "is also used by output"),
            NearMiss(_plain, _float64, "torch.float64 is not a dtype of the kernel"),
            NearMiss(_plain, _shape((1, 2, 3, 800), (1, 2, 4, 800), (1, 2, 4, 800)), "width of a head"),
            NearMiss(_plain, _shape((1, 300, 1, 8), (1, 300, 2, 8), (1, 300, 2, 8)), "number of heads"),
            NearMiss(_plain, _shape((2, 4, 5, 16), (2, 4, 7, 16), (2, 4, 7, 8)), "the values are no"),
            NearMiss(_values_by_column, _shape(*_HEADS[:2], (2, 4, 16, 7)), "the values are no"),
            NearMiss(_queries_by_column, _shape((2, 4, 16, 5), *_HEADS[1:]), "the queries are no"),
            NearMiss(_keys_by_column, _shape(_HEADS[0], (2, 4, 16, 7), _HEADS[2]), "the keys are no transposed"),
            NearMiss(_three_dimensions, _shape((8, 5, 16), (8, 7, 16), (8, 7, 16)), "scores have 3 dimensions"),
            NearMiss(_other_result, _example_without_mask, "heads of the result"),
            NearMiss(_divided_by_zero, _example_without_mask, "scores are divided by zero"),
            NearMiss(_shifted_by_number, _example_without_mask, "the mask is no tensor"),
            NearMiss(_program, _wide_mask, "the mask's dtype torch.float32 is not that of the query"),
            NearMiss(_program, _shape(*_HEADS, (7,)), "the mask has 1 dimensions"),
            NearMiss(_program, _shape(*_HEADS, (2, 1, 5, 1)), "the mask's columns"),
            NearMiss(_program, reason="the mask's sizes by batch and head are not numbers", dynamic=True),
        ),
    ),
    Rule(
        "attention_rows_first",
        pattern=Call(
            COPY,
            Call(
                "aten.transpose.int",
                Call(
                    "npu_fused.attention.default",
                    *(_transposed_heads(name) for name in ("query", "key", "value")),
                    Any("mask"),
                    Any("scale"),
                    Exactly(HEADS_FIRST),
                ),
                Exactly(1),
                Exactly(2),
            ),
            Any("format"),
        ),
        operator="attention",
        operands=lambda match: (
            *(match.bindings[name] for name in ("query", "key", "value", "mask", "scale")),
            ROWS_FIRST,
        ),
        reference=_turned_and_copied,
        oracle=_rows_first,
        example=_example_rows_first,
        near_misses=(
            NearMiss(_key_in_its_cache, _example_of_cache, "the rule wants aten.transpose.int"),
            NearMiss(_also_heads_first, reason="is also used by output"),
        ),
    ),
)
