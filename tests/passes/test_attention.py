"""attention: the ways models write it, and what stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import repeat_kv

from npu_compiler.passes import attention, common, dead_code, noop
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered

PASSES = (
    Pass(noop.NAME, "", noop.run),
    Pass(attention.NAME, "", rules=attention.RULES),
    Pass(common.NAME, "", common.run),
    Pass(dead_code.NAME, "", dead_code.run),
)
FUSED, EXPANDED, COPIED = "npu_fused.attention.default", "aten.expand.default", "aten.clone.default"
MASKS = {
    "of a request": (2, 1, 1, 7),
    "of a request and row": (2, 1, 5, 7),
    "of all requests, by row": (1, 1, 5, 7),
    "of all requests and rows": (1, 1, 1, 7),
    "two dimensions": (5, 7),
    "one row of two dimensions": (1, 7),
    "by head, as ALiBi adds it": (4, 1, 7),
}


def after(function: object, *args: Tensor, inference: bool = False) -> list[str]:
    """The operators behind attention and the passes around it; the values are compared."""
    with torch.inference_mode(inference):
        program = lowered(function, *args)  # type: ignore[arg-type]
    for entry in PASSES:
        apply(entry, program.graph)
    wanted = function(*(item.double() for item in args))  # type: ignore[operator]
    torch.testing.assert_close(program.graph(*args)[0].double(), wanted, atol=1e-5, rtol=1e-5)
    return calls(program.graph)


def operands(*mask: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Key, query, mask and value."""
    return torch.randn(2, 4, 7, 16), torch.randn(2, 4, 5, 16), torch.randn(mask), torch.randn(2, 4, 7, 16)


def attended(key: Tensor, query: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """Arguments in the order of their use, which is that of a lowered program."""
    return torch.softmax(query @ key.mT * 0.25 + mask, dim=-1) @ value


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_masks(shape: tuple[int, ...], inference: bool) -> None:
    assert after(attended, *operands(*shape), inference=inference) == [EXPANDED, COPIED, FUSED]


def test_mask_of_each_head_is_taken_as_it_is() -> None:
    assert after(attended, *operands(2, 4, 5, 7)) == [FUSED]


def test_no_mask_and_no_scale() -> None:
    key, query, _, value = operands()
    assert after(lambda *args: torch.softmax(args[1] @ args[0].mT, -1) @ args[2], key, query, value) == [FUSED]


def test_mask_in_front_and_scale_by_division() -> None:
    def function(key: Tensor, query: Tensor, mask: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2) / 4
        return torch.softmax(mask + scores, dim=3) @ value

    assert after(function, *operands(2, 1, 1, 7)) == [EXPANDED, COPIED, FUSED]


def test_layers_share_one_copy_of_the_mask() -> None:
    def function(key: Tensor, query: Tensor, mask: Tensor, value: Tensor) -> Tensor:
        return attended(key, attended(key, query, mask, value), mask, value)

    assert after(function, *operands(2, 1, 1, 7)) == [EXPANDED, COPIED, FUSED, FUSED]


def test_key_heads_are_read_where_they_lie() -> None:
    """transformers repeats them."""

    def function(key: Tensor, query: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ repeat_kv(key, 2).mT, dim=-1) @ repeat_kv(value, 2)

    key, query, _, value = operands()
    assert after(function, key[:, :2], query, value[:, :2]) == [FUSED]


@pytest.mark.parametrize("mask", [False, True])
def test_projections_are_read_and_written_by_row(mask: bool) -> None:
    """Without a cache no copy of heads is left."""

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (item.view(2, 7, 4, 16).transpose(1, 2) for item in (query, key, value))
        scores = query @ key.mT
        shares = torch.softmax(scores + torch.zeros(1, 1, 1, 7) if mask else scores, dim=-1)
        return (shares @ value).transpose(1, 2).reshape(2, 7, 64)

    found = after(function, *(torch.randn(2, 7, 64) for _ in range(3)))
    assert found.count(FUSED) == 1
    assert found.count(COPIED) == mask
    assert "aten.transpose.int" not in found, found


def test_scores_that_something_else_is_done_to_stay() -> None:
    """Gemma 2's soft cap, for which CANN has no operator."""

    def function(key: Tensor, query: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(torch.tanh(query @ key.mT / 50) * 50, dim=-1) @ value

    key, query, _, value = operands()
    assert FUSED not in after(function, key, query, value)


def test_products_that_broadcast_stay() -> None:
    key, query, _, value = operands()
    assert FUSED not in after(lambda *args: torch.softmax(args[1] @ args[0].mT, -1) @ args[2], key[:1], query, value)


@pytest.mark.parametrize(
    "shape",
    [(1, 2, 7, 16), (1, 4, 7, 16), (2, 2, 1, 16), (2, 2, 7, 1)],
    ids=["request and heads", "request", "heads and keys", "heads and columns"],
)
def test_what_is_repeated_beside_heads_is_copied(shape: tuple[int, ...]) -> None:
    """One prompt's keys and values for all requests, say: the kernel takes as many of them as of queries."""

    def repeated(heads: Tensor) -> Tensor:
        return heads[:, :, None].expand(2, shape[1], 4 // shape[1], 7, 16).reshape(2, 4, 7, 16)

    def function(key: Tensor, query: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ repeated(key).mT, dim=-1) @ repeated(value)

    key, value = torch.randn(shape), torch.randn(shape)
    found = after(function, key, operands()[1], value)
    assert (found.count(EXPANDED), found.count(FUSED)) == (2, 1)


@pytest.mark.parametrize("numbers", [(2, 4), (4, 2), (1, 2)])
def test_keys_and_values_of_other_numbers_of_heads_are_copied(numbers: tuple[int, int]) -> None:
    """The kernel takes as many heads of one as of the other."""

    def function(key: Tensor, query: Tensor, value: Tensor) -> Tensor:
        shares = torch.softmax(query @ repeat_kv(key, 4 // numbers[0]).mT, dim=-1)
        return shares @ repeat_kv(value, 4 // numbers[1])

    key, query, _, value = operands()
    found = after(function, key[:, : numbers[0]], query, value[:, : numbers[1]])
    assert found.count(FUSED) == 1
    assert found.count(EXPANDED) == sum(number < 4 for number in numbers)
